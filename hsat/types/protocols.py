"""Objectives, threat models, attacks and classifiers: what the parts of hsat need to know of each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hsat.quantities import fields_repr
from hsat.types.table import EmbeddingTable

Objective = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) -> a scalar, or one value per image (n,); attacks MAXIMISE it.

Any function will do.  One with values per image may offer more, and attacks use it where it is there:

- `select(index)`: the same objective for the images `index` (a tensor of ints) of the batch.  Images that `success` has
  stopped are then left out of the passes; without it the objective always sees the whole batch in order.
- `stationary_at_clean`: True where the clean images are a stationary point, as for a drift from their own embeddings.
  Attacks without a random start then begin at a random point all the same, and count it.
- `success(images)`: (n,) bool, is the attack done with the image?  It is no part of the loop: hand it to the call,
  `attack(x, objective, success=objective.success)`.
"""

SuccessTest = Callable[[Tensor], Tensor]
"""Adversarial images (n, c, h, w) -> (n,) bool: images that succeed are stopped where they are."""

EmbeddingFunction = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] -> embeddings (n, d); normalisation of the pixels happens inside."""


@runtime_checkable
class DecisionObjective(Protocol):
    """An objective of a model's logits: how far each image is from being misclassified.

    Attributes:
        model: Images (n, c, h, w) -> logits (n, classes).
        labels: (n,) int64, the true classes.
    """

    @property
    def model(self) -> Callable[[Tensor], Tensor]:
        """Images (n, c, h, w) -> logits (n, classes)."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64, the true classes."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> values (n,), to be maximised."""

    def select(self, index: Tensor) -> Self:
        """The same objective for the images `index` of the batch.

        Args:
            index: (m,) int64, places in the batch.

        Returns:
            The objective of these images, in this order.
        """

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the decision on the image wrong?

        Args:
            images: (n, c, h, w), as many as there are labels.

        Returns:
            (n,) bool on the images' device.
        """


class ThreatModel(ABC):
    """What the attacker may do to an image: the only place where eps and the pixel range live.  Subclass it.

    A threat model of your own says its `eps` and three things: a random point, a direction and a projection.  What
    follows has defaults, to be overridden where there is something better to say: `clamp`, for a pixel range;
    `projection_at`, to compute once per batch what all projections share; `select`, where images differ.  A subclass
    that overrides `project` alone gets the default `projection_at` back, which calls its `project`.

        class OnlyBrighter(ThreatModel):
            eps = 0.1

            def random_start(self, x, generator=None):
                return x

            def steepest_ascent(self, grad):
                return grad.clamp(min=0).sign()

            def project(self, x_adv, x):
                return torch.minimum(torch.maximum(x_adv, x), (x + self.eps).clamp(max=1))

    Attributes:
        eps: Size of the ball; a float, or a tensor per image (n,) or broadcastable to (n, c, h, w).
        low: Least pixel value.
        high: Largest pixel value.
    """

    eps: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        project, projection_at = (
            next(place for place, home in enumerate(cls.__mro__) if name in vars(home))
            for name in ("project", "projection_at")
        )
        if project < projection_at:  # an inherited shortcut would pass the new projection by
            setattr(cls, "projection_at", ThreatModel.projection_at)  # noqa: B010  # mypy takes no assignment here

    @abstractmethod
    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the feasible set around x (n, c, h, w), which lies in the pixel range; dtype of x.

        Args:
            x: (n, c, h, w) images in the pixel range.
            generator: Source of noise; None is torch's global generator.

        Returns:
            (n, c, h, w) feasible points.
        """

    @abstractmethod
    def steepest_ascent(self, grad: Tensor) -> Tensor:
        """Steepest-ascent direction of unit size in this norm, per image; a zero gradient gives zero.

        Args:
            grad: (n, c, h, w), the gradient of the objective.

        Returns:
            (n, c, h, w), the direction in which the objective rises fastest; the attack scales it by its step size.
        """

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest feasible point to x_adv: inside the ball around x and inside the pixel range.

        Args:
            x_adv: (n, c, h, w), anywhere.
            x: (n, c, h, w) clean images in the pixel range.

        Returns:
            (n, c, h, w), the nearest feasible points, in x_adv's dtype.
        """

    def projection_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """x_adv -> `project(x_adv, x)`, for a fixed x that lies in the pixel range.

        Args:
            x: (n, c, h, w) clean images in the pixel range.

        Returns:
            The projection, which may keep what depends on x alone.
        """
        return lambda x_adv: self.project(x_adv, x)

    def clamp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x clamped to the pixel range, and a 0-d bool on its device: must the images be refused?

        Attacks call it first, and read the flag once.  By default every image is admitted as it is.

        Args:
            x: (n, c, h, w) images.

        Returns:
            The images, and the flag.
        """
        return x, torch.zeros((), dtype=torch.bool, device=x.device)

    def select(self, index: Tensor) -> ThreatModel:
        """The threat model of the images `index` of a batch; by default it is the same for all images.

        Args:
            index: (m,) int64, places in the batch.

        Returns:
            The threat model of these images, in this order.
        """
        return self


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack did.  All tensors are detached and live on the device of the images.

    Attributes:
        x_adv: (n, c, h, w), dtype of x.
        value: The objective at x_adv, (n,) for per-image objectives, else ().
        start_value: The same at the first point the objective saw.
        zero_gradient: (n,) int64, number of gradient steps in which the image's gradient was exactly zero.
        success: (n,) bool, or None when no `success` test was given.
        forwards: How many times the whole batch went through the objective.
        backwards: How many times it went back.
        stationary: (n,) bool, images that were given a random start because the clean point was stationary.
        broken_by: Of an ensemble, for each image the name of the member that broke it, "clean" where it was wrong
            before any attack, "" where it withstood all.
        members: Of an ensemble, what each member did, in the order of their turns.
        never_moved: (n,) bool, images that no member with gradients moved; None where comparing x_adv with x tells.
        embedding: (n, d), what the model decides from at x_adv; None where it was not kept.
        outside: Of another library's attack, (n,) float64, how far a pixel of the library's image lay from x_adv, the
            nearest image that the threat model allows; infinite where it was NaN.
    """

    x_adv: Tensor
    value: Tensor
    start_value: Tensor
    zero_gradient: Tensor
    success: Tensor | None
    forwards: int
    backwards: int
    stationary: Tensor | None = None
    broken_by: tuple[str, ...] | None = None
    members: tuple[MemberStats, ...] | None = None
    never_moved: Tensor | None = None
    embedding: Tensor | None = None
    outside: Tensor | None = None

    def __repr__(self) -> str:
        return fields_repr(self, (one.name for one in fields(self)))


