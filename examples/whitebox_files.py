"""The files of a white-box evaluation: records, table, scores, evidence, figures."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ensemble_report import write_ensembles
from evaluation_run import remove_state
from hsat.data import Cohort
from hsat.eval import (
    Record,
    WhiteboxResult,
    compare_models,
    differences_table,
    markdown_table,
    plot_accuracy_vs_eps,
    plot_patches,
    save_scores,
    score_tables,
    write_evidence,
    write_records,
)
from hsat.run_folder import write_json, write_run_file

if TYPE_CHECKING:
    from evaluate_whitebox import EvaluateWhitebox


def write_results(settings: EvaluateWhitebox, cohort: Cohort, results: dict[str, WhiteboxResult]) -> str:
    """Write records, table, plots and the account of the run; returns the table."""
    out = settings.out
    records: list[Record] = [record for result in results.values() for record in result.records]
    write_records(out / "records.jsonl", records)
    scores = [table for result in results.values() for table in score_tables(result)]
    save_scores(out / "scores.npz", scores)
    table = markdown_table(records)
    if len(results) > 1:
        found = compare_models(scores, seed=settings.seed, resamples=settings.bootstrap, compat=settings.compat)
        table += f"\n**Differences** from {found[0].against}, on the same patients\n\n{differences_table(found)}"
        write_json(out / "differences.json", [asdict(each) for each in found])
    table += write_ensembles(out, {title: result.outcomes for title, result in results.items()})
    (out / "table.md").write_text(table)
    write_run_file(out, settings.plain(), cohort=cohort.fingerprint(), command=sys.argv)
    keep_evidence(settings, results)
    try:
        draw(settings, records, results)
    except ImportError as error:
        print(f"no figures: {error}", file=sys.stderr)
    remove_state(settings)
    return table


def keep_evidence(settings: EvaluateWhitebox, results: dict[str, WhiteboxResult]) -> None:
    """What report.py shows besides numbers: predictions, a map of the embeddings, the first patches."""
    for title, result in results.items():
        write_evidence(
            settings.out / "evidence",
            model=title,
            tables=result.tables,
            scores=result.scores,
            class_names=result.class_names,
            examples=result.examples,
            target=settings.target,
            compat=settings.compat,
            checkpoint=result.records[0].checkpoint,
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
