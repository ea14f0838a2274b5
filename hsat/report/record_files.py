"""Any records as tables, as LaTeX for a paper, as CSV for other programs, and as a DataFrame."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hsat.eval import Record, Table
from hsat.eval.tables import import_pandas, latex_tabular
from hsat.report.aggregation import (
    aggregate_runs,
    describe_setting,
    drop_duplicates,
    group_by_setting,
    mean_chance,
)
from hsat.report.tables import accuracy_tables, prefix_caption, transfer_tables
from hsat.untrusted import as_cell

if TYPE_CHECKING:
    from pandas import DataFrame

_FAMILIES = (("accuracy", "mca"), ("certified_accuracy",), ("smallest_fraction",))  # metrics that share a table
_ITALIC = re.compile(r"(?<=& )\*([^&]*)\*(?= (?:&|\\\\))")  # a whole cell that Markdown would set in italics
CSV_COLUMNS = (
    *("setting", "model", "surrogate", "target", "classifier", "k", "level", "attack", "eps", "metric"),
    *("value", "low", "high", "sd", "runs", "n", "chance"),
)


def record_tables(records: Iterable[Record], *, intervals: bool = True) -> tuple[Table, ...]:
    """The tables of any records: of accuracies, certificates, budgets by level, of transfers by level, attack and k.

    Numbers are in percent, several runs become mean and standard deviation; of a transfer the drops are shown.  Each
    table has `to_markdown`, `to_latex`, `to_csv`, `to_html` and `to_frame`.  Where the records were measured in several
    settings (cohorts, targets, banks), captions begin with theirs.

    Args:
        records: Of any evaluation, also of several: `record_tables(result.records)`.
        intervals: Whether to show the intervals.

    Returns:
        At least one table.

    Raises:
        ValueError: Without records.
    """
    settings = group_by_setting(_checked(records))
    tables = []
    for setting, group in settings.items():
        heading = f"{describe_setting(setting, settings)}: " if len(settings) > 1 else ""
        tables += [prefix_caption(table, heading) for family in _tables_of(group, intervals) for table in family]
    return tuple(tables)


def records_latex(records: Iterable[Record], *, intervals: bool = True) -> str:
    """Records as `tabular`s with the rules of booktabs, which the document must use: a table per setting and metrics.

    A table has one section per level (of a transfer: per level, attack and k) and names its setting in a comment.
    Numbers are in percent, several runs become mean and standard deviation; of a transfer the drops are shown.

    Args:
        records: Of any evaluation, also of several.
        intervals: Whether to show the intervals.

    Returns:
        LaTeX text.

    Raises:
        ValueError: Without records.
    """
    settings = group_by_setting(_checked(records))
    parts = []
    for setting, group in settings.items():
        comment = f"% {_one_line(describe_setting(setting, settings))}\n"
        for tables in _tables_of(group, intervals):
            names = [label in ("model", "target") or label.startswith("surrogate") for label in tables[0].head]
            align = "".join("l" if is_name else "r" for is_name in names)
            parts.append(comment + _ITALIC.sub(r"\\textit{\1}", latex_tabular(tables, align=align)))
    return "\n".join(["% needs \\usepackage{booktabs}", *parts])


def _tables_of(records: Sequence[Record], intervals: bool) -> list[tuple[Table, ...]]:
    """The tables of one setting; those of one head belong together."""
    drops = tuple(dict.fromkeys(record.metric for record in records if record.metric.endswith("_drop")))
    if drops:
        return [transfer_tables(records, metrics=drops, intervals=intervals)]
    measured = dict.fromkeys(record.metric for record in records)
    known = {metric for family in _FAMILIES for metric in family}
    families = [*_FAMILIES, tuple(metric for metric in measured if metric not in known)]
    used = [tuple(metric for metric in family if metric in measured) for family in families]
    return [accuracy_tables(records, metrics=family, intervals=intervals) for family in used if family]


def records_csv(records: Iterable[Record]) -> str:
    """Records as CSV, one line per number; several runs of one number are one line.

    The columns are `CSV_COLUMNS`.  value, low, high, sd (standard deviation over the runs) and chance are shares, as in
    the records; cells are empty where there is nothing.  Texts that a spreadsheet would run begin with an apostrophe.

    Args:
        records: Of any evaluation, also of several.

    Returns:
        CSV text.

    Raises:
        ValueError: Without records.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in _rows_of(records):
        writer.writerow("" if cell is None else as_cell(cell) for cell in row)
    return out.getvalue()


def records_frame(records: Iterable[Record]) -> DataFrame:
    """Records as a DataFrame of pandas, which the extra `frames` brings: the rows and columns of `records_csv`.

    Numbers are numbers, NaN where there is none.

    Args:
        records: Of any evaluation, also of several: `records_frame(result.records)`.

    Returns:
        The DataFrame, with the columns `CSV_COLUMNS`.

    Raises:
        ValueError: Without records.
        ImportError: If pandas is not installed; the message names the command that installs it.
    """
    rows = list(_rows_of(records))
    frame: DataFrame = import_pandas("records_frame").DataFrame(rows, columns=list(CSV_COLUMNS))
    return frame.astype({name: "float64" for name in ("value", "low", "high", "sd", "chance")})


def _rows_of(records: Iterable[Record]) -> Iterator[tuple[str | float | None, ...]]:
    """A row for each number, in `CSV_COLUMNS`; n is a text where runs differ in it."""
    settings = group_by_setting(_checked(records))
    for setting, group in settings.items():
        heading = describe_setting(setting, settings)
        numbers: dict[tuple[str | int, ...], list[Record]] = {}
        for record in group:
            numbers.setdefault((*_columns_of(record), record.attack), []).append(record)
        for (*columns, _), runs in numbers.items():
            if (one := aggregate_runs(runs)) is not None:
                size = one.n[0] if len(one.n) == 1 else " ".join(map(str, one.n))
                cells = (one.value, one.low, one.high, one.sd, one.runs, size, mean_chance(runs))
                yield (heading, *columns, *cells)


def _columns_of(record: Record) -> tuple[str | int, ...]:
    names = (record.model, record.surrogate, record.target, record.classifier, record.k)
    return (*names, record.level, record.attack_name, record.eps, record.metric)


def _checked(records: Iterable[Record]) -> tuple[Record, ...]:
    kept = drop_duplicates(records)
    if not kept:
        raise ValueError("no records, so there is no table; give the folders of evaluations")
    return kept


def _one_line(text: str) -> str:
    return " ".join(text.split())
