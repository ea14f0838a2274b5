"""An evaluation command from its options to its files: the folder, the ranks of torchrun, errors in one sentence."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from cohorts import describe, open_cohort
from hsat.data import BadPatch, Cohort
from hsat.distributed import RankFailedError
from hsat.run_folder import lock_folder
from hsat.training import assert_ranks_agree
from one_voice import one_voice
from ranks import Ranks, joined, one_after_the_first
from runs import same_on_all_ranks
from settings import DataSettings, Names, Settings, StoredModelSettings


class EvaluationSettings(Settings):
    """What every evaluation that can be resumed and shared among processes is told."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    seed: int = Field(0, ge=0, description="of the attacks' random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    out: Path = Field(Path("runs/evaluation"), description="folder for the results")
    resume: bool = Field(False, description="go on with the finished batches of an interrupted run in --out")
    quiet: bool = Field(False, description="no progress bars")

    @property
    def state(self) -> Path:
        """The folder of finished batches, until the results are written."""
        return self.out / ".state"

    def state_of(self, title: str) -> Path:
        """The folder in it for one encoder or attack, another one for every title."""
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:40]
        return self.state / f"{readable}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


S = TypeVar("S", bound=EvaluationSettings)
Result = TypeVar("Result")


def open_run(settings: EvaluationSettings, ranks: Ranks) -> Cohort:
    """The cohort, after the first rank has found the folder for the results free and made it."""
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with one_after_the_first(ranks):  # which may write the synthetic cohort
        if ranks.first and settings.state.exists() and not (settings.resume or ranks.again):
            raise ValueError(
                f"{settings.out} holds finished batches of an earlier run; add --resume to go on with it, or delete"
                f" {settings.state} to begin anew"
            )
        cohort = open_cohort(settings.data, seed=settings.seed)
        if ranks.first:
            print(describe(cohort), file=sys.stderr)
            settings.out.mkdir(parents=True, exist_ok=True)
    assert_ranks_agree(cohort=cohort, seed=settings.seed)
    return cohort


def remove_state(settings: EvaluationSettings) -> None:
    """Remove the finished batches: all of them are in the results now, or nobody asked for them."""
    shutil.rmtree(settings.state, ignore_errors=True)


def run_evaluation(
    settings: S, evaluate: Callable[[S, Cohort, Ranks], Result], write: Callable[[S, Cohort, Result], str]
) -> None:
    """Evaluate on all ranks, write and print on the first; what the user can mend ends the program with the reason.

    evaluate: (settings, cohort, ranks) -> result.  It says `ranks.begin()` once the options are checked.
    write: (settings, cohort, result) -> the table that is printed.
    """
    if not settings.checkpoint:
        raise SystemExit(
            "error: give --checkpoint FILE, or --checkpoint a=FILE,b=FILE; train_hsat.py writes best.safetensors"
        )
    try:
        with joined(settings.device, patience=timedelta(seconds=settings.rank_timeout)) as ranks, one_voice(ranks):
            with lock_folder(settings.out) if ranks.first else nullcontext():
                cohort = open_run(settings, ranks)
                result = evaluate(settings, cohort, ranks)
                table = write(settings, cohort, result) if ranks.first else ""
        if not ranks.first:
            return
    except (BadPatch, FloatingPointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except RankFailedError as error:
        raise SystemExit(f"error: {error}; the same command with --resume goes on with the finished batches") from None
    print(table)
    print(f"results are in {settings.out}", file=sys.stderr)
