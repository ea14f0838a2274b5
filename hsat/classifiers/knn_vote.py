"""The vote of the nearest neighbours: class scores, the decision, and logits with gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.classifiers.base import Queries, chunks, logits_dtype, raise_winner, unit_rows
from hsat.classifiers.search import BLOCK_BYTES, Neighbours
from hsat.types.precision import widest_dtype

CPU_SLICE_BYTES = 4 * 2**20  # of rows that a gradient gathers: twice as fast as slices that no cache holds


class VoteRows(NamedTuple):
    """The rows that logits are made of.

    Attributes:
        neighbours: The k nearest rows.
        class_row: (n, classes) int64, the nearest row of each class, -1 for a class without rows.
        class_similarity: (n, classes) float64, their cosine similarity.
    """

    neighbours: Neighbours
    class_row: np.ndarray
    class_similarity: np.ndarray


class NeighbourVote(ABC):
    """What banks of one and of several tables have in common: their k nearest rows vote.

    Attributes:
        k: Number of neighbours in use.
    """

    k: int

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """The classes of the bank, in the order of the columns of the scores."""

    @property
    @abstractmethod
    def temperature(self) -> float:
        """Temperature of the vote's weights."""

    @property
    @abstractmethod
    def label(self) -> np.ndarray:
        """(m,) int64, the class of each row of the bank."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width d of the embeddings."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the embeddings of `logits` and `scores` have to be."""

    @abstractmethod
    def neighbours(self, z: Queries) -> Neighbours:
        """The k nearest bank rows of each query, measured in float64."""

    @abstractmethod
    def vote_rows(self, unit: np.ndarray) -> VoteRows:
        """Neighbours and the nearest row of each class, of float64 unit rows (n, d)."""

    @abstractmethod
    def gather(self, row: Tensor) -> Tensor:
        """Bank rows (..., d) float32 with these indices, on the device of `row`."""

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Itself: nothing in it changes, and a bank is large."""
        return self

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """Unit rows: embeddings of any length are normalised first."""
        return "unit"

    @property
    def classes_with_rows(self) -> int:
        """Number of classes that have rows in the bank."""
        return len(np.unique(self.label))

    def predict_proba(self, z: Queries) -> np.ndarray:
        """Class scores (n, classes) float64; rows sum to one.

        Args:
            z: (n, d) embeddings of any length (normalised here), or a table, whose classes must be known to the bank by
                name (ids are not compared, so that it may come from another cohort).
        """
        return self.score(self.neighbours(z))

    def predict(self, z: Queries) -> np.ndarray:
        """Index of the highest score among `class_names`, (n,) int64; ties go to the lower index."""
        winner: np.ndarray = self.predict_proba(z).argmax(1)
        return winner

    def score(self, neighbours: Neighbours, *, k: int | None = None) -> np.ndarray:
        """Class scores (n, classes) from neighbours that were searched before, or from the nearest k of them."""
        return class_scores(
            neighbours,
            self.label[neighbours.row],
            classes=len(self.class_names),
            temperature=self.temperature,
            k=self.k if k is None else k,
        )

    def certain_winner(
        self, product: np.ndarray, row: np.ndarray, *, error: float, whole: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The decision (n,) by products that are known to within an error, and whether it is certain (n,).

        Args:
            product: (n, count) float64, the highest products, falling; count is at least k.
            row: (n, count), their bank rows.
            error: How far a product may be from the cosine similarity.
            whole: Whether these are all rows of the bank.
        """
        k = self.k
        after = product[:, k : k + 1] if product.shape[1] > k else np.full((len(product), 1), -np.inf)
        inside = product > after + 2 * error  # at most k rows can be as near as such a row
        possible = product >= product[:, k - 1 : k] - 2 * error
        weight = np.exp((product - product[:, :1]) / self.temperature)
        label, line = self.label[row], np.arange(len(row))[:, None]
        low, high = np.zeros((len(row), len(self.class_names))), np.zeros((len(row), len(self.class_names)))
        np.add.at(low, (line, label), np.where(inside, weight, 0.0))
        np.add.at(high, (line, label), np.where(possible, weight, 0.0))
        winner = low.argmax(1)
        others = high.copy()
        others[line[:, 0], winner] = 0.0
        spread = 2 * error / self.temperature
        if spread > 300:  # weights could underflow and seem certain
            return winner, np.zeros(len(row), dtype=bool)
        certain = low.max(1) > others.max(1) * np.exp(spread) * (1 + 1e-9)
        if not whole:
            certain &= ~possible[:, -1]  # else a row that was not proposed may be a neighbour
        return winner, certain

    def doubtful_queries(self, nearest: Neighbours) -> np.ndarray:
        """Queries, by index, whose neighbours or winner could be others if the last digits of similarities were.

        Args:
            nearest: Neighbours as a device measured them, one more than k where the bank has one more.
        """
        if self.device.type == "mps" or self.temperature < 1e-4:
            return np.arange(len(nearest.row))
        scores = np.sort(self.score(Neighbours(nearest.similarity[:, : self.k], nearest.row[:, : self.k])), axis=1)
        doubtful = scores[:, -1] - scores[:, -2:-1].max(1, initial=-1.0) < 1e-9
        if nearest.row.shape[1] > self.k:
            doubtful |= ~(nearest.similarity[:, self.k - 1] - nearest.similarity[:, self.k] > 1e-11)
        return np.flatnonzero(doubtful)

    def logits(self, z: Tensor) -> Tensor:
        """Log votes of the classes, with gradients to the embeddings.

        V_c = log sum over the neighbours j of class c of exp(s_j / temperature), s_j the cosine similarity.  A class
        that none of the k neighbours has is stood in for by its nearest row in the whole bank, V_c = s / temperature
        (a class without any row: -1 / temperature).  That row is no nearer than the k-th neighbour, so it never
        outvotes a class with neighbours, and V is nowhere flat.  Neighbours are searched at every call; gradients flow
        through their similarities and not through their choice.

        Args:
            z: (n, d) embeddings of any length, on the bank's device.

        Returns:
            (n, classes), float32 (float64 for float64 z), finite.  The highest is the decision of `predict`: where
            rounding would tie it with another class or put it behind, it is raised by one float.
        """
        self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            rows, similarity, class_similarity = self._measured(z)
            label = torch.from_numpy(self.label[rows.neighbours.row]).to(z.device)
            has_rows = torch.from_numpy(rows.class_row >= 0).to(z.device)
            votes = log_votes(similarity, label, class_similarity, has_rows, temperature=self.temperature)
            winner = torch.from_numpy(self.score(rows.neighbours).argmax(1)).to(z.device)
            return raise_winner(votes.to(logits_dtype(z)), winner)

    def scores(self, z: Tensor) -> Tensor:
        """Class scores (n, classes) with gradients, float64: the values of `predict_proba`."""
        self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            rows, similarity, _ = self._measured(z)
            label = torch.from_numpy(self.label[rows.neighbours.row]).to(z.device)
            member = F.one_hot(label, len(self.class_names)).to(similarity.dtype)
            weight = ((similarity - similarity.detach()[:, :1]) / self.temperature).softmax(1)
            shares = (weight[:, :, None] * member).sum(1)
            value = torch.from_numpy(self.score(rows.neighbours)).to(shares)
            return value + (shares - shares.detach())

    def _check(self, z: Tensor) -> None:
        """Raise ValueError for embeddings of another width, or on another device."""
        if z.ndim != 2 or z.shape[1] != self.width:
            raise ValueError(
                f"the encoder gave embeddings {tuple(z.shape)}, the bank's have width {self.width}: not its bank"
            )
        if z.device != self.device:
            raise ValueError(
                f"embeddings on {z.device}, the bank on {self.device};"
                f" move the classifier with .to({str(z.device)!r}), or the DecisionModel that holds it"
            )

    def _measured(self, z: Tensor) -> tuple[VoteRows, Tensor, Tensor]:
        """The rows, and with gradients the similarities of the neighbours (n, k) and of each class (n, classes)."""
        unit = unit_rows(z.detach().cpu().double().numpy())
        rows = self.vote_rows(unit)
        row = np.concatenate((rows.neighbours.row, rows.class_row), 1)
        value = np.concatenate((rows.neighbours.similarity, rows.class_similarity), 1)
        missing = (row < 0) | np.isneginf(value)
        dtype, known = widest_dtype(z.device), torch.from_numpy(np.where(missing, -1, row)).to(z.device)
        gathered = _GatheredRows(torch.from_numpy(unit).to(z.device, dtype), known, self.gather)
        similarity = _CosineSimilarity.apply(z, torch.from_numpy(value).to(z.device, dtype), gathered)
        neighbours, of_class = similarity.split([rows.neighbours.row.shape[1], rows.class_row.shape[1]], dim=1)
        return rows, neighbours, of_class


