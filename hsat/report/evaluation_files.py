"""The files of a white-box evaluation: records, scores, tables, figures, and what a report shows besides numbers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hsat.attacks import NaturalShift
from hsat.eval import (
    Difference,
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
from hsat.report.accuracy_plot import plot_accuracy_vs_eps
from hsat.report.artifacts import ArtifactSource, write_artifacts
from hsat.report.plots import plot_patches
from hsat.report.record_files import record_tables
from hsat.report.tables import differences_table, markdown_table
from hsat.run_folder import write_json

PAGE = "report.html"


def compare_results(results: Mapping[str, WhiteboxResult], *, scoring: Scoring, seed: int) -> tuple[Difference, ...]:
    """What each model has more than the first, on the same patches; nothing for a single one, and without scores.

    Args:
        results: By the name of the model.
        scoring: As in the evaluation.
        seed: Of the resamples.
    """
    if len(results) < 2 or not all(any(result.scores.values()) for result in results.values()):
        return ()
    scores = [table for result in results.values() for table in score_tables(result)]
    return tuple(compare_models(scores, seed=seed, scoring=scoring))


def write_evaluation(
    folder: str | os.PathLike[str],
    results: Mapping[str, WhiteboxResult],
    *,
    target: str,
    scoring: Scoring,
    seed: int = 0,
    pictures: bool = True,
) -> tuple[Difference, ...]:
    """Write records.jsonl, scores.npz, table.md, differences.json, ensemble.csv, evidence/ and the figures.

    Args:
        folder: The folder of the run; it is made.
        results: By the name of the model.
        target: What the attacks maximised, as the records say it.
        scoring: As in the evaluation.
        seed: Of the comparison.
        pictures: Whether to draw patches under attack, where the results hold any.

    Returns:
        The differences between the models.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    records = [record for result in results.values() for record in result.records]
    write_records(out / "records.jsonl", records)
    scores = [table for result in results.values() if any(result.scores.values()) for table in score_tables(result)]
    if scores:
        save_scores(out / "scores.npz", scores)
    table = markdown_table(records) if scores else "\n".join(one.to_markdown() for one in record_tables(records))
    differences = compare_results(results, scoring=scoring, seed=seed)
    if differences:
        table += (
            f"\n**Differences** from {differences[0].against}, on the same patients\n\n"
            f"{differences_table([one for one in differences if one.condition not in NaturalShift.standard()])}"
        )
        write_json(out / "differences.json", [asdict(difference) for difference in differences])
    table += write_ensembles(out, {title: result.outcomes for title, result in results.items()})
    (out / "table.md").write_text(table)
    for title, result in results.items():
        _keep_artifacts(out, title, result, target=target, scoring=scoring)
    _draw(out, records, results, pictures=pictures)
    return differences


def _keep_artifacts(out: Path, title: str, result: WhiteboxResult, *, target: str, scoring: Scoring) -> None:
    """Predictions, a map of the embeddings, the first patches; of natural shifts a report shows the numbers only."""
    names = [name for name in result.tables if name not in NaturalShift.standard()]
    write_artifacts(
        out / "evidence",
        ArtifactSource(
            tables={name: result.tables[name] for name in names},
            scores={name: result.scores[name] for name in names},
            class_names=result.class_names,
            examples={name: result.examples[name] for name in names if name in result.examples},
        ),
        target=target,
        provenance=Provenance(model=title, checkpoint=result.records[0].checkpoint),
        scoring=scoring,
    )


def _draw(out: Path, records: Sequence[Record], results: Mapping[str, WhiteboxResult], *, pictures: bool) -> None:
    """Accuracy against eps for the first classifier, each model's patches under the first attack at its last eps."""
    records = [record for record in records if record.classifier == records[0].classifier]
    if any(record.metric == "accuracy" for record in records):
        plot_accuracy_vs_eps(records, out / "accuracy_vs_eps.png", k=records[0].k)
    for title, result in results.items():
        shifts = NaturalShift.standard()
        attacks = [one for one in result.examples if not one.startswith(("clean", "noise")) and one not in shifts]
        if attacks and pictures:
            name = [name for name in attacks if name.split("-")[0] == attacks[0].split("-")[0]][-1]
            clean, x_adv = result.examples["clean"], result.examples[name]
            heads = [f"patch {i + 1}" for i in range(len(clean))]
            plot_patches(clean, x_adv, out / f"patches_{title}_{name}.png", titles=heads)


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
