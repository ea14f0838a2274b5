"""Classification by the nearest embeddings of a bank, on FAISS or plain torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval.banks.indexes import EXACT, Search, build_index, flat_search, index_search, split_factory, stream_search
from hsat.eval.banks.neighbours import BLOCK_BYTES, Neighbours, chunks, measure, rounding, row_slack, settle
from hsat.eval.scoring import match_classes
from hsat.types import EmbeddingTable

_MARGIN = 8  # rows beyond k that are proposed, so that float32 rounding at the k-th place is mended afterwards


@dataclass(frozen=True, kw_only=True)
class KNNClassifier:
    """Settings of a weighted nearest-neighbour classifier; `fit` gives the classifier and leaves this object as it is.

    Class score = sum of softmax(cosine / temperature) over the k nearest bank rows of that class; a row of scores sums
    to one.  These are the published weights after their L1 normalisation.

    index: "flat" (exact, FAISS on the bank's own rows, without a copy), "stream" (exact, plain torch on `device`, the
    bank read in blocks, once per 64 MiB of queries; for banks on disk, for GPUs, or where faiss and torch quarrel over
    OpenMP; "torch" is its older name), or a FAISS factory string such as "IVF64,Flat", "HNSW32" or "SQfp16"
    (approximate; see `FittedKNN.recall` and `agreement`), with `index_parameters` such as "nprobe=8" in FAISS's own
    notation; "IVF64,Flat;nprobe=8" holds both.  seed: draws the rows that train such an index.
    chunk: queries that one search of "flat" or of a factory string answers.
    k is cut to the size of the bank, with a UserWarning that names both.
    """

    k: int = 200
    temperature: float = 0.07
    index: str = "flat"
    index_parameters: str = ""
    device: str | None = None
    chunk: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; the paper uses 0.07")
        if not isinstance(self.index, str) or not self.index.strip():
            raise ValueError(f"index must be 'flat', 'stream' or a FAISS factory string, got {self.index!r}")
        name, parameters = split_factory(self.index)
        if self.index_parameters and parameters:
            raise ValueError(f"index {self.index!r} has parameters and so has index_parameters; give them once")
        if name in EXACT and (self.index_parameters or parameters):
            raise ValueError(
                f"index {name!r} is exact and takes no parameters, got {self.index_parameters or parameters!r}"
            )

    @property
    def exact(self) -> bool:
        """Whether the index finds the true neighbours, whatever the bank."""
        return self.index in EXACT

    def fit(self, table: EmbeddingTable) -> FittedKNN:
        """A classifier with this table as its bank.  Raises ValueError for an empty table or a bad factory string."""
        k = cut_k(self.k, check_bank(table))
        slack = row_slack(table.z) if isinstance(table.z, np.memmap) else FittedKNN.slack
        index = None if self.exact else build_index(table.z, *self.factory(), seed=self.seed)
        return FittedKNN(settings=self, table=table, k=k, slack=slack, _index=index)

    def factory(self) -> tuple[str, str]:
        """FAISS's factory string and search parameters."""
        name, parameters = split_factory(self.index)
        return name, parameters or self.index_parameters