def class_scores(neighbours: Neighbours, labels: np.ndarray, *, classes: int, temperature: float, k: int) -> np.ndarray:
    """Class scores (n, classes) of the nearest k neighbours, whose labels (n, at least k) are given."""
    if not 1 <= k <= neighbours.similarity.shape[1]:
        raise ValueError(f"k must lie in [1, {neighbours.similarity.shape[1]}], the neighbours found; got {k}")
    similarity = neighbours.similarity[:, :k]
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    weights /= weights.sum(1, keepdims=True)
    scores = np.zeros((len(similarity), classes))
    np.add.at(scores, (np.arange(len(scores))[:, None], labels[:, :k]), weights)
    return scores


def log_votes(
    similarity: Tensor, label: Tensor, class_similarity: Tensor, has_rows: Tensor, *, temperature: float
) -> Tensor:
    """V_c of `NeighbourVote.logits`.

    Args:
        similarity: (n, k) of the neighbours, -inf for missing ones.
        label: (n, k) int64, their classes.
        class_similarity: (n, classes) of the nearest row of each class.
        has_rows: (n, classes) bool, whether the class has rows.
        temperature: Of the weights.
    """
    present = similarity.isfinite()
    member = F.one_hot(label, class_similarity.shape[1]).bool() & present[:, :, None]
    last = torch.where(present, similarity.detach(), torch.inf).amin(1, keepdim=True)
    excess = (class_similarity.detach() - last).clamp_min(0)  # of a row that an approximate index did not find
    stand_in = torch.where(has_rows, class_similarity - excess, -1.0)
    vote = torch.where(member, similarity[:, :, None] / temperature, -torch.inf)
    stand_in = torch.where(member.any(1), -torch.inf, stand_in / temperature)
    return torch.cat((vote, stand_in[:, None]), 1).logsumexp(1)


