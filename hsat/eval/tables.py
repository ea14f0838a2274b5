"""Records as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hsat.eval.records import Record
from hsat.types import LEVELS

_TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}


def markdown_table(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy", "mca"),
    intervals: bool = True,
) -> str:
    """One Markdown table per level: rows are models, columns are clean and then the attacks as they first occur.

    A cell holds the metrics in the order given, in %, joined by " / ", each with its interval.  Several records for one
    cell (seeds, splits) give their mean and standard deviation.  Rows are split by target and k where those differ.
    Transfers have a row per pair, "surrogate → model"; see `transfer_table` for the matrix.
    Below the tables stand the notes and flags of the records.  Raises ValueError if no record fits.
    """
    wanted = [record for record in records if record.level in levels and record.metric in metrics]
    if not wanted:
        raise ValueError(
            f"none of the {len(records)} records is at a level of {list(levels)} with a metric of {list(metrics)}"
        )
    columns = list(dict.fromkeys(record.attack_name for record in wanted))
    columns.sort(key=lambda name: name != "clean")
    parts = [_table(level, wanted, columns, metrics, intervals) for level in levels]
    parts.append(_remarks(wanted))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(
    level: str, records: Sequence[Record], columns: Sequence[str], metrics: Sequence[str], intervals: bool
) -> str:
    here = [record for record in records if record.level == level]
    if not here:
        return ""
    rows = list(dict.fromkeys((_row(record), record.target, record.k) for record in here))
    sizes = sorted({record.n for record in here})
    heading = f"**{level.capitalize()} level** ({' / '.join(_TITLES.get(name, name) for name in metrics)}, %;"
    heading += f" n = {', '.join(map(str, sizes))})"
    lines = [heading, "", table_row(["model", "target", "k", *columns]), "|" + " --- |" * (len(columns) + 3)]
    for row in rows:
        mine = [record for record in here if (_row(record), record.target, record.k) == row]
        cells = [
            _cell([record for record in mine if record.attack_name == name], metrics, intervals) for name in columns
        ]
        lines.append(table_row([*(str(value) for value in row), *cells]))
    return "\n".join(lines)


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table; a bar or a line break inside a cell does not end it."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _row(record: Record) -> str:
    return f"{record.surrogate} → {record.model}" if record.surrogate else record.model


def _cell(records: Sequence[Record], metrics: Sequence[str], intervals: bool) -> str:
    parts = []
    for name in metrics:
        found = [record for record in records if record.metric == name]
        if not found:
            parts.append("–")
        elif len(found) > 1:
            values = [100 * record.value for record in found]
            parts.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} runs)")
        elif intervals and found[0].low is not None and found[0].high is not None:
            parts.append(f"{100 * found[0].value:.1f} [{100 * found[0].low:.1f}, {100 * found[0].high:.1f}]")
        else:
            parts.append(f"{100 * found[0].value:.1f}")
    return " / ".join(parts) if any(part != "–" for part in parts) else "–"


def _remarks(records: Sequence[Record]) -> str:
    lines: dict[str, None] = {}
    for record in records:
        if note := record.settings.get("note"):
            lines[f"- {record.attack_name}: {note}"] = None
        for flag in record.flags:
            lines[f"- {_row(record)}, {record.attack_name} ({record.target}): {flag}"] = None
    return "\n".join(lines)
