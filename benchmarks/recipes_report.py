"""The tables and the plot of benchmarks/recipes.py, from the files of its runs.

python benchmarks/recipes_report.py    # writes benchmarks/results/recipes.md and recipes.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recipe_candidates import EBHI, IMAGE_SIZES, OURS, PAINTED, RECIPES, TUNED
from recipes import PASSES, RADII, RESULTS, SHIPPED, TRIAL, choose, planned, read_results

from hsat.eval import Scoring, paired_difference
from hsat.eval.comparison import Difference, ScoreTable
from hsat.report.panels import (
    COLOURS,
    GREY,
    MARKERS,
    figure_style,
    finish_figure,
    legend_below,
    open_panels,
    percent_axis,
)

Result = Mapping[str, Any]
Results = Mapping[str, Result]
NAMES = {PAINTED: "Painted tissue", EBHI: "Real H&E (EBHI)"}
IDEAS = {
    PAINTED: "What standardised images do to the recipes that the trials chose; it chooses nothing here.",
    EBHI: "Tried when no trial was above always guessing the largest class, as many for the tuned HSAT as for HSAT+;"
    " the finalists are the best of trials and ideas.",
}
REMEDIES = (
    "Tried when HSAT+ without augmentation got worse between 1x and 4x on the finalists' seeds: the finalists, and what"
    " might keep HSAT+ from it.  They chose no finalist.  Passes are without those of held-out evaluations."
)
FAMILIES = ("HiDisc", "HSAT", TUNED, OURS)


def condition(cohort: str, attack: str, place: int = 0) -> str:
    """The name of an attack at the primary radius, or at the second one."""
    return f"{attack} {RADII[cohort][place]}/255"


def percent(value: float | None) -> str:
    """A share as a cell of a table."""
    return "" if value is None else f"{100 * value:.1f}"


def cell(result: Result, decision: str, name: str, level: str = "patch") -> float | None:
    """One accuracy of a run, where it was measured."""
    value: float | None = result["accuracy"].get(decision, {}).get(name, {}).get(level)
    return value


def select(results: Results, **wanted: Any) -> list[Result]:
    """The runs without failure whose description has these values."""
    return [
        one
        for one in results.values()
        if "failure" not in one and all(one["run"][name] == value for name, value in wanted.items())
    ]


def trial_lines(results: Results, cohort: str, stage: str) -> list[str]:
    """The trials or the ideas of a cohort, best first in each family; what was chosen is in bold."""
    chosen = choose(results, cohort)
    strong, weak = condition(cohort, "PGD-10"), condition(cohort, "PGD-10", 1)
    done = select(results, cohort=cohort, stage=stage)
    if not done:
        return [f"No {stage} has been run.", ""]
    lines = [
        f"| family | what distinguishes it | clean | {strong} | {weak} | batches | passes | CPU s | least free share |"
    ]
    lines += ["|" + " --- |" * 9]
    for family in FAMILIES:
        mine = [one for one in done if one["family"] == family]
        for one in sorted(mine, key=lambda one: -(cell(one, "knn", strong) or 0)):
            picked = chosen.get(family) == one["run"]["recipe"] and family in (TUNED, OURS)
            mark = "**" if picked else ""
            values = [percent(cell(one, "knn", name)) for name in ("clean", strong, weak)]
            values += [str(one["steps"]), f"{passes_of(one):.0f}", f"{one['train_cpu_seconds']:.0f}", least_share(one)]
            lines.append(f"| {' | '.join([family, mark + one['change'] + mark, *values])} |")
    counts = [f"{family}: {sum(one['family'] == family for one in done)}" for family in (TUNED, OURS)]
    compute = "four times" if stage == "remedy" else f"{TRIAL:g} of"
    return [*lines, "", f"Run: {', '.join(counts)}.  Each has {compute} the passes of 1x.", ""]


def passes_of(result: Result) -> float:
    """Passes of a training, with those that the guard adds where a check sends it to PGD until the next one."""
    attack = result["config"]["attack"]
    failed = sum(share < attack["check_share"] for share in result.get("free_share") or [])
    passes: float = result["passes"]
    return passes + failed * attack["check_every"] * (attack["steps"] + 1 - attack["replays"])


def least_share(result: Result) -> str:
    """The smallest share of PGD's rise in loss that free training reached in a check."""
    shares = result.get("free_share") or []
    return f"{min(shares):.2f}" if shares else ""


