"""Which batches of a loader are this rank's."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hsat.eval.engine.crew import Crew
from hsat.types import HierarchicalBatch


class Share:
    """The batches of a loader that this rank has to do, with their numbers among all; can be read once.

    Batches stay as one process would have them, and are dealt out in turn: those in `finished` (ascending numbers),
    which cost little, apart from the others.  Of a DataLoader in order only this rank's images are read.  From any
    other loader each rank reads all batches and skips those of others; `check` finds out if these were not the same.
    batches: how many there are for all ranks, known after reading.
    Raises ValueError for a DataLoader that shuffles, if there is more than one rank.
    """

    def __init__(self, loader: Iterable[HierarchicalBatch], crew: Crew, *, finished: Sequence[int] = ()) -> None:
        self.dataset = getattr(loader, "dataset", None)
        self._loader, self._crew, self._finished = loader, crew, finished
        self._lists = _index_lists(loader) if crew.size > 1 else None
        self._seen: dict[int, str] = {}
        self.batches = 0

    def owns(self, number: int) -> bool:
        """Whether the batch of this number is this rank's."""
        before = bisect_left(self._finished, number)
        known = before < len(self._finished) and self._finished[before] == number
        return (before if known else number - before) % self._crew.size == self._crew.rank

    def __len__(self) -> int:
        """The number of this rank's batches; TypeError where the loader does not know how many it has."""
        count = len(self._loader if self._lists is None else self._lists)  # type: ignore[arg-type]
        return sum(map(self.owns, range(count)))

    def __iter__(self) -> Iterator[tuple[int, HierarchicalBatch]]:
        if self._lists is not None:
            self.batches = len(self._lists)
            own = [number for number in range(self.batches) if self.owns(number)]
            yield from zip(own, _reading(self._loader, [self._lists[number] for number in own]), strict=True)
            return
        for number, batch in enumerate(self._loader):
            self.batches = number + 1
            if self._crew.size > 1:
                self._seen[number] = hashlib.sha256(batch.patch.cpu().numpy().tobytes()).hexdigest()
            if self.owns(number):
                yield number, batch

    def check(self) -> None:
        """ValueError, on every rank, if the ranks were given different batches; each has to call it, after reading."""
        counts = self._crew.gather(self.batches)
        seen = self._crew.gather(self._seen)
        if len(set(counts)) > 1 or any(each != seen[0] for each in seen):
            raise ValueError(
                f"the {self._crew.size} processes were given different batches ({', '.join(map(str, counts))} of them);"
                " all need the same patches in the same order and batches: no shuffling"
            )


def _index_lists(loader: Any) -> list[list[int]] | None:
    """The indices of each batch of a DataLoader that goes through its dataset in order; None for any other loader."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError("several processes cannot share a DataLoader that shuffles: each would see another order")
    plain = type(loader) is DataLoader and type(loader.sampler) is SequentialSampler
    return list(loader.batch_sampler) if plain and type(loader.batch_sampler) is BatchSampler else None


def _reading(loader: Any, lists: list[list[int]]) -> Iterable[HierarchicalBatch]:
    """The same loader for some of its batches."""
    import torch
    from torch.utils.data import DataLoader

    names = ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    options = {name: getattr(loader, name) for name in (*names, "prefetch_factor")}
    found: Iterable[HierarchicalBatch] = DataLoader(
        loader.dataset, batch_sampler=lists, generator=torch.Generator(), **options
    )
    return found