class _GatheredRows(NamedTuple):
    """Unit rows (n, d) of embeddings, bank rows (n, m) by index (-1 for none), and what reads bank rows by index."""

    unit: Tensor
    row: Tensor
    gather: Callable[[Tensor], Tensor]


class _CosineSimilarity(torch.autograd.Function):
    """Similarities that are known already, with their gradient to the embeddings.

    Neither pass holds (n, rows, d) numbers at once.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, similarity: Tensor, gathered: _GatheredRows) -> Tensor:
        """Embeddings z (n, d) and their similarities (n, m) to the rows that are gathered."""
        ctx.save_for_backward(z, gathered.unit, gathered.row)
        ctx.gather = gathered.gather
        return similarity.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of cosine similarity; a zero embedding has that of the product."""
        z, unit, row = ctx.saved_tensors
        grad = torch.where(row < 0, 0.0, grads[0])
        sums = []
        limit = CPU_SLICE_BYTES if unit.device.type == "cpu" else BLOCK_BYTES
        for part in chunks(len(row), max(1, limit // max(1, 8 * row.shape[1] * unit.shape[1]))):
            rows = ctx.gather(row[part].clamp_min(0)).to(unit.dtype)
            length = torch.linalg.vector_norm(rows, dim=2)
            weight = grad[part] / torch.where(length > 0, length, 1.0)
            sums.append(torch.bmm(weight[:, None], rows)[:, 0])
        total = torch.cat(sums) if sums else torch.zeros_like(unit)
        length = torch.linalg.vector_norm(z.to(unit.dtype), dim=1, keepdim=True)
        total = (total - (total * unit).sum(1, keepdim=True) * unit) / torch.where(length > 0, length, 1.0)
        return total.to(z.dtype), None, None
