"""Records, artifacts and differences as tables.

`markdown_table` and `transfer_markdown` are for people who read text; the page has tables of its own, with a column per
model and metric, since it can shade, group and scroll.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from hsat.eval import Difference, Record, Table, TableCell
from hsat.eval.doubts import is_shift
from hsat.eval.tables import ABSENT, Row
from hsat.eval.transfer_drops import OTHERS
from hsat.report.aggregation import (
    CLEAN,
    TITLES,
    ConditionColumn,
    Estimate,
    aggregate_runs,
    format_number,
    format_points,
    list_conditions,
    mean_chance,
    metrics_unit,
    page_cell,
)
from hsat.report.natural_shift import shift_markdown
from hsat.types import LEVELS

MEAN_OF_OTHERS = "mean of the others"
DROPS = (
    "Acc-D and MCA-D are drops: the accuracy and the mean class accuracy of the encoder that is measured (target) on"
    " clean images, minus those on images that were attacked on another (surrogate), in points of %"
)


def accuracy_tables(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy", "mca"),
    intervals: bool = True,
) -> tuple[Table, ...]:
    """One table per level: rows are models, columns are clean and then the attacks as they first occur.

    A cell holds the metrics in the order given, in %, joined by " / ", each with its interval.  Several records for one
    cell (seeds, splits) give their mean and standard deviation.  The last column is the chance level, where records
    state it.  Rows are split by target and k where those differ, and by the classifier where several have no k.
    Natural shifts are left out: they have tables of their own.  Transfers have a row per pair, "surrogate → model"; see
    `transfer_markdown` for the matrix.

    Args:
        records: What was measured.
        levels: Which levels.
        metrics: Which metrics.
        intervals: Whether to show the intervals.

    Returns:
        The tables, in the order of the levels.

    Raises:
        ValueError: If no record fits.
    """
    chosen = [r for r in records if r.level in levels and r.metric in metrics and not is_shift(r)]
    if not chosen:
        raise ValueError(
            f"none of the {len(records)} records is at a level of {list(levels)} with a metric of {list(metrics)}"
        )
    columns = sorted(dict.fromkeys(record.attack_name for record in chosen), key=lambda name: name != CLEAN)
    head = ("model", "target", "k", *columns, *(("chance",) if mean_chance(chosen) is not None else ()))
    several = len({"" if record.k else record.classifier for record in chosen}) > 1

    def row_of(record: Record) -> tuple[str, str, str]:
        name = _model_name(record)
        return (
            (f"{name}, {record.classifier}" if several and not record.k else name),
            record.target,
            str(record.k or ABSENT),
        )

    tables = []
    for level in levels:
        here = [record for record in chosen if record.level == level]
        rows: list[Row] = []
        for row in dict.fromkeys(map(row_of, here)):
            mine = [record for record in here if row_of(record) == row]
            cells = [[record for record in mine if record.attack_name == name] for name in columns]
            numbers = [_joined_cell(cell, metrics, intervals) for cell in cells]
            rows.append((*row, *numbers, _joined_chance(mine, metrics))[: len(head)])
        if rows:
            sizes = f"n = {', '.join(map(str, sorted({record.n for record in here})))}"
            details = f" ({_titles(metrics)}, {metrics_unit(metrics)}; {sizes})"
            tables.append(Table(head, rows, f"{level.capitalize()} level", details))
    return tuple(tables)


def markdown_table(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy", "mca"),
    intervals: bool = True,
) -> str:
    """`accuracy_tables` as Markdown, below them the notes and flags of the records, and tables of natural shifts.

    Args:
        records, levels, metrics, intervals: See `accuracy_tables`.

    Returns:
        Markdown text.

    Raises:
        ValueError: If no record fits.
    """
    tables = accuracy_tables(records, levels=levels, metrics=metrics, intervals=intervals)
    shown = [record for record in records if record.level in levels and record.metric in metrics]
    remarks: dict[str, None] = {}
    for record in shown:
        if note := record.settings.get("note"):
            remarks[f"- {record.attack_name}: {note}"] = None
        for flag in record.flags:
            remarks[f"- {_model_name(record)}, {record.attack_name} ({record.target}): {flag}"] = None
    shifts = shift_markdown(records, levels=levels, metrics=metrics)
    return _paragraphs(tables, remarks) + (f"\n{shifts}" if shifts else "")


def transfer_tables(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy_drop", "mca_drop"),
    intervals: bool = False,
) -> tuple[Table, ...]:
    """One table per level, attack and k: rows are surrogates, columns are targets.

    A cell holds the drops of the target, clean minus attacked, in points of %, in the order given, joined by " / ".
    The first rows have the clean numbers and the chance level; the last has the mean drop over the surrogates other
    than the target itself.  White-box cells, where the surrogate is the target, are in italics (of Markdown).

    Args:
        records: Of a transfer.
        levels: Which levels.
        metrics: Which drops.
        intervals: Whether to show the 95 % intervals.

    Returns:
        The tables, level by level.

    Raises:
        ValueError: If no record fits.
    """
    chosen = [r for r in records if r.level in levels and r.metric in metrics and r.surrogate]
    if not chosen:
        raise ValueError(
            f"none of the {len(records)} records is a transfer at a level of {list(levels)} with a metric of"
            f" {list(metrics)}; evaluate_transfer makes them"
        )
    tables = []
    for level in levels:
        here = [record for record in chosen if record.level == level]
        for name, voters in dict.fromkeys((record.attack_name, name_classifier(record)) for record in here):
            clean = [r for r in records if (r.level, name_classifier(r), r.surrogate) == (level, voters, "")]
            mine = [record for record in here if (record.attack_name, name_classifier(record)) == (name, voters)]
            title = f"{level.capitalize()} level, {name}, {voters}"
            tables.append(_transfer_table(title, mine, clean, metrics, intervals))
    return tuple(tables)


def transfer_markdown(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy_drop", "mca_drop"),
    intervals: bool = False,
) -> str:
    """`transfer_tables` as Markdown, and below them what a drop is, the notes and flags of the records.

    Args:
        records, levels, metrics, intervals: See `transfer_tables`.

    Returns:
        Markdown text.

    Raises:
        ValueError: If no record fits.
    """
    tables = transfer_tables(records, levels=levels, metrics=metrics, intervals=intervals)
    shown = [r for r in records if r.level in levels and r.metric in metrics and r.surrogate]
    remarks = {f"- {DROPS}": None}
    remarks |= dict.fromkeys(f"- {r.attack_name}: {r.settings['note']}" for r in shown if r.settings.get("note"))
    remarks |= dict.fromkeys(
        f"- {record.surrogate} → {record.model}, {record.attack_name}: {flag}"
        for record in shown
        if record.surrogate != OTHERS
        for flag in record.flags
    )
    return _paragraphs(tables, remarks)


def _transfer_table(
    title: str, records: Sequence[Record], clean: Sequence[Record], metrics: Sequence[str], intervals: bool
) -> Table:
    targets = list(dict.fromkeys(record.model for record in records))
    moved = ", ".join(dict.fromkeys(record.target for record in records))
    sizes = ", ".join(map(str, dict.fromkeys(record.n for record in records)))
    undropped = [metric.removesuffix("_drop") for metric in metrics]
    rows: list[Row] = []
    if plain := [record for record in clean if record.metric in undropped]:
        cells = [_joined_cell([r for r in plain if r.model == name], undropped, intervals) for name in targets]
        rows.append((f"clean {_titles(undropped)}", *cells))
        if mean_chance(plain) is not None:
            cells = [_joined_chance([r for r in plain if r.model == name], undropped) for name in targets]
            rows.append((f"chance {_titles(undropped)}", *cells))
    for surrogate in list_surrogates(records):
        mine = [record for record in records if record.surrogate == surrogate]
        cells = [_joined_cell([r for r in mine if r.model == name], metrics, intervals) for name in targets]
        cells = [f"*{cell}*" if name == surrogate else cell for name, cell in zip(targets, cells, strict=True)]
        rows.append((MEAN_OF_OTHERS if surrogate == OTHERS else surrogate, *cells))
    details = f" ({_titles(metrics)}, %; attacks on the {moved}; n = {sizes})"
    return Table(("surrogate ↓ target →", *targets), rows, title, details)


def list_surrogates(records: Iterable[Record]) -> list[str]:
    """The surrogates of a transfer as they occur, the mean over the others last."""
    return sorted(dict.fromkeys(record.surrogate for record in records), key=lambda name: name == OTHERS)


def _joined_cell(records: Sequence[Record], metrics: Sequence[str], intervals: bool) -> str:
    estimates = [aggregate_runs([record for record in records if record.metric == name]) for name in metrics]
    if not any(estimates):
        return ABSENT
    return " / ".join(
        ABSENT if estimate is None else format_number(estimate, name, interval=intervals)
        for name, estimate in zip(metrics, estimates, strict=True)
    )


def _joined_chance(records: Sequence[Record], metrics: Sequence[str]) -> str:
    levels = [mean_chance(record for record in records if record.metric == name) for name in metrics]
    if not any(level is not None for level in levels):
        return ABSENT
    return " / ".join(ABSENT if level is None else format_points(level) for level in levels)


def join_estimates(estimates: Sequence[Estimate | None], text: Callable[[Estimate], str]) -> str:
    """Several numbers in one cell, joined by " / "; a single dash where there is none."""
    if not any(estimates):
        return ABSENT
    return " / ".join(ABSENT if estimate is None else text(estimate) for estimate in estimates)


def _titles(metrics: Iterable[str]) -> str:
    return " / ".join(TITLES.get(name, name) for name in metrics)


def name_classifier(record: Record) -> str:
    """What decided, for a title: "k = 20", or the settings of a classifier without neighbours."""
    return f"k = {record.k}" if record.k or not record.classifier else record.classifier


def _model_name(record: Record) -> str:
    return f"{record.surrogate} → {record.model}" if record.surrogate else record.model


def _paragraphs(tables: Iterable[Table], remarks: Iterable[str]) -> str:
    lines = "\n".join(remarks)
    return "\n".join(table.to_markdown() for table in tables) + (f"\n{lines}\n" if lines else "")


def differences_table(
    differences: Sequence[Difference],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy", "mca"),
) -> Table:
    """One row per model, condition, k, level and metric, in points of a percent.

    Args:
        differences: What `compare_models` gave.
        levels: Which levels.
        metrics: Which metrics.

    Returns:
        The table.
    """
    rows: list[Row] = []
    for one in differences:
        if one.level in levels and one.metric in metrics:
            absent = one.low is None or one.high is None
            interval = ABSENT if absent else f"[{100 * (one.low or 0.0):+.1f}, {100 * (one.high or 0.0):+.1f}]"
            share = ABSENT if one.not_above is None else f"{one.not_above:.3f}"
            numbers = (f"{100 * one.value:.1f}", f"{100 * one.value_against:.1f}", f"{100 * one.difference:+.1f}")
            names = (one.model, one.against, one.condition, str(one.k or one.classifier), one.level, one.metric)
            rows.append((*names, *numbers, interval, share, str(one.patients)))
    head = ("model", "against", "condition", "k", "level", "metric", "model, %", "against, %", "difference")
    return Table((*head, "interval", "resamples not above 0", "patients"), rows)


def level_table(records: Sequence[Record], *, level: str, metrics: Sequence[str]) -> Table | None:
    """One row per condition, one group of columns per model; None without records of that level and these metrics.

    The last row is the chance level, where records state it.
    """
    here = [record for record in records if record.level == level and record.metric in metrics]
    if not here:
        return None
    used = [metric for metric in metrics if any(record.metric == metric for record in here)]
    models = list(dict.fromkeys(record.model for record in here))
    columns = list_conditions(here)
    rows: list[Row] = []
    for column in columns:
        cells = []
        for model in models:
            mine = [record for record in here if record.model == model and column.matches(record)]
            cells += [page_cell(aggregate_runs([r for r in mine if r.metric == name]), name) for name in used]
        rows.append((column.label, *cells))
    if mean_chance(here) is not None:
        by_model = [[record for record in here if record.model == model] for model in models]
        rows.append(("chance", *(_chance_cell(of_model, name) for of_model in by_model for name in used)))
    sizes = ", ".join(map(str, sorted({record.n for record in here})))
    notes = _attacks_of_labels(columns)
    if len({record.n for record in here}) > 1:
        notes.append(f"The numbers of queries differ between cells: n = {sizes}.")
    return Table(
        head=("condition", *(TITLES.get(name, name) for _ in models for name in used)),
        rows=rows,
        caption=f"{level.capitalize()} level, {metrics_unit(used)} (n = {sizes})",
        groups=[(model, len(used)) for model in models],
        notes=notes,
    )


def _chance_cell(records: Sequence[Record], metric: str) -> TableCell:
    chance = mean_chance(record for record in records if record.metric == metric)
    return TableCell(ABSENT if chance is None else format_points(chance))


def _attacks_of_labels(columns: Sequence[ConditionColumn]) -> list[str]:
    return [f"{column.label}: {column.attack}" for column in columns if column.label != column.name]


def drop_table(records: Sequence[Record], *, level: str, attack: str) -> Table | None:
    """Rows are surrogates, columns the drops of the encoders that were measured, under one attack.

    The first rows have the clean numbers and the chance level, the last the mean drop over the surrogates other than
    the target itself.  None without drops at that level.
    """
    at_level = [record for record in records if record.level == level]
    here = [r for r in at_level if r.attack_name == attack and r.metric.endswith("_drop")]
    if not here:
        return None
    targets, drops = tuple(dict.fromkeys(r.model for r in here)), tuple(dict.fromkeys(r.metric for r in here))
    places = [(target, metric) for target in targets for metric in drops]

    def cells(chosen: Sequence[Record], ending: str = "") -> list[TableCell]:
        return [
            page_cell(
                aggregate_runs([r for r in chosen if (r.model, r.metric) == (target, metric.removesuffix(ending))])
            )
            for target, metric in places
        ]

    clean = [record for record in at_level if not record.attack]
    rows: list[Row] = [("(clean)", *cells(clean, "_drop"))] if clean else []
    if mean_chance(clean) is not None:
        by_target = [[r for r in clean if r.model == target] for target, _ in places]
        pairs = zip(by_target, places, strict=True)
        rows.append(("(chance)", *(_chance_cell(mine, metric.removesuffix("_drop")) for mine, (_, metric) in pairs)))
    for surrogate in list_surrogates(here):
        label = MEAN_OF_OTHERS if surrogate == OTHERS else surrogate
        rows.append((label, *cells([record for record in here if record.surrogate == surrogate])))
    sizes = ", ".join(map(str, sorted({record.n for record in here})))
    return Table(
        head=("attack made on", *(TITLES.get(metric, metric) for _, metric in places)),
        rows=rows,
        caption=f"{attack}, {level} level, points of % (n = {sizes})",
        groups=[(target, len(drops)) for target in targets],
        notes=(f"{DROPS}.",),
    )


def prefix_caption(table: Table, prefix: str) -> Table:
    """The same table with something before its caption."""
    return replace(table, caption=prefix + table.caption)
