"""Processes that share work: who they are, what they tell each other, and which batches each of them does."""

from __future__ import annotations

import hashlib
import importlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from hsat.types import HierarchicalBatch
from hsat.types.batch import require_ids

if dist.is_available():
    # Before there is a group.  torch 2.8 to 2.14 at least: this module, which the first optimiser or
    # DistributedDataParallel imports, takes the group of that moment for the defaults of its functions.  A group that
    # is held keeps gloo's threads beyond its end; such a thread frees the tensors of the last exchange, and on a busy
    # machine it does so while the interpreter shuts down: "terminate called without an active exception", SIGABRT
    # (https://github.com/pytorch/pytorch/issues/190489).
    importlib.import_module("torch.distributed.nn.functional")

_TIMEOUT = timedelta(days=7)  # a rank that has finished waits for the slowest attack of all
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_GATHER_CHUNK = 64  # batches that a rank hands over at a time, so that no message is as large as a bank

Value = TypeVar("Value")


class RankFailedError(RuntimeError):
    """Another rank has stopped, so its share of the work is missing."""


class RanksDisagreeError(ValueError):
    """The ranks were given different things; all of them raise this at the same place, with the same message."""


class World:
    """The processes that share a piece of work; without a process group, one process.

    All ranks call `gather`, `gather_by_index` and `assert_same` in the same order; they wait for one another there and
    nowhere else.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank()
        self.size = 1 if group is None else dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that belong to all, and shows the progress."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Collect one value of every rank, on every rank.

        Args:
            value: This rank's value; a small plain object.

        Returns:
            The values in the order of the ranks.

        Raises:
            RankFailedError: If another rank has stopped.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RankFailedError(
                "another process of this evaluation has stopped, so that its share is missing; its own message says why"
            ) from error
        return values

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank.

        Raises:
            RankFailedError: If another rank has stopped.
        """
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        try:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise RankFailedError("another rank of this run has stopped; its own message says why") from error
        return int(tensor)

    def gather_by_index(self, values: Mapping[int, Value]) -> list[Value]:
        """Collect numbered values of all ranks, on every rank, by ascending number.

        Args:
            values: This rank's values, under numbers that no other rank uses.
        """
        if self._group is None:
            return [values[number] for number in sorted(values)]
        numbers, collected = sorted(values), dict[int, Value]()
        for start in range(0, max(self.gather(len(numbers))), _GATHER_CHUNK):
            chunk = {number: values[number] for number in numbers[start : start + _GATHER_CHUNK]}
            for part in self.gather(chunk):
                collected |= part
        return [collected[number] for number in sorted(collected)]

    def assert_same(self, settings: Mapping[str, Any]) -> None:
        """Raise unless all ranks hold the same settings.

        Args:
            settings: Texts, numbers, lists and mappings by name.

        Raises:
            RanksDisagreeError: On every rank, naming each setting that differs and its value on each rank.
        """
        if self._group is None:
            return
        by_rank = self.gather(json.loads(json.dumps(settings)))
        names = sorted({name for own in by_rank for name in own})
        differing = [name for name in names if any(own.get(name) != by_rank[0].get(name) for own in by_rank)]
        if differing:
            shown = "; ".join(
                f"{name} is {', '.join(f'{own.get(name)!r} on rank {rank}' for rank, own in enumerate(by_rank))}"
                for name in differing
            )
            raise RanksDisagreeError(f"all ranks must be called with the same settings: {shown}")


@contextmanager
def shared_world() -> Iterator[World]:
    """The ranks of the default process group; one process without a group, or with a group of one.

    The ranks talk over gloo in a group of their own, which closes with the block, so that after an error on one rank
    the others, which would wait for it, get an error as well.
    """
    if world_size() == 1:
        yield World()
        return
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_TIMEOUT))  # every rank is a member
    try:
        yield World(group)
    finally:
        dist.destroy_process_group(group)


def world_size() -> int:
    """Number of processes of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_rank() -> int:
    """Number of this process in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(value: Value) -> list[Value]:
    """The small plain values that the ranks of the default process group hold, in order of rank; every rank calls it.

    Without a process group the list holds this process's value alone.
    """
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


