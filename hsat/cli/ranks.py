"""The ranks of a command: what torchrun says about this process, how the ranks meet, and which of them speaks."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from hsat.cli.environment import Place, place_of
from hsat.cli.options import device_of
from hsat.distributed import RankFailedError, RanksDisagreeError
from hsat.rendezvous import PATIENCE as MEETING_PATIENCE
from hsat.rendezvous import Store, meet_ranks
from hsat.training.interrupts import TrainingInterrupted

PATIENCE = timedelta(minutes=30)
BEGUN = "hsat/begun"
GRACE = 5.0  # seconds for a rank that failed to say why, before another one says that it did


_BY_ALL = (TrainingInterrupted, RanksDisagreeError)  # all ranks raise these together


class Ranks(NamedTuple):
    """Process number `rank` of `size`, which computes on `device`.

    again: this torchrun began the run before, and has started its processes anew.  board: what outlives them.
    """

    rank: int
    size: int
    device: torch.device
    again: bool = False
    board: Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @classmethod
    def alone(cls, device: str = "auto") -> Ranks:
        """One process by itself, on the device that --device names."""
        return cls(0, 1, torch.device(device_of(device)))

    def begin(self) -> None:
        """Say, once it is settled that the run may begin, that processes started anew are to go on with it."""
        if self.is_main and self.board is not None:
            self.board.set(BEGUN, "1")


@contextmanager
def join_ranks(device: str, *, patience: timedelta = MEETING_PATIENCE) -> Iterator[Ranks]:
    """The ranks that the environment tells of (torchrun's variables), connected inside the block; or one by itself.

    On GPUs each process of a machine takes its own (NCCL); on CPUs they talk over gloo.

    The end of the block ends gloo's threads as well, for which nothing may hold the group any more; `hsat.distributed`
    sees to it that torch does not.

    Of errors, only those that all ranks raise together end the group as well.  After any other one an exchange may be
    under way in which the others wait for this rank.  The end of the group would wait for them (with torch 2.14, until
    the other rank had ended), its `abort` does not stop an exchange of gloo, and in a thread the wait would only move
    to where the error, whose frames hold the group, is freed.  But torchrun waits for this rank to end before it ends
    the others.  So the group is left, and torch may end such a rank by SIGABRT after it has said why.

    Args:
        device: What --device says.
        patience: How long to wait for the others.

    Yields:
        The place of this process.

    Raises:
        ValueError: For variables that are incomplete or make no sense (see `place_of`), and for ranks of other worlds,
            kinds of devices or versions of torch.
        TimeoutError: Naming the ranks that did not come.
    """
    place = place_of(os.environ)
    if place is None:
        yield Ranks.alone(device)
        return
    chosen = _own_device(device, place)
    board, rank, size = _board(place, patience), place.rank, place.size
    terms = f"device {chosen.type}, torch {torch.__version__}"
    try:
        room = meet_ranks(board, rank=rank, size=size, patience=patience, terms=terms)
        room.set_timeout(PATIENCE)
        if rank == 0:
            room.set("again", str(int(has_begun(board))))
        again = room.get("again") == b"1"
    except ValueError:
        time.sleep(GRACE if rank else 0)  # rank 0 says the same, and torchrun ends all when the first one ends
        raise
    except RuntimeError as error:  # torch's own
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {rank} of {size} lost the store at {place.address}:{place.port} ({reason}); whoever kept it, rank 0"
            " or torchrun, has ended: see what it wrote"
        ) from None
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=room, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size, chosen, again, board)
    except (Exception, SystemExit) as error:
        if isinstance(error, _BY_ALL) or isinstance(error.__context__, _BY_ALL):
            traceback.clear_frames(error.__traceback__)  # they hold the group
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def first_rank_first(ranks: Ranks) -> Iterator[None]:
    """The first rank does what is in the block, then all others do, and say nothing about it."""
    if ranks.size == 1:
        yield
        return
    if not ranks.is_main:
        dist.barrier()
    with nullcontext() if ranks.is_main else silence():
        yield
    if ranks.is_main:
        dist.barrier()


@contextmanager
def silence() -> Iterator[None]:
    """No message and no warning inside the block: `logging` and `warnings` drop them.

    Bars of progress need no silence: of several ranks the first one alone makes any.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def has_begun(board: Store) -> bool:
    """Whether earlier processes of this torchrun began the run; where they took their store along, by its count."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return bool(board.check([BEGUN]))
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _board(place: Place, patience: timedelta) -> Store:
    """The store in which the processes meet: torchrun's, or one that rank 0 keeps.

    Nobody waits in it for the others: `common_room` does, and names those that do not come.
    """
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{place.address}:{place.port} (MASTER_ADDR:MASTER_PORT)"
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]  # which torch does export
            place.address, place.port, place.size, is_master=keeps, timeout=patience, wait_for_workers=False
        )
    except RuntimeError as error:  # torch's own: DistNetworkError and DistStoreError
        reason = str(error).splitlines()[0]
        if keeps:
            raise OSError(
                f"rank 0 cannot listen at {where}: {reason}. A second process with RANK=0, or an earlier run, may hold"
                " that port; give another one, as in torchrun --master_port 29501"
            ) from None
        raise TimeoutError(
            f"rank {place.rank} of {place.size} waited {patience.total_seconds():g} s in vain for rank 0 at {where}:"
            f" {reason}. See whether it was started and what it wrote"
        ) from None


def _own_device(device: str, place: Place) -> torch.device:
    own_device = torch.device(device_of(device))
    if own_device.type != "cuda":
        return own_device
    if own_device.index is not None:
        raise ValueError(f"under torchrun every process takes a GPU of its own; write --device cuda, not {device}")
    if place.local is None:
        raise ValueError(
            "the environment has RANK but no LOCAL_RANK, which says which GPU of this machine is rank"
            f" {place.rank}'s; start all processes by torchrun, or compute on --device cpu"
        )
    if place.local >= torch.cuda.device_count():
        raise ValueError(
            f"torchrun started a process number {place.local}, but this machine has {torch.cuda.device_count()} GPU(s);"
            " lower --nproc_per_node"
        )
    torch.cuda.set_device(place.local)
    return torch.device("cuda", place.local)


@contextmanager
def silence_other_ranks(ranks: Ranks) -> Iterator[None]:
    """Only the first rank logs and warns inside the block; of ranks that fail, one goes on with its error.

    That is the one that failed first; the others, which often fail for the same reason or because it is gone, end
    without a word.
    """
    if ranks.size == 1 or ranks.board is None:
        yield
        return
    word = [secrets.token_hex(8)]
    dist.broadcast_object_list(word, device=ranks.device)
    failed = f"hsat/failed/{word[0]}"  # of this attempt: the board outlives it
    try:
        with nullcontext() if ranks.is_main else silence():
            yield
    except TrainingInterrupted:  # which all ranks agreed upon
        raise
    except RanksDisagreeError:
        if ranks.is_main:
            raise
        time.sleep(GRACE)  # torchrun ends all when the first one ends, which has to speak before
        raise SystemExit(1) from None
    except (Exception, SystemExit) as error:
        if _another_spoke(ranks.board, failed, error):
            time.sleep(GRACE)  # torchrun ends all when the first one ends, which has to speak before
            raise SystemExit(1) from None
        raise


def _another_spoke(board: Store, failed: str, error: BaseException) -> bool:
    """Whether another rank failed before this one, and so says why.

    Where the store is gone, rank 0 kept it and has ended: an error of the connection tells no more than that.
    """
    try:
        end = time.monotonic() + GRACE
        while isinstance(error, RankFailedError) and time.monotonic() < end and not board.check([failed]):
            time.sleep(0.05)
        return bool(board.add(failed, 1) > 1)
    except RuntimeError:
        if not isinstance(error, RuntimeError):
            return False
        raise SystemExit("error: rank 0 has ended or cannot be reached; its own message says why") from None


def describe_launcher(environment: Mapping[str, str]) -> list[str]:
    """The words that start this command again, up to its name: hsat, or torchrun with its options."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["hsat"]
    machines = environment.get("GROUP_WORLD_SIZE", "1")
    several = [] if machines == "1" else [f"--nnodes={machines}", "..."]
    return ["torchrun", *several, f"--nproc_per_node={environment['LOCAL_WORLD_SIZE']}", "-m", "hsat"]


def command_to_resume(name: str, argv: Sequence[str], values: Mapping[str, str] | None = None) -> str:
    """The command line that goes on with an interrupted run.

    Args:
        name: The command.
        argv: Its options.
        values: Options that are to have other values, with their dashes.
    """
    changed = [word for pair in (values or {}).items() for word in pair]
    words = [*_without(argv, {*(values or {}), "--resume", "--overwrite"}), "--resume", *changed]
    return shlex.join([*describe_launcher(os.environ), name, *words])


def _without(argv: Sequence[str], names: set[str]) -> list[str]:
    """The options but for these and their values."""
    kept: list[str] = []
    drop = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if name in names:
            drop = not equals
        elif word.startswith("--") or not drop:
            kept.append(word)
            drop = False
    return kept
