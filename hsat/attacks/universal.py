"""One perturbation for all images: made without labels, applied to any encoder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsat.attacks.base import check_counts
from hsat.attacks.initialization import check_ids, check_start
from hsat.attacks.loop import ImageGradient, check_finite
from hsat.attacks.objectives import DISTANCES, Distance, feature_drift
from hsat.attacks.pgd import unguided_result
from hsat.attacks.threat import L2, Linf, detach_images, require_images, settings_number, tensor_digest
from hsat.files import write_file
from hsat.types import AttackResult, EmbeddingFunction, HierarchicalBatch, Objective, SuccessTest
from hsat.untrusted import check_regular, strict_json

FORMAT = "hsat universal perturbation 1"

BatchObjectiveFactory = Callable[[Tensor, HierarchicalBatch], Objective]
"""(images, batch) -> the objective that is climbed on that batch."""


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation:
    """Settings of a universal perturbation; `fit` gives the perturbation and leaves this object as it is.

    One delta for all images (Moosavi-Dezfooli et al., arXiv:1610.08401), found by stochastic gradient ascent over
    batches, delta <- project(delta + step_size * ascent(gradient of the mean objective at clip(x + delta)))
    (Shafahi et al., arXiv:1811.11304, algorithm 1, with the attacked network fixed).  Label-free: the objective is the
    mean drift of the embeddings, so that no diagnosis is needed to make it.

    Attributes:
        threat: Linf or L2, with an eps that is the same for all images (per channel is fine).
        step_size: In units of the threat model's norm.
        epochs: Passes over the loader; epochs * batches * step_size should be well above eps.
        distance: See `feature_drift`.
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
        check_counts(epochs=self.epochs)
        if self.distance not in DISTANCES:
            raise ValueError(f"unknown distance {self.distance!r}; choose one of {DISTANCES}")

    def fit(
        self,
        loader: Iterable[HierarchicalBatch],
        encode: EmbeddingFunction,
        *,
        objective: BatchObjectiveFactory | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        note: str = "",
    ) -> FittedUniversal:
        """The perturbation that moves the embeddings of the loader's images most, on average.

        Args:
            loader: HierarchicalBatches of one image size; read `epochs` times, so not a one-way iterator.  Use patients
                that the evaluation does not.
            encode: Images (n, c, h, w) -> embeddings (n, d), such as `encoder.features`; keep its module `frozen`.
            objective: (images, batch) -> an objective, in place of the drift; for instance classification with the
                labels.
            generator: Source of the random start (a point of the ball, since the clean images are stationary for a
                drift); torch's global one if None.
            device: Where the images go; None leaves them where they are.
            note: Kept with the result, to say what it was made on.

        Raises:
            ValueError: For an empty loader, a loader that gives nothing the second time, and images of other sizes or
                outside the range.
        """
        fit = _UniversalFit(self, encode, objective, generator, device)
        for epoch in range(self.epochs):
            values = [fit.step(batch) for batch in loader]
            if not values:
                again = "a second time; give a list or a DataLoader" if epoch else ": nothing to fit"
                raise ValueError(f"the loader gave no batches {again}")
            images = sum(count for count, _ in values)
            fit.history.append(sum(count * value for count, value in values) / images)
        assert fit.delta is not None
        return FittedUniversal(
            threat=self.threat, delta=fit.delta, settings=repr(self), history=tuple(fit.history), note=note
        )

    def __repr__(self) -> str:
        options = f"step_size={settings_number(self.step_size)}, epochs={self.epochs}, distance={self.distance!r}"
        return f"UniversalPerturbation(threat={self.threat!r}, {options})"