@dataclass(frozen=True, eq=False)
class FittedKNN:
    """A bank that answers queries.  k is the number of neighbours in use; columns of scores follow `class_names`.

    The index proposes a few rows more than k from float32 products; these are measured again in float64 and ordered by
    similarity, then by row.  With an exact index, queries for which rounding could hide a nearer row are searched again
    in float64, so that the neighbours depend neither on the index nor on the other queries, and equal rows go to the
    lower row.  slack: how far bank rows may be from unit length.
    """

    settings: KNNClassifier
    table: EmbeddingTable
    k: int
    slack: float = 1e-5
    _index: Any = field(default=None, repr=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the bank, in the order of the columns of the scores."""
        return self.table.class_names

    def predict_proba(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        """Class scores (n, classes) float64; rows sum to one.

        z: (n, d) embeddings of any length (normalised here), or a table, whose classes must be known to the bank by
        name (ids are not compared, so that it may come from another cohort).
        """
        return self.score(self.neighbours(z))

    def predict(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        """Index of the highest score among `class_names`, (n,) int64; ties go to the lower index."""
        winner: np.ndarray = self.predict_proba(z).argmax(1)
        return winner

    def neighbours(self, z: np.ndarray | Tensor | EmbeddingTable) -> Neighbours:
        """The k nearest bank rows of each query, measured in float64."""
        queries = query_rows(z, self.class_names, self.table.z.shape[1])
        found = Neighbours(np.empty((len(queries), self.k)), np.empty((len(queries), self.k), dtype=np.int64))
        search = self._search()
        for part, unit in unit_queries(queries, self._together):
            found.similarity[part], found.row[part] = self._answer(search, unit)
        if lost := int(np.isneginf(found.similarity[:, 0]).sum()):
            raise ValueError(
                f"index {self.settings.index!r} found no neighbour for {lost} of {len(queries)} queries;"
                " search wider, for instance index_parameters='nprobe=8', or use index='flat'"
            )
        return found

    def score(self, found: Neighbours, *, k: int | None = None) -> np.ndarray:
        """Class scores (n, classes) from neighbours already found, or from the nearest k of them."""
        return class_scores(
            found,
            self.table.label[found.row],
            classes=len(self.class_names),
            temperature=self.settings.temperature,
            k=self.k if k is None else k,
        )

    def recall(self, z: np.ndarray | Tensor | EmbeddingTable) -> float:
        """Share of the true k nearest neighbours that the index finds: 1.0 for the exact indexes.

        A row as similar as the true k-th neighbour counts as found, so that ties cost nothing.
        """
        last = self.exactly().neighbours(z).similarity[:, -1:]
        return float((self.neighbours(z).similarity >= last - 1e-9).mean())

    def agreement(self, z: np.ndarray | Tensor | EmbeddingTable) -> float:
        """Share of the queries that the index and an exact search give the same class: 1.0 for the exact indexes."""
        return float((self.predict(z) == self.exactly().predict(z)).mean())

    def exactly(self) -> FittedKNN:
        """The same bank and k, searched exactly and without an index of its own (in blocks, on `device`)."""
        settings = KNNClassifier(
            k=self.settings.k, temperature=self.settings.temperature, index="stream", device=self.settings.device
        )
        return FittedKNN(settings=settings, table=self.table, k=self.k, slack=self.slack)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write settings and index to a folder; see `load_knn`, which wants the same bank again."""
        from hsat.eval.banks.knn_files import save_knn

        return save_knn(path, self)

    @property
    def _together(self) -> int:
        """Queries of one search: a stream reads the bank for each, so it takes as many as fit a block."""
        streams = self.settings.exact and not self._in_place
        return max(self.settings.chunk, BLOCK_BYTES // (8 * self.table.z.shape[1])) if streams else self.settings.chunk

    @property
    def _in_place(self) -> bool:
        """FAISS multiplies float32 rows where they are; it would copy others, which are read in blocks instead."""
        z = self.table.z
        return self.settings.index == "flat" and z.dtype == np.float32 and z.flags.c_contiguous

    def _search(self) -> Search:
        if self._index is not None:
            return index_search(self._index)
        if self._in_place:
            return flat_search(self.table.z)
        return stream_search(self.table.z, self.settings.device)

    def _answer(self, search: Search, queries: np.ndarray) -> Neighbours:
        """Neighbours of float64 unit rows: proposed, measured, and settled where that cannot decide."""
        bank, k = self.table.z, self.k
        margin = _MARGIN if self.settings.exact else max(_MARGIN, k // 4)
        wanted = min(k + margin, len(bank))
        products, proposed = search(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        found = measure(queries, bank, proposed, k)
        if self.settings.exact and wanted < len(bank):
            hidden = products[:, -1].astype(np.float64) + rounding(bank.shape[1]) + self.slack
            open_ones = np.flatnonzero(found.similarity[:, -1] <= hidden)
            for part in chunks(len(open_ones), self.settings.chunk):
                at = open_ones[part]
                found.similarity[at], found.row[at] = settle(queries[at], bank, k)
        return found


def check_bank(table: EmbeddingTable) -> int:
    """The number of its rows; TypeError for what is no table, ValueError for an empty one."""
    if not isinstance(table, EmbeddingTable):
        raise TypeError(f"the bank must be an EmbeddingTable, as embed gives, got {type(table).__name__}")
    if not len(table):
        raise ValueError(f"the bank is empty (cohort {table.cohort!r}, split {table.split!r}): nothing to search")
    return len(table)


def cut_k(k: int, rows: int) -> int:
    """k, or the number of rows with a UserWarning where k is more."""
    if rows < k:
        warnings.warn(f"k={k} is more than the {rows} rows of the bank; using k={rows}", stacklevel=3)
    return int(min(k, rows))


def class_scores(found: Neighbours, labels: np.ndarray, *, classes: int, temperature: float, k: int) -> np.ndarray:
    """Class scores (n, classes) of the nearest k neighbours, whose labels (n, at least k) are given."""
    if not 1 <= k <= found.similarity.shape[1]:
        raise ValueError(f"k must lie in [1, {found.similarity.shape[1]}], the neighbours found; got {k}")
    similarity = found.similarity[:, :k]
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    weights /= weights.sum(1, keepdims=True)
    scores = np.zeros((len(similarity), classes))
    np.add.at(scores, (np.arange(len(scores))[:, None], labels[:, :k]), weights)
    return scores


def query_rows(z: np.ndarray | Tensor | EmbeddingTable, class_names: Sequence[str], width: int) -> np.ndarray:
    """Queries as an array of this width; a table's classes must be among the names.  Nothing is copied if need not."""
    if isinstance(z, EmbeddingTable):
        match_classes(z, tuple(class_names))
        z = z.z
    array = np.asarray(z.detach().cpu().double() if isinstance(z, Tensor) else z)
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"queries must be (n, {width}) as the bank's embeddings are, got shape {array.shape}")
    return array


def unit_queries(queries: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Parts of the queries as float64 unit rows; ValueError names the first row that is not finite."""
    for part in chunks(len(queries), size):
        array = np.asarray(queries[part], dtype=np.float64)
        norm = np.sqrt(np.einsum("nd,nd->n", array, array))
        if not np.isfinite(norm).all():
            raise ValueError(
                f"queries are not finite, first in row {part.start + np.flatnonzero(~np.isfinite(norm))[0]}"
            )
        yield part, array / np.where(norm > 0, norm, 1.0)[:, None]