def final_lines(results: Results, cohort: str) -> list[str]:
    """Means of the finalists over seeds or splits, with each one's primary value."""
    strong, weak = condition(cohort, "ensemble"), condition(cohort, "PGD-10", 1)
    linear = condition(cohort, "PGD-10")
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for one in select(results, cohort=cohort, stage="final"):
        run = one["run"]
        groups.setdefault((run["multiple"], run["equal"], run["backbone"], one["family"], one["change"]), []).append(
            one
        )
    if not groups:
        return ["No finalist has been run.", ""]
    head = ["compute", "recipe", "runs", "clean", strong, "by seed", weak, "slide", "patient"]
    head += ["linear: clean", f"linear: {linear}", "batches", "passes", "CPU s", "least free share"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    order = sorted(groups, key=lambda key: (key[2], key[0], FAMILIES.index(key[3]), key[1] == "seconds"))
    for key in order:
        multiple, equal, backbone, family, change = key
        runs = sorted(groups[key], key=lambda one: one["run"]["index"])
        shipped = ", as shipped" if change == RECIPES[SHIPPED[cohort]].change and family == OURS else ""
        name = family if family in ("HiDisc", "HSAT") else f"{family} ({change}{shipped})"
        cells = [f"{multiple:g}x, equal {equal}{', ' + backbone if backbone else ''}", name, str(len(runs))]
        cells += [mean(runs, "knn", "clean"), f"**{mean(runs, 'knn', strong)}**"]
        cells += [", ".join(f"{one['run']['index']}: {percent(cell(one, 'knn', strong))}" for one in runs)]
        cells += [mean(runs, "knn", weak), mean(runs, "knn", strong, "slide"), mean(runs, "knn", strong, "patient")]
        cells += [mean(runs, "linear", "clean"), mean(runs, "linear", linear)]
        taken = ([one["steps"], passes_of(one), one["train_cpu_seconds"]] for one in runs)
        cells += [f"{statistics.mean(values):.0f}" for values in zip(*taken, strict=True)]
        shares = [share for one in runs if (share := least_share(one))]
        lines.append(f"| {' | '.join([*cells, min(shares, default='')])} |")
    chance = statistics.mean(one["chance"] for runs in groups.values() for one in runs)
    return [*lines, "", f"Always guessing the largest class: {percent(chance)} %.", ""]


def mean(runs: Sequence[Result], decision: str, name: str, level: str = "patch") -> str:
    """The mean over runs as a cell."""
    values = [value for one in runs if (value := cell(one, decision, name, level)) is not None]
    return percent(statistics.mean(values)) if values else ""


def pooled_table(runs: Sequence[Result], name: str, *, cohort: str) -> ScoreTable:
    """The decisions of several runs as one table of two scores, right and wrong.

    Patients of painted cohorts differ from seed to seed; those of EBHI are the same in every split, and are resampled
    with all that the splits say of them.
    """
    right, patient, patch = [], [], []
    for one in runs:
        digits, index = [int(digit) for digit in one["right"]["knn"][name]], one["run"]["index"]
        right += digits
        patient += [int(who) + (1000 * index if cohort == PAINTED else 0) for who in one["patients"].split()]
        patch += [100_000 * index + row for row in range(len(digits))]
    scores = np.stack([np.array(right), 1 - np.array(right)], 1).astype(float)
    ids = np.array(patch)
    return ScoreTable(
        scores, np.zeros(len(ids), int), ids, ids, np.array(patient), ("right", "wrong"), model=runs[0]["family"]
    )


def difference(results: Results, cohort: str, pair: tuple[dict[str, Any], dict[str, Any]], name: str) -> str:
    """How much higher the first is, with its interval over patients, on the seeds or splits that both have."""
    runs = [{one["run"]["index"]: one for one in select(results, cohort=cohort, stage="final", **of)} for of in pair]
    both = sorted({*runs[0]} & {*runs[1]})
    both = [index for index in both if all(name in each[index]["right"]["knn"] for each in runs)]
    if not both:
        return "not run"
    tables = [pooled_table([each[index] for index in both], name, cohort=cohort) for each in runs]
    found = compare(*tables)
    interval = "no interval" if found.low is None else f"{100 * found.low:+.1f}, {100 * found.high:+.1f}"
    return f"{100 * found.difference:+.1f} [{interval}], {len(both)} runs, {found.patients} patients"


def difference_lines(results: Results, cohort: str) -> list[str]:
    """HSAT+ against the comparators, at equal passes and at equal seconds."""
    chosen = choose(results, cohort)
    if OURS not in chosen:
        return []
    lines = [f"| HSAT+ | minus | compute | {condition(cohort, 'ensemble')} | clean |", "|" + " --- |" * 5]
    ours = dict.fromkeys((chosen[OURS], SHIPPED[cohort]))
    backbones = sorted({one["run"]["backbone"] for one in select(results, cohort=cohort, stage="final")})
    for recipe, backbone, multiple, equal in itertools.product(ours, backbones, (1, 2, 4), ("passes", "seconds")):
        mine = {"recipe": recipe, "multiple": multiple, "equal": equal, "backbone": backbone}
        for rival in ("hidisc", "hsat", chosen.get(TUNED, "")):
            theirs = mine | {"recipe": rival}
            if rival == "hidisc":
                theirs |= {"equal": "seconds"}
            if rival == "hsat":  # whose seconds the others were given
                theirs |= {"equal": "passes"}
            names = (condition(cohort, "ensemble"), "clean")
            cells = [difference(results, cohort, (mine, theirs), name) for name in names]
            if cells[0] != "not run":
                titles = f"{RECIPES[recipe].change} | {RECIPES[rival].family}"
                compute = f"{multiple}x, equal {equal}{', ' + backbone if backbone else ''}"
                lines.append(f"| {titles} | {compute} | {' | '.join(cells)} |")
    if len(lines) == 2:
        return []
    lines += ["", "Points of patch accuracy, kNN decision, with 95 % intervals over patients.", ""]
    return [*lines, *(line for recipe in ours for line in chance_lines(results, cohort, recipe))]


def chance_lines(results: Results, cohort: str, recipe: str) -> list[str]:
    """A recipe under the ensemble at 1x, with its interval over patients, beside always guessing the largest class."""
    name = condition(cohort, "ensemble")
    runs = select(results, cohort=cohort, stage="final", recipe=recipe, multiple=1, equal="passes", backbone="")
    if not runs:
        return []
    wrong = [dict(one) | {"right": {"knn": {name: "0" * len(one["right"]["knn"][name])}}} for one in runs]
    value = compare(*(pooled_table(each, name, cohort=cohort) for each in (runs, wrong)))
    counts = [len(one["right"]["knn"][name]) for one in runs]
    chance = float(np.average([one["chance"] for one in runs], weights=counts))
    interval = "" if value.low is None else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return [
        f"{RECIPES[recipe].change}: {100 * value.difference:.1f} %{interval} under the {name}, {len(runs)} runs;"
        f" always guessing the largest class: {percent(chance)} %.",
        "",
    ]


def compare(one: ScoreTable, other: ScoreTable) -> Difference:
    """The difference of two tables' patch accuracies."""
    return paired_difference(
        one,
        other,
        generator=np.random.default_rng(0),
        names=("accuracy",),
        levels=("patch",),
        scoring=Scoring(bootstrap=2000),
    )[0]


def diagnosis_lines(folder: Path, cohort: str) -> list[str]:
    """What benchmarks/recipe_diagnosis.py found on a cohort."""
    path = folder / ("diagnosis_ebhi.json" if cohort == EBHI else "diagnosis.json")
    place = "EBHI split" if cohort == EBHI else "painted seed"
    lines = [f"### Is the gradient masked? {NAMES[cohort]}", ""]
    if not path.exists():
        return [*lines, "Not diagnosed.", ""]
    found = json.loads(path.read_text())
    left = found["left"]
    lines.append(
        f"`benchmarks/recipe_diagnosis.py`: {RECIPES[found['recipe']].change}, {place} {found['seed']},"
        f" {found['patches']} patches, of which {percent(left['clean'])} % are right.  PGD on the vote, unless it says"
        " otherwise."
    )
    lines += ["", "| attack | left, % |", "| --- | --- |"]
    order = sorted(left, key=lambda name: (int(name.split("/")[0]) if "/" in name else 0, name))
    lines += [f"| {name} | {percent(left[name])} |" for name in order]
    lines += [
        f"| {RADII[cohort][1]}/255, 10 steps, made on {name} | {percent(value)} |"
        for name, value in found["transfer"].items()
    ]
    tested, changed = found["certificates"]["tested"], found["certificates"]["changed"]
    flags = "; ".join(found["flags"]) or "none"
    return [
        *lines,
        "",
        f"Flags of hsat's own diagnosis: {flags}.  Certified patches attacked: {tested}, changed: {changed}.",
        "",
    ]


def missing_lines(results: Results) -> list[str]:
    """What the study has planned and not run, and what failed."""
    chosen = {cohort: choose(results, cohort) for cohort in (PAINTED, EBHI)}
    lines = ["## What is missing", ""]
    for stage in ("trial", "idea", "final", "shipped", "seconds", "growth", "resnet10t", "remedy"):
        for cohort in (PAINTED, EBHI):
            runs = [run for run in planned([stage], chosen, ebhi=True) if run.cohort == cohort]
            left = [run.key for run in runs if run.key not in results]
            if runs:
                shown = f": {', '.join(f'`{key}`' for key in left)}" if left else ""
                lines.append(f"- {stage}, {cohort}: {len(left)} of {len(runs)} runs{shown}")
    failed = [f"- `{key}` failed: {one['failure']}" for key, one in results.items() if "failure" in one]
    return [*lines, "", *(failed or ["No run failed."]), ""]


def document(results: Results, folder: Path) -> str:
    """The page.

    Args:
        results: Every run, by key.
        folder: Where the diagnoses are, as far as they were made.
    """
    versions = sorted({str(one["versions"]) for one in results.values()})
    commits = sorted({one["commit"][:12] for one in results.values()})
    lines = [
        "# Recipes at equal compute",
        "",
        "Written by `benchmarks/recipes_report.py` from the runs of `benchmarks/recipes.py`, which says what is"
        " compared.  Accuracies of patches in %, kNN decision (k = 20) unless it says otherwise.  A pass is one forward"
        f" and one backward of 64 images; 1x is {PASSES['cpu'][PAINTED]} passes on painted tissue"
        f" ({IMAGE_SIZES[PAINTED]} pixels, augmentation v0) and {PASSES['cpu'][EBHI]} on EBHI ({IMAGE_SIZES[EBHI]}"
        " pixels, augmentation he), of `test_resnet` in float32.  HiDisc has the CPU seconds of HSAT: each of its"
        " passes needs new views.  Rows of equal seconds have the CPU seconds that HSAT takes at the same multiple.",
        "",
        "![Robust accuracy against CPU seconds](recipes.png)",
        "",
    ]
    for cohort in (PAINTED, EBHI):
        lines += [f"## {NAMES[cohort]}", "", "### Finalists", "", *final_lines(results, cohort)]
        lines += difference_lines(results, cohort)
        place = "seed" if cohort == PAINTED else "split"
        attack = "PGD-10 on the vote, which is cheaper than the ensemble"
        lines += [f"### Trials, on {place} 0, under {attack}", "", *trial_lines(results, cohort, "trial")]
        lines += [f"### Ideas for tissue, on {place} 0, under the same attack", "", IDEAS[cohort], ""]
        lines += trial_lines(results, cohort, "idea")
        if cohort == PAINTED:
            lines += ["### Four times the compute, on seed 0, under the same attack", "", REMEDIES, ""]
            lines += trial_lines(results, cohort, "remedy")
    for cohort in (PAINTED, EBHI):
        lines += diagnosis_lines(folder, cohort)
    lines += missing_lines(results)
    return "\n".join([*lines, f"Versions: {'; '.join(versions)}.  Commits: {', '.join(commits)}.", ""])


def plot(results: Results, path: Path) -> None:
    """Accuracy under the ensemble at the primary radius against CPU seconds of training: runs, and means by compute."""
    with figure_style():
        figure, panels = open_panels(2, path, None, size=(7.1, 3.0))
        for panel, cohort in zip(panels, (PAINTED, EBHI), strict=True):
            draw_cohort(panel, results, cohort)
        percent_axis(panels[0])
        percent_axis(panels[1], first=False)
        panels[0].set_ylabel("patch accuracy under the ensemble, %")
        legend_below(figure, panels, own=True)
        finish_figure(figure, path)


def curves(results: Results, cohort: str) -> list[tuple[str, str, str]]:
    """Title, recipe and line of what is plotted: the finalists, and HSAT+ as shipped where that is another one."""
    chosen = choose(results, cohort)
    found = [("HiDisc", "hidisc", "-"), ("HSAT", "hsat", "-"), (TUNED, chosen.get(TUNED, ""), "-")]
    found.append((OURS, chosen.get(OURS, ""), "-"))
    if SHIPPED[cohort] != chosen.get(OURS):
        found.append((f"{OURS} as shipped", SHIPPED[cohort], "--"))
    return found


def draw_cohort(panel: Any, results: Results, cohort: str) -> None:
    """One cohort."""
    strong = condition(cohort, "ensemble")
    done = [one for one in select(results, cohort=cohort, stage="final", backbone="") if cell(one, "knn", strong)]
    for number, (title, recipe, style) in enumerate(curves(results, cohort)):
        means = []
        mine = [one for one in done if one["run"]["recipe"] == recipe]
        colour, marker = COLOURS[min(number, 3)], MARKERS[number]
        for key in sorted({(one["run"]["multiple"], one["run"]["equal"]) for one in mine}):
            runs = [one for one in mine if (one["run"]["multiple"], one["run"]["equal"]) == key]
            points = [(one["train_cpu_seconds"], 100 * (cell(one, "knn", strong) or 0)) for one in runs]
            panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, alpha=0.4)
            means.append(tuple(map(statistics.mean, zip(*points, strict=True))))
        if means:
            x, y = zip(*sorted(means), strict=True)
            panel.plot(x, y, marker, color=colour, linestyle=style, label=title)
    if done:
        chance = 100 * statistics.mean(one["chance"] for one in done)
        panel.axhline(chance, color=GREY, linestyle=":", linewidth=1.1, label="largest class")
    panel.set(title=f"{NAMES[cohort]}, {RADII[cohort][0]}/255", xlabel="training, CPU seconds")
    panel.set_xlim(0, 1.08 * max((one["train_cpu_seconds"] for one in done), default=100))


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS, help="the files of the runs")
    parser.add_argument(
        "--out", type=Path, default=RESULTS.with_suffix(".md"), help="the page; the plot lies beside it"
    )
    options = parser.parse_args()
    results = read_results(options.runs)
    options.out.write_text(document(results, options.runs))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
