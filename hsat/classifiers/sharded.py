"""A bank in several tables: each is searched by itself, and the nearest rows of all are merged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import Queries, check_bank, query_rows
from hsat.classifiers.knn import FittedKNN, KNNClassifier, clip_k
from hsat.classifiers.knn_vote import NeighbourVote, VoteRows
from hsat.classifiers.search import Neighbours, topk
from hsat.types import EmbeddingTable, align_labels


@dataclass(frozen=True, eq=False)
class ShardedKNN(NeighbourVote):
    """Several banks that answer as one; rows count through all of them in their order.

    With an exact index the answers are, bit for bit, those of one table with all rows.

    Attributes:
        settings: The settings that were fitted.
        shards: A classifier of each table.
        k: Number of neighbours in use.
    """

    settings: KNNClassifier
    shards: tuple[FittedKNN, ...]
    k: int
    _class_names: tuple[str, ...]
    _label: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the first table, then the new ones of each further table."""
        return self._class_names

    @property
    def label(self) -> np.ndarray:
        """(m,) int64, the class of each row of all tables."""
        return self._label

    @property
    def temperature(self) -> float:
        """Temperature of the vote's weights."""
        return self.settings.temperature

    @property
    def width(self) -> int:
        """Width d of the embeddings."""
        return self.shards[0].width

    @property
    def device(self) -> torch.device:
        """Where the embeddings of `logits` and `scores` have to be."""
        return self.shards[0].device

    def neighbours(self, z: Queries) -> Neighbours:
        """The k nearest rows of all shards for each query."""
        rows = query_rows(z, self.class_names, width=self.width)
        return self._merge(len(rows), [shard.neighbours(rows) for shard in self.shards])

    def vote_rows(self, unit: np.ndarray) -> VoteRows:
        """Neighbours and the nearest row of each class in all shards, of float64 unit rows (n, d)."""
        parts = [shard.vote_rows(unit) for shard in self.shards]
        class_row = np.full((len(unit), len(self.class_names)), -1)
        class_similarity = np.full(class_row.shape, -np.inf)
        for shard, start, part in zip(self.shards, self._starts, parts, strict=True):
            columns = [self.class_names.index(name) for name in shard.class_names]
            similarity = np.where(part.class_row < 0, -np.inf, part.class_similarity)
            better = similarity > class_similarity[:, columns]
            class_row[:, columns] = np.where(better, part.class_row + start, class_row[:, columns])
            class_similarity[:, columns] = np.where(better, similarity, class_similarity[:, columns])
        neighbours = self._merge(len(unit), [part.neighbours for part in parts])
        return VoteRows(neighbours, class_row, np.where(class_row < 0, -1.0, class_similarity))

    def gather(self, row: Tensor) -> Tensor:
        """Bank rows (..., d) float32 with these indices, on the device of `row`."""
        rows = torch.zeros(*row.shape, self.width, device=row.device)
        for shard, start in zip(self.shards, self._starts, strict=True):
            own = (row >= start) & (row < start + len(shard.table))
            rows[own] = shard.gather(row[own] - start)
        return rows

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its banks on a device."""
        return replace(self, shards=tuple(shard.to(device) for shard in self.shards))

    def tensors(self) -> dict[str, Tensor]:
        """The rows of each shard by name, as `FittedKNN.tensors` gives them."""
        held = [(place, shard.tensors()) for place, shard in enumerate(self.shards)]
        return {f"{name}_{place}": tensor for place, tensors in held for name, tensor in tensors.items()}

    @property
    def _starts(self) -> list[int]:
        """The number of each shard's first row."""
        return [0, *itertools.accumulate(len(shard.table) for shard in self.shards[:-1])]

    def _merge(self, n: int, parts: Sequence[Neighbours]) -> Neighbours:
        nearest = Neighbours(np.empty((n, 0)), np.empty((n, 0), dtype=np.int64))
        for part, start in zip(parts, self._starts, strict=True):
            nearest = topk(
                np.concatenate((nearest.similarity, part.similarity), 1),
                np.concatenate((nearest.row, part.row + start), 1),
                self.k,
            )
        return nearest


def fit_shards(settings: KNNClassifier, tables: Sequence[EmbeddingTable]) -> ShardedKNN:
    """A classifier whose bank is all these tables, of one width and one encoder; they may be memory-mapped.

    Classes are matched by name.  k is cut to the rows of all tables, with a UserWarning.  An index from a factory
    string is built for each table.  Raises ValueError for no table, an empty one, and widths or encoders that differ,
    naming the table by its place.
    """
    tables = list(tables)
    names, label = _check_tables(tables)
    k = clip_k(settings.k, len(label))
    shards = tuple(replace(settings, k=min(k, len(table))).fit(table) for table in tables)
    return ShardedKNN(settings=settings, shards=shards, k=k, _class_names=names, _label=label)


def concat_tables(tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
    """All rows as one table in memory, for those who need one; answers are those of `fit_shards`.

    split: the splits' names with "+" between.  Raises ValueError as `fit_shards` does, and for tables of different
    cohorts, whose ids cannot be told apart.
    """
    tables = list(tables)
    names, label = _check_tables(tables)
    for place, table in enumerate(tables):
        if table.cohort != tables[0].cohort:
            raise ValueError(f"shard {place} is of cohort {table.cohort!r}, shard 0 of {tables[0].cohort!r}")
    columns: Any = {
        name: np.concatenate([getattr(table, name) for table in tables]) for name in ("patch", "slide", "patient")
    }
    norms = [table.norm for table in tables if table.norm is not None]
    return replace(
        tables[0],
        norm=np.concatenate(norms) if len(norms) == len(tables) else None,
        z=np.concatenate([table.z for table in tables]),
        label=label,
        **columns,
        class_names=names,
        split="+".join(dict.fromkeys(table.split for table in tables)),
    )


def _check_tables(tables: list[EmbeddingTable]) -> tuple[tuple[str, ...], np.ndarray]:
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
