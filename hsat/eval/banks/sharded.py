"""A bank in several tables: each is searched by itself, and the nearest rows of all are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval.banks.knn import FittedKNN, KNNClassifier, check_bank, class_scores, cut_k, query_rows
from hsat.eval.banks.neighbours import Neighbours, best
from hsat.types import EmbeddingTable, align_labels


@dataclass(frozen=True, eq=False)
class ShardedKNN:
    """Several banks that answer as one; rows count through all of them in their order.

    With an exact index the answers are, bit for bit, those of one table with all rows.  class_names: those of the
    first table, then the new ones of each further table.
    """

    settings: KNNClassifier
    shards: tuple[FittedKNN, ...]
    k: int
    class_names: tuple[str, ...]
    label: np.ndarray

    def predict_proba(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        """Class scores (n, classes) float64, as `FittedKNN.predict_proba` gives."""
        return self.score(self.neighbours(z))

    def predict(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        """Index of the highest score among `class_names`, (n,) int64; ties go to the lower index."""
        winner: np.ndarray = self.predict_proba(z).argmax(1)
        return winner

    def neighbours(self, z: np.ndarray | Tensor | EmbeddingTable) -> Neighbours:
        """The k nearest rows of all shards for each query."""
        queries = query_rows(z, self.class_names, self.shards[0].table.z.shape[1])
        found = Neighbours(np.empty((len(queries), 0)), np.empty((len(queries), 0), dtype=np.int64))
        start = 0
        for shard in self.shards:
            similarity, row = shard.neighbours(queries)
            found = best(
                np.concatenate((found.similarity, similarity), 1), np.concatenate((found.row, row + start), 1), self.k
            )
            start += len(shard.table)
        return found

    def score(self, found: Neighbours, *, k: int | None = None) -> np.ndarray:
        """Class scores (n, classes) from neighbours already found, or from the nearest k of them."""
        return class_scores(
            found,
            self.label[found.row],
            classes=len(self.class_names),
            temperature=self.settings.temperature,
            k=self.k if k is None else k,
        )


def fit_shards(settings: KNNClassifier, tables: Sequence[EmbeddingTable]) -> ShardedKNN:
    """A classifier whose bank is all these tables, of one width and one encoder; they may be memory-mapped.

    Classes are matched by name.  k is cut to the rows of all tables, with a UserWarning.  An index from a factory
    string is built for each table.  Raises ValueError for no table, an empty one, and widths or encoders that differ,
    naming the table by its place.
    """
    tables = list(tables)
    names, label = _checked(tables)
    k = cut_k(settings.k, len(label))
    shards = tuple(replace(settings, k=min(k, len(table))).fit(table) for table in tables)
    return ShardedKNN(settings=settings, shards=shards, k=k, class_names=names, label=label)


def joined_tables(tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
    """All rows as one table in memory, for those who need one; answers are those of `fit_shards`.

    split: the splits' names with "+" between.  Raises ValueError as `fit_shards` does, and for tables of different
    cohorts, whose ids cannot be told apart.
    """
    tables = list(tables)
    names, label = _checked(tables)
    for place, table in enumerate(tables):
        if table.cohort != tables[0].cohort:
            raise ValueError(f"shard {place} is of cohort {table.cohort!r}, shard 0 of {tables[0].cohort!r}")
    columns: Any = {
        name: np.concatenate([getattr(table, name) for table in tables]) for name in ("patch", "slide", "patient")
    }
    return replace(
        tables[0],
        z=np.concatenate([table.z for table in tables]),
        label=label,
        **columns,
        class_names=names,
        split="+".join(dict.fromkeys(table.split for table in tables)),
    )


def _checked(tables: list[EmbeddingTable]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of all tables, and the labels of all rows as these number them, after the checks of `fit_shards`."""
    if not tables:
        raise ValueError("a sharded bank needs at least one table, got none")
    first = tables[0]
    for place, table in enumerate(tables):
        check_bank(table)
        if table.z.shape[1] != first.z.shape[1]:
            raise ValueError(f"shard {place} has width {table.z.shape[1]}, shard 0 has {first.z.shape[1]}")
        if table.encoder != first.encoder:
            raise ValueError(f"shard {place} was embedded by {table.encoder!r}, shard 0 by {first.encoder!r}")
    names = tuple(dict.fromkeys(name for table in tables for name in table.class_names))
    return names, np.concatenate([align_labels(table.label, table.class_names, names) for table in tables])
