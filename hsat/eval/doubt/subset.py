"""A fair handful of queries from a loader that is read once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hsat.attacks.starts import image_seed
from hsat.types import HierarchicalBatch

_Entry = tuple[int, tuple[int, ...], Tensor]  # hash; patch, slide, patient and label; image


class Handful:
    """Keeps the `size` patches whose hash of (seed, patch id) is smallest: a random choice that no order changes."""

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._kept: list[_Entry] = []
        self._widest = 1

    def see(self, batch: HierarchicalBatch, label: Tensor) -> None:
        """Consider the patches of a batch.  label: (n,) classes as the bank numbers them."""
        self._widest = max(self._widest, len(batch))
        ids = torch.stack([batch.patch.cpu(), batch.slide.cpu(), batch.patient.cpu(), label], 1).tolist()
        limit = self._kept[-1][0] if len(self._kept) == self._size else 2**63
        for at, row in enumerate(ids):
            if (rank := image_seed(self._seed, row[0], -1)) < limit:
                self._kept.append((rank, tuple(row), batch.images[at].detach().cpu().clone()))
        self._kept = sorted(self._kept, key=lambda entry: entry[:2])[: self._size]

    def join(self, every: Iterable[Handful]) -> None:
        """Become what one handful would be that had seen everything that these saw; this one should be among them."""
        every = list(every)
        entries = [entry for each in every for entry in each._kept]
        self._kept = sorted(entries, key=lambda entry: entry[:2])[: self._size]
        self._widest = max(each._widest for each in every)

    def batches(self) -> list[HierarchicalBatch]:
        """What was kept, by ascending patch id, in batches no wider than those that were seen."""
        rows = sorted(self._kept, key=lambda entry: entry[1])
        parts = [rows[start : start + self._widest] for start in range(0, len(rows), self._widest)]
        return [_batch(part) for part in parts]


def _batch(rows: list[_Entry]) -> HierarchicalBatch:
    patch, slide, patient, label = torch.tensor([row[1] for row in rows]).T
    return HierarchicalBatch(torch.stack([row[2] for row in rows]), patch, slide, patient, label)
