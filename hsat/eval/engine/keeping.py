"""What an evaluation keeps on the disk: embeddings for the next one, and its own finished batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from hsat.classifiers import FittedKNN, concat_tables
from hsat.distributed import World
from hsat.embedding import Layer
from hsat.eval.engine.cache import EmbeddingCache
from hsat.eval.engine.identity import attack_identity, encoder_identity, loader_identity, table_identity
from hsat.eval.engine.journal import Journal
from hsat.eval.engine.sharing import shared_embed
from hsat.types import EmbeddingFunction, EmbeddingTable, HierarchicalBatch

Bank = Iterable[HierarchicalBatch] | EmbeddingTable | Sequence[EmbeddingTable]


def embedded_bank(
    encoder: EmbeddingFunction,
    bank: Bank,
    cache: EmbeddingCache | None,
    world: World,
    *,
    layer: Layer,
    model: str,
    checkpoint: str,
    **options: Any,
) -> EmbeddingTable:
    """The table of the bank: given, in one piece or several, from the cache, or embedded by all ranks together.

    The cache's is taken where all ranks find it; the first one writes it, after all have looked.
    """
    if isinstance(bank, EmbeddingTable):
        return bank
    if isinstance(bank, Sequence) and any(isinstance(each, EmbeddingTable) for each in bank):
        return concat_tables(cast(Sequence[EmbeddingTable], bank))
    bank = cast(Iterable[HierarchicalBatch], bank)
    key = None if cache is None else cache_key(encoder, bank, layer, checkpoint)
    if cache is None or key is None:
        return shared_embed(encoder, bank, world, layer=layer, encoder_name=model, **options)
    classes = options["class_names"]
    key |= {"classes": None if classes is None else list(classes), "model": model}
    found = cache.find_table(key)
    if all(world.gather(found is not None)) and found is not None:
        return found
    made = shared_embed(encoder, bank, world, layer=layer, encoder_name=model, **options)
    if world.is_main:
        cache.keep_table(key, made)
    return made


def cache_key(encoder: EmbeddingFunction, loader: Any, layer: str, checkpoint: str) -> dict[str, Any] | None:
    """What decides the embeddings of a loader; None where encoder or loader cannot say."""
    of_encoder, of_loader = encoder_identity(encoder, checkpoint), loader_identity(loader)
    if of_encoder is None or of_loader is None:
        return None
    return {"encoder": of_encoder, "loader": of_loader, "layer": layer}


def journal_of(
    state: str | os.PathLike[str] | None,
    encoders: Mapping[str, EmbeddingFunction],
    queries: Any,
    attacks: Mapping[str, Any],
    decisive: Mapping[str, Any],
    *,
    world: World,
    checkpoint: str,
) -> Journal:
    """The journal of this evaluation, which refuses a folder of another one; ranks that are called unlike, too.

    encoders: the one that is measured under the name "", and the surrogates.  decisive: options, and the classifier.
    checkpoint: the name of the measured encoder's weights, where it is no module.
    """
    if state is None and world.size == 1:
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
    world.assert_same(
        {name: value for name, value in settings.items() if name != "queries.files"} | {"state": str(state)}
    )
    journal = Journal(state, settings) if world.is_main else None
    finished = world.gather(() if journal is None else journal.finished)[0]
    return journal or Journal(state, settings, finished=finished)
