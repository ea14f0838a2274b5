"""Margins of decisions as objectives: their gradients do not fade where cross-entropy's do.

Of a classifier's decision on each image, and of the pooled decisions on slides and patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hsat.types import FittedClassifier
from hsat.types.precision import widest_dtype
from hsat.types.row_checks import check_labels, check_rows

TINY = 1e-12
"""Floor of the denominator of the logit ratio, as in the published code."""

_LOST_TIE = 1e-12  # the margin of a decision that is lost on a tie


@dataclass(frozen=True, eq=False)
class Margin:
    """The best wrong logit, or that of a target, minus the true one; see `margin`."""

    model: Callable[[Tensor], Tensor]
    labels: Tensor
    target: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> margins (n,); without target above 0 exactly where the image is misclassified."""
        logits = _logits(self.model(images), self.labels, least=2, name="margin")
        if self.target is None:
            value = _best_wrong(logits, self.labels) - _of(logits, self.labels)
            return _with_sign(value, logits.argmax(1) != self.labels)
        _check_classes(self.target, logits.shape[1], "target")
        return _of(logits, self.target) - _of(logits, self.labels)

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the decision, the highest logit with ties to the lower class, wrong?"""
        return decision_is_wrong(self.model, self.labels, images)

    def select(self, index: Tensor) -> Margin:
        """The same for the images `index` of the batch."""
        return Margin(self.model, self.labels[index], None if self.target is None else self.target[index])


def margin(model: Callable[[Tensor], Tensor], labels: Tensor, *, target: Tensor | None = None) -> Margin:
    """max over the wrong classes of their logit, minus the logit of the true class, one value per image.

    Carlini and Wagner, arXiv:1608.04644, section V-A (f_6 there, with the sign turned and without its clip); called CW
    loss in arXiv:2003.01690.  Above 0 exactly where the image is misclassified, so `success` and value agree: the
    objective of Square.  A tie that goes to a lower, wrong class has the value 1e-12 in place of 0, and the same
    gradient.
    With a target the value is the target's logit minus the true one: its gradient leads to one class however far that
    is, where the untargeted one may change its mind, or lead to the nearest class alone.  Above 0 then still means
    misclassified, but an image may be misclassified as a third class before.

    Args:
        model: Images (n, c, h, w) -> logits (n, classes), at least 2 classes; for a classifier of embeddings a
            `hsat.classifiers.DecisionModel`.
        labels: (n,) int64, the true classes.
        target: (n,) int64, classes to reach, or None.

    Returns:
        A `DecisionObjective`: images -> margins (n,), float32 or wider.

    Raises:
        ValueError: For labels or targets of another form here; for logits of another form when it is called.

    Example:
        >>> objective = margin(lambda images: images.flatten(1), torch.tensor([0]))
        >>> objective(torch.tensor([0.5, 0.25]).reshape(1, 1, 1, 2))
        tensor([-0.2500])
    """
    _check_class_numbers(labels, "labels")
    _check_target(target, labels)
    return Margin(model, labels, target)


@dataclass(frozen=True, eq=False)
class LogitRatio:
    """Margin divided by a difference of sorted logits; see `dlr`."""

    model: Callable[[Tensor], Tensor]
    labels: Tensor
    target: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> ratios (n,)."""
        least = 3 if self.target is None else 4
        logits = _logits(self.model(images), self.labels, least=least, name="dlr" + " with a target" * (least == 4))
        if self.target is not None:
            _check_classes(self.target, logits.shape[1], "target")
        top = logits.topk(least, dim=1).values
        if self.target is None:
            wrong, spread = _best_wrong(logits, self.labels), top[:, 0] - top[:, 2]
        else:
            wrong, spread = _of(logits, self.target), top[:, 0] - (top[:, 2] + top[:, 3]) / 2
        ratio = (wrong - _of(logits, self.labels)) / spread.clamp_min(TINY)
        return ratio if self.target is not None else _with_sign(ratio, logits.argmax(1) != self.labels)

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the decision, the highest logit with ties to the lower class, wrong?"""
        return decision_is_wrong(self.model, self.labels, images)

    def select(self, index: Tensor) -> LogitRatio:
        """The same for the images `index` of the batch."""
        return LogitRatio(self.model, self.labels[index], None if self.target is None else self.target[index])


def dlr(model: Callable[[Tensor], Tensor], labels: Tensor, *, target: Tensor | None = None) -> LogitRatio:
    """Difference of logits ratio, one value per image; it does not change when logits are shifted or scaled.

    With z_1 >= z_2 >= ... the sorted logits and y the true class, the value is
    (max over i != y of z_i - z_y) / (z_1 - z_3), eq. 6 of Croce and Hein, arXiv:2003.01690;
    with a target t it is (z_t - z_y) / (z_1 - (z_3 + z_4) / 2), eq. 7.  Without target it is above 0
    exactly where the image is misclassified; a lost tie is 1e-12, as that of `margin`.
    The denominator is floored at 1e-12 (the published code adds that number, which would break the invariance).

    Args:
        model: Images (n, c, h, w) -> logits (n, classes), at least 3 classes, 4 with a target.
        labels: (n,) int64, the true classes.
        target: (n,) int64, classes to reach, or None.

    Returns:
        A `DecisionObjective`: images -> ratios (n,).

    Raises:
        ValueError: For labels or targets of another form here; for fewer classes and logits of another form when it is
            called.

    Example:
        >>> objective = dlr(lambda images: images.flatten(1), torch.tensor([0]))
        >>> objective(torch.tensor([0.75, 0.5, 0.25]).reshape(1, 1, 1, 3))
        tensor([-0.5000])
    """
    _check_class_numbers(labels, "labels")
    _check_target(target, labels)
    return LogitRatio(model, labels, target)


def decision_is_wrong(model: Callable[[Tensor], Tensor], labels: Tensor, images: Tensor) -> Tensor:
    """(n,) bool: is the highest logit, ties to the lower class, another class than the label?"""
    with torch.no_grad():
        return model(images).argmax(1) != labels


@runtime_checkable
class EmbeddingDecision(Protocol):
    """A model that decides from embeddings, as `hsat.classifiers.DecisionModel` does."""

    @property
    def fitted(self) -> FittedClassifier:
        """The classifier of embeddings."""

    def embed(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> the embeddings (n, d) that the classifier reads."""

    def classify(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) -> the logits (n, classes) that the model gives for their images."""


@dataclass(frozen=True, eq=False)
class AggregateMargin:
    """Sum over the groups of a batch of the log-odds of their pooled decisions; see `aggregate_margin`.

    Attributes:
        model: Images -> logits, or an `EmbeddingDecision`.
        groups: (g,) the ids, ascending.
        member_of: (n,) int64, the position of each image's group.
        labels: (g,) int64, the class of each group.
    """

    model: Callable[[Tensor], Tensor] | EmbeddingDecision
    groups: Tensor
    member_of: Tensor
    labels: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> a scalar, float64: the sum of `values`."""
        return self.values(images).sum()

    def values(self, images: Tensor) -> Tensor:
        """The margin of each group, (g,): positive exactly where its pooled decision is wrong."""
        evidence = self._evidence(images)
        logits = self._wide_logits(evidence)
        with torch.no_grad():
            wrong = self._wrong(self._scores(evidence))
        share = logits.log_softmax(1)
        highest = share.detach().new_full((len(self.groups), share.shape[1]), -torch.inf)
        where = self.member_of[:, None].expand_as(share)
        highest = highest.scatter_reduce(0, where, share.detach(), "amax")
        total = torch.zeros_like(highest).index_add(0, self.member_of, (share - highest[self.member_of]).exp())
        pooled = highest + total.log()
        return _with_sign(_best_wrong(pooled, self.labels) - _of(pooled, self.labels), wrong)

    def scores(self, images: Tensor) -> Tensor:
        """Pooled class scores (g, classes): the mean over each group's images, as `hsat.eval.pool` gives them."""
        return self._pool(self._scores(self._evidence(images)))

    def wrong(self, images: Tensor) -> Tensor:
        """(g,) bool: is the pooled decision, ties to the lower class index, another class than the label?"""
        with torch.no_grad():
            return self._wrong(self._scores(self._evidence(images)))

    def _evidence(self, images: Tensor) -> Tensor:
        """What logits and scores are made of: embeddings (n, d), or the logits of a model that gives nothing else."""
        if isinstance(self.model, EmbeddingDecision):
            evidence, giver = self.model.embed(images), "the encoder"
        else:
            evidence, giver = self.model(images), "the model"
        check_rows(evidence, len(images), giver)
        if len(evidence) != len(self.member_of):
            raise ValueError(f"groups for {len(self.member_of)} images, but {len(evidence)} embeddings")
        return evidence

    def _wide_logits(self, evidence: Tensor) -> Tensor:
        evidence = evidence.to(widest_dtype(evidence.device))
        logits = self.model.fitted.logits(evidence) if isinstance(self.model, EmbeddingDecision) else evidence
        return _logits(logits, self.labels[self.member_of], least=2, name="aggregate_margin")

    def _scores(self, evidence: Tensor) -> Tensor:
        if isinstance(self.model, EmbeddingDecision):
            return self.model.fitted.scores(evidence)
        return evidence.to(widest_dtype(evidence.device)).softmax(1)

    def _pool(self, scores: Tensor) -> Tensor:
        total = scores.new_zeros(len(self.groups), scores.shape[1])
        size = torch.bincount(self.member_of, minlength=len(self.groups))
        return total.index_add(0, self.member_of, scores) / size[:, None]

    def _wrong(self, scores: Tensor) -> Tensor:
        return self._pool(scores).detach().argmax(1) != self.labels


