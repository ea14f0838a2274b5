"""The words every room of hsat shares: objectives, threat models, attacks, batches and embedding tables.

Only torch and numpy are imported here; every other room may import this one and nothing here imports a room.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) -> a scalar, or one value per image (n,); attacks MAXIMISE it."""

Encoder = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] -> embeddings (n, d); normalisation of the pixels happens inside."""

LEVELS = ("patch", "slide", "patient")


@runtime_checkable
class ThreatModel(Protocol):
    """What the attacker may do to an image: the only place where eps and the pixel range live."""

    @property
    def eps(self) -> float | Tensor:
        """Size of the ball; a float, or a tensor per image (n,) or broadcastable to (n, c, h, w)."""

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the feasible set around x (n, c, h, w)."""

    def ascent(self, grad: Tensor) -> Tensor:
        """Steepest-ascent direction of unit size in this norm, per image; a zero gradient gives zero."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest feasible point to x_adv: inside the ball around x and inside the pixel range."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack did.  All tensors are detached and live on the device of the images.

    x_adv: (n, c, h, w), dtype of x.  value: the objective at x_adv, (n,) for per-image objectives, else ().
    start_value: the same at the first point the objective saw.  zero_gradient: (n,) int64, number of gradient steps
    in which the image's gradient was exactly zero.  success: (n,) bool, or None when no `success` test was given.
    forwards, backwards: how many times the whole batch went through the objective and back.
    stationary: (n,) bool, images that were given a random start because the clean point was stationary.
    """

    x_adv: Tensor
    value: Tensor
    start_value: Tensor
    zero_gradient: Tensor
    success: Tensor | None
    forwards: int
    backwards: int
    stationary: Tensor | None = None


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
        success: Callable[[Tensor], Tensor] | None = None,
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
        success: Callable[[Tensor], Tensor] | None = None,
    ) -> AttackResult:
        """The same, with what is worth knowing about the run."""


def _as_ids(name: str, ids: Tensor, n: int) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} ids must be a tensor of integers, got {type(ids).__name__}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name} ids must be integers, got {ids.dtype}")
    if ids.shape != (n,):
        raise ValueError(f"{name} ids must have shape ({n},), one per image; got {tuple(ids.shape)}")
    return ids.to(torch.int64)


