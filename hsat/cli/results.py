"""The files of a white-box evaluation: records, table, scores, artifacts, ensembles, figures."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hsat.cli.evaluation import remove_state
from hsat.data import Cohort
from hsat.eval import (
    PAPER,
    EnsembleOutcome,
    Provenance,
    Record,
    Scoring,
    WhiteboxResult,
    compare_models,
    save_scores,
    score_tables,
    write_records,
)
from hsat.files import write_file
from hsat.report import differences_table, markdown_table, plot_accuracy_vs_eps, plot_patches, write_artifacts
from hsat.run_folder import write_json, write_run_file

if TYPE_CHECKING:
    from hsat.cli.evaluate import Evaluate


def write_results(settings: Evaluate, cohort: Cohort, results: dict[str, WhiteboxResult]) -> str:
    """Write records, table, plots and the account of the run; returns the table."""
    out, scoring = settings.out, PAPER.scoring if settings.preset == "paper" else Scoring()
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
    write_run_file(out, settings.plain(), cohort=cohort.fingerprint(), command=sys.argv)
    keep_artifacts(settings, results, scoring)
    draw(settings, records, results)
    remove_state(settings)
    return table


def keep_artifacts(settings: Evaluate, results: dict[str, WhiteboxResult], scoring: Scoring) -> None:
    """What hsat report shows besides numbers: predictions, a map of the embeddings, the first patches."""
    for title, result in results.items():
        write_artifacts(
            settings.out / "evidence",
            result,
            target=settings.target,
            provenance=Provenance(model=title, checkpoint=result.records[0].checkpoint),
            scoring=scoring,
        )


def draw(settings: Evaluate, records: list[Record], results: dict[str, WhiteboxResult]) -> None:
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


def write_ensembles(out: Path, outcomes: Mapping[str, Mapping[str, EnsembleOutcome]]) -> str:
    """Write ensemble.csv, a line per encoder, ensemble and patch; returns the tables in Markdown, "" without any."""
    text, file = "", io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["model", "attack", "patch", "broken_by", "margin"])
    for title, ensembles in outcomes.items():
        for name, outcome in ensembles.items():
            text += f"\n**{name}** on {title}: how many patches each attack broke\n\n{outcome.to_markdown()}"
            rows = zip(outcome.patch, outcome.broken_by, outcome.margin, strict=True)
            lines.writerows([title, name, int(patch), by, f"{margin:.6f}"] for patch, by, margin in rows)
    if text:
        write_file(out / "ensemble.csv", file.getvalue())
    return text
