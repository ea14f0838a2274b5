"""Augmentation after the transfer: batches of stored integers travel to the device, views are made there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hsat.data.augment import Augmentation
from hsat.data.batched import augment_batch
from hsat.data.image_operations import sent
from hsat.data.readers import as_image
from hsat.data.samples import Sample, make_sample
from hsat.types import HierarchicalBatch

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort

Shape = tuple[int, int, int]


class DrawnPatches(NamedTuple):
    """One item before its augmentation: what was drawn, and the integers of its patches.

    sample: ids and paths of the m images; its own images are placeholders (m, 1, 1, 1).  patches: the distinct patches
    as `read_stored` gives them.  source, seeds: m numbers each, which patch an image shows and what decides its draws.
    """

    sample: Sample
    patches: tuple[Tensor, ...]
    source: tuple[int, ...]
    seeds: tuple[int, ...]
    pipeline: Augmentation
    kind: Literal["srh", "rgb"]

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        shown: Sequence[int],
        patches: Mapping[int, Tensor],
        pipeline: Augmentation,
        seeds: Sequence[int],
    ) -> DrawnPatches:
        """shown: the row of each image; patches: the integers of each row."""
        place = {row: i for i, row in enumerate(patches)}
        sample = make_sample(cohort, shown, [torch.zeros(1, 1, 1)] * len(shown))
        source = tuple(place[row] for row in shown)
        return cls(sample, tuple(patches.values()), source, tuple(seeds), pipeline, cohort.kind)


@dataclass(frozen=True)
class DrawnBatch:
    """Several DrawnPatches as they travel: all integers in one flat tensor, so that one copy moves them.

    shapes: (channels, h, w) of each patch, in the order of `stored`.  source, seeds, pipeline: a number per image, the
    last one a place in `pipelines`.  batch: ids, with placeholders for images.
    """

    batch: HierarchicalBatch
    stored: Tensor
    shapes: tuple[Shape, ...]
    source: tuple[int, ...]
    seeds: tuple[int, ...]
    pipeline: tuple[int, ...]
    pipelines: tuple[Augmentation, ...]
    kind: Literal["srh", "rgb"]

    def pin_memory(self) -> DrawnBatch:
        """The integers in page-locked memory; torch's DataLoader calls this when pin_memory=True."""
        return dataclasses.replace(self, batch=self.batch.pin_memory(), stored=self.stored.pin_memory())

    def augmented(self, device: torch.device | str) -> HierarchicalBatch:
        """The batch on the device, with images (n, 3, size, size) made there; ValueError where sizes differ."""
        patches = self._images(self.stored.to(device, non_blocking=True))
        parts, order = [], []
        for number, pipeline in enumerate(self.pipelines):
            mine = [i for i, which in enumerate(self.pipeline) if which == number]
            seeds, source = [self.seeds[i] for i in mine], [self.source[i] for i in mine]
            parts.append(augment_batch(patches, pipeline, seeds, source=source))
            order += mine
        sizes = {tuple(part.shape[1:]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"images of {len(sizes)} sizes come out: {sorted(sizes)}; pass image_size to the dataset")
        images = parts[0]
        if len(parts) > 1:
            back = sorted(range(len(order)), key=order.__getitem__)
            images = torch.cat(parts)[sent(back, images, torch.int64)]
        return self.batch.to(device, non_blocking=True).replace(images=images)

    def _images(self, stored: Tensor) -> list[Tensor]:
        if len(set(self.shapes)) == 1:
            return list(as_image(stored.view(-1, *self.shapes[0]), kind=self.kind))
        images, begin = [], 0
        for shape in self.shapes:
            end = begin + math.prod(shape)
            images.append(as_image(stored[begin:end].view(shape), kind=self.kind))
            begin = end
        return images


@dataclass(frozen=True)
class CollateDrawn:
    """DrawnPatches to a DrawnBatch; `ids` makes the batch of ids from the samples (`collate`, for one)."""

    ids: Callable[[Sequence[Sample]], HierarchicalBatch]

    def __call__(self, items: Sequence[DrawnPatches]) -> DrawnBatch:
        """Raises what `ids` raises."""
        batch = self.ids([item.sample for item in items])
        patches = [patch for item in items for patch in item.patches]
        pipelines = list(dict.fromkeys(item.pipeline for item in items))
        first, source = 0, list[int]()
        for item in items:
            source += [first + place for place in item.source]
            first += len(item.patches)
        return DrawnBatch(
            batch=batch,
            stored=torch.cat([patch.reshape(-1) for patch in patches]),
            shapes=tuple((patch.shape[0], patch.shape[1], patch.shape[2]) for patch in patches),
            source=tuple(source),
            seeds=tuple(seed for item in items for seed in item.seeds),
            pipeline=tuple(pipelines.index(item.pipeline) for item in items for _ in item.source),
            pipelines=tuple(pipelines),
            kind=items[0].kind,
        )


@dataclass(frozen=True)
class AugmentingLoader:
    """A loader of DrawnBatches as one of HierarchicalBatches, augmented on `device` when they are asked for."""

    loader: Any
    device: torch.device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        for drawn in self.loader:
            yield drawn.augmented(self.device)
