"""Perturbations kept from epoch to epoch, so that a few steps begin where earlier ones ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from hsat.attacks.initialization import to_device_of
from hsat.types import HierarchicalBatch, ThreatModel


class WarmStarts:
    """The last perturbation of every image, by patch id and place among the images of that patch in the batch.

        starts = WarmStarts()
        result = adversarial_step(model, loss, attack, batch, start=starts.points(batch, threat, generator=generator))
        starts.keep(batch, result.x_adv)

    Zheng et al., arXiv:1912.11969 (attacks accumulated over epochs).  They undo the augmentation before they store a
    perturbation; here it is stored in the pixels that the network saw.  It therefore helps only where a patch shows the
    same pixels every time; after random crops, flips or rotations it is no better than noise.  ids must be those of
    patches ("true"), not places in a batch.

    Stored on the CPU as int8 with one float32 scale per image: c * h * w bytes each, with an error of at most 1/254 of
    the image's largest change.  The object belongs to one rank.  `state_dict` goes into `save_checkpoint(extra=...)`,
    so that runs resume bit for bit.

    Attributes:
        capacity: Number of images kept at most, the longest unused are dropped; None keeps all.
    """

    def __init__(self, *, capacity: int | None = None) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            raise ValueError(f"capacity must be a number of images >= 1 or None, got {capacity!r}")
        self.capacity = capacity
        self._kept: dict[tuple[int, int], tuple[Tensor, float]] = {}

    def __len__(self) -> int:
        """Number of images whose perturbation is known."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of the perturbations, in bytes."""
        return sum(delta.numel() for delta, _ in self._kept.values())

    def points(
        self, batch: HierarchicalBatch, threat: ThreatModel, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Starts (n, c, h, w) for an attack: image plus kept perturbation, projected; random where none is known.

        Random points are drawn for the whole batch, so the generator advances by the same amount whatever is known.

        Args:
            batch: Images with the ids of their patches.
            threat: The feasible set of the attack that starts there.
            generator: Source of the random points.

        Returns:
            (n, c, h, w), feasible.

        Raises:
            ValueError: Naming the patch whose image has another shape than the one that was kept.
        """
        x = batch.images.detach()
        points = threat.random_start(x, generator)
        kept = {row: self._kept[key] for row, key in enumerate(_keys(batch)) if key in self._kept}
        if not kept:
            return points
        for row, (delta, _) in kept.items():
            shape = tuple(delta.shape)
            if shape != tuple(x.shape[1:]):
                raise ValueError(
                    f"patch {int(batch.patch[row])} was kept with shape {shape} and now has {tuple(x.shape[1:])};"
                    " warm starts need images of one size"
                )
        perturbations = torch.stack([delta.float() * scale for delta, scale in kept.values()])
        index = to_device_of(torch.tensor(list(kept)), x)
        moved = x.index_select(0, index) + to_device_of(perturbations, x, x.dtype)
        return threat.project(points.index_copy(0, index, moved), x)

    def keep(self, batch: HierarchicalBatch, x_adv: Tensor) -> None:
        """Remember what an attack made of a batch (reads the device).

        Args:
            batch: The images that were attacked.
            x_adv: The attack's result (n, c, h, w).

        Raises:
            ValueError: If x_adv has not the shape of the images.
        """
        if x_adv.shape != batch.images.shape:
            raise ValueError(
                f"x_adv must have the shape of the images, {tuple(batch.images.shape)}; got {tuple(x_adv.shape)}"
            )
        delta = (x_adv.detach().float() - batch.images.detach().float()).cpu()
        scale = delta.abs().amax((1, 2, 3)) / 127
        whole = (delta / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None, None]).round().to(torch.int8)
        for key, row, size in zip(_keys(batch), whole, scale.tolist(), strict=True):
            self._kept.pop(key, None)  # what is new goes to the end
            self._kept[key] = (row.contiguous(), size)
        while self.capacity is not None and len(self._kept) > self.capacity:
            del self._kept[next(iter(self._kept))]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        kept = list(self._kept.values())
        return {
            "keys": torch.tensor(list(self._kept), dtype=torch.int64).view(-1, 2),
            "scales": torch.tensor([scale for _, scale in kept], dtype=torch.float64),
            "deltas": torch.stack([delta for delta, _ in kept]) if kept else torch.zeros(0, dtype=torch.int8),
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take everything back.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            ValueError: When the parts do not belong together.
        """
        keys, scales, deltas = (state_dict[name] for name in ("keys", "scales", "deltas"))
        if not len(keys) == len(scales) == len(deltas):
            raise ValueError(f"{len(keys)} keys, {len(scales)} scales and {len(deltas)} perturbations: not one state")
        pairs = [(int(patch), int(place)) for patch, place in keys.tolist()]
        rows = zip(deltas.to(torch.int8).cpu(), scales.tolist(), strict=True)
        self._kept = {key: (delta.clone(), scale) for key, (delta, scale) in zip(pairs, rows, strict=True)}


def _keys(batch: HierarchicalBatch) -> list[tuple[int, int]]:
    """(patch id, how many images of that patch came before) of every image."""
    seen: Counter[int] = Counter()
    keys = []
    for patch in batch.patch.tolist():
        keys.append((patch, seen[patch]))
        seen[patch] += 1
    return keys
