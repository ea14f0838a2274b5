"""Sets of banks and of classifiers: one kNN classifier on several tables, several classifiers on one table.

Tables are searched one by one, and the nearest rows of all are merged; classifiers share an index and a search.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import Queries, check_bank, clip_k, query_rows
from hsat.classifiers.knn import FittedKNN, KNNClassifier
from hsat.classifiers.knn_vote import NeighbourVote, VoteRows
from hsat.classifiers.search import Neighbours, topk
from hsat.types import Classifier, EmbeddingTable, FittedClassifier, align_labels

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class ShardedKNN(NeighbourVote):
    """Several banks that answer as one; rows count through all of them in their order.

    With an exact index neighbours, scores and decisions are, bit for bit, those of one table with all rows.  The logit
    of a class that no neighbour has comes from its nearest row by float32 products, which may be another one among rows
    that these cannot tell apart.

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
        """The k nearest rows of all shards for each query.

        Args:
            z: (n, d) queries of any length, or a table of them.

        Returns:
            (n, k) similarities and rows; rows count through the shards in their order.
        """
        rows = query_rows(z, self.class_names, width=self.width)
        return self._merge(len(rows), [shard.neighbours(rows) for shard in self.shards])

    def vote_rows(self, unit: np.ndarray) -> VoteRows:
        """Neighbours and the nearest row of each class in all shards.

        Args:
            unit: (n, d) float64 queries of length one.

        Returns:
            Rows and similarities, from which logits are made; rows count through the shards in their order.
        """
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
        """The rows of the bank with these indices.

        Args:
            row: (...) int64 indices, which count through the shards in their order.

        Returns:
            (..., d) float32, on the device of `row`.
        """
        rows = torch.zeros(*row.shape, self.width, device=row.device)
        for shard, start in zip(self.shards, self._starts, strict=True):
            inside = (row >= start) & (row < start + len(shard.table))
            rows[inside] = shard.gather(row[inside] - start)
        return rows

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its banks on a device.

        Args:
            device: Where embeddings will be.

        Returns:
            A copy.
        """
        return replace(self, shards=tuple(shard.to(device) for shard in self.shards))

    def tensors(self) -> dict[str, Tensor]:
        """The rows of each shard by name, as `FittedKNN.tensors` gives them."""
        by_shard = [(number, shard.tensors()) for number, shard in enumerate(self.shards)]
        return {f"{name}_{number}": tensor for number, tensors in by_shard for name, tensor in tensors.items()}

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
    string is built for each table.

    Args:
        settings: Of the classifier.
        tables: The shards, in the order in which rows of the bank are counted.

    Returns:
        The classifier of all rows.

    Raises:
        ValueError: For no table, an empty one, and widths or encoders that differ, naming the table by its number.
    """
    tables = list(tables)
    names, label = _check_tables(tables)
    k = clip_k(settings.k, len(label))
    shards = tuple(replace(settings, k=min(k, len(table))).fit(table) for table in tables)
    return ShardedKNN(settings=settings, shards=shards, k=k, _class_names=names, _label=label)


def concat_tables(tables: Sequence[EmbeddingTable]) -> EmbeddingTable:
    """All rows as one table in memory; a classifier of it answers as that of `fit_shards`.

    Its split is the names of the splits with "+" between.

    Args:
        tables: Of one width, one encoder and one cohort; classes are matched by name.

    Returns:
        The rows of all tables in their order; see `EmbeddingTable.concat`.

    Raises:
        ValueError: As `fit_shards` does, and for tables of different cohorts, whose ids cannot be told apart.
    """
    tables = list(tables)
    _check_tables(tables)
    return EmbeddingTable.concat(tables)


def _check_tables(tables: list[EmbeddingTable]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of all tables, and the labels of all rows as these number them, after the checks of `fit_shards`."""
    if not tables:
        raise ValueError("a sharded bank needs at least one table, got none")
    first = tables[0]
    for number, table in enumerate(tables):
        check_bank(table)
        if table.z.shape[1] != first.z.shape[1]:
            raise ValueError(f"shard {number} has width {table.z.shape[1]}, shard 0 has {first.z.shape[1]}")
        if table.encoder != first.encoder:
            raise ValueError(f"shard {number} was embedded by {table.encoder!r}, shard 0 by {first.encoder!r}")
    names = tuple(dict.fromkeys(name for table in tables for name in table.class_names))
    return names, np.concatenate([align_labels(table.label, table.class_names, names) for table in tables])


def fit_classifiers(classifiers: Sequence[Classifier], bank: EmbeddingTable) -> list[FittedClassifier]:
    """Fit classifiers on one bank, in their order.

    kNN classifiers whose settings differ in k and temperature only share one index, which is built once, and one
    search, for the largest k.

    Args:
        classifiers: Settings, of any kinds.
        bank: Embeddings with labels.

    Returns:
        One fitted classifier for each.
    """
    fitted: list[FittedClassifier | None] = [None] * len(classifiers)

    def index_settings(classifier: Classifier) -> Hashable:
        return replace(classifier, k=1, temperature=1.0) if isinstance(classifier, KNNClassifier) else id(classifier)

    for numbers in _group_numbers(classifiers, index_settings):
        members = [classifiers[number] for number in numbers]
        if not all(isinstance(member, KNNClassifier) for member in members):
            fitted[numbers[0]] = members[0].fit(bank)
            continue
        settings = [member for member in members if isinstance(member, KNNClassifier)]
        largest = max(settings, key=lambda member: member.k).fit(bank)
        for number, member in zip(numbers, settings, strict=True):
            k = member.k if member.k == largest.settings.k else clip_k(member.k, len(bank))
            fitted[number] = replace(largest, settings=member, k=min(k, len(bank)))
    return [classifier for classifier in fitted if classifier is not None]


def predict_scores(fitted: Sequence[FittedClassifier], z: Queries) -> list[np.ndarray]:
    """Class scores of each classifier, as its `predict_proba` gives them.

    kNN classifiers that share a bank, an index and a search are answered from one search.

    Args:
        fitted: Classifiers of embeddings of one width.
        z: (n, d) queries, or a table of them.

    Returns:
        (n, classes) float64 for each, in their order; rows sum to one.
    """
    scores: list[np.ndarray | None] = [None] * len(fitted)

    def search(classifier: FittedClassifier) -> Hashable:
        return classifier.search_key if isinstance(classifier, FittedKNN) else id(classifier)

    for numbers in _group_numbers(fitted, search):
        members = [fitted[number] for number in numbers]
        largest = max(members, key=lambda member: getattr(member, "k", 0))
        if len(members) == 1 or not isinstance(largest, FittedKNN):
            scores[numbers[0]] = members[0].predict_proba(z)
            continue
        neighbours = largest.neighbours(z)
        for number, member in zip(numbers, members, strict=True):
            assert isinstance(member, FittedKNN)
            scores[number] = member.score(neighbours)
    return [score for score in scores if score is not None]


def _group_numbers(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[int]]:
    """Numbers of the items with equal keys, in the order in which the keys come first."""
    groups: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(key(item), []).append(number)
    return list(groups.values())
