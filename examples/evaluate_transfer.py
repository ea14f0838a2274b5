"""Black-box transfer between encoders: records.jsonl, table.md, heat maps.

    python examples/evaluate_transfer.py --checkpoint a=runs/a/best.safetensors,b=FILE,c=FILE --data.root /data/opensrh
    python examples/evaluate_transfer.py --checkpoint a=FILE,b=FILE,c=FILE --surrogates a,b --target embedding --resume

Every encoder of --surrogates is attacked on the validation patches, once per attack; every encoder of --targets then
classifies what came out with its own bank of clean training patches.  Acc-D and MCA-D are the target's clean accuracy
minus its accuracy on these images.  The paper's tables attack the embedding (--target embedding).

The folder `state` in --out keeps what is finished: after an interruption the same command with --resume goes on from
there and ends with the same records.  With --hold one only one encoder is in memory at a time, and the adversarial
images of one surrogate and attack wait in that folder meanwhile.  Several GPUs or processes share the work, with the
same results (docs/devices.md):

    torchrun --nproc_per_node=4 examples/evaluate_transfer.py --checkpoint a=FILE,b=FILE --data.root /data/opensrh
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from cohorts import describe, open_cohort
from evaluate_whitebox import load_named, loaders
from hsat.data import BadPatch, Cohort
from hsat.eval import (
    Record,
    TransferResult,
    evaluate_transfer,
    paper_attacks,
    plot_transfer,
    transfer_table,
    write_records,
)
from hsat.eval.engine.crew import RankStoppedError
from hsat.models import active_branch
from hsat.training import assert_ranks_agree
from one_voice import one_voice
from ranks import Ranks, joined, one_after_the_first
from runs import device_named, same_on_all_ranks, versions, write_json
from settings import Counts, DataSettings, Names, Pixels, PixelsList, Settings, StoredModelSettings


class EvaluateTransfer(Settings):
    """Measure how attacks on one encoder hurt others, by kNN at patch, slide and patient level."""

    checkpoint: Names = Field([], description="encoders: name=file,name=file,... or files alone")
    surrogates: Names = Field([], description="names of the encoders to attack; all if not given")
    targets: Names = Field([], description="names of the encoders to measure; all if not given")
    data: DataSettings = DataSettings()
    model: StoredModelSettings = StoredModelSettings()
    attacks: Names = Field(["pgd", "bim", "mifgsm"], description="names separated by commas")
    eps: PixelsList = Field([4 / 255, 8 / 255], description="radii: 4/255,8/255")
    step_size: Pixels = Field(2 / 255, description="size of a step")
    steps: int = Field(10, gt=0, description="gradient steps")
    k: Counts = Field([200], description="neighbours; several with commas between")
    temperature: float = Field(0.07, gt=0, description="of the kNN vote")
    target: Literal["features", "embedding"] | None = Field(
        None, description="what the attacks move on the surrogate; features, or embedding with --compat paper"
    )
    compat: Literal["paper"] | None = Field(None, description="paper: the published arithmetic and attack target")
    bank_patches: int | None = Field(None, gt=0, description="use this many training patches; all if not given")
    query_patches: int | None = Field(None, gt=0, description="attack this many validation patches; all if not given")
    batch_size: int = Field(64, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    hold: Literal["all", "one"] = Field("all", description="encoders in memory: all of them, or one at a time")
    intervals: bool = Field(False, description="show intervals in the table; the records have them anyway")
    seed: int = Field(0, ge=0, description="of the attacks' random starts")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    out: Path = Field(Path("runs/transfer"), description="folder for the results and the state")
    resume: bool = Field(False, description="go on with what is finished in the folder of --out")
    quiet: bool = Field(False, description="no progress bars")


def open_encoders(
    settings: EvaluateTransfer, device: torch.device
) -> tuple[dict[str, Any], dict[str, str], dict[str, str | None]]:
    """By name: the encoders or what loads them, the SHA-256 of their files, the active branches of dual BatchNorm.

    Every file is read once here, so that one that does not fit is found before the first attack.
    """
    encoders: dict[str, Any] = {}
    digests: dict[str, str] = {}
    branches: dict[str, str | None] = {}
    for text in settings.checkpoint:
        name, encoder, digests[name] = load_named(settings, text)
        if name in encoders:
            raise ValueError(f"two encoders are called {name!r}; name them: --checkpoint a=FILE,b=FILE")
        branches[name] = active_branch(encoder)
        encoders[name] = encoder.to(device) if settings.hold == "all" else _loader(settings, text, device)
    return encoders, digests, branches


def _loader(settings: EvaluateTransfer, text: str, device: torch.device) -> Callable[[], Any]:
    def load() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):  # what it has to say was said at the first reading
            return load_named(settings, text)[1].to(device)

    return load


def evaluate(settings: EvaluateTransfer, cohort: Cohort, ranks: Ranks | None = None) -> TransferResult:
    """The whole matrix; its records say which branch of a dual BatchNorm was measured.

    ranks: which of several processes this is; all of them call this, and all get the result of one.
    """
    device = ranks.device if ranks else device_named(settings.device)
    encoders, digests, branches = open_encoders(settings, device)
    bank, queries = loaders(settings, cohort)
    result = evaluate_transfer(
        encoders,
        bank,
        queries,
        paper_attacks(settings.eps, steps=settings.steps, step_size=settings.step_size, names=settings.attacks),
        surrogates=settings.surrogates or None,
        targets=settings.targets or None,
        target=settings.target,
        k=settings.k,
        temperature=settings.temperature,
        seed=settings.seed,
        compat=settings.compat,
        bootstrap=settings.bootstrap,
        checkpoints=digests,
        hold=settings.hold,
        state=settings.out / "state",
        device=device,
        progress=not settings.quiet,
    )
    return replace(result, records=tuple(_naming_branch(record, branches) for record in result.records))


def _naming_branch(record: Record, branches: dict[str, str | None]) -> Record:
    found = {"branch": branches[record.model], "surrogate_branch": branches.get(record.surrogate)}
    return replace(record, settings=record.settings | {key: value for key, value in found.items() if value})


def write_results(settings: EvaluateTransfer, cohort: Cohort, result: TransferResult) -> str:
    """Write records, table, heat maps and the account of the run; returns the table."""
    out = settings.out
    write_records(out / "records.jsonl", result.records)
    table = transfer_table(result.records, intervals=settings.intervals)
    (out / "table.md").write_text(table)
    about = {"settings": settings.plain(), "cohort": cohort.fingerprint(), "versions": versions(), "command": sys.argv}
    write_json(out / "run.json", about | {"attacked_in_this_run": result.made})
    used = {record.k for record in result.records}
    k = settings.k[0] if settings.k[0] in used else max(used)
    try:
        for metric, title in (("accuracy_drop", "acc_d"), ("mca_drop", "mca_d")):
            plot_transfer(result.records, out / f"transfer_{title}.png", metric=metric, k=k)
    except ImportError as error:
        print(f"no figures: {error}", file=sys.stderr)
    return table


def opened(settings: EvaluateTransfer, ranks: Ranks) -> Cohort:
    """The cohort, after the first rank has made the folder for the results and found it free."""
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with one_after_the_first(ranks):  # which may write the synthetic cohort
        if ranks.first and (settings.out / "state").exists() and not (settings.resume or ranks.again):
            raise ValueError(
                f"{settings.out} holds a run already; add --resume to go on with it, or choose another --out"
            )
        cohort = open_cohort(settings.data, seed=settings.seed)
        if ranks.first:
            print(describe(cohort), file=sys.stderr)
            settings.out.mkdir(parents=True, exist_ok=True)
    assert_ranks_agree(cohort=cohort, seed=settings.seed)
    return cohort


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    settings = EvaluateTransfer.load(argv)
    if not settings.checkpoint:
        raise SystemExit("error: give --checkpoint a=FILE,b=FILE,...; train_hsat.py writes best.safetensors")
    try:
        with joined(settings.device, patience=timedelta(seconds=settings.rank_timeout)) as ranks, one_voice(ranks):
            cohort = opened(settings, ranks)
            ranks.begin()
            result = evaluate(settings, cohort, ranks)
        if not ranks.first:
            return
        table = write_results(settings, cohort, result)
    except (BadPatch, FloatingPointError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except RankStoppedError as error:
        raise SystemExit(f"error: {error}; the same command with --resume goes on with the finished pairs") from None
    print(table)
    print(f"results are in {settings.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