def _anchors(ids: Tensor) -> int:
    """How many images share their id with another image."""
    if ids.numel() == 0:
        return 0
    counts = torch.unique(ids, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _check_nesting(inner: str, inner_ids: Tensor, outer: str, outer_ids: Tensor) -> None:
    order = torch.argsort(inner_ids, stable=True)
    inner_sorted, outer_sorted = inner_ids[order], outer_ids[order]
    broken = (inner_sorted[1:] == inner_sorted[:-1]) & (outer_sorted[1:] != outer_sorted[:-1])
    if broken.any():
        at = int(broken.nonzero()[0, 0])
        first, second = int(outer_sorted[at]), int(outer_sorted[at + 1])
        raise ValueError(
            f"{inner} {int(inner_sorted[at])} belongs to {outer}s {first} and {second};"
            f" ids must be unique over the cohort, so that a {inner} lies in one {outer}"
        )


@dataclass(frozen=True, eq=False)
class Levels:
    """Patch, slide and patient ids of n images, (n,) int64 each, unique over the cohort.

    `anchors` maps each level to the number of images that share their id with another one.  It is counted once, at
    creation, so that losses need no device-to-host read; `to` carries it along.
    Raises TypeError for ids that are not integers, ValueError for shapes that differ or ids that do not nest.
    """

    patch: Tensor
    slide: Tensor
    patient: Tensor
    anchors: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.anchors:
            return
        n = len(self.patch)
        for name in LEVELS:
            object.__setattr__(self, name, _as_ids(name, getattr(self, name), n))
        patch, slide, patient = (getattr(self, name).cpu() for name in LEVELS)
        _check_nesting("patch", patch, "slide", slide)
        _check_nesting("slide", slide, "patient", patient)
        object.__setattr__(
            self, "anchors", {"patch": _anchors(patch), "slide": _anchors(slide), "patient": _anchors(patient)}
        )

    def __len__(self) -> int:
        return len(self.patch)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Levels:
        """The same ids on another device, without counting again."""
        patch, slide, patient = (getattr(self, name).to(device, non_blocking=non_blocking) for name in LEVELS)
        return Levels(patch, slide, patient, anchors=self.anchors)


@dataclass(frozen=True, eq=False)
class HierarchicalBatch:
    """n images with their place in the hierarchy; the views of one patch are n rows that share its patch id.

    images: (n, c, h, w) floats in [0, 1].  patch, slide, patient: (n,) int64, unique over the cohort and nested.
    label: (n,) int64 class indices or None; the HiDisc loss never reads it.
    Raises TypeError or ValueError, naming the field, when shapes or dtypes disagree or ids do not nest.
    """

    images: Tensor
    patch: Tensor
    slide: Tensor
    patient: Tensor
    label: Tensor | None = None
    _levels: Levels | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise ValueError(f"images must be (n, c, h, w), got shape {tuple(self.images.shape)}")
        if not self.images.dtype.is_floating_point:
            raise TypeError(f"images must be floats in [0, 1], got {self.images.dtype}; divide integers by their range")
        n = len(self.images)
        if self._levels is not None:
            if len(self._levels) != n:
                raise ValueError(f"{n} images but ids for {len(self._levels)}")
            return
        for name in LEVELS:
            object.__setattr__(self, name, _as_ids(name, getattr(self, name), n))
        if self.label is not None:
            object.__setattr__(self, "label", _as_ids("label", self.label, n))
        object.__setattr__(self, "_levels", Levels(self.patch, self.slide, self.patient))

    @property
    def levels(self) -> Levels:
        """The ids alone, as the losses take them."""
        assert self._levels is not None  # set in __post_init__
        return self._levels

    @property
    def counts(self) -> dict[str, int]:
        """Number of distinct patches, slides and patients in the batch (reads the device)."""
        return {name: int(getattr(self, name).unique().numel()) for name in LEVELS}

    def __len__(self) -> int:
        return len(self.images)

    def replace(self, *, images: Tensor) -> HierarchicalBatch:
        """The same ids and labels with other images; nothing is counted or checked again but the number of images."""
        return dataclasses.replace(self, images=images)

    def _map(self, move: Callable[[Tensor], Tensor]) -> HierarchicalBatch:
        patch, slide, patient = (move(getattr(self, name)) for name in LEVELS)
        return HierarchicalBatch(
            images=move(self.images),
            patch=patch,
            slide=slide,
            patient=patient,
            label=None if self.label is None else move(self.label),
            _levels=Levels(patch, slide, patient, anchors=self.levels.anchors),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HierarchicalBatch:
        """The batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> HierarchicalBatch:
        """The batch in page-locked memory; torch's DataLoader calls this when pin_memory=True."""
        return self._map(lambda t: t.pin_memory())

    @classmethod
    def from_grid(cls, images: Tensor, labels: Tensor | None = None) -> HierarchicalBatch:
        """A batch with slot ids from images (P, S, K, V, c, h, w) and labels (P,) of the patients.

        Slot ids number the axes: the same patient drawn into two slots counts as two patients, exactly as in the
        layout of the published code.  Use real ids wherever you have them.
        """
        if images.ndim != 7:
            raise ValueError(f"images must be (patients, slides, patches, views, c, h, w), got {tuple(images.shape)}")
        p, s, k, v = images.shape[:4]
        patch = torch.arange(p * s * k, device=images.device).repeat_interleave(v)
        slide = torch.arange(p * s, device=images.device).repeat_interleave(k * v)
        patient = torch.arange(p, device=images.device).repeat_interleave(s * k * v)
        if labels is not None and labels.shape != (p,):
            raise ValueError(f"labels must have shape ({p},), one per patient; got {tuple(labels.shape)}")
        label = None if labels is None else labels.repeat_interleave(s * k * v)
        return cls(images.flatten(0, 3), patch, slide, patient, label)


_TABLE_IDS = ("label", "patch", "slide", "patient")
_TABLE_TEXT = ("cohort", "split", "encoder")


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """One row per image: all that evaluation knows of a model.

    z: (n, d) float32 unit rows, may be memory-mapped; float64 is rounded and rows of other lengths are normalised (an
    all-zero row stays zero).  label, patch, slide, patient: (n,) int64.  class_names: label i is class_names[i].
    cohort, split, encoder: fingerprints or names; ids of tables of different cohorts are never compared.
    Raises ValueError naming the field when lengths differ, a label has no class name, or z is not finite.
    """

    z: np.ndarray
    label: np.ndarray
    patch: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    class_names: tuple[str, ...]
    cohort: str = ""
    split: str = ""
    encoder: str = ""

    def __post_init__(self) -> None:
        if self.z.ndim != 2:
            raise ValueError(f"z must be (n, d), got shape {self.z.shape}")
        n = len(self.z)
        for name in _TABLE_IDS:
            ids = np.asarray(getattr(self, name))
            if ids.shape != (n,):
                raise ValueError(f"{n} embeddings but {name} has shape {ids.shape}; expected ({n},)")
            if not np.issubdtype(ids.dtype, np.integer):
                raise TypeError(f"{name} must hold integers, got {ids.dtype}")
            object.__setattr__(self, name, ids.astype(np.int64, copy=False))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if n and not (self.label.min() >= 0 and self.label.max() < len(self.class_names)):
            raise ValueError(
                f"labels run from {self.label.min()} to {self.label.max()} but there are {len(self.class_names)}"
                f" class names: {self.class_names}"
            )
        if not isinstance(self.z, np.memmap):
            object.__setattr__(self, "z", _unit_rows(self.z))

    def __len__(self) -> int:
        return len(self.z)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as a folder of .npy files and a table.json; the folder appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path / "table.json").is_file():
            raise FileExistsError(f"{path} exists and is not an embedding table; it is left untouched")
        working = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for name in ("z", *_TABLE_IDS):
                np.save(working / f"{name}.npy", getattr(self, name), allow_pickle=False)
            text: dict[str, Any] = {name: getattr(self, name) for name in _TABLE_TEXT}
            text["class_names"] = list(self.class_names)
            (working / "table.json").write_text(json.dumps(text, indent=1))
            if path.exists():
                shutil.rmtree(path)
            working.replace(path)
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory_map: bool = False) -> EmbeddingTable:
        """Read a table written by `save`; with memory_map=True z stays on disk.  Never unpickles."""
        path = Path(path)
        if not (path / "table.json").is_file():
            raise FileNotFoundError(f"{path} is not an embedding table: {path / 'table.json'} is missing")
        text = json.loads((path / "table.json").read_text())
        arrays: dict[str, Any] = {}
        for name in ("z", *_TABLE_IDS):
            mode: Any = "r" if memory_map and name == "z" else None
            arrays[name] = np.load(path / f"{name}.npy", mmap_mode=mode, allow_pickle=False)
        names = {name: text[name] for name in _TABLE_TEXT}
        return cls(**arrays, class_names=tuple(text["class_names"]), **names)


def _unit_rows(z: np.ndarray) -> np.ndarray:
    if not np.issubdtype(z.dtype, np.floating):
        raise TypeError(f"z must hold floats, got {z.dtype}")
    norms = np.sqrt(np.einsum("ij,ij->i", z, z, dtype=np.float64))
    finite = np.isfinite(norms)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(f"z holds non-finite values in {len(rows)} of {len(z)} rows, first in row {rows[0]}")
    if np.abs(norms - 1.0).max(initial=0.0) > 1e-5:
        scale = np.where(norms > 0, norms, 1.0)
        z = z / scale[:, None]
    return np.ascontiguousarray(z, dtype=np.float32)
