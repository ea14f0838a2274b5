"""Images with their place in the hierarchy of patches, slides and patients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hsat.quantities import fields_repr

LEVELS = ("patch", "slide", "patient")
UNLABELLED = "unlabelled"
"""The class of patches that have none."""


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
    """Patch, slide and patient ids of n images, unique over the cohort.

    Attributes:
        patch: (n,) int64.
        slide: (n,) int64.
        patient: (n,) int64.
        anchors: For each level the number of images that share their id with another one.  It is counted once, at
            creation, so that losses need no device-to-host read; `to` carries it along.

    Raises:
        TypeError: For ids that are not integers.
        ValueError: For shapes that differ or ids that do not nest.

    Example:
        >>> patch, slide, patient = (torch.tensor(ids) for ids in ([0, 0, 1, 2], [0, 0, 0, 1], [0, 0, 0, 0]))
        >>> Levels(patch, slide, patient).anchors
        {'patch': 2, 'slide': 3, 'patient': 4}
    """

    patch: Tensor
    slide: Tensor
    patient: Tensor
    anchors: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n = len(self.patch) if getattr(self.patch, "ndim", 1) else 1  # a 0-d tensor is refused by its shape below
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

    def __repr__(self) -> str:
        return fields_repr(self, LEVELS)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Levels:
        """The same ids on another device, without counting again.

        Args:
            device: Where the tensors go.
            non_blocking: As in `torch.Tensor.to`.

        Returns:
            Levels whose tensors are there.
        """
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def _map(self, move: Callable[[Tensor], Tensor]) -> Levels:
        moved = object.__new__(Levels)  # not the constructor, which would read the ids to check and count them
        for name in LEVELS:
            object.__setattr__(moved, name, move(getattr(self, name)))
        object.__setattr__(moved, "anchors", self.anchors)
        return moved


@dataclass(frozen=True, eq=False)
class HierarchicalBatch:
    """n images with their place in the hierarchy; the views of one patch are rows that share its patch id.

    Attributes:
        images: (n, c, h, w) floats in [0, 1].
        patch: (n,) int64, unique over the cohort; a patch lies in one slide.
        slide: (n,) int64; a slide lies in one patient.
        patient: (n,) int64.
        label: (n,) int64 class indices or None; the HiDisc loss never reads it.

    Raises:
        TypeError: For a dtype that does not fit, naming the field.
        ValueError: For shapes that disagree or ids that do not nest, naming the field.

    Example:
        >>> batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 3, 2, 3, 8, 8))  # patients, slides, patches, views
        >>> len(batch), batch.counts
        (24, {'patch': 12, 'slide': 4, 'patient': 2})
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
        n, known = len(self.images), self._levels
        kept = known is not None and all(getattr(known, name) is getattr(self, name) for name in LEVELS)
        if known is not None and kept and len(known) != n:
            raise ValueError(f"{n} images but ids for {len(known)}")
        if self.label is not None:
            object.__setattr__(self, "label", _as_ids("label", self.label, n))
        if kept:
            return
        for name in LEVELS:
            object.__setattr__(self, name, _as_ids(name, getattr(self, name), n))
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

    def __repr__(self) -> str:
        return fields_repr(self, ("images", *LEVELS, "label"))

    def replace(self, *, images: Tensor) -> HierarchicalBatch:
        """The same ids and labels with other images; nothing is counted or checked again but the number of images.

        Args:
            images: (n, c, h, w), as many as before.

        Returns:
            A batch that shares all ids with this one.
        """
        return dataclasses.replace(self, images=images)

    def _map(self, move: Callable[[Tensor], Tensor]) -> HierarchicalBatch:
        levels = self.levels._map(move)
        return HierarchicalBatch(
            images=move(self.images),
            patch=levels.patch,
            slide=levels.slide,
            patient=levels.patient,
            label=None if self.label is None else move(self.label),
            _levels=levels,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HierarchicalBatch:
        """The batch on another device.

        Args:
            device: Where the tensors go.
            non_blocking: As in `torch.Tensor.to`.

        Returns:
            A batch whose tensors are there.
        """
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> HierarchicalBatch:
        """The batch in page-locked memory; torch's DataLoader calls this when pin_memory=True."""
        return self._map(lambda t: t.pin_memory())

    @classmethod
    def from_grid(cls, images: Tensor, labels: Tensor | None = None) -> HierarchicalBatch:
        """A batch with slot ids.

        Slot ids number the axes: the same patient drawn into two slots counts as two patients, exactly as in the
        layout of the published code.  Use real ids wherever you have them.

        Args:
            images: (patients, slides, patches, views, c, h, w).
            labels: (patients,) ints.

        Returns:
            A batch of patients x slides x patches x views images.

        Raises:
            ValueError: For other shapes.

        Example:
            >>> HierarchicalBatch.from_grid(torch.rand(2, 1, 1, 2, 3, 8, 8)).patient
            tensor([0, 0, 1, 1])
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


def require_ids(item: Any) -> HierarchicalBatch:
    """The batch; TypeError that says what to write where it has no ids of slides and patients."""
    if isinstance(item, HierarchicalBatch) or not (isinstance(item, list | tuple) and isinstance(item[0], Tensor)):
        batch: HierarchicalBatch = item  # what is no batch at all fails where it is used
        return batch
    raise TypeError(
        f"this evaluation needs to know patients and slides, and the loader gives {type(item).__name__}"
        f"{collate_hint(item)}."
        " Give patch_loader(PatchDataset(cohort, ...), batch_size=...), or batches"
        " HierarchicalBatch(images, patch, slide, patient, labels) with ids of your own; for single images without"
        " patients evaluate_classifier(DecisionModel(encoder, classifier.fit(embed(encoder, bank))), loader, attacks)"
        " takes pairs (images, labels)"
    )


def collate_hint(item: Any) -> str:
    """What to pass to a DataLoader whose batches are stacked samples; "" for other batches."""
    if hasattr(item, "paths"):  # samples of hsat's datasets that torch has stacked
        return ": pass collate_fn=hsat.collate to the DataLoader, or use hsat.patch_loader"
    return ""
