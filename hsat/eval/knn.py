"""Classification by the nearest embeddings of a bank, on FAISS or plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsat.eval.scoring import match_classes
from hsat.types import EmbeddingTable

_MARGIN = 8  # rows beyond k that the index proposes, so that float32 rounding at the k-th place is mended afterwards
_GATHER_BYTES = 64 * 2**20


class Neighbours(NamedTuple):
    """Nearest bank rows of each query, nearest first: cosine similarity (n, k) float64 and bank row (n, k) int64.

    Where an approximate index found fewer than k, the similarity is -inf and the row 0.
    """

    similarity: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, kw_only=True)
class KNNClassifier:
    """Settings of a weighted nearest-neighbour classifier; `fit` gives the classifier and leaves this object as it is.

    Class score = sum of softmax(cosine / temperature) over the k nearest bank rows of that class; a row of scores sums
    to one.  These are the published weights after their L1 normalisation.

    index: "flat" (exact, FAISS), "torch" (exact, on `device`; for GPUs, or where faiss and torch quarrel over OpenMP),
    or a FAISS factory string such as "IVF64,Flat" or "HNSW32" (approximate; see `FittedKNN.recall`), with
    `index_parameters` such as "nprobe=8" in FAISS's own notation.
    k is cut to the size of the bank, with a UserWarning that names both.
    """

    k: int = 200
    temperature: float = 0.07
    index: str = "flat"
    index_parameters: str = ""
    device: str | None = None
    chunk: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; the paper uses 0.07")

    def fit(self, table: EmbeddingTable) -> FittedKNN:
        """A classifier with this table as its bank.  Raises ValueError for an empty table or a bad factory string."""
        if not isinstance(table, EmbeddingTable):
            raise TypeError(f"the bank must be an EmbeddingTable, as embed gives, got {type(table).__name__}")
        if not len(table):
            raise ValueError(f"the bank is empty (cohort {table.cohort!r}, split {table.split!r}): nothing to search")
        k = int(min(self.k, len(table)))
        if k < self.k:
            warnings.warn(f"k={self.k} is more than the {len(table)} rows of the bank; using k={k}", stacklevel=2)
        search = None if self.index == "torch" else _faiss_index(self, table.z)
        return FittedKNN(settings=self, table=table, k=k, _index=search)


@dataclass(frozen=True, eq=False)
class FittedKNN:
    """A bank that answers queries.  k is the number of neighbours in use; columns of scores follow `class_names`.

    The index proposes a few rows more than k from float32 products; these are measured again in float64 and ordered by
    similarity, then by row.  Bank rows that tie for the k-th place beyond that margin are chosen by the index.
    """

    settings: KNNClassifier
    table: EmbeddingTable
    k: int
    _index: Any = field(repr=False)

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
        queries = self._queries(z)
        similarity = np.empty((len(queries), self.k))
        row = np.empty((len(queries), self.k), dtype=np.int64)
        wanted = min(self.k + _MARGIN, len(self.table))
        for part in _chunks(len(queries), self.settings.chunk):
            proposed = self._propose(queries[part], wanted)
            similarity[part], row[part] = _measure(queries[part], self.table.z, proposed, self.k)
        if lost := int(np.isneginf(similarity[:, 0]).sum()):
            raise ValueError(
                f"index {self.settings.index!r} found no neighbour for {lost} of {len(queries)} queries;"
                " search wider, for instance index_parameters='nprobe=8', or use index='flat'"
            )
        return Neighbours(similarity, row)

    def score(self, found: Neighbours, *, k: int | None = None) -> np.ndarray:
        """Class scores (n, classes) from neighbours already found, or from the nearest k of them."""
        k = self.k if k is None else k
        if not 1 <= k <= found.similarity.shape[1]:
            raise ValueError(f"k must lie in [1, {found.similarity.shape[1]}], the neighbours found; got {k}")
        similarity, label = found.similarity[:, :k], self.table.label[found.row[:, :k]]
        weights = np.exp((similarity - similarity[:, :1]) / self.settings.temperature)
        weights /= weights.sum(1, keepdims=True)
        scores = np.zeros((len(similarity), len(self.class_names)))
        np.add.at(scores, (np.arange(len(scores))[:, None], label), weights)
        return scores

    def recall(self, z: np.ndarray | Tensor | EmbeddingTable) -> float:
        """Share of the true k nearest neighbours that the index finds: 1.0 for the exact indexes.

        A row as similar as the true k-th neighbour counts as found, so that ties cost nothing.
        """
        queries = self._queries(z)
        found = self.neighbours(queries).similarity
        exact = FittedKNN(settings=self.settings, table=self.table, k=self.k, _index=None)
        last = exact.neighbours(queries).similarity[:, -1:]
        return float((found >= last - 1e-9).mean())

    def _queries(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        if isinstance(z, EmbeddingTable):
            match_classes(z, self.class_names)
            z = z.z
        array = np.asarray(z.detach().cpu().double() if isinstance(z, Tensor) else z, dtype=np.float64)
        width = self.table.z.shape[1]
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"queries must be (n, {width}) as the bank's embeddings are, got shape {array.shape}")
        norm = np.sqrt(np.einsum("nd,nd->n", array, array))
        if not np.isfinite(norm).all():
            raise ValueError(f"queries are not finite, first in row {np.flatnonzero(~np.isfinite(norm))[0]}")
        unit: np.ndarray = array / np.where(norm > 0, norm, 1.0)[:, None]
        return unit

    def _propose(self, queries: np.ndarray, wanted: int) -> np.ndarray:
        """Candidate bank rows (n, wanted), -1 where an approximate index found none."""
        single = np.ascontiguousarray(queries, dtype=np.float32)
        if self._index is None:
            return _torch_search(single, self.table.z, wanted, self.settings.device)
        proposed: np.ndarray = self._index.search(single, wanted)[1]
        return proposed


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _measure(queries: np.ndarray, bank: np.ndarray, proposed: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarity in float64 of the proposed rows, and the k best of them by (similarity, row)."""
    missing = proposed < 0
    rows = np.where(missing, 0, proposed)
    similarity = np.empty(rows.shape)
    for part in _chunks(len(queries), max(1, _GATHER_BYTES // (8 * rows.shape[1] * bank.shape[1]))):
        close = bank[rows[part]].astype(np.float64)
        length = np.sqrt(np.einsum("nkd,nkd->nk", close, close))  # float32 rows are units to 1e-7 only
        similarity[part] = np.matmul(close, queries[part][:, :, None])[:, :, 0] / np.where(length > 0, length, 1.0)
    similarity[missing] = -np.inf
    order = np.lexsort((rows, -similarity), axis=1)[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)


def _torch_search(queries: np.ndarray, bank: np.ndarray, wanted: int, device: str | None) -> np.ndarray:
    """The rows with the highest float32 products, over slices of the bank that fit in memory."""
    place = torch.device(device or "cpu")
    query = torch.from_numpy(queries).to(place)
    value = torch.empty(len(query), 0, device=place)
    row = torch.empty(len(query), 0, dtype=torch.int64, device=place)
    for part in _chunks(len(bank), 65536):
        product = query @ torch.from_numpy(np.array(bank[part], dtype=np.float32)).to(place).T
        value = torch.cat((value, product), 1)
        row = torch.cat((row, torch.arange(part.start, part.stop, device=place).expand(len(query), -1)), 1)
        value, at = value.topk(min(wanted, value.shape[1]), dim=1)
        row = row.gather(1, at)
    return row.cpu().numpy()


def _faiss_index(settings: KNNClassifier, bank: np.ndarray) -> Any:
    """A FAISS index over the bank: flat, or built from a factory string and trained on the bank itself."""
    try:
        faiss: Any = import_module("faiss")  # its own type hints miss overloads
    except ImportError as error:
        raise ImportError("index='flat' needs FAISS: pip install faiss-cpu, or use index='torch'") from error
    rows = np.ascontiguousarray(bank, dtype=np.float32)
    if settings.index == "flat":
        index = faiss.IndexFlatIP(rows.shape[1])
    else:
        try:
            index = faiss.index_factory(rows.shape[1], settings.index, faiss.METRIC_INNER_PRODUCT)
            index.train(rows)
            if settings.index_parameters:
                faiss.ParameterSpace().set_index_parameters(index, settings.index_parameters)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"FAISS cannot build index {settings.index!r} {settings.index_parameters!r} on {len(rows)} rows of"
                f" width {rows.shape[1]}: {reason}.  Exact choices are 'flat' and 'torch'"
            ) from error
    index.add(rows)
    return index
