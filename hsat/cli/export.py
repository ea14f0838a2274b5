r"""Adversarial patches as files that open anywhere, and the accuracy that is measured on these files.

    hsat export --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh \
        --threat raw_srh --eps 8/255 --out runs/adversarial

Writes --out/cohort (8-bit PNGs of colour patches, 16-bit TIFFs of SRH, with a manifest; `--data.layout csv` reads it),
records.jsonl, table.md and run.json.  Patches are attacked at the size of their files and rounded inside the ball; the
numbers of "(files)" are those of the files, read again (docs/threats.md).  SRH cohorts need --threat raw_srh, since
their files hold two channels; the default is linf for colour patches and raw_srh for SRH.  --resume goes on after an
interruption, and torchrun shares the work among processes, as for hsat evaluate.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from hsat.cli.attacks import AttackNames, Lengths, attacks_under, check_radii, check_threat
from hsat.cli.classifiers import ClassifierOptions, choose_classifier, describe_classifiers
from hsat.cli.encoders import open_encoders
from hsat.cli.evaluation import OUT, EvaluationSettings, begin_run, remove_state, run_evaluation
from hsat.cli.options import Names, Pixels, say
from hsat.cli.ranks import Ranks
from hsat.data import Cohort, PatchDataset
from hsat.eval import ExportOptions, ExportResult, Provenance, RunOptions, save_adversarial
from hsat.eval.export import ShapeBatches
from hsat.eval.result_files import RunAccount, save_records
from hsat.report import markdown_table
from hsat.training.config import written


class Export(ClassifierOptions, EvaluationSettings):
    """Attack the patches of a split, write them as lossless files, and score the files."""

    checkpoint: Names = Field([], description="file, or name=file; one")
    split: str = Field("val", description="the patches to attack")
    attacks: AttackNames = Field(written("pgd"), description="one name; --attacks list shows all of them")
    threat: Literal["linf", "l2", "raw_srh"] | None = Field(None, description="linf, or raw_srh for SRH, if not given")
    eps: Lengths = Field(written("8/255"), description="radius, in the unit of --threat; one")
    step_size: Pixels | None = Field(None, description="size of a step; eps / 4 if not given")
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["decision", "features", "embedding"] = Field("decision", description="what the attack moves")
    batch_size: int = Field(16, gt=0, description="patches per batch")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    out: Path = Field(written("runs/adversarial-TIME"), description=OUT)


def evaluate(settings: Export, cohort: Cohort, ranks: Ranks) -> ExportResult:
    """Attack the patches of a split, write them as files, and score the files.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        ranks: The place of this process; all ranks call this and get the result of one.

    Returns:
        What was written and measured.

    Raises:
        ValueError: For several encoders, attacks or radii, and for an attack whose images no file of this kind holds.
    """
    for option in ("checkpoint", "attacks", "eps"):
        if len(given := getattr(settings, option)) != 1:
            raise ValueError(f"one run writes the files of one attack on one encoder; --{option} has {len(given)}")
    threat = settings.threat or ("raw_srh" if cohort.kind == "srh" else "linf")
    check_threat(threat, cohort)
    ((name, attack),) = attacks_under(
        threat,
        check_radii(threat, settings.eps),
        names=settings.attacks,
        steps=settings.steps,
        step_size=settings.step_size,
    ).items()
    ((title, encoder, digest),) = open_encoders(settings.checkpoint, settings.model)
    if encoder.fixed_size is None:
        encoder.input_size = (settings.data.image_size,) * 2  # patches come at the size of their files
    bank = ShapeBatches(PatchDataset(cohort, "train"), settings.batch_size)
    classifier = choose_classifier(settings, bank)
    begin_run(settings, ranks, encoder)
    try:
        return save_adversarial(
            settings.out / "cohort",
            encoder.to(ranks.device),
            bank,
            cohort,
            attack,
            options=ExportOptions(
                split=settings.split, batch_size=settings.batch_size, name=name, bootstrap=settings.bootstrap
            ),
            classifier=classifier,
            target=settings.target,
            run=RunOptions(seed=settings.seed, resume_dir=settings.state, progress=not settings.quiet),
            provenance=Provenance(model=title, checkpoint=digest),
        )
    except TypeError as error:  # an attack whose images no file of this kind can hold
        raise ValueError(str(error)) from error


def write_results(settings: Export, cohort: Cohort, result: ExportResult) -> str:
    """Write records, table and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        result: What was written and measured.

    Returns:
        The table, as Markdown.
    """
    table = markdown_table(result.records)
    (settings.out / "table.md").write_text(table)
    facts = {"files": result.cohort.fingerprint(), "changed": result.changed}
    facts["classifiers"] = describe_classifiers(result.records)
    account = RunAccount(settings=settings.plain(), cohort=cohort.fingerprint(), command=sys.argv, about=facts)
    save_records(settings.out, result.records, account)
    remove_state(settings)
    say(f"{len(result.cohort)} files in {result.root}, {result.changed:.0%} of their numbers changed")
    return table


def main(argv: list[str]) -> None:
    """Read the options, attack, write, print."""
    run_evaluation(Export.load(argv), evaluate, write_results)
