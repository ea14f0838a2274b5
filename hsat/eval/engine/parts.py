"""What one batch of queries adds to an evaluation, as it is kept on the disk and handed from rank to rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.embedding import EmbeddingBuffer, ids_of
from hsat.eval.engine.journal import Arrays
from hsat.eval.engine.siege import Fall
from hsat.eval.engine.strongest import Casualties, MemberCount
from hsat.eval.tally import Tally
from hsat.types import HierarchicalBatch

Part = tuple[dict[str, Any], Arrays]
"""(texts and numbers, arrays) of one batch: counts and members by condition; ids, embeddings, images by its place."""


class Seen:
    """One batch under one condition after another.  keep: how many of its images to keep of each."""

    def __init__(self, batch: HierarchicalBatch, *, keep: int) -> None:
        self._batch, self._keep = batch, keep
        self._found: dict[str, tuple[Tensor, np.ndarray, Tally, Fall | None]] = {}

    def store(self, name: str, images: Tensor, z: Tensor, tally: Tally, fall: Fall | None = None) -> None:
        """Take in the images of a condition, their embeddings z (n, d), what was counted, and who felled them."""
        self._found[name] = (
            images[: self._keep].detach().cpu(),
            EmbeddingBuffer().append(self._batch, z)[0],
            tally,
            fall,
        )

    def part(self, order: Sequence[str]) -> Part:
        """All conditions, in this order."""
        arrays: Arrays = dict(ids_of(self._batch))
        dtype = str(self._batch.images.dtype).removeprefix("torch.")
        about: dict[str, Any] = {"dtype": dtype, "counts": {}, "members": {}}
        for i, name in enumerate(order):
            kept, arrays[f"z{i}"], tally, fall = self._found[name]
            arrays[f"kept{i}"] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy()
            about["counts"][name] = tally.counts()
            if fall is not None:
                arrays |= {f"felled_by{i}": fall.felled_by, f"margin{i}": fall.margin}
                about["members"][name] = [dataclasses.asdict(each) for each in fall.members]
        return about, arrays


class Falls:
    """What one Strongest did, over the batches."""

    def __init__(self) -> None:
        self._patch: list[np.ndarray] = []
        self._felled_by: list[np.ndarray] = []
        self._margin: list[np.ndarray] = []
        self._members: list[MemberCount] = []

    def add(self, patch: np.ndarray, felled_by: np.ndarray, margin: np.ndarray, members: Sequence[MemberCount]) -> None:
        """Add a batch; see `Casualties`."""
        self._patch.append(patch)
        self._felled_by.append(felled_by)
        self._margin.append(margin)
        self._members = [
            _sum(old, new) for old, new in zip(self._members or map(_nothing, members), members, strict=True)
        ]

    def joined(self) -> Casualties:
        """All batches in their order."""
        patch, felled_by, margin = map(np.concatenate, (self._patch, self._felled_by, self._margin))
        return Casualties(patch, felled_by, margin, tuple(self._members))


def count_fall(fall: Fall) -> Tally:
    """What the strongest attack did to one batch, in numbers."""
    return Tally(
        images=len(fall.x_adv),
        forwards=sum(each.forwards for each in fall.members),
        backwards=sum(each.backwards for each in fall.members),
        zero_gradient=int(fall.zero_gradient.sum()),
        never_moved=int(fall.never_moved.sum()),
    )


def _nothing(member: MemberCount) -> MemberCount:
    return dataclasses.replace(member, seen=0, felled=0, forwards=0, backwards=0)


def _sum(old: MemberCount, new: MemberCount) -> MemberCount:
    """The counts of both; the rest is the first batch's."""
    names = ("seen", "felled", "forwards", "backwards")
    return dataclasses.replace(old, **{name: getattr(old, name) + getattr(new, name) for name in names})