class ShardedLoader:
    """The batches of a loader that this rank has to do, with their numbers among all batches; can be read once.

    Batches stay as one process would have them and are dealt out in turn.  Of a DataLoader in order only this rank's
    images are read.  From any other loader every rank reads all batches and skips those of other ranks; `check` finds
    out whether these were the same.

    Args:
        loader: Batches of images.
        world: The processes that share them.
        finished: Ascending numbers of batches that are done already; they cost little and are dealt out by themselves.

    Attributes:
        batches: Number of batches of all ranks, known after reading.

    Raises:
        ValueError: For a DataLoader that shuffles, if there is more than one rank.
    """

    def __init__(self, loader: Iterable[HierarchicalBatch], world: World, *, finished: Sequence[int] = ()) -> None:
        self.dataset = getattr(loader, "dataset", None)
        self._loader, self._world, self._finished = loader, world, finished
        self._index_lists = _index_lists(loader) if world.size > 1 else None
        self._digests: dict[int, str] = {}
        self.batches = 0

    def is_mine(self, number: int) -> bool:
        """Whether the batch of this number belongs to this rank."""
        before = bisect_left(self._finished, number)
        known = before < len(self._finished) and self._finished[before] == number
        return (before if known else number - before) % self._world.size == self._world.rank

    def __len__(self) -> int:
        """The number of this rank's batches; TypeError where the loader does not know how many it has."""
        count = len(cast(Sized, self._loader) if self._index_lists is None else self._index_lists)
        return sum(map(self.is_mine, range(count)))

    def __iter__(self) -> Iterator[tuple[int, HierarchicalBatch]]:
        if self._index_lists is not None:
            self.batches = len(self._index_lists)
            numbers = [number for number in range(self.batches) if self.is_mine(number)]
            batches = _read_batches(self._loader, [self._index_lists[number] for number in numbers])
            yield from zip(numbers, map(require_ids, batches), strict=True)
            return
        for number, batch in enumerate(map(require_ids, self._loader)):
            self.batches = number + 1
            if self._world.size > 1:
                self._digests[number] = hashlib.sha256(batch.patch.cpu().numpy().tobytes()).hexdigest()
            if self.is_mine(number):
                yield number, batch

    def check(self) -> None:
        """Raise ValueError, on every rank, if the ranks were given different batches; all ranks call it at the end."""
        counts = self._world.gather(self.batches)
        digests = self._world.gather(self._digests)
        if len(set(counts)) > 1 or any(other != digests[0] for other in digests):
            raise ValueError(
                f"the {self._world.size} processes were given different batches ({', '.join(map(str, counts))} of"
                " them); all need the same patches in the same order and batches: no shuffling"
            )


def _index_lists(loader: object) -> list[list[int]] | None:
    """The indices of each batch of a DataLoader that goes through its dataset in order; None for any other loader."""
    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader.sampler, RandomSampler):
        raise ValueError("several processes cannot share a DataLoader that shuffles: each would see another order")
    plain = type(loader) is DataLoader and type(loader.sampler) is SequentialSampler
    return list(loader.batch_sampler) if plain and type(loader.batch_sampler) is BatchSampler else None


def _read_batches(loader: object, index_lists: list[list[int]]) -> Iterable[HierarchicalBatch]:
    """The same DataLoader for some of its batches."""
    assert isinstance(loader, DataLoader)
    return DataLoader(
        loader.dataset,
        batch_sampler=index_lists,
        generator=torch.Generator(),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def row_share(n: int, *, batch_size: int) -> slice:
    """Share of n rows for this rank: consecutive whole batches, those that one process would make of all rows.

    Shares of the ranks follow one another; a rank may get none.  Without a process group it is everything.

    Raises:
        ValueError: For a batch_size below 1 or a negative n.
    """
    if n < 0 or batch_size < 1:
        raise ValueError(f"n must be at least 0 and batch_size at least 1, got {n} and {batch_size}")
    rank, ranks = world_rank(), world_size()
    batches = -(-n // batch_size)
    begin, end = batches * rank // ranks, batches * (rank + 1) // ranks
    return slice(min(n, begin * batch_size), min(n, end * batch_size))


def batch_share(total: int, *, ranks: int, parts: int = 1, name: str = "batch_patients") -> int:
    """How many of `total` items of a batch a rank has at a time.

    Args:
        total: Items of the whole batch.
        ranks: Number of processes.
        parts: Parts into which each rank cuts its share (gradient accumulation).
        name: What the total is called, for the error message.

    Raises:
        ValueError: If it does not divide evenly; the message names totals that do.
    """
    if ranks < 1 or parts < 1:
        raise ValueError(f"ranks and parts must be at least 1, got {ranks} and {parts}")
    groups = ranks * parts
    if total % groups:
        below, above = total // groups * groups, (total // groups + 1) * groups
        fitting = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"{name}={total} cannot be split evenly over {ranks} rank(s) with {parts} part(s) each; use {fitting}"
        )
    return total // ranks


def global_indices(images: int, *, rank: int) -> Tensor:
    """Places (images,) int64 of this rank's images in the batch of all ranks, each of which has as many.

    As `ids` of an attack they give an image the same noise whichever rank has it.
    """
    return torch.arange(rank * images, (rank + 1) * images)


def average_statistics(module: nn.Module) -> None:
    """Give every floating-point buffer (BatchNorm's running statistics) its mean over the ranks; one collective.

    Integers, which count steps, are equal on all ranks already.  Every rank has to call it.
    """
    ranks = world_size()
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if ranks == 1 or not buffers:
        return
    with torch.no_grad():
        flat = torch.cat([buffer.flatten().to(torch.float32) for buffer in buffers])
        dist.all_reduce(flat)
        flat /= ranks
        means = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


def synchronize_batchnorm(module: nn.Module, *, device: torch.device) -> nn.Module:
    """Replace every BatchNorm of a module, in place, by one whose batch statistics are those of all ranks.

    timm's layers that carry an activation keep it.  In evaluation mode, so in attacks, such a layer exchanges nothing.

    Args:
        module: A network.
        device: Where it will compute.

    Returns:
        The network; a new one if it is a BatchNorm itself.

    Raises:
        ValueError: On the CPU, where torch has no such layer, and for a module without BatchNorm.
    """
    if device.type == "cpu":
        raise ValueError("synchronised BatchNorm needs GPUs: torch has none for the CPU; leave it off here")
    if not any(isinstance(part, _BATCH_NORMS) for part in module.modules()):
        raise ValueError(f"{type(module).__name__} has no BatchNorm layer to synchronise")
    from timm.layers import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(module)
    return converted
