"""What an evaluation keeps on the disk: embeddings for the next one, and its own finished batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from hsat.eval.banks.knn import FittedKNN
from hsat.eval.embedding import Layer, embed
from hsat.eval.engine.cache import EmbeddingCache
from hsat.eval.engine.identity import attack_identity, encoder_identity, loader_identity, table_identity
from hsat.eval.engine.journal import Journal
from hsat.types import EmbeddingTable, Encoder, HierarchicalBatch


def embedded_bank(
    encoder: Encoder,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    cache: EmbeddingCache | None,
    *,
    layer: Layer,
    model: str,
    checkpoint: str,
    **options: Any,
) -> EmbeddingTable:
    """The table of the bank: given, from the cache, or embedded."""
    if isinstance(bank, EmbeddingTable):
        return bank

    def made() -> EmbeddingTable:
        return embed(encoder, bank, layer=layer, encoder_name=model, **options)

    key = None if cache is None else cache_key(encoder, bank, layer, checkpoint)
    if cache is None or key is None:
        return made()
    classes = options["class_names"]
    return cache.table({**key, "classes": None if classes is None else list(classes), "model": model}, made)


def cache_key(encoder: Encoder, loader: Any, layer: str, checkpoint: str) -> dict[str, Any] | None:
    """What decides the embeddings of a loader; None where encoder or loader cannot say."""
    of_encoder, of_loader = encoder_identity(encoder, checkpoint), loader_identity(loader)
    if of_encoder is None or of_loader is None:
        return None
    return {"encoder": of_encoder, "loader": of_loader, "layer": layer}


def journal_of(
    state: str | os.PathLike[str] | None,
    encoders: Mapping[str, Encoder],
    queries: Any,
    attacks: Mapping[str, Any],
    decisive: Mapping[str, Any],
    *,
    checkpoint: str,
) -> Journal:
    """The journal of this evaluation, which refuses a folder of another one.

    encoders: the one that is measured under the name "", and the surrogates.  decisive: options, and the classifier.
    checkpoint: the name of the measured encoder's weights, where it is no module.
    """
    if state is None:
        return Journal(None, {})
    knn: FittedKNN = decisive["knn"]
    settings = {name: value for name, value in decisive.items() if name != "knn"}
    settings |= {"temperature": knn.settings.temperature, "index": knn.settings.index}
    settings |= {"bank": table_identity(knn.table)}
    settings |= {f"queries.{what}": value for what, value in (loader_identity(queries) or {}).items()}
    settings |= {f"attack.{name}": attack_identity(attack) for name, attack in attacks.items()}
    for name, encoder in encoders.items():
        known = encoder_identity(encoder, "" if name else checkpoint) or {}
        place = f"surrogate.{name}" if name else "encoder"
        settings |= {f"{place}.{what}": value for what, value in known.items()}
    return Journal(state, settings)
