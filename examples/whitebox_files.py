"""The files of a white-box evaluation: records, table, scores, artifacts, figures."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ensemble_report import write_ensembles
from evaluation_run import remove_state
from hsat.data import Cohort
from hsat.eval import (
    PAPER,
    Provenance,
    Record,
    Scoring,
    WhiteboxResult,
    compare_models,
    save_scores,
    score_tables,
    write_records,
)
from hsat.report import differences_table, markdown_table, plot_accuracy_vs_eps, plot_patches, write_artifacts
from runs import versions, write_json

if TYPE_CHECKING:
    from evaluate_whitebox import EvaluateWhitebox


def write_results(settings: EvaluateWhitebox, cohort: Cohort, results: dict[str, WhiteboxResult]) -> str:
    """Write records, table, plots and the account of the run; returns the table."""
    out, scoring = settings.out, PAPER.scoring if settings.compat == "paper" else Scoring()
    records: list[Record] = [record for result in results.values() for record in result.records]
    write_records(out / "records.jsonl", records)
    scores = [table for result in results.values() for table in score_tables(result)]
    save_scores(out / "scores.npz", scores)
    table = markdown_table(records)
    if len(results) > 1:
        differences = compare_models(scores, seed=settings.seed, scoring=replace(scoring, bootstrap=settings.bootstrap))
        table += (
            f"\n**Differences** from {differences[0].against}, on the same patients\n\n{differences_table(differences)}"
        )
        write_json(out / "differences.json", [asdict(difference) for difference in differences])
    table += write_ensembles(out, {title: result.outcomes for title, result in results.items()})
    (out / "table.md").write_text(table)
    about = {"settings": settings.plain(), "cohort": cohort.fingerprint(), "versions": versions(), "command": sys.argv}
    write_json(out / "run.json", about)
    keep_artifacts(settings, results, scoring)
    draw(settings, records, results)
    remove_state(settings)
    return table


def keep_artifacts(settings: EvaluateWhitebox, results: dict[str, WhiteboxResult], scoring: Scoring) -> None:
    """What report.py shows besides numbers: predictions, a map of the embeddings, the first patches."""
    for title, result in results.items():
        write_artifacts(
            settings.out / "evidence",
            result,
            target=settings.target,
            provenance=Provenance(model=title, checkpoint=result.records[0].checkpoint),
            scoring=scoring,
        )


def draw(settings: EvaluateWhitebox, records: list[Record], results: dict[str, WhiteboxResult]) -> None:
    """Accuracy against eps for the first k, and each encoder's patches under the first attack at its largest eps."""
    used = {record.k for record in records}
    k = settings.k[0] if settings.k[0] in used else max(used)
    plot_accuracy_vs_eps(records, settings.out / "accuracy_vs_eps.png", k=k)
    for title, result in results.items():
        attacks = [name for name in result.examples if not name.startswith(("clean", "noise"))]
        if attacks and settings.gallery:
            name = [name for name in attacks if name.split("-")[0] == attacks[0].split("-")[0]][-1]
            clean, x_adv = result.examples["clean"], result.examples[name]
            heads = [f"patch {i + 1}" for i in range(len(clean))]
            plot_patches(clean, x_adv, settings.out / f"patches_{title}_{name}.png", titles=heads)