class _UniversalFit:
    """The perturbation so far, and the mean objective of each pass."""

    def __init__(
        self,
        settings: UniversalPerturbation,
        encode: EmbeddingFunction,
        objective: BatchObjectiveFactory | None,
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

    def step(self, batch: HierarchicalBatch) -> tuple[int, float]:
        """One step; how many images there were, and their mean objective before it."""
        images = batch.images.detach().to(self.device, non_blocking=True)
        clean = require_images(images, self.settings.threat)
        work = torch.promote_types(clean.dtype, torch.float32)
        origin = torch.zeros_like(clean[:1], dtype=work)
        if self.delta is None:
            self.delta = self.ball.random_start(origin, self.generator)
        self.delta = self.delta.to(origin)
        if self.delta.shape != origin.shape:
            first_shape, shape = tuple(self.delta.shape[1:]), tuple(origin.shape[1:])
            raise ValueError(
                f"a universal perturbation is for images of one size; the loader began with {first_shape} and now gives"
                f" {shape}. Pass image_size to the dataset"
            )
        value, grad = ImageGradient(self.delta, work)(self._mean_objective(clean, batch), self.delta)
        check_finite(~grad.isfinite().flatten(1).all(1))
        ascent = self.settings.step_size * self.ball.steepest_ascent(grad)
        self.delta = self.ball.projection_at(origin)(self.delta + ascent)
        return len(clean), float(value)

    def _mean_objective(self, clean: Tensor, batch: HierarchicalBatch) -> Objective:
        threat = self.settings.threat
        if self.objective is None:
            inner: Objective = feature_drift(self.encode, clean, self.settings.distance)
        else:
            inner = self.objective(clean, batch)
        return lambda delta: inner((clean + delta).clamp(threat.low, threat.high).to(clean.dtype)).mean()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FittedUniversal:
    """An attack that adds one delta to every image and projects; it needs no gradients.

    `start`, `generator` and `ids` change nothing, since nothing is drawn; `success` is called once, with the result.
    Images of another size than delta's are a ValueError that names both.

    Attributes:
        threat: What the projection keeps to.
        delta: (1, c, h, w), the perturbation.
        settings: repr of the UniversalPerturbation that made it.
        history: Mean objective of each pass while it was made.
        note: What it was made on.
    """

    threat: Linf | L2
    delta: Tensor
    settings: str = ""
    history: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.delta.ndim != 4 or len(self.delta) != 1 or not bool(self.delta.isfinite().all()):
            raise ValueError(f"delta must be (1, c, h, w) and finite, got shape {tuple(self.delta.shape)}")
        object.__setattr__(self, "delta", self.delta.detach().clone())

    @property
    def random_start(self) -> bool:
        """False: nothing is drawn when it is applied."""
        return False

    @property
    def uses_objective(self) -> bool:
        """False: the objective is not asked."""
        return False

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
        """project(x + delta), same shape, dtype and device as x, detached."""
        check_ids(ids, len(x))
        check_start(start, x)
        if x.ndim != 4 or x.shape[1:] != self.delta.shape[1:]:
            raise ValueError(
                f"this perturbation is for images of shape (n, {', '.join(map(str, self.delta.shape[1:]))}); got"
                f" {tuple(x.shape)}. Fit another one at that size, or resize the images"
            )
        x = detach_images(x)
        work = torch.promote_types(x.dtype, torch.float32)
        moved = x.to(work) + self.delta.to(x.device, work)
        return self.threat.project(moved.to(x.dtype), x)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The same with the objective's value at the images and at the perturbed images; see `unguided_result`."""
        x_adv = self(x, objective, start=start, ids=ids)
        return unguided_result(x_adv, x, objective, success=success, score=score)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write delta and everything about it as safetensors; the file appears whole or not at all."""
        from safetensors.torch import save

        eps = self.threat.eps
        tensors = {"delta": self.delta.cpu().contiguous()} | ({"eps": eps.cpu()} if isinstance(eps, Tensor) else {})
        about = {
            "threat": type(self.threat).__name__,
            "eps": None if isinstance(eps, Tensor) else eps,
            "low": self.threat.low,
            "high": self.threat.high,
            "settings": self.settings,
            "history": self.history,
            "note": self.note,
        }
        return write_file(path, save(tensors, metadata={"format": FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedUniversal:
        """Read what `save` wrote.  Raises FileNotFoundError, or ValueError naming the file for anything else."""
        from safetensors import SafetensorError, safe_open

        check_regular(path, kind="universal perturbation")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, wanted {FORMAT!r}")
            about: dict[str, Any] = strict_json(metadata["about"], where="about", depth=3, containers=10)
            kinds: dict[str, type[Linf | L2]] = {"Linf": Linf, "L2": L2}
            eps = tensors["eps"] if about["eps"] is None else about["eps"]
            return cls(
                threat=kinds[about["threat"]](eps, low=about["low"], high=about["high"]),
                delta=tensors["delta"],
                settings=about["settings"],
                history=tuple(about["history"]),
                note=about["note"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a universal perturbation that hsat saved: {error}") from error

    def __repr__(self) -> str:
        delta = f"tensor(shape={tuple(self.delta.shape)}, sha256={tensor_digest(self.delta)[:8]})"
        return f"FittedUniversal(threat={self.threat!r}, delta={delta}, settings={self.settings!r}, note={self.note!r})"
