"""Any records as a LaTeX table for a paper, and as CSV for other programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from hsat.eval import Record, Table
from hsat.eval.tables import latex_tabular
from hsat.report.aggregation import (
    aggregate_runs,
    describe_setting,
    drop_duplicates,
    group_by_setting,
)
from hsat.report.tables import accuracy_tables, transfer_tables

_FAMILIES = (("accuracy", "mca"), ("certified_accuracy",), ("smallest_fraction",))  # metrics that share a table
_ITALIC = re.compile(r"(?<=& )\*([^&]*)\*(?= (?:&|\\\\))")  # a whole cell that Markdown would set in italics
CSV_COLUMNS = (
    *("setting", "model", "surrogate", "target", "classifier", "k", "level", "attack", "eps", "metric"),
    *("value", "low", "high", "sd", "runs", "n"),
)


def records_latex(records: Iterable[Record], *, intervals: bool = True) -> str:
    """Records as `tabular`s with the rules of booktabs, which the document must use: a table per setting and metrics.

    A table has one section per level (of a transfer: per level, attack and k) and names its setting in a comment.
    Numbers are in percent, several runs become mean and standard deviation; of a transfer the drops are shown.

    Args:
        records: Of any evaluation, also of several.
        intervals: Whether to show the intervals.

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

    The columns are `CSV_COLUMNS`.  value, low, high and sd (standard deviation over the runs) are shares, as in the
    records; cells are empty where there is nothing.

    Args:
        records: Of any evaluation, also of several.

    Raises:
        ValueError: Without records.
    """
    settings = group_by_setting(_checked(records))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for setting, group in settings.items():
        heading = describe_setting(setting, settings)
        numbers: dict[tuple[str, ...], list[Record]] = {}
        for record in group:
            numbers.setdefault((*_columns_of(record), record.attack), []).append(record)
        for (*columns, _), runs in numbers.items():
            if (one := aggregate_runs(runs)) is not None:
                sizes = " ".join(map(str, one.n))
                cells = (one.value, one.low, one.high, one.sd, one.runs, sizes)
                writer.writerow([heading, *columns, *("" if cell is None else cell for cell in cells)])
    return out.getvalue()


def _columns_of(record: Record) -> tuple[str, ...]:
    names = (record.model, record.surrogate, record.target, record.classifier, str(record.k))
    return (*names, record.level, record.attack_name, record.eps, record.metric)


def _checked(records: Iterable[Record]) -> tuple[Record, ...]:
    kept = drop_duplicates(records)
    if not kept:
        raise ValueError("no records, so there is no table; give the folders of evaluations")
    return kept


def _one_line(text: str) -> str:
    return " ".join(text.split())
