"""The k nearest rows of a bank and their vote, exact and differentiable: what attacks on a kNN decision climb."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.bank_rows import BankLike, bank_rows

_MARGIN = 8  # rows beyond k that float32 products propose; float64 chooses among them, as KNNClassifier does
_SLICE = 65536  # bank rows per product
_TIED = 1e-12  # float64 products of unit rows are right to this; closer ones count as equal, as in KNNClassifier
_GATHER_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class VoteBank:
    """A bank on a device, ready to vote: made once by `vote_bank`, shared by all batches.

    rows: (m, d) float32, sorted by class, then by their place in the bank.  length: (m,) float64, their Euclidean
    length (1 but for rounding).  label, place: (m,) int64, class and original row.  bounds: class c has the rows
    bounds[c] to bounds[c + 1].  filled: (classes,) bool, which have rows at all.  slack: how far lengths are from 1 at
    most.  k, temperature: of the vote.
    """

    rows: Tensor
    length: Tensor
    label: Tensor
    place: Tensor
    bounds: tuple[int, ...]
    filled: Tensor
    slack: float
    k: int
    temperature: float

    @property
    def classes(self) -> int:
        """Number of classes, those without rows included."""
        return len(self.bounds) - 1

    def vote(self, z: Tensor) -> Vote:
        """The vote on embeddings z (n, d) of any length, with gradients to z; neighbours are searched here, exactly."""
        if z.ndim != 2 or z.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"the encoder gave embeddings {tuple(z.shape)}, the bank's have width {self.rows.shape[1]}:"
                " not its bank"
            )
        if z.device != self.rows.device:
            raise ValueError(
                f"embeddings on {z.device}, the bank on {self.rows.device};"
                " the bank goes where the labels of the queries are: give them on the device of the images"
            )
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(_exact(z.device))
            length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
            unit = z / torch.where(length > 0, length, 1.0)
            with torch.no_grad():
                near, nearest = self._propose(unit.detach())
            similarity = _Similarity.apply(unit, self, torch.cat((near, nearest), 1))
            return self._count(similarity[:, : near.shape[1]], near, similarity[:, near.shape[1] :])

    def _propose(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates (n, k + a few) by product, and the nearest row of each class (n, classes), 0 for empty classes."""
        n, wanted = len(unit), self._wanted
        precise = torch.get_float32_matmul_precision() == "highest"  # else CUDA may round products to ten bits
        query = unit.float() if precise else unit
        value, row = query.new_empty(n, 0), self.place.new_empty(n, 0)
        nearest = self.place.new_zeros(n, self.classes)
        for c, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            own, at = query.new_empty(n, 0), self.place.new_empty(n, 0)
            for first in range(begin, end, _SLICE):
                last = min(first + _SLICE, end)
                product = query @ self.rows[first:last].to(query.dtype).T
                where = torch.arange(first, last, device=row.device).expand(n, -1)
                own, at = _best(torch.cat((own, product), 1), torch.cat((at, where), 1), wanted)
            if end > begin:
                nearest[:, c] = at[:, 0]
            value, row = _best(torch.cat((value, own), 1), torch.cat((row, at), 1), wanted)
        if wanted < len(self.rows):
            # a row that was not proposed may be this much nearer than its product says, and the k-th this much farther
            rounding = 8 * math.sqrt(unit.shape[1]) * (2.0**-24 if precise else 2.0**-49) + self.slack
            doubtful = (value[:, self.k - 1] - value[:, -1] <= 2 * rounding).nonzero().flatten()
            if len(doubtful):
                row[doubtful] = self._settle(unit[doubtful])
        return row, nearest

    def _settle(self, unit: Tensor) -> Tensor:
        """Candidates where products of 32 bits cannot tell: all rows nearer than the k-th, then the first that tie.

        Two passes over the bank in float64; ties count in the order of the bank, however many there are.
        """
        nearest = unit.new_empty(len(unit), 0)
        for first in range(0, len(self.rows), _SLICE):
            value = torch.cat((nearest, self._similarity(unit, slice(first, first + _SLICE))), 1)
            nearest = value.topk(min(self.k, value.shape[1]), dim=1).values
        rank, row = unit.new_empty(len(unit), 0), self.place.new_empty(len(unit), 0)
        for first in range(0, len(self.rows), _SLICE):
            part = slice(first, first + _SLICE)
            gap = self._similarity(unit, part) - nearest[:, -1:]
            order = torch.where(gap > _TIED, 1.0, torch.where(gap >= -_TIED, -self.place[part].to(gap), -torch.inf))
            at = torch.arange(first, first + order.shape[1], device=row.device).expand_as(order)
            rank, row = _best(torch.cat((rank, order), 1), torch.cat((row, at), 1), self._wanted)
        return row

    def _similarity(self, unit: Tensor, part: slice) -> Tensor:
        return unit @ self.rows[part].to(unit.dtype).T / self.length[part].to(unit.dtype)

    @property
    def _wanted(self) -> int:
        return min(self.k + _MARGIN, len(self.rows))

    def _count(self, similarity: Tensor, row: Tensor, nearest: Tensor) -> Vote:
        """The k best of the candidates, ties to the earlier row of the bank, and what they say."""
        by_place = self.place[row].argsort(dim=1)
        order = similarity.detach().gather(1, by_place).sort(dim=1, descending=True, stable=True).indices
        order = by_place.gather(1, order)[:, : self.k]
        similarity = similarity.gather(1, order)
        member = F.one_hot(self.label[row.gather(1, order)], self.classes).bool()
        weight = ((similarity - similarity[:, :1]) / self.temperature).exp()
        weight = weight / weight.sum(1, keepdim=True)
        # one after the other, as KNNClassifier adds: votes that tie there tie here
        scores = (weight[:, :, None] * member).cumsum(1)[:, -1]
        stand_in = torch.where(self.filled, nearest, -1.0) / self.temperature
        logit = torch.where(member, similarity[:, :, None] / self.temperature, -math.inf)
        stand_in = torch.where(member.any(1), -math.inf, stand_in)
        return Vote(scores, torch.cat((logit, stand_in[:, None]), 1).logsumexp(1))


