"""Embeddings and ids of all ranks, for losses whose negatives lie on other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gather_with_grad(z: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks of the default process group, in order of rank, with gradients.

    Every rank has to call it, forward and backward, with rows of equal shape and dtype; n may differ, for which the
    counts are read from the device once.  The gradient of a rank's rows is the sum over ranks of the gradients of
    their copies, so each parameter's gradient, summed over ranks, belongs to the sum of the ranks' losses, and averaged
    over ranks (as DistributedDataParallel does) to their mean.  Differentiable once.
    With one rank, or without a process group, it is z itself.

    Args:
        z: (n, ...), this rank's rows.

    Returns:
        (n of all ranks, ...).
    """
    if not _several_ranks():
        return z
    gathered: Tensor = _Gather.apply(z, _counts(z))
    return gathered


def gather_images(z: Tensor, ids: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`gather_with_grad` for rows (n, d) together with id tensors (n,) int64 of the same images."""
    if not _several_ranks():
        return z, list(ids)
    counts = _counts(z)
    table = _concatenate(torch.stack(tuple(ids), dim=1), counts)
    return _Gather.apply(z, counts), list(table.unbind(1))


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _counts(rows: Tensor) -> list[int]:
    mine = torch.tensor([len(rows)], device=rows.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    counts: list[int] = torch.cat(every).tolist()
    return counts


def _concatenate(rows: Tensor, counts: list[int]) -> Tensor:
    """The ranks' rows behind one another; padded on the way because a collective moves equal shapes."""
    longest = max(counts)
    padding = [0, 0] * (rows.ndim - 1) + [0, longest - len(rows)]
    mine = F.pad(rows, padding).contiguous()
    every = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(every, mine)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, counts: list[int]) -> Tensor:
        before = sum(counts[: dist.get_rank()])
        ctx.mine = slice(before, before + len(z))
        return _concatenate(z, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.mine], None