def aggregate_margin(
    model: Callable[[Tensor], Tensor] | EmbeddingDecision, groups: Tensor, labels: Tensor
) -> AggregateMargin:
    """The decisions on slides or patients as one objective over all their patches.

    With p_ic the softmax over classes of the logits V_ic and P_gc the mean of p_ic over the members i of group g,

        margin_g = max over c != label of log P_gc - log P_g,label.

    A group's margin is moved by a constant, without changing its gradient, where its sign is not that of the decision:
    the mean of the members' class scores, as `hsat.eval.pool` with how="mean" takes it.  For kNN these are the vote
    shares, zeros included, while the logits let a class without a neighbour take part.  So the margin is positive
    exactly where the decision is wrong, and its gradient does not vanish where all votes agree.

    The value is a scalar, the sum over groups: a patch's value depends on the other patches of its group, which values
    per image would deny.  Hence no `success` and no `.select`; restarts are kept or dropped whole.  `.values` has the
    margins (g,), `.scores` the pooled scores (g, classes) and `.wrong` the decisions (g,), by `.groups`.

    Args:
        model: A `DecisionModel`, of whose embeddings logits are computed in float64 and scores are the classifier's;
            or any function from images to logits (n, classes), whose scores are the softmax.
        groups: (n,) ids, `batch.slide` or `batch.patient`.  The batch must hold every patch of its groups, for the
            decision is that of the patches it holds.
        labels: (n,) the class of each image, as an index of the model's classes; one class per group.

    Returns:
        The objective, a scalar for the batch.

    Raises:
        TypeError: For labels that are no integers.
        ValueError: For groups of another shape, labels that are no classes of the model, and for a group with two
            labels, naming it.
    """
    check_labels(labels, classes=len(model.fitted.class_names) if isinstance(model, EmbeddingDecision) else None)
    if groups.shape != labels.shape or groups.dtype.is_floating_point:
        raise ValueError(
            f"groups must be integers ({len(labels)},), one id per label; got {groups.dtype} {tuple(groups.shape)}"
        )
    names, member_of = torch.unique(groups.to(labels.device), return_inverse=True)
    shared = labels.new_zeros(len(names)).scatter_reduce(0, member_of, labels, "amax", include_self=False)
    if len(split := (shared[member_of] != labels).nonzero().flatten()):
        group = groups.to(labels.device)[split[0]]
        classes_of_group = sorted(set(labels[member_of == member_of[split[0]]].tolist()))
        raise ValueError(
            f"group {int(group)} holds images with labels {classes_of_group}; a slide or patient has one label"
        )
    return AggregateMargin(model, names, member_of, shared)


