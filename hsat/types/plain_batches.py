"""Batches of (images, labels), where nobody needs patients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hsat.types.batch import HierarchicalBatch, collate_hint
from hsat.types.row_checks import check_labels


class PlainBatches:
    """Batches of (images, labels) as batches with ids: each image is a patch, a slide and a patient of its own.

    Batches that have ids already stay as they are.

    Args:
        loader: Batches of either kind; its dataset stays known.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.source = loader
        self.dataset = getattr(loader, "dataset", None)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # TypeError for loaders that do not know it

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        start = 0
        for item in self.source:
            if isinstance(item, HierarchicalBatch):
                yield item
                continue
            images, labels = pair_of(item)
            ids = torch.arange(start, start + len(images))
            start += len(images)
            yield HierarchicalBatch(images, ids, ids, ids, labels)


def pair_of(item: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a plain batch; TypeError for anything else."""
    pair = isinstance(item, Sequence) and not isinstance(item, str) and len(item) >= 2
    if not pair or not all(isinstance(part, Tensor) for part in item[:2]) or hasattr(item, "paths"):
        raise TypeError(
            "the loader must give batches with ids (hsat.data.patch_loader) or pairs of tensors (images, labels); got"
            f" {type(item).__name__}{collate_hint(item)}"
        )
    check_labels(item[1])
    return item[0], item[1]
