"""Which records may stand in one table, and what several records for one cell become."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hsat.eval.records import Record

CLEAN = "clean"
_ARITHMETIC = ("how", "absent", "keys")  # of pooling and of the mean class accuracy
_EXACT = ("flat", "stream", "torch")  # indexes that find the true neighbours, and so the same numbers


@dataclass(frozen=True, order=True)
class Setting:
    """What two numbers must share to be compared: the data, what was attacked, and the arithmetic."""

    cohort: str
    split: str
    target: str
    layer: str
    arithmetic: str
    temperature: float
    bank_cohort: str
    bank_split: str
    bank_rows: int
    index: str
    convention: str


@dataclass(frozen=True)
class Column:
    """A condition of a table: label is its name, with a number where one name stands for several attacks."""

    label: str
    name: str
    attack: str
    eps_value: float

    def holds(self, record: Record) -> bool:
        """Whether a record was measured under this condition."""
        return (record.attack_name, record.attack) == (self.name, self.attack)


@dataclass(frozen=True)
class Cell:
    """One or several runs of one number, as shares.  sd: None for one run; low and high: None where there are none."""

    value: float
    low: float | None
    high: float | None
    sd: float | None
    runs: int
    n: tuple[int, ...]


def setting_of(record: Record) -> Setting:
    """The setting that a record was measured in; what it does not say is empty, and so is an exact index."""
    said = record.settings
    index = str(said.get("index", ""))
    return Setting(
        cohort=record.cohort,
        split=record.split,
        target=record.target,
        layer=str(said.get("layer", "")),
        arithmetic=", ".join(f"{name} {said[name]}" for name in _ARITHMETIC if said.get(name)),
        temperature=record.temperature,
        bank_cohort=str(said.get("bank_cohort", "")),
        bank_split=str(said.get("bank_split", "")),
        bank_rows=int(said.get("bank_rows", 0)),
        index="" if index in _EXACT else index,
        convention=str(said.get("convention", "")),
    )


def branch_of(record: Record) -> str:
    """The BatchNorm branch that a record speaks of, "" where there is one only; with the attacked one if that differs.

    "pgd"; "normal, attacked through pgd" (the published evaluation).
    """
    scored, attacked = (str(record.settings.get(name) or "") for name in ("branch", "attack_branch"))
    return f"{scored}, attacked through {attacked}" if scored and attacked not in ("", scored) else scored


def branch_names(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Names by (model, branch) for models that were measured in several branches: two encoders in one file, as it were.

    Empty for all others, which keep their names.
    """
    branches: dict[str, dict[str, None]] = {}
    for record in records:
        branches.setdefault(record.model, {})[branch_of(record)] = None
    return {
        (model, branch): f"{model} (branch {branch or 'not recorded'})"
        for model, found in branches.items()
        if len(found) > 1
        for branch in found
    }


def unique(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records without exact repetitions, so that a run given twice counts once."""
    seen: dict[str, Record] = {}
    for record in records:
        seen.setdefault(json.dumps(dataclasses.asdict(record), sort_keys=True), record)
    return tuple(seen.values())


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Conditions: clean first, then as they occur.  A name that stands for several attacks gets a number each."""
    found = dict.fromkeys((record.attack_name, record.attack, record.eps_value) for record in records)
    attacks: dict[str, dict[str, None]] = {}
    for name, attack, _ in found:
        attacks.setdefault(name, {})[attack] = None
    columns = []
    for name, attack, eps in found:
        versions = list(attacks[name])
        label = name if len(versions) == 1 else f"{name} ({versions.index(attack) + 1})"
        columns.append(Column(label=label, name=name, attack=attack, eps_value=eps))
    return sorted(columns, key=lambda column: column.name != CLEAN)


def cell_of(records: Sequence[Record]) -> Cell | None:
    """Several records of one number as mean and standard deviation (n - 1); one keeps its interval; none is None.

    A number that two evaluations took of the same weights (the clean one of a white-box run and of a transfer) is one.
    """
    if not records:
        return None
    records = _measured_once(records)
    sizes = tuple(sorted({record.n for record in records}))
    values = [record.value for record in records]
    if len(values) > 1:
        return Cell(statistics.mean(values), None, None, statistics.stdev(values), len(values), sizes)
    return Cell(values[0], records[0].low, records[0].high, None, 1, sizes)


def _measured_once(records: Sequence[Record]) -> list[Record]:
    """Without repetitions: same file of weights, same seed (which clean images do not need), same value and n."""
    seen: dict[tuple[object, ...], Record] = {}
    for number, record in enumerate(records):
        seed = record.seed if record.attack else None
        known = (record.checkpoint, seed, record.n, record.value) if record.checkpoint else (number,)
        seen.setdefault(known, record)
    return list(seen.values())


def is_transfer(record: Record) -> bool:
    """Whether a record is about attacks made on another encoder."""
    return bool(getattr(record, "surrogate", "")) or record.metric.endswith("_drop")
