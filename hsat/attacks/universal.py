"""One perturbation for all images: found without labels, applied to any encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks import radius
from hsat.attacks.gradient import ImageGradient, check_finite
from hsat.attacks.objectives import DISTANCES, Distance, feature_drift
from hsat.attacks.one_for_all import FittedUniversal
from hsat.attacks.threat import L2, Linf
from hsat.types import EmbeddingFunction, HierarchicalBatch, Objective

MakeObjective = Callable[[Tensor, HierarchicalBatch], Objective]


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation:
    """Settings of a universal perturbation; `fit` gives the perturbation and leaves this object as it is.

    One delta for all images (Moosavi-Dezfooli et al., arXiv:1610.08401), found by stochastic gradient ascent over
    batches, delta <- project(delta + step_size * ascent(gradient of the mean objective at clip(x + delta)))
    (Shafahi et al., arXiv:1811.11304, algorithm 1, with the attacked network fixed).  Label-free: the objective is the
    mean drift of the embeddings, so that no diagnosis is needed to make it.

    threat: Linf or L2, with an eps that is the same for all images (per channel is fine).  step_size: in units of its
    norm.  epochs: passes over the loader; epochs * batches * step_size should be well above eps.  distance: see
    `feature_drift`.
    """

    threat: Linf | L2
    step_size: float
    epochs: int
    distance: Distance = "cosine"

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf | L2):
            raise TypeError(f"a universal perturbation needs Linf or L2, got {self.threat!r}")
        eps = self.threat.eps
        if isinstance(eps, Tensor) and (eps.ndim != 4 or eps.shape[0] != 1):
            raise ValueError(f"one perturbation for all images needs one eps for all; got eps {tuple(eps.shape)}")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be a finite number above 0, got {self.step_size!r}")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be a whole number >= 1, got {self.epochs!r}")
        if self.distance not in DISTANCES:
            raise ValueError(f"unknown distance {self.distance!r}; choose one of {DISTANCES}")

    def fit(
        self,
        loader: Iterable[HierarchicalBatch],
        encode: EmbeddingFunction,
        *,
        objective: MakeObjective | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        note: str = "",
    ) -> FittedUniversal:
        """The perturbation that moves the embeddings of the loader's images most, on average.

        loader: HierarchicalBatches of one image size; read `epochs` times, so not a one-way iterator.  Use patients
        that the evaluation does not.  encode: images -> (n, d), such as `encoder.features`; keep its module `frozen`.
        objective: (images, batch) -> an objective, in place of the drift; for instance classification with the labels.
        generator: source of the random start (a point of the ball, since the clean images are stationary for a drift);
        torch's global one if None.  device: where the images go; None leaves them where they are.
        note: kept with the result, to say what it was made on.
        Raises ValueError for an empty loader, a loader that gives nothing the second time, images of other sizes or
        outside the range; what the gradient raises.
        """
        climb = _Fit(self, encode, objective, generator, device)
        for epoch in range(self.epochs):
            values = [climb.see(batch) for batch in loader]
            if not values:
                again = "a second time; give a list or a DataLoader" if epoch else ": nothing to fit"
                raise ValueError(f"the loader gave no batches {again}")
            images = sum(count for count, _ in values)
            climb.history.append(sum(count * value for count, value in values) / images)
        assert climb.delta is not None
        return FittedUniversal(
            threat=self.threat, delta=climb.delta, settings=repr(self), history=tuple(climb.history), note=note
        )

    def __repr__(self) -> str:
        options = f"step_size={radius.text(self.step_size)}, epochs={self.epochs}, distance={self.distance!r}"
        return f"UniversalPerturbation(threat={self.threat!r}, {options})"


class _Fit:
    """The perturbation on its way, and the mean objective of each pass."""

    def __init__(
        self,
        settings: UniversalPerturbation,
        encode: EmbeddingFunction,
        objective: MakeObjective | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
    ) -> None:
        threat = settings.threat
        width = threat.high - threat.low
        self.settings, self.encode, self.objective = settings, encode, objective
        self.generator, self.device = generator, device
        self.ball = dataclasses.replace(threat, low=-width, high=width)  # of delta, around zero, without the box
        self.delta: Tensor | None = None
        self.history: list[float] = []

    def see(self, batch: HierarchicalBatch) -> tuple[int, float]:
        """One step; how many images there were, and their mean objective before it."""
        images = batch.images.detach().to(self.device, non_blocking=True)
        clean, outside = self.settings.threat.admit(images)
        if bool(outside):
            self.settings.threat.project(images, images)  # raises, with the extremes
        work = torch.promote_types(clean.dtype, torch.float32)
        origin = torch.zeros_like(clean[:1], dtype=work)
        if self.delta is None:
            self.delta = self.ball.start_inside(origin, self.generator)
        self.delta = self.delta.to(origin)
        if self.delta.shape != origin.shape:
            first, now = tuple(self.delta.shape[1:]), tuple(origin.shape[1:])
            raise ValueError(
                f"a universal perturbation is for images of one size; the loader began with {first} and now gives"
                f" {now}. Pass image_size to the dataset"
            )
        value, grad = ImageGradient(self.delta, work)(self._mean_objective(clean, batch), self.delta)
        check_finite(~grad.isfinite().flatten(1).all(1))
        step = self.settings.step_size * self.ball.ascent(grad)
        self.delta = self.ball.around(origin)(self.delta + step)
        return len(clean), float(value)

    def _mean_objective(self, clean: Tensor, batch: HierarchicalBatch) -> Objective:
        threat = self.settings.threat
        if self.objective is None:
            inner: Objective = feature_drift(self.encode, clean, self.settings.distance)
        else:
            inner = self.objective(clean, batch)
        return lambda delta: inner((clean + delta).clamp(threat.low, threat.high).to(clean.dtype)).mean()
