"""Where a command writes when nobody says so: a folder of its own, whose name ends with the time it began.

The default of --out ends with TIME, as in runs/evaluation-TIME, and becomes runs/evaluation-2026-11-28-1730; a second
run of the same minute gets runs/evaluation-2026-11-28-1730-02.  Names in alphabetical order are in the order of time.
"""

from __future__ import annotations

import glob
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from hsat.cli.options import say
from hsat.cli.ranks import Ranks

TIME = "TIME"
_FORM, _NAME = "%Y-%m-%d-%H%M", re.compile(r"\d{4}-\d\d-\d\d-\d{4}(-\d+)?")
_BOARD = "hsat/out"


class HasFolder(Protocol):
    """Options of a command that writes into --out."""

    @property
    def out(self) -> Path: ...  # noqa: D102
    def model_copy(self, *, update: dict[str, object]) -> Self: ...  # noqa: D102


S = TypeVar("S", bound=HasFolder)


def choose_folder(out: Path, *, resume: bool = False, is_unfinished: Callable[[Path], bool] | None = None) -> Path:
    """The folder that --out means; a new one is made at once, so that no other process takes it.

    Args:
        out: What --out says; a name that ends with TIME stands for a new folder of that name and the time of now.
        resume: Take the newest unfinished run of that name instead.
        is_unfinished: Whether a folder holds a run that can be resumed.

    Returns:
        The folder.

    Raises:
        ValueError: If nothing is there to be resumed, with what to type.
    """
    if not out.name.endswith(TIME):
        return out
    stem = out.name.removesuffix(TIME)
    if resume:
        earlier = [
            path
            for path in sorted(out.parent.glob(f"{glob.escape(stem)}*"))
            if _NAME.fullmatch(path.name.removeprefix(stem)) and (is_unfinished is None or is_unfinished(path))
        ]
        if not earlier:
            raise ValueError(
                f"--resume finds no unfinished run {out.parent / stem}*; name the folder of the run: --out FOLDER"
            )
        say(f"--resume without --out: going on in {earlier[-1]}, the newest unfinished run")
        return earlier[-1]
    name = stem + time.strftime(_FORM)
    for number in itertools.count(1):
        folder = out.with_name(name if number == 1 else f"{name}-{number:02d}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def settle_folder(settings: S, ranks: Ranks, *, resume: bool, is_unfinished: Callable[[Path], bool]) -> S:
    """The options with the folder that --out means; the first rank chooses, and all ranks have the same one.

    Processes that torchrun started anew go on in the folder of those before them.

    Args:
        settings: The options.
        ranks: The place of this process.
        resume: Whether to go on with a run.
        is_unfinished: Whether a folder holds a run that can be resumed.

    Returns:
        The options, with another `out` where it was to carry a time.
    """
    if not settings.out.name.endswith(TIME):
        return settings
    chosen = [""]
    if ranks.is_main:
        board = ranks.board
        if board is not None and ranks.again and board.check([_BOARD]):
            chosen = [board.get(_BOARD).decode()]
        else:
            folder = choose_folder(settings.out, resume=resume or ranks.again, is_unfinished=is_unfinished)
            chosen = [str(folder)]
        if board is not None:
            board.set(_BOARD, chosen[0])
    if ranks.size > 1:
        dist.broadcast_object_list(chosen, device=ranks.device)
    return settings.model_copy(update={"out": Path(chosen[0])})
