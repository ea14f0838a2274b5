"""The files of a white-box evaluation: table.md, differences.json and figures beside what `hsat.eval` saves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hsat.attacks import NaturalShift
from hsat.eval import Difference, EnsembleOutcome, Record, Scoring, WhiteboxResult, compare_models
from hsat.eval.result_files import RunAccount, replaced_result, save_conditions, score_tables
from hsat.report.accuracy_plot import plot_accuracy_vs_eps
from hsat.report.page import write_report
from hsat.report.plots import plot_patches
from hsat.report.record_files import record_tables
from hsat.report.tables import differences_table, markdown_table
from hsat.run_folder import write_json

PAGE = "report.html"
_UNKNOWN = RunAccount()


def compare_results(results: Mapping[str, WhiteboxResult], *, scoring: Scoring, seed: int) -> tuple[Difference, ...]:
    """What each model has more than the first, on the same patches; nothing for a single one, and without scores.

    Args:
        results: By the name of the model.
        scoring: As in the evaluation.
        seed: Of the resamples.

    Returns:
        The differences.
    """
    if len(results) < 2 or not all(any(result.scores.values()) for result in results.values()):
        return ()
    scores = [table for result in results.values() for table in score_tables(result)]
    return tuple(compare_models(scores, seed=seed, scoring=scoring))


def write_evaluation(
    folder: str | os.PathLike[str],
    results: Mapping[str, WhiteboxResult],
    *,
    scoring: Scoring,
    seed: int = 0,
    pictures: bool = True,
    account: RunAccount = _UNKNOWN,
) -> tuple[Difference, ...]:
    """Write what `hsat.eval.result_files.save_conditions` does, table.md, differences.json, the figures and the page.

    Args:
        folder: The folder of the run; it is made.  A result that it holds is replaced; other files stay.
        results: By the name of the model.
        scoring: As in the evaluation.
        seed: Of the comparison.
        pictures: Whether to draw patches under attack, where the results hold any.
        account: What run.json says.

    Returns:
        The differences between the models.
    """
    records = [record for result in results.values() for record in result.records]
    with_scores = any(any(result.scores.values()) for result in results.values())
    table = markdown_table(records) if with_scores else "\n".join(one.to_markdown() for one in record_tables(records))
    differences = compare_results(results, scoring=scoring, seed=seed)
    if differences:
        table += (
            f"\n**Differences** from {differences[0].against}, on the same patients\n\n"
            f"{differences_table([one for one in differences if one.condition not in NaturalShift.standard()])}"
        )
    table += _describe_ensembles({title: result.outcomes for title, result in results.items()})
    with replaced_result(folder) as out:
        save_conditions(out, list(results.values()), account)
        if differences:
            write_json(out / "differences.json", [asdict(difference) for difference in differences])
        (out / "table.md").write_text(table, encoding="utf-8")
        _draw(out, records, results, pictures=pictures)
    write_report([Path(folder)], Path(folder) / PAGE)
    return differences


def _draw(out: Path, records: Sequence[Record], results: Mapping[str, WhiteboxResult], *, pictures: bool) -> None:
    """Accuracy against eps, and for each encoder a patch of each class under the first attack at its last eps."""
    records = [record for record in records if record.classifier == records[0].classifier]
    if any(record.metric == "accuracy" for record in records):
        plot_accuracy_vs_eps(records, out / "accuracy_vs_eps.png", k=records[0].k)
    for title, result in results.items():
        shifts = NaturalShift.standard()
        attacks = [one for one in result.examples if not one.startswith(("clean", "noise")) and one not in shifts]
        if attacks and pictures:
            name = [name for name in attacks if name.split("-")[0] == attacks[0].split("-")[0]][-1]
            labels = result.tables["clean"].label[list(result.example_rows)]
            chosen = np.unique(labels, return_index=True)[1]  # the first of each class
            clean, x_adv = (result.examples[condition][chosen] for condition in ("clean", name))
            titles = _patch_titles(result, name, [result.example_rows[place] for place in chosen])
            plot_patches(clean, x_adv, out / f"patches_{title}_{name}.png", titles=titles)


def _patch_titles(result: WhiteboxResult, attack: str, rows: list[int]) -> list[str]:
    """For each of these queries its class and what the first classifier takes it for; its number without scores."""
    if not result.scores["clean"]:
        return [f"patch {row + 1}" for row in rows]
    names, classes = result.class_names, result.tables["clean"].class_names
    before, after = (next(iter(result.scores[name].values()))[rows].argmax(1) for name in ("clean", attack))
    labels = result.tables["clean"].label[rows]
    return [
        f"{classes[label]}\n{names[clean]} → {names[attacked]}"
        for label, clean, attacked in zip(labels, before, after, strict=True)
    ]


def _describe_ensembles(outcomes: Mapping[str, Mapping[str, EnsembleOutcome]]) -> str:
    """How many patches each attack of an ensemble broke, as tables in Markdown; "" without ensembles."""
    return "".join(
        f"\n**{name}** on {title}: how many patches each attack broke\n\n{outcome.to_markdown()}"
        for title, ensembles in outcomes.items()
        for name, outcome in ensembles.items()
    )
