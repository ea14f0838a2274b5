"""What natural shifts leave: tables of their own, since shifts have no place on the axis of eps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hsat.attacks.natural_shift import STRENGTHS
from hsat.eval import Record, Table
from hsat.eval.doubts import is_shift
from hsat.eval.tables import Row, TableCell
from hsat.report.aggregation import CLEAN, TITLES, aggregate_runs, page_cell

OWN = "own"  # the column of amounts that are none of the standard ones


def shift_table(records: Sequence[Record], *, level: str, metric: str, with_amounts: bool = True) -> Table | None:
    """One row per kind of shift; per model the metric clean and under mild, medium and strong shifts.

    Args:
        records: Of one setting and k.
        level: Which level.
        metric: Which metric.
        with_amounts: Say below the table what each shift does.

    Returns:
        None where no shift was measured at that level.
    """
    here = [record for record in records if (record.level, record.metric) == (level, metric)]
    shifts = [record for record in here if is_shift(record)]
    if not shifts:
        return None
    models = list(dict.fromkeys(record.model for record in shifts))
    used = [name for name in (*STRENGTHS, OWN) if any(shift_place(record)[1] == name for record in shifts)]
    rows: list[Row] = []
    for label in dict.fromkeys(shift_place(record)[0] for record in shifts):
        cells: list[TableCell] = []
        for model in models:
            mine = [record for record in here if record.model == model]
            cells.append(page_cell(aggregate_runs([record for record in mine if record.attack_name == CLEAN])))
            for strength in used:
                fitting = [record for record in mine if is_shift(record) and shift_place(record) == (label, strength)]
                cells.append(page_cell(aggregate_runs(fitting)))
        rows.append((label, *cells))
    sizes = ", ".join(map(str, sorted({record.n for record in shifts})))
    return Table(
        head=("shift", *(name for _ in models for name in (CLEAN, *used))),
        rows=rows,
        caption=f"Natural shift, {level} level, {TITLES.get(metric, metric)} in % (n = {sizes})",
        groups=[(model, 1 + len(used)) for model in models],
        notes=_amounts(shifts) if with_amounts else (),
    )


def shift_markdown(records: Sequence[Record], *, levels: Sequence[str], metrics: Sequence[str]) -> str:
    """The tables of shifts as Markdown, for each target and k; "" without any."""
    parts = []
    for target, k in dict.fromkeys((record.target, record.k) for record in records if is_shift(record)):
        mine = [record for record in records if (record.target, record.k) == (target, k) and not record.surrogate]
        places = [(level, metric) for level in levels for metric in metrics]
        tables = [
            shift_table(mine, level=level, metric=metric, with_amounts=(level, metric) == places[-1])
            for level, metric in places
        ]
        several = len({record.k for record in records}) > 1
        parts += [(f"k = {k}\n\n" if several else "") + table.to_markdown() for table in tables if table]
    return "\n".join(parts)


def shift_place(record: Record) -> tuple[str, str]:
    """Row and column of a record: its kind and strength, or its own name where the amount is not a standard one."""
    about = record.settings.get("natural_shift")
    about = about if isinstance(about, Mapping) else {}
    kind, strength = str(about.get("kind", "")), str(about.get("strength", ""))
    return (kind, strength) if kind and strength in STRENGTHS else (record.attack_name, OWN)


def _amounts(records: Sequence[Record]) -> list[str]:
    """What each shift does, a note per row."""
    texts: dict[str, dict[str, None]] = {}
    for record in records:
        about = record.settings.get("natural_shift")
        if isinstance(about, Mapping) and about.get("text"):
            texts.setdefault(shift_place(record)[0], {})[str(about["text"])] = None
    return [f"{label}: {'; '.join(said)}" for label, said in texts.items()]