@dataclass(frozen=True, eq=False)
class Vote:
    """What the neighbours of n embeddings say, float64.

    scores: (n, classes), rows sum to one: those of `hsat.eval.KNNClassifier`.  log_vote: (n, classes),
    V_c = log sum over the neighbours j of class c of exp(s_j / temperature), s_j the cosine similarity.  A class that
    none of the k neighbours has is stood in for by its nearest row in the whole bank, V_c = max_j s_j / temperature
    (a class without any row: -1 / temperature, the lowest similarity there is).  That row is no nearer than the k-th
    neighbour, so it never outvotes a class with neighbours, and V is finite and nowhere flat.
    """

    scores: Tensor
    log_vote: Tensor

    def wrong(self, label: Tensor) -> Tensor:
        """(n,) bool: is the winner, ties to the lower class index, another class than the label?"""
        return self.scores.detach().argmax(1) != label


class _Similarity(torch.autograd.Function):
    """Cosine similarity of unit rows (n, d) to bank rows (n, j), without ever holding (n, j, d) numbers at once."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, bank: VoteBank, row: Tensor) -> Tensor:
        ctx.bank, ctx.row = bank, row
        parts = [(_unit_rows(bank, row[p], unit) * unit[p, None]).sum(2) for p in _parts(unit, row)]
        return (torch.cat(parts) if parts else unit.new_empty(row.shape)) / _length(bank, row, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        bank, row = ctx.bank, ctx.row
        grad = grad / _length(bank, row, grad)
        like = grad.new_empty(len(row), bank.rows.shape[1])
        parts = [(_unit_rows(bank, row[p], grad) * grad[p, :, None]).sum(1) for p in _parts(like, row)]
        return torch.cat(parts) if parts else like, None, None


def _unit_rows(bank: VoteBank, row: Tensor, like: Tensor) -> Tensor:
    return bank.rows[row].to(like.dtype)


def _length(bank: VoteBank, row: Tensor, like: Tensor) -> Tensor:
    return bank.length[row].to(like.dtype)


def _parts(unit: Tensor, row: Tensor) -> list[slice]:
    """Slices of the batch whose gathered rows fit in memory."""
    step = max(1, _GATHER_BYTES // max(1, 8 * row.shape[1] * unit.shape[1]))
    return [slice(first, first + step) for first in range(0, len(row), step)]


def _best(value: Tensor, row: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    value, at = value.topk(min(wanted, value.shape[1]), dim=1)
    return value, row.gather(1, at)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def vote_bank(
    bank: BankLike, *, k: int, temperature: float, classes: int | None, device: torch.device, stacklevel: int = 2
) -> VoteBank:
    """Check a bank and bring it to a device, once: float32 unit rows, sorted by class.

    bank: an EmbeddingTable, or embeddings (m, d) of any length and their labels (m,) int64.  classes: their number;
    None takes the table's, or the highest label of the bank + 1.  k is cut to the bank, with a UserWarning.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}; the paper uses 0.07")
    rows, label, names = bank_rows(bank)
    if not len(rows):
        raise ValueError("the bank is empty: nothing to search")
    if k > len(rows):
        warnings.warn(
            f"k={k} is more than the {len(rows)} rows of the bank; using k={len(rows)}", stacklevel=stacklevel + 1
        )
    count = max(names, int(label.max()) + 1) if classes is None else classes
    if int(label.min()) < 0 or int(label.max()) >= count:
        raise ValueError(f"labels of the bank run from {int(label.min())} to {int(label.max())}, with {count} classes")
    if count < 2:
        raise ValueError("a vote needs at least two classes, and the bank has one; give classes=2 if another exists")
    order = label.argsort(stable=True)
    rows = rows[order]
    length = torch.linalg.vector_norm(rows.double(), dim=1)
    length = torch.where(length > 0, length, 1.0)
    exact = _exact(device)
    count_of = torch.bincount(label, minlength=count)
    return VoteBank(
        rows=rows.to(device),
        length=length.to(device, exact),
        label=label[order].to(device),
        place=order.to(device),
        bounds=(0, *count_of.cumsum(0).tolist()),
        filled=(count_of > 0).to(device),
        slack=float((length - 1).abs().max()),
        k=min(k, len(rows)),
        temperature=temperature,
    )
