"""The kNN vote as an objective: attacks climb the decision that evaluation takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hsat.attacks.bank_rows import BankLike, check_labels
from hsat.attacks.vote_bank import Vote, VoteBank, vote_bank
from hsat.types import EmbeddingFunction
from hsat.types.row_checks import check_rows

VoteLoss = Literal["margin", "ce"]
VOTE_LOSSES = ("margin", "ce")
_BARELY = 1e-12  # the margin of a vote that is lost on a tie


@dataclass(frozen=True, eq=False)
class SoftKNN:
    """How far the kNN vote on each image leans to a wrong class; see `soft_knn`."""

    encode: EmbeddingFunction
    bank: VoteBank
    labels: Tensor
    loss: VoteLoss = "margin"

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> values (n,) float64; neighbours are searched anew at every call."""
        vote = self.vote(images)
        if self.loss == "ce":
            own = vote.log_vote.gather(1, self.labels[:, None])[:, 0]
            return vote.log_vote.logsumexp(1) - own
        return signed(lead(vote.log_vote, self.labels), vote.wrong(self.labels))

    def vote(self, images: Tensor) -> Vote:
        """The vote itself, with gradients: `.scores` (n, classes) and `.log_vote`."""
        z = self.encode(images)
        check_rows(z, len(images), "the encoder")
        if len(z) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for {len(z)} embeddings; give one label per image")
        return self.bank.vote(z)

    def scores(self, images: Tensor) -> Tensor:
        """Class scores (n, classes) float64, rows sum to one: those of `hsat.eval.KNNClassifier`, differentiable."""
        return self.vote(images).scores

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the vote on the image wrong?  For `attack(..., success=objective.success)`."""
        with torch.no_grad():
            return self.vote(images).wrong(self.labels)

    def select(self, index: Tensor) -> SoftKNN:
        """The same for the images `index` of the batch."""
        return dataclasses.replace(self, labels=self.labels[index])

    def relabel(self, labels: Tensor) -> SoftKNN:
        """The same vote for another batch, with its labels (n,): the bank is prepared once and not copied."""
        check_labels(labels, classes=self.bank.classes)
        return dataclasses.replace(self, labels=labels.to(self.bank.rows.device))


def soft_knn(
    encoder: EmbeddingFunction,
    bank: BankLike,
    labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    loss: VoteLoss = "margin",
    classes: int | None = None,
) -> SoftKNN:
    """The k-nearest-neighbour vote as a per-image objective, maximised where a wrong class wins.

    encoder: images -> embeddings (n, d), the layer that kNN reads.  bank: an EmbeddingTable, or embeddings (m, d) and
    labels (m,) of the training images.  labels: (n,), the true classes of the images, as indices of the bank's classes;
    the bank goes to their device, once (`relabel` serves further batches).  k, temperature: as in KNNClassifier; k is
    cut to the bank with a warning.  classes: their number, where the bank cannot tell.

    With s_j the cosine similarities of the k nearest rows, V_c = log sum_{j of class c} exp(s_j / temperature); for a
    class without a neighbour, V_c = s / temperature of its nearest row anywhere in the bank.
      margin = max_{c != label} V_c - V_label: the log-odds of the vote.  It is positive exactly where the classifier
               is wrong (a tie lost to a lower class index counts as 1e-12).
      ce     = log sum_c exp V_c - V_label: the cross-entropy of the vote, where every class has a neighbour.
    Neighbours are searched exactly at every evaluation and are those of `hsat.eval.KNNClassifier`: float32 products
    propose k + 8 rows, float64 chooses and searches again where rounding could hide a nearer row, ties go to the
    earlier row.  Gradients flow through the similarities of the neighbours, not through their choice.

    The scores themselves would be flat where all k neighbours share the image's class, and their logarithm infinite
    where none does.  The log-odds are not: the stand-in is no nearer than the k-th neighbour, so it changes no sign,
    and V_c is continuous when its row becomes a neighbour.  "ce" is flat to float64 when the log-odds pass about -700,
    which needs temperatures below 0.003.
    Raises ValueError for impossible k, temperature, loss or labels, and for embeddings of another width than the
    bank's.
    """
    if loss not in VOTE_LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of {VOTE_LOSSES}")
    check_labels(labels)
    ready = vote_bank(bank, k=k, temperature=temperature, classes=classes, device=labels.device)
    check_labels(labels, classes=ready.classes)
    return SoftKNN(encoder, ready, labels, loss)


def lead(value: Tensor, label: Tensor) -> Tensor:
    """max over the wrong classes of value (n, classes) - value at the label, (n,)."""
    own = torch.nn.functional.one_hot(label, value.shape[1]).bool()
    return value.masked_fill(own, -torch.inf).amax(1) - value.gather(1, label[:, None])[:, 0]


def signed(margin: Tensor, wrong: Tensor) -> Tensor:
    """The margin, moved by a constant where its sign is not the decision's: positive where wrong, else at most zero."""
    value = margin.detach()
    return margin + (torch.where(wrong, value.clamp_min(_BARELY), value.clamp_max(0.0)) - value)
