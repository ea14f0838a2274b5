"""The processes that share an evaluation, and how they tell each other what they found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # who has finished waits for the slowest attack of all
_ROUND = 64  # batches that a rank hands over at a time, so that no message is as large as a bank

Part = TypeVar("Part")


class RankStoppedError(RuntimeError):
    """Another rank of an evaluation has ended, or its share failed: nothing more will come from it."""


class Crew:
    """One process among those that share an evaluation: number `rank` of `size`; alone where group is None.

    All ranks call `gather`, `join` and `agree` in the same order.  They wait for one another there, and nowhere else.
    A rank that has stopped is a RankStoppedError for those that wait.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank()
        self.size = 1 if group is None else dist.get_world_size()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what belongs to all, and shows its progress."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            raise RankStoppedError(
                "another process of this evaluation has stopped, so that its share is missing; its own message says why"
            ) from error
        return found

    def join(self, parts: Mapping[int, Part]) -> list[Part]:
        """What all ranks found, by ascending number; parts: this rank's, by numbers that no other rank has."""
        if self._group is None:
            return [parts[number] for number in sorted(parts)]
        own, found = sorted(parts), dict[int, Part]()
        for start in range(0, max(self.gather(len(own))), _ROUND):
            for some in self.gather({number: parts[number] for number in own[start : start + _ROUND]}):
                found |= some
        return [found[number] for number in sorted(found)]

    def agree(self, settings: Mapping[str, Any]) -> None:
        """ValueError, naming what differs, unless the ranks have the same settings: texts, numbers, lists by name."""
        if self._group is None:
            return
        every = self.gather(json.loads(json.dumps(settings)))
        names = sorted({name for each in every for name in each})
        differing = [name for name in names if any(each.get(name) != every[0].get(name) for each in every)]
        if differing:
            shown = "; ".join(
                f"{name} is {', '.join(f'{each.get(name)!r} on rank {rank}' for rank, each in enumerate(every))}"
                for name in differing
            )
            raise ValueError(f"the processes of one evaluation must be called alike: {shown}")


@contextmanager
def crew_of_ranks() -> Iterator[Crew]:
    """The ranks of the process group as a crew; alone without one, or with one of a single process.

    They talk over gloo in a group of their own, which closes with the block: after an error the others, who would wait
    for this rank, get one as well.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield Crew()
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Crew(group)
    finally:
        dist.destroy_process_group(group)
