"""The work of a transfer evaluation: banks, clean queries, and pairs of surrogate and attack, each done once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hsat.classifiers import FittedKNN, KNNClassifier
from hsat.distributed import World
from hsat.embedding import Layer, LoaderInfo, loader_info, show_progress
from hsat.eval.conventions import Compat
from hsat.eval.engine.sharing import shared_embed
from hsat.eval.tally import Tally
from hsat.eval.transfer.crossing import SameQueries, Sink, Source, spill, stream
from hsat.eval.transfer.ledger import Entry, Ledger
from hsat.eval.transfer.lending import Lender
from hsat.eval.whitebox import scores_by_k
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch

Queries = Iterable[HierarchicalBatch]
Banks = Iterable[HierarchicalBatch] | Mapping[str, EmbeddingTable]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How encoders look at images; see `evaluate_transfer`."""

    target: str
    attack_branch: str | None
    compat: Compat | None
    layer: Layer
    seed: int
    device: torch.device | str | None
    class_names: Sequence[str] | None
    progress: bool


class TransferRun:
    """What has to be done, what the ledger has already, and the classifiers that are in memory."""

    def __init__(
        self,
        lender: Lender,
        ledger: Ledger,
        world: World,
        *,
        banks: Banks,
        queries: Queries,
        knn: KNNClassifier,
        ks: Sequence[int],
        reading: Reading,
    ) -> None:
        self._lender, self._ledger, self._world, self._banks, self._reading = lender, ledger, world, banks, reading
        self._names = astuple(loader_info(queries, reading.class_names))[0]
        self._queries = SameQueries(queries, world, ledger.note("queries") or ())
        self._knn, self._ks = knn, ks
        self._fitted: dict[str, FittedKNN] = {}
        self._warned: set[str] = set()

    def clean(self, name: str) -> dict[int, np.ndarray]:
        """A target's class scores of the clean queries, by k; its bank is embedded on the way."""
        described = self._ledger.table("queries") is not None  # asked before any rank can have written it
        if (known := self._ledger.get("clean", name)) and described:
            return known.scores[name]
        table = self._embed_clean(name)
        if not described:
            self._ledger.put_note("queries", self._queries.digests)
            self._put_table("queries", replace(table, z=np.zeros((len(table), 1), dtype=np.float32), encoder=""))
        entry = Entry({name: self._score(name, table)})
        self._ledger.put(entry, "clean", name)
        return entry.scores[name]

    def pair(self, surrogate: str, name: str, attack: Attack, targets: Sequence[str]) -> tuple[Entry, bool]:
        """The targets' class scores of the queries attacked on a surrogate, and whether they were made just now."""
        known = self._ledger.get("attacked", surrogate, name)
        missing = [target for target in targets if known is None or target not in known.scores]
        if known is not None and not missing:
            return known, False
        scores, tally = ({}, Tally()) if known is None else (dict(known.scores), known.tally)
        for target, table, counted in self._cross(surrogate, name, attack, missing):
            scores[target], tally = self._score(target, table), counted
        entry = Entry(scores, tally)
        self._ledger.put(entry, "attacked", surrogate, name)
        return entry, True

    def queries(self) -> EmbeddingTable:
        """Ids and labels of the queries, without embeddings."""
        table = self._ledger.table("queries")
        assert table is not None  # kept with the first clean scores
        return table

    def classifier(self, name: str) -> FittedKNN:
        """A target's classifier as records describe it; its index is built when it has to answer."""
        bank = self._bank(name)
        return FittedKNN(settings=self._knn, table=bank, k=min(self._knn.k, len(bank)))

    def _cross(self, surrogate: str, name: str, attack: Attack, targets: Sequence[str]) -> Any:
        reading = self._reading

        def source(encoder: EmbeddingFunction) -> Source:
            return Source(
                encoder,
                attack,
                show_progress(self._queries, f"{name} on {surrogate}", shown=reading.progress and self._world.is_main),
                target=reading.target,
                branch=_branch_of(encoder, reading),
                seed=reading.seed,
                device=reading.device,
            )

        parts: dict[str, Any] = {"queries": self.queries(), "source": source, "sink": self._sink, "world": self._world}
        if self._lender.hold == "all":
            return stream(self._lender, surrogate, targets, **parts)
        return spill(self._lender, surrogate, targets, folder=self._ledger.scratch, **parts)

    def _sink(self, encoder: EmbeddingFunction) -> Sink:
        return Sink(encoder, self._world, layer=self._reading.layer, device=self._reading.device)

    def _embed_clean(self, name: str) -> EmbeddingTable:
        names, cohort, split = astuple(loader_info(self._queries, self._names))
        with self._lender.lend(name) as encoder:
            self._make_bank(name, encoder)
            sink = self._sink(encoder)
            for number, batch in show_progress(
                self._queries, "embedding", shown=self._reading.progress and self._world.is_main
            ):
                sink.add(number, batch)
        return sink.rows().table(LoaderInfo(class_names=names, cohort=cohort, split=split), encoder=name)

    def _make_bank(self, name: str, encoder: EmbeddingFunction) -> None:
        if isinstance(self._banks, Mapping) or self._ledger.table(f"bank {name}") is not None:
            return
        reading = self._reading
        table = shared_embed(
            encoder,
            self._banks,
            self._world,
            class_names=reading.class_names,
            layer=reading.layer,
            device=reading.device,
            encoder_name=name,
            progress=reading.progress,
        )
        self._put_table(f"bank {name}", table)

    def _put_table(self, name: str, table: EmbeddingTable) -> None:
        """Keep a table, and go on when all ranks can have it."""
        self._ledger.put_table(name, table)
        self._world.gather(name)

    def _bank(self, name: str) -> EmbeddingTable:
        table = self._banks[name] if isinstance(self._banks, Mapping) else self._ledger.table(f"bank {name}")
        assert table is not None  # made with the clean scores
        return table

    def _score(self, name: str, table: EmbeddingTable) -> dict[int, np.ndarray]:
        if name not in self._fitted:
            if self._lender.hold == "one":
                self._fitted.clear()
            bank = self._bank(name)
            k = min(self._knn.k, len(bank)) if name in self._warned else self._knn.k  # a cut is said once per target
            self._fitted[name] = replace(self._knn, k=k).fit(bank)
            self._warned.add(name)
        return scores_by_k(self._fitted[name], table, self._ks)


def _branch_of(encoder: EmbeddingFunction, reading: Reading) -> str | None:
    """The BatchNorm branch that an attack on this encoder goes through; None is the one that is active."""
    if reading.compat == "paper" and reading.attack_branch is None and isinstance(encoder, nn.Module):
        from hsat.models import is_dual

        return "pgd" if is_dual(encoder) else None
    return reading.attack_branch