@dataclass(frozen=True, kw_only=True)
class MemberStats:
    """What one member of an ensemble did.

    Attributes:
        name: The member's name.
        attack: Its complete settings.
        black_box: Whether it has no gradients of the model that is attacked.
        seen: Images that it was given.
        newly_broken: Images that it was the first to break.
        forwards: Forward passes, times images.
        backwards: Backward passes, times images.
    """

    name: str
    attack: str
    black_box: bool
    seen: int = 0
    newly_broken: int = 0
    forwards: int = 0
    backwards: int = 0


@runtime_checkable
class Attack(Protocol):
    """A frozen set of numbers that is called on images and any function of images."""

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Adversarial images: same shape, dtype and device as x; detached."""

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> AttackResult:
        """The same, with what is worth knowing about the run.

        Args:
            x: (n, c, h, w) images in the threat model's range.
            objective: What is maximised.
            start: (n, c, h, w), where the first restart begins; projected first.
            generator: Source of noise; None is torch's global generator.
            ids: (n,) ints, by which an image's noise is drawn.
            success: (x_adv) -> (n,) bool, which stops images early.

        Returns:
            The adversarial images, the objective's values, and what the run cost.
        """


@runtime_checkable
class Classifier(Protocol):
    """Frozen settings of a classifier of embeddings."""

    def fit(self, bank: EmbeddingTable) -> FittedClassifier:
        """A classifier that decides by the rows of this table.

        Args:
            bank: Embeddings with labels.

        Returns:
            The classifier, with settings and bank fixed.
        """


@runtime_checkable
class FittedClassifier(Protocol):
    """A classifier of embeddings: differentiable logits, scores, and probabilities of whole tables.

    The decision is the highest logit; ties go to the lower class.  The highest score is the same class.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the columns of logits and scores."""

    @property
    def classes_with_rows(self) -> int:
        """Number of classes that the classifier was fitted on; with one there is nothing to decide."""

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """What it decides from: unit rows, or the embeddings as the encoder gives them."""

    def logits(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) as the encoder gives them -> (n, classes), finite and differentiable.

        float32; float64 only for float64 z.

        Args:
            z: (n, d) embeddings, on the classifier's device.

        Returns:
            (n, classes), finite, with gradients; float32, and float64 only for float64 z.
        """

    def scores(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) -> class scores (n, classes), differentiable; rows sum to one.

        Args:
            z: (n, d) embeddings, on the classifier's device.

        Returns:
            (n, classes) in [0, 1], with gradients.
        """

    def predict_proba(self, z: np.ndarray | Tensor | EmbeddingTable) -> np.ndarray:
        """Class scores (n, classes) float64 of an array, a tensor or a table, in blocks.

        Args:
            z: (n, d), of any length where the classifier reads unit rows.

        Returns:
            (n, classes) float64; rows sum to one.
        """

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its tensors on a device.

        Args:
            device: Where embeddings will be.

        Returns:
            The classifier there; the same object where nothing has to move.
        """
