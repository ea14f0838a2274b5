"""A number with everything that is needed to trust it, as JSON lines and as a Markdown table."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsat.eval.reporting.json_fields import COUNT, NUMBER, OBJECT, TEXT, TEXTS, check_fields
from hsat.files import read_json_lines, write_json_lines
from hsat.types import LEVELS

_KINDS = dict.fromkeys(
    ("model", "attack", "attack_name", "eps", "target", "level", "metric", "cohort", "split", "checkpoint"), TEXT
)
_KINDS |= dict.fromkeys(("eps_value", "value", "low", "high", "temperature", "forwards", "backwards"), NUMBER)
_KINDS |= {"surrogate": TEXT, "n": COUNT, "k": COUNT, "seed": COUNT}
_KINDS |= {"flags": TEXTS, "versions": OBJECT, "settings": OBJECT}
_MEASURED = dict.fromkeys(("zero_gradient_share", "never_moved_share", "stationary_share"), NUMBER)
_MEASURED |= {"bank_rows": COUNT}  # entries of settings that are reckoned with
_TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number: what was measured, of what, under which attack, and how certain it is.

    attack: repr of the attack ("" for clean images); attack_name: its short name, the column of a table.  eps: as text
    ("8/255"); eps_value: the same in units of the pixel range.  target: the layer whose drift the attack maximises.
    value, low, high: the metric and its interval in [0, 1]; low and high are None where there is no interval.
    n: rows at this level.  forwards, backwards: passes per image that the attack spent.
    surrogate: in a transfer, the encoder that was attacked while `model` was measured; "" otherwise.
    flags: reasons to distrust the number.  settings: whatever else decides it.
    """

    model: str
    attack: str
    attack_name: str
    eps: str
    eps_value: float
    target: str
    level: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int
    k: int
    temperature: float
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    cohort: str = ""
    split: str = ""
    checkpoint: str = ""
    surrogate: str = ""
    flags: tuple[str, ...] = ()
    forwards: float = 0.0
    backwards: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flags", tuple(self.flags))


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> Path:
    """Write one JSON object per line; the file appears whole or not at all.  ValueError for NaN or infinity."""
    return write_json_lines(path, map(dataclasses.asdict, records))


def read_records(path: str | os.PathLike[str]) -> tuple[Record, ...]:
    """Read what `write_records` wrote; empty lines are skipped.

    Raises ValueError naming the line for text that is not a JSON object, for missing or unknown fields, and for values
    of another kind, NaN and infinity among them.
    """
    return tuple(_as_record(values, where) for where, values in read_json_lines(path))


def _as_record(values: dict[str, Any], where: str) -> Record:
    known = {option.name for option in dataclasses.fields(Record)}
    needed = {
        option.name
        for option in dataclasses.fields(Record)
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{where}: fields {missing} are missing; every record needs {sorted(needed)}")
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown fields {unknown}; a record has {sorted(known)}")
    check_fields(values, where, _KINDS, optional=("low", "high"))
    check_fields(values.get("settings", {}), f"{where}, settings", _MEASURED)
    return Record(**values)


def eps_text(eps: float | torch.Tensor) -> str:
    """eps as people write it: "8/255" for whole grey levels, else plain digits ("0.5"), "4/255..8/255" for a tensor."""
    if isinstance(eps, torch.Tensor):
        low, high = (eps_text(float(edge)) for edge in eps.double().aminmax())
        return low if low == high else f"{low}..{high}"
    levels = eps * 255
    whole = round(levels) > 0 and abs(levels - round(levels)) < 1e-4
    plain = abs(round(eps, 3) - eps) < 1e-7  # with room for the rounding of float32
    return f"{round(levels)}/255" if whole and not plain else f"{eps:g}"


def eps_value(eps: float | torch.Tensor) -> float:
    """eps as a number; the largest entry of a tensor."""
    return float(eps.max()) if isinstance(eps, torch.Tensor) else float(eps)


def software_versions() -> dict[str, str]:
    """Versions of what a number depends on; libraries that are not installed are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name, package in (("hsat", "hsat"), ("faiss", "faiss-cpu"), ("timm", "timm"), ("torchvision", "torchvision")):
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
