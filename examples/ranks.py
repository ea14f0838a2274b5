"""One process of several: what torchrun says about this one, and how they find each other."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from meeting import SOON, common_room
from runs import device_named

PATIENCE = timedelta(minutes=30)
BEGUN = "hsat/begun"


class Ranks(NamedTuple):
    """Process number `rank` of `size`, which computes on `device`.

    again: this torchrun began the run before, and has started its processes anew.  board: what outlives them.
    """

    rank: int
    size: int
    device: torch.device
    again: bool = False
    board: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def begin(self) -> None:
        """Say, once it is settled that the run may begin, that processes started anew are to go on with it."""
        if self.first and self.board is not None:
            self.board.set(BEGUN, "1")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected inside the block; a process started without it is alone.

    device: what --device says.  On GPUs each process of a machine takes its own (NCCL); on CPUs they talk over gloo.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(0, 1, device_named(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    chosen = _own_device(device, local)
    board, rank, size = next(dist.rendezvous("env://", timeout=SOON))
    room = common_room(board, rank=rank, size=size)
    room.set_timeout(PATIENCE)
    if rank == 0:
        room.set("again", str(int(_begun(board))))
    again = room.get("again") == b"1"
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=room, rank=rank, world_size=size, timeout=PATIENCE)
    yield Ranks(rank, size, chosen, again, board)
    dist.destroy_process_group()  # after an error the others may wait for this one: torchrun ends them


@contextmanager
def one_after_the_first(ranks: Ranks) -> Iterator[None]:
    """The first rank does what is in the block, then all others do, and say nothing about it."""
    if ranks.size == 1:
        yield
        return
    if not ranks.first:
        dist.barrier()
    with contextlib.nullcontext() if ranks.first else contextlib.redirect_stderr(io.StringIO()):
        yield
    if ranks.first:
        dist.barrier()


def _begun(board: dist.Store) -> bool:
    """Whether earlier processes of this torchrun began the run; where they took their store along, by its count."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return board.check([BEGUN])
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _own_device(device: str, local: int) -> torch.device:
    found = device_named(device)
    if found.type != "cuda":
        return found
    if found.index is not None:
        raise ValueError(f"under torchrun every process takes a GPU of its own; write --device cuda, not {device}")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun started a process number {local}, but this machine has {torch.cuda.device_count()} GPU(s);"
            " lower --nproc_per_node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