def _with_sign(margin: Tensor, wrong: Tensor) -> Tensor:
    """The margin, moved by a constant where its sign is not the decision's: positive where wrong, else at most zero."""
    value = margin.detach()
    signed = torch.where(wrong, torch.where(value <= 0, _LOST_TIE, value), value.clamp_max(0.0))
    return margin + (signed - value)


def _check_class_numbers(labels: Tensor, name: str) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        got = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} must be (n,) int64 class numbers, got {got}")


def _check_target(target: Tensor | None, labels: Tensor) -> None:
    if target is None:
        return
    _check_class_numbers(target, "target")
    if target.shape != labels.shape:
        raise ValueError(f"target must have the shape of labels, {tuple(labels.shape)}; got {tuple(target.shape)}")
    if labels.device.type == "cpu" and bool((target == labels).any()):
        raise ValueError("target holds the true class of some images; an attack must aim at another class")


def _logits(logits: Tensor, labels: Tensor, *, least: int, name: str) -> Tensor:
    """The logits in float32 or wider, checked against labels and the number of classes that is needed."""
    check_rows(logits, len(labels), "the model", columns="classes")
    classes = logits.shape[1]
    if classes < least:
        hint = "; use `margin`, which needs two" if least > 2 else ""
        raise ValueError(f"{name} needs at least {least} classes, the model gives {classes}{hint}")
    _check_classes(labels, classes, "labels")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_classes(labels: Tensor, classes: int, name: str) -> None:
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{name} go from {int(labels.min())} to {int(labels.max())}, but the model gives {classes} classes"
        )


def _of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def _best_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1)
