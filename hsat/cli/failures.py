"""Failures that come from outside of a command, in one line with the cause and the cure."""

from __future__ import annotations

import errno
import re

from hsat.data import BadPatch
from hsat.distributed import RankFailedError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe")


def explain_failure(error: BaseException, *, workers: int = 0, resumable: bool = True) -> str | None:
    """The sentence for what the user can mend; None for other errors, whose traceback is wanted.

    Args:
        error: What ended the command.
        workers: Value of --data.workers.
        resumable: Whether the command has --resume.
    """
    again = "; the same command with --resume goes on" if resumable else ""
    if is_disk_full(error):
        return f"no space is left to write ({_root(error)}); free some, or choose an --out on another disk{again}"
    if is_dead_worker(error):
        return (
            f"a process that reads patches has died ({_first_line(error)}), as when memory runs out; lower"
            f" --data.workers (now {workers}; 0 reads in the command itself){again}"
        )
    if isinstance(error, RankFailedError) or is_lost_rank(error):
        reason = error if isinstance(error, RankFailedError) else "another process of this run has stopped"
        return f"{reason}{again}"
    if isinstance(error, BadPatch | FloatingPointError | OSError | ValueError):
        return str(error)
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit on the size of files was reached.

    torch and safetensors raise errors of their own then: torch beside the system's, safetensors with its number in the
    text.
    """
    return any(_number(one) in FULL for one in _chain(error))


def is_dead_worker(error: BaseException) -> bool:
    """Whether a process of a DataLoader was killed; torch raises a plain RuntimeError then."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether another rank has gone; gloo raises a plain RuntimeError then."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _root(error: BaseException) -> str:
    return _first_line(next(one for one in _chain(error) if _number(one) in FULL))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
