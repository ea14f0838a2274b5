r"""How few patches must an attacker alter to change the diagnosis of a patient?  records.jsonl, groups.csv, table.md.

    hsat budget --checkpoint runs/hsat/best.safetensors --data.root /data/opensrh
    hsat budget --checkpoint a=runs/a/final.safetensors,b=runs/b/best.safetensors \
        --level slide

Every validation patch is attacked; then the fewest attacked patches are counted that turn the pooled decision of their
patient or slide (docs/threats.md).  groups.csv has that number for each of them.  --query_patches thins the patches,
and with them the patients' sizes: the fractions stay what they say, of the patches that are left.  --resume goes on
after an interruption, and torchrun shares the work among processes, as for hsat evaluate.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from hsat.cli.attacks import AttackNames, Lengths, Threat, attacks_under, check_radii, check_threat
from hsat.cli.classifiers import ClassifierOptions, choose_classifier, describe_classifiers
from hsat.cli.encoders import open_encoders
from hsat.cli.evaluation import OUT, PatchSettings, begin_run, open_loaders, remove_state, run_evaluation
from hsat.cli.options import Pixels, say, split_commas
from hsat.cli.ranks import Ranks
from hsat.cli.threads import name_threads
from hsat.data import Cohort
from hsat.eval import (
    BudgetResult,
    PatchBudget,
    Provenance,
    Record,
    RunOptions,
    Scoring,
    evaluate_budget,
)
from hsat.eval.budget import write_groups
from hsat.eval.result_files import RunAccount, save_records
from hsat.report import markdown_table
from hsat.training.config import written

Fractions = Annotated[list[float], BeforeValidator(split_commas)]


class Budget(ClassifierOptions, PatchSettings):
    """The smallest share of a patient's or slide's patches whose alteration changes the decision."""

    level: Literal["slide", "patient"] = Field("patient", description="whose decision is to change")
    fractions: Fractions = Field(written("0.05,0.1,0.25,0.5,1"), description="shares of the patches, for the table")
    order: Literal["worst", "random"] = Field("worst", description="the attacker chooses the patches, or chance does")
    attacks: AttackNames = Field(
        written("pgd"), description="names separated by commas; --attacks list shows all of them"
    )
    threat: Threat = Field("linf", description="what the attacks may change; see docs/threats.md")
    eps: Lengths = Field(written("8/255"), description="radii: 4/255,8/255; in the unit of --threat")
    step_size: Pixels | None = Field(None, description="size of a step; eps / 4 if not given")
    steps: int = Field(10, gt=0, description="gradient steps")
    target: Literal["decision", "features", "embedding"] = Field("decision", description="what the attacks move")
    bootstrap: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    seed: int = Field(0, ge=0, description="of the attacks' random starts, and of --order random")
    out: Path = Field(written("runs/budget-TIME"), description=OUT)

    @field_validator("eps")
    @classmethod
    def _radii_fit(cls, eps: list[float], info: ValidationInfo) -> list[float]:
        return check_radii(info.data.get("threat", "linf"), eps)


def evaluate(settings: Budget, cohort: Cohort, ranks: Ranks) -> dict[tuple[str, str], BudgetResult]:
    """Count, for every encoder and attack, how few patches change each decision.

    Args:
        settings: The options.
        cohort: With the splits "train" and "val".
        ranks: The place of this process; all ranks call this and get the result of one.

    Returns:
        Results by encoder and attack.
    """
    check_threat(settings.threat, cohort)
    budget = PatchBudget(level=settings.level, fractions=settings.fractions, order=settings.order)
    encoders = open_encoders(settings.checkpoint, settings.model)
    bank, queries = open_loaders(settings, cohort)
    classifier = choose_classifier(settings, bank)
    attacks = attacks_under(
        settings.threat, settings.eps, names=settings.attacks, steps=settings.steps, step_size=settings.step_size
    )
    threads = begin_run(settings, ranks, encoders[0].encoder)
    results: dict[tuple[str, str], BudgetResult] = {}
    for title, encoder, digest in encoders:
        if settings.threat == "raw_srh" and encoder.fixed_size is None:
            encoder.input_size = (settings.data.image_size,) * 2  # patches come at their own size
        for name, attack in attacks.items():
            say(f"{title}: {name} on {settings.target}")
            results[title, name] = evaluate_budget(
                encoder.to(ranks.device),
                bank,
                queries,
                attack,
                budget=dataclasses.replace(budget, name=name),
                classifier=classifier,
                target=settings.target,
                scoring=Scoring(bootstrap=settings.bootstrap),
                run=RunOptions(
                    seed=settings.seed,
                    resume_dir=settings.state_of(f"{title} {name}"),
                    progress=not settings.quiet,
                ),
                provenance=Provenance(model=title, checkpoint=digest),
            )
    return {
        key: dataclasses.replace(result, records=name_threads(result.records, threads))
        for key, result in results.items()
    }


def records_of(results: dict[tuple[str, str], BudgetResult]) -> list[Record]:
    """All records; the clean ones, which the attacks of an encoder share, once."""
    records: list[Record] = []
    seen: set[str] = set()
    for (title, _), result in results.items():
        records += [record for record in result.records if record.attack_name != "clean" or title not in seen]
        seen.add(title)
    return records


def write_results(settings: Budget, cohort: Cohort, results: dict[tuple[str, str], BudgetResult]) -> str:
    """Write records, groups, table and the account of the run.

    Args:
        settings: The options.
        cohort: What was evaluated.
        results: By encoder and attack.

    Returns:
        The table, as Markdown.
    """
    records = records_of(results)
    about = {"classifiers": describe_classifiers(records)}
    account = RunAccount(settings=settings.plain(), cohort=cohort.fingerprint(), command=sys.argv, about=about)
    write_groups(save_records(settings.out, records, account), results.values())
    table = markdown_table(records, metrics=("accuracy", "smallest_fraction"), levels=(settings.level,))
    (settings.out / "table.md").write_text(table)
    remove_state(settings)
    return table


def main(argv: list[str]) -> None:
    """Read the options, evaluate, write, print."""
    run_evaluation(Budget.load(argv), evaluate, write_results)
