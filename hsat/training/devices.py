"""What several ranks need beside DistributedDataParallel: parts of a batch, one set of statistics, one answer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hsat.models.dual_norm import BatchNorm


def ranks_here() -> tuple[int, int]:
    """Rank of this process and the number of ranks of the default process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of_batch(total: int, *, ranks: int, parts: int = 1, name: str = "batch_patients") -> int:
    """How many of `total` a rank has at a time.  Raises ValueError, naming numbers that would do, if it is uneven."""
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


def image_slots(images: int, *, rank: int) -> Tensor:
    """(images,) int64: places of this rank's images in the batch of all ranks, each with as many.

    As `ids` of an attack they give an image the same noise whichever rank has it.
    """
    return torch.arange(rank * images, (rank + 1) * images)


def average_statistics(module: nn.Module) -> None:
    """Give every floating-point buffer (BatchNorm's running statistics) its mean over the ranks; one collective.

    Integers, which count steps, are equal on all ranks already.  Without several ranks nothing happens.  Every rank
    has to call it.
    """
    _, ranks = ranks_here()
    found = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if ranks == 1 or not found:
        return
    with torch.no_grad():
        flat = torch.cat([buffer.flatten().to(torch.float32) for buffer in found])
        dist.all_reduce(flat)
        flat /= ranks
        for buffer, mean in zip(found, torch.split(flat, [buffer.numel() for buffer in found]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def synchronised_norm(module: nn.Module, *, device: torch.device) -> nn.Module:
    """The module with every BatchNorm replaced by one whose batch statistics are those of all ranks, in place.

    timm's layers that carry an activation keep it.  In evaluation mode, so in attacks, such a layer exchanges nothing.
    Raises ValueError on the CPU, where torch has no such layer, and for a module without BatchNorm.
    """
    if device.type == "cpu":
        raise ValueError("synchronised BatchNorm needs GPUs: torch has none for the CPU; leave it off here")
    if not any(isinstance(part, BatchNorm) for part in module.modules()):
        raise ValueError(f"{type(module).__name__} has no BatchNorm layer to synchronise")
    from timm.layers import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(module)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in converted.modules())
    return converted


def of_all_ranks(value: Any) -> list[Any]:
    """The values (numbers, lists of them: small plain objects) that the ranks hold, in order of rank.

    Every rank has to call it.  Without several ranks it is [value].
    """
    _, ranks = ranks_here()
    every: list[Any] = [value] * ranks
    if ranks > 1:
        dist.all_gather_object(every, value)
    return every
