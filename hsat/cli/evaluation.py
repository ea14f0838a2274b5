"""An evaluation command from its options to its files: the folder, the ranks of torchrun, errors in one sentence."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar, cast, get_args

from pydantic import Field
from torch.utils.data import DataLoader

from hsat.cli.cohort import describe, open_cohort
from hsat.cli.encoders import name_file
from hsat.cli.failures import explain_failure
from hsat.cli.folders import settle_folder
from hsat.cli.image_size import settle_image_size
from hsat.cli.options import EvaluationDataSettings, Names, StoredModelSettings, device_of, say
from hsat.cli.ranks import Ranks, first_rank_first, join_ranks, silence_other_ranks
from hsat.cli.threads import Threads, computing_threads, settle_threads
from hsat.cli.train import same_on_all_ranks
from hsat.cli.training_runs import RunSettings, check_synthetic
from hsat.data import Cohort, PatchDataset, patch_loader
from hsat.embedding import Layer
from hsat.eval.result_files import EVIDENCE, RECORDS, RESULT_FILES
from hsat.models import Encoder
from hsat.run_folder import LOG_FILE, lock_folder
from hsat.training import assert_ranks_agree
from hsat.training.config import written
from hsat.types import HierarchicalBatch

STATES = (".state", "state")
RESULTS = (*RESULT_FILES, EVIDENCE)
"""Files and folders that evaluations write into --out."""
MARKED = ("cohort/adversarial.json", "state/**/settings.json")
"""Files by which other folders of --out are known to be of an evaluation."""


OUT = "folder for the results; TIME stands for the time of now"


class EvaluationSettings(RunSettings):
    """What every evaluation that can be resumed and shared among processes is told."""

    checkpoint: Names = Field([], description="file, or name=file, or several with commas between")
    data: EvaluationDataSettings = EvaluationDataSettings()
    model: StoredModelSettings = StoredModelSettings()
    seed: int = Field(0, ge=0, description="of the attacks' random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    threads: Threads = Field(
        "auto", description="threads of a CPU; auto: the faster of one and torch's own, by a short measurement"
    )
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    out: Path = Field(written("runs/evaluation-TIME"), description=OUT)
    resume: bool = Field(False, description="go on with the finished batches of an interrupted run in --out")
    overwrite: bool = Field(False, description="remove the results of an earlier run in --out first")
    quiet: bool = Field(False, description="no progress bars")

    @property
    def state(self) -> Path:
        """The folder of finished batches, until the results are written."""
        return self.out / ".state"

    def state_of(self, title: str) -> Path:
        """The folder in it for one encoder or attack, another one for every title."""
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:40]
        return self.state / f"{readable}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


class PatchSettings(EvaluationSettings):
    """What evaluations of a bank and of queries are told beside that."""

    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="take this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches per batch")


class HasPatches(Protocol):
    """Options that choose patches, of any command."""

    @property
    def data(self) -> EvaluationDataSettings: ...  # noqa: D102
    @property
    def bank_patches(self) -> int | None: ...  # noqa: D102
    @property
    def query_patches(self) -> int | None: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102


Loader = DataLoader[HierarchicalBatch]


def open_loaders(settings: HasPatches, cohort: Cohort, *, own_size: bool = False) -> tuple[Loader, Loader]:
    """The bank (clean training patches) and the queries (validation patches), thinned evenly where asked.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        own_size: Patches keep the size of their files; resized, SRH patches are not made of two channels any more.

    Returns:
        Loaders of the bank and of the queries.
    """
    loaders = []
    on_gpu = device_of(settings.device).startswith("cuda")
    for split, count in (("train", settings.bank_patches), ("val", settings.query_patches)):
        dataset = PatchDataset(cohort, split, image_size=None if own_size else settings.data.image_size).thin(count)
        workers = settings.data.workers
        loaders.append(patch_loader(dataset, batch_size=settings.batch_size, workers=workers, pin_memory=on_gpu))
    return cast(Loader, loaders[0]), cast(Loader, loaders[1])  # datasets give samples, their loaders batches


S = TypeVar("S", bound=EvaluationSettings)
Result = TypeVar("Result")


def open_run(settings: EvaluationSettings, ranks: Ranks) -> Cohort:
    """The cohort, after the first rank has found the folder for the results free and made it."""
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with first_rank_first(ranks):  # which may write the synthetic cohort
        if ranks.is_main and not ranks.again:
            if settings.data.root is None:
                check_synthetic([name_file(text)[1] for text in settings.checkpoint])
            check_folder(settings.out, overwrite=settings.overwrite, resume=settings.resume, state=settings.state)
        cohort = open_cohort(settings.data, seed=settings.seed)
        if ranks.is_main:
            say(describe(cohort))
            settings.out.mkdir(parents=True, exist_ok=True)
    assert_ranks_agree(cohort=cohort, seed=settings.seed)
    return cohort


def check_folder(out: Path, *, overwrite: bool, resume: bool = False, state: Path | None = None) -> None:
    """Raise ValueError, with what to type, unless the folder is free for the results or may be used again.

    Args:
        out: The folder.
        overwrite: Whether what it holds is to be replaced.
        resume: Whether the run in it is to go on.
        state: Where it has finished batches, of a command that can be resumed.
    """
    if resume and overwrite:
        raise ValueError("give --resume to go on with a run, or --overwrite true to replace it; not both")
    if (out / LOG_FILE).exists() and not (out / RECORDS).exists():
        raise ValueError(f"{out} holds a training; choose another --out for the evaluation")
    has_state = state is not None and state.exists()
    if resume or overwrite or not (has_state or (out / RECORDS).exists()):
        return
    what = "the results of another run" if (out / RECORDS).exists() else "finished batches of an earlier run"
    more = "add --resume to go on with it, " if has_state else ""
    raise ValueError(f"{out} holds {what}; {more}choose another --out, or replace it: --overwrite true")


def has_state(out: Path) -> bool:
    """Whether a folder holds finished batches of an evaluation."""
    return any((out / name).is_dir() for name in STATES)


def begin_run(settings: EvaluationSettings, ranks: Ranks, encoder: Encoder) -> int | None:
    """Called by every evaluation once its options are checked: what is to be overwritten goes, the run is begun.

    Returns:
        The number of threads, where one was chosen (`settle_threads`).
    """
    if ranks.is_main and not ranks.again and not settings.resume:
        if settings.overwrite:
            remove_results(settings.out)
        remove_state(settings)
    ranks.begin()
    if ranks.size > 1:
        return None if settings.threads == "auto" else settings.threads
    return settle_threads(
        settings.threads, encoder, image_size=settings.data.image_size, device=ranks.device, state=settings.state
    )


def remove_results(out: Path) -> None:
    """Remove what evaluations write into a folder, and nothing else."""
    known = [out / path.relative_to(out).parts[0] for pattern in MARKED for path in out.glob(pattern)]
    for path in {*known, *(path for pattern in RESULTS for path in out.glob(pattern))}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_state(settings: EvaluationSettings) -> None:
    """Remove the finished batches: all of them are in the results now, or nobody asked for them."""
    shutil.rmtree(settings.state, ignore_errors=True)


def run_evaluation(
    settings: S, evaluate: Callable[[S, Cohort, Ranks], Result], write: Callable[[S, Cohort, Result], str]
) -> None:
    """Evaluate on all ranks, write and print on the first.

    Args:
        settings: The options.
        evaluate: (settings, cohort, ranks) -> result.  It calls `ranks.begin()` once the options are checked.
        write: (settings, cohort, result) -> the table that is printed.

    Raises:
        SystemExit: With the reason, for what the user can mend.
    """
    if not settings.checkpoint:
        raise SystemExit(
            "error: give --run FOLDER of hsat train, --checkpoint FILE, or --checkpoint a=FILE,b=FILE; hsat train"
            " writes best.safetensors"
        )
    try:
        with (
            join_ranks(settings.device, patience=timedelta(seconds=settings.rank_timeout)) as ranks,
            silence_other_ranks(ranks),
            computing_threads(settings.threads),
        ):
            settings = settle_folder(settings, ranks, resume=settings.resume, is_unfinished=has_state)
            with lock_folder(settings.out) if ranks.is_main else nullcontext():
                cohort = open_run(settings, ranks)
                files = [name_file(text)[1] for text in settings.checkpoint]
                data = settle_image_size(settings.data, cohort, files, settings.model)
                settings = settings.model_copy(update={"data": data})
                result = evaluate(settings, cohort, ranks)
                table = write(settings, cohort, result) if ranks.is_main else ""
        if not ranks.is_main:
            return
    except Exception as error:
        message = explain_failure(error, workers=settings.data.workers)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from None
    print(table)
    say(f"results are in {settings.out}")
    if note := upper_bound_note(getattr(settings, "target", ""), getattr(settings, "attacks", [])):
        say(note)


def upper_bound_note(target: str, attacks: Sequence[str] = ()) -> str:
    """What the last line of a run says whose attacks were not against the decision; "" where one was.

    Args:
        target: What the attacks moved.
        attacks: Their names; an ensemble always attacks the decision.
    """
    if target not in get_args(Layer) or any(name.lower() == "ensemble" for name in attacks):
        return ""
    return (
        f"note: the attacks moved the {target} and not the decision, so the numbers are an upper bound; attacks on the"
        " decision usually leave far less (hsat evaluate --target decision)"
    )
