"""Black-box transfer between encoders: tables, records, heat maps; on screen at most 10 lines.

    hsat transfer --checkpoint a=runs/a/best.safetensors,b=FILE,c=FILE --data.root /data/opensrh
    hsat transfer --checkpoint a=FILE,b=FILE,c=FILE --surrogates a,b --target embedding --resume

Every encoder of --surrogates is attacked on the validation patches, once per attack; every encoder of --targets then
classifies what came out with its own bank of clean training patches; --classifier says how.  Acc-D and MCA-D are the
target's clean accuracy minus its accuracy on these images.  Attacks are against the surrogate's decision; the paper's
tables attack the embedding (--target embedding).

The folder `state` in --out keeps what is finished: after an interruption the same command with --resume goes on from
there and ends with the same records; encoders and attacks may be added later.  Several GPUs or processes share the
work, with the same results (docs/devices.md):

    torchrun --nproc_per_node=4 -m hsat transfer --checkpoint a=FILE,b=FILE --data.root /data/opensrh
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hsat.cli.attacks import AttackNames, attacks_under
from hsat.cli.classifiers import ClassifierOptions, choose_classifiers, describe_classifiers
from hsat.cli.encoders import open_encoders
from hsat.cli.evaluate import plain_warnings, published_options, say_logits, target_and_scoring
from hsat.cli.evaluation import OUT, PatchSettings, begin_run, open_loaders, run_evaluation
from hsat.cli.options import Names, Pixels, PixelsList
from hsat.cli.ranks import Ranks
from hsat.cli.threads import name_threads
from hsat.data import Cohort
from hsat.eval import Provenance, Record, RunOptions, TransferResult, evaluate_transfer
from hsat.eval.result_files import RunAccount, save_records
from hsat.models import active_branch
from hsat.report import plot_transfer, transfer_markdown
from hsat.report.short_summary import transfer_summary
from hsat.training.config import written


class Transfer(ClassifierOptions, PatchSettings):
    """Measure how attacks on one encoder hurt others, by classifiers of embeddings, of patches, slides and patients."""

    checkpoint: Names = Field([], description="encoders: name=file,name=file,... or files alone")
    surrogates: Names = Field([], description="names of the encoders to attack; all if not given")
    targets: Names = Field([], description="names of the encoders to measure; all if not given")
    attacks: AttackNames = Field(
        written("pgd,mifgsm"), description="names separated by commas; --attacks list shows all of them"
    )
    eps: PixelsList = Field(written("4/255,8/255"), description="radii: 4/255,8/255")
    step_size: Pixels = Field(written("2/255"), description="size of a step")
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["decision", "features", "embedding"] = Field(
        "decision", description="what the attacks move on the surrogate; embedding with --preset paper"
    )
    preset: Literal["paper"] | None = Field(None, description="paper: the published arithmetic and attack target")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    intervals: bool = Field(False, description="show intervals in the table; the records have them anyway")
    out: Path = Field(written("runs/transfer-TIME"), description=OUT)
    resume: bool = Field(False, description="go on with what is finished in the folder of --out")

    @model_validator(mode="before")
    @classmethod
    def _published_evaluation(cls, values: Any) -> Any:
        return published_options(values)

    @property
    def state(self) -> Path:
        """The folder of finished batches; it stays, so that encoders and attacks can be added."""
        return self.out / "state"


def pairs_of(settings: Transfer, titles: Sequence[str]) -> list[tuple[str, str]]:
    """Every surrogate with every target.

    Args:
        settings: The options.
        titles: Names of the encoders.

    Returns:
        (surrogate, target) pairs.

    Raises:
        ValueError: For names that are none of the encoders'.
    """
    chosen = {}
    for option in ("surrogates", "targets"):
        chosen[option] = list(dict.fromkeys(getattr(settings, option) or titles))
        if unknown := [name for name in chosen[option] if name not in titles]:
            raise ValueError(f"unknown {option} {unknown}; --checkpoint has {list(titles)}")
    return list(itertools.product(chosen["surrogates"], chosen["targets"]))


def evaluate(settings: Transfer, cohort: Cohort, ranks: Ranks | None = None) -> TransferResult:
    """Attack every surrogate and measure every target.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        ranks: The place of this process; all ranks call this and get the result of one.

    Returns:
        The whole matrix; its records say which branch of a dual BatchNorm was measured.
    """
    ranks = ranks or Ranks.alone(settings.device)
    encoders = open_encoders(settings.checkpoint, settings.model, paper=settings.preset == "paper")
    say_logits(settings.model, encoders)
    pairs = pairs_of(settings, [one.title for one in encoders])
    bank, queries = open_loaders(settings, cohort)
    classifiers = choose_classifiers(settings, bank)
    target, scoring = target_and_scoring(settings.target, settings.preset, bootstrap=settings.bootstrap)
    attacks = attacks_under(
        "linf", settings.eps, names=settings.attacks, steps=settings.steps, step_size=settings.step_size
    )
    threads = begin_run(settings, ranks, encoders[0].encoder)
    result = evaluate_transfer(
        {one.title: one.encoder.to(ranks.device) for one in encoders},
        bank,
        queries,
        attacks,
        pairs=pairs,
        classifier=classifiers,
        target=target,
        scoring=scoring,
        run=RunOptions(seed=settings.seed, device=ranks.device, resume_dir=settings.state, progress=not settings.quiet),
        provenance={one.title: Provenance(checkpoint=one.digest) for one in encoders},
    )
    branches = {one.title: active_branch(one.encoder) for one in encoders}
    named = (_naming_branch(record, branches) for record in result.records)
    return replace(result, records=name_threads(named, threads))


def _naming_branch(record: Record, branches: dict[str, str | None]) -> Record:
    branch_settings = {"branch": branches[record.model], "surrogate_branch": branches.get(record.surrogate)}
    return replace(record, settings=record.settings | {key: value for key, value in branch_settings.items() if value})


def write_results(settings: Transfer, cohort: Cohort, result: TransferResult) -> str:
    """Write records, table, heat maps and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        result: The whole matrix.

    Returns:
        What is printed: at most 10 lines, the last of which says where all tables are.
    """
    out = settings.out
    table = transfer_markdown(result.records, intervals=settings.intervals)
    (out / "table.md").write_text(table)
    about = {"classifiers": describe_classifiers(result.records), "attacked_in_this_run": result.made}
    account = RunAccount(settings=settings.plain(), cohort=cohort.fingerprint(), command=sys.argv, about=about)
    save_records(out, result.records, account)
    k = result.records[0].k
    for metric, title in (("accuracy_drop", "acc_d"), ("mca_drop", "mca_d")):
        plot_transfer(result.records, out / f"transfer_{title}.png", metric=metric, k=k)
    return "\n".join((*transfer_summary(result.records), f"all levels and attacks: {out / 'table.md'}"))


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    with plain_warnings():
        run_evaluation(Transfer.load(argv), evaluate, write_results)
