"""Slide and patient decisions as functions of all their patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks.bank_rows import BankLike, check_labels
from hsat.attacks.nearest_vote import lead, signed
from hsat.attacks.vote_bank import Vote, VoteBank, vote_bank
from hsat.types import EmbeddingFunction
from hsat.types.row_checks import check_rows


@dataclass(frozen=True, eq=False)
class LevelMargin:
    """Sum over the groups of a batch of the log-odds of their pooled votes; see `level_margin`.

    groups: (g,) the ids, ascending.  member_of: (n,) the position of each image's group.  labels: (g,).
    """

    encode: EmbeddingFunction
    bank: VoteBank
    groups: Tensor
    member_of: Tensor
    labels: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> a scalar, float64: the sum of `values`."""
        return self.values(images).sum()

    def values(self, images: Tensor) -> Tensor:
        """The margin of each group, (g,): positive exactly where its pooled decision is wrong."""
        vote = self._vote(images)
        share = vote.log_vote.log_softmax(1)
        highest = share.detach().new_full((len(self.groups), share.shape[1]), -torch.inf)
        where = self.member_of[:, None].expand_as(share)
        highest = highest.scatter_reduce(0, where, share.detach(), "amax")
        total = torch.zeros_like(highest).index_add(0, self.member_of, (share - highest[self.member_of]).exp())
        return signed(lead(highest + total.log(), self.labels), self._wrong(vote))

    def scores(self, images: Tensor) -> Tensor:
        """Pooled class scores (g, classes): the mean over each group's images, as `hsat.eval.pool` gives them."""
        return self._pool(self._vote(images))

    def wrong(self, images: Tensor) -> Tensor:
        """(g,) bool: is the pooled decision, ties to the lower class index, another class than the label?"""
        with torch.no_grad():
            return self._wrong(self._vote(images))

    def _vote(self, images: Tensor) -> Vote:
        z = self.encode(images)
        check_rows(z, len(images), "the encoder")
        if len(z) != len(self.member_of):
            raise ValueError(f"groups for {len(self.member_of)} images, but {len(z)} embeddings")
        return self.bank.vote(z)

    def _pool(self, vote: Vote) -> Tensor:
        total = vote.scores.new_zeros(len(self.groups), self.bank.classes)
        size = torch.bincount(self.member_of, minlength=len(self.groups))
        return total.index_add(0, self.member_of, vote.scores) / size[:, None]

    def _wrong(self, vote: Vote) -> Tensor:
        return self._pool(vote).detach().argmax(1) != self.labels


def level_margin(
    encoder: EmbeddingFunction,
    bank: BankLike,
    groups: Tensor,
    labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    classes: int | None = None,
) -> LevelMargin:
    """The decisions on slides or patients as one objective over all their patches.

    encoder, bank, k, temperature, classes: as in `soft_knn`.  groups: (n,) ids, `batch.slide` or `batch.patient`; the
    batch must hold every patch of its groups, for the decision is that of the patches it holds.  labels: (n,), the
    class of each image, as an index of the bank's classes; one class per group.

    With p_ic the softmax over classes of the votes V_ic of `soft_knn` (stand-ins for classes without a neighbour
    included) and P_gc the mean of p_ic over the members i of group g,
      margin_g = max_{c != label} log P_gc - log P_g,label.
    A group's margin is moved by a constant, without changing its gradient, where its sign is not that of the decision:
    the mean of the members' class scores, as `hsat.eval.pool` with how="mean" takes it.  So it is positive exactly
    where that decision is wrong, and its gradient does not vanish where all votes agree.

    The value is a scalar, the sum over groups: a patch's value depends on the other patches of its group, which values
    per image would deny.  Hence no `success` and no `.select`; restarts are kept or dropped whole.  `.values` has the
    margins (g,), `.scores` the pooled scores (g, classes) and `.wrong` the decisions (g,), by `.groups`.
    Raises ValueError as `soft_knn` does, and for a group with two labels, naming it.
    """
    check_labels(labels)
    if groups.shape != labels.shape or groups.dtype.is_floating_point:
        raise ValueError(
            f"groups must be integers ({len(labels)},), one id per label; got {groups.dtype} {tuple(groups.shape)}"
        )
    ready = vote_bank(bank, k=k, temperature=temperature, classes=classes, device=labels.device)
    check_labels(labels, classes=ready.classes)
    names, member_of = torch.unique(groups.to(labels.device), return_inverse=True)
    shared = labels.new_zeros(len(names)).scatter_reduce(0, member_of, labels, "amax", include_self=False)
    if len(split := (shared[member_of] != labels).nonzero().flatten()):
        group = groups.to(labels.device)[split[0]]
        found = sorted(set(labels[member_of == member_of[split[0]]].tolist()))
        raise ValueError(f"group {int(group)} holds images with labels {found}; a slide or patient has one label")
    return LevelMargin(encoder, ready, names, member_of, shared)
