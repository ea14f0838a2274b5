"""Which records may stand in one table, and what several records for one cell become."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hsat.eval.records import Record
from hsat.eval.tables import ABSENT, TableCell

CLEAN = "clean"
TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}
TITLES |= {"accuracy_drop": "Acc-D", "mca_drop": "MCA-D"}
TITLES |= {"certified_accuracy": "certified Acc", "smallest_fraction": "smallest fraction"}
PLAIN_METRICS = {"drift": "1 - cos"}
"""Metrics that are no shares, and their unit: shown as they are, and not in percent."""
_ARITHMETIC = ("how", "absent", "keys")  # of pooling and of the mean class accuracy
_TARGETS = {
    "decision": "Attacks on the decision of the classifier",
    "knn": "Attacks on the vote of the nearest neighbours",
    "cross_entropy": "Attacks on the cross-entropy of the true class",
    "own_decision": "Attacks away from the decision as it is, without labels",
    "representation": "Attacks on the representation of the slide, without labels",
    "any": "Certificates, which hold for any attack",
}
_EXACT = ("flat", "stream", "torch")  # indexes that find the true neighbours, and so the same numbers


@dataclass(frozen=True, order=True)
class EvaluationSetting:
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
    classifier: str

    @classmethod
    def of(cls, record: Record) -> EvaluationSetting:
        """The setting that a record was measured in; what it does not say is empty, and so is an exact index."""
        settings = record.settings
        index = str(settings.get("index", ""))
        return cls(
            cohort=record.cohort,
            split=record.split,
            target=record.target,
            layer=str(settings.get("layer", "")),
            arithmetic=", ".join(f"{name} {settings[name]}" for name in _ARITHMETIC if settings.get(name)),
            temperature=record.temperature,
            bank_cohort=str(settings.get("bank_cohort", "")),
            bank_split=str(settings.get("bank_split", "")),
            bank_rows=int(settings.get("bank_rows", 0)),
            index="" if index in _EXACT else index,
            convention=str(settings.get("convention", "")),
            classifier="" if record.k else record.classifier,  # kNNs differ by k and temperature
        )


def group_by_setting(records: Iterable[Record]) -> dict[EvaluationSetting, list[Record]]:
    """The records of each setting, as they occur."""
    groups: dict[EvaluationSetting, list[Record]] = {}
    for record in records:
        groups.setdefault(EvaluationSetting.of(record), []).append(record)
    return groups


def describe_setting(setting: EvaluationSetting, among: Iterable[EvaluationSetting] = ()) -> str:
    """A setting in words; what all of `among` share and nobody needs to tell them apart is left out."""
    others = list(among)

    def differs(name: str) -> bool:
        return len({getattr(other, name) for other in others}) > 1

    cohort = f"cohort {setting.cohort[:12]}" if setting.cohort else "unnamed cohort"
    target = _TARGETS.get(setting.target, f"Attacks on the {setting.target}")
    parts = [target, cohort + (f" ({setting.split})" if setting.split else "")]
    if differs("arithmetic"):
        parts.append(f"arithmetic: {setting.arithmetic or 'not recorded'}")
    if differs("layer"):
        parts.append(f"{'classifier' if setting.classifier else 'kNN'} on the {setting.layer}")
    if differs("temperature") and not setting.classifier:
        parts.append(f"temperature {setting.temperature:g}")
    if differs("bank_rows") or differs("bank_cohort") or differs("bank_split"):
        bank = f" of {setting.bank_cohort[:12]}" if setting.bank_cohort != setting.cohort else ""
        split = f" ({setting.bank_split})" if setting.bank_split else ""
        parts.append(f"bank of {setting.bank_rows} patches{bank}{split}")
    if differs("index"):
        parts.append(f"index {setting.index or 'exact'}")
    if setting.classifier or differs("classifier"):
        parts.append(f"classifier: {setting.classifier or 'nearest neighbours'}")
    if differs("convention"):
        parts.append(f"convention: {setting.convention or 'not one of a comparison'}")
    return ", ".join(parts)


@dataclass(frozen=True)
class ConditionColumn:
    """A condition of a table.

    Attributes:
        label: Its name, with a number where one name stands for several attacks.
        name, attack, eps_value: As in the records.
    """

    label: str
    name: str
    attack: str
    eps_value: float

    def matches(self, record: Record) -> bool:
        """Whether a record was measured under this condition."""
        return (record.attack_name, record.attack) == (self.name, self.attack)


@dataclass(frozen=True)
class Estimate:
    """One or several runs of one number, as shares.

    Attributes:
        value: The number, or the mean over runs.
        low, high: The interval of one run; None where there is none.
        sd: Standard deviation over several runs; None for one run.
        runs: How many runs.
        n: Rows of the level, each number that occurs.
    """

    value: float
    low: float | None
    high: float | None
    sd: float | None
    runs: int
    n: tuple[int, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the interval of one run, mean minus and plus the standard deviation over several; None without."""
        if self.sd is not None:
            return self.value - self.sd, self.value + self.sd
        return None if self.low is None or self.high is None else (self.low, self.high)


def label_branch(record: Record) -> str:
    """The BatchNorm branch that a record speaks of, "" where there is one only; with the attacked one if that differs.

    "pgd"; "normal, attacked through pgd" (the published evaluation).
    """
    scored, attacked = (str(record.settings.get(name) or "") for name in ("branch", "attack_branch"))
    return f"{scored}, attacked through {attacked}" if scored and attacked not in ("", scored) else scored


def label_branches(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Names by (model, branch) for models that were measured in several branches: two encoders in one file, as it were.

    Empty for all others, which keep their names.
    """
    branches: dict[str, dict[str, None]] = {}
    for record in records:
        branches.setdefault(record.model, {})[label_branch(record)] = None
    return {
        (model, branch): f"{model} (branch {branch or 'not recorded'})"
        for model, names in branches.items()
        if len(names) > 1
        for branch in names
    }


def drop_duplicates(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records without exact repetitions, so that a run given twice counts once."""
    seen: dict[str, Record] = {}
    for record in records:
        seen.setdefault(json.dumps(dataclasses.asdict(record), sort_keys=True), record)
    return tuple(seen.values())


def list_conditions(records: Sequence[Record]) -> list[ConditionColumn]:
    """Conditions: clean first, then as they occur.  A name that stands for several attacks gets a number each."""
    conditions = dict.fromkeys((record.attack_name, record.attack, record.eps_value) for record in records)
    attacks: dict[str, dict[str, None]] = {}
    for name, attack, _ in conditions:
        attacks.setdefault(name, {})[attack] = None
    columns = []
    for name, attack, eps in conditions:
        versions = list(attacks[name])
        label = name if len(versions) == 1 else f"{name} ({versions.index(attack) + 1})"
        columns.append(ConditionColumn(label=label, name=name, attack=attack, eps_value=eps))
    return sorted(columns, key=lambda column: column.name != CLEAN)


def aggregate_runs(records: Sequence[Record]) -> Estimate | None:
    """Several records of one number as mean and standard deviation (n - 1); one keeps its interval; none is None.

    A number that two evaluations took of the same weights (the clean one of a white-box run and of a transfer) is one.
    """
    if not records:
        return None
    records = _drop_repetitions(records)
    sizes = tuple(sorted({record.n for record in records}))
    values = [record.value for record in records]
    if len(values) > 1:
        return Estimate(statistics.mean(values), None, None, statistics.stdev(values), len(values), sizes)
    return Estimate(values[0], records[0].low, records[0].high, None, 1, sizes)


def _drop_repetitions(records: Sequence[Record]) -> list[Record]:
    """Without repetitions: same file of weights, same seed (which clean images do not need), same value and n."""
    seen: dict[tuple[object, ...], Record] = {}
    for number, record in enumerate(records):
        seed = record.seed if record.attack else None
        known = (record.checkpoint, seed, record.n, record.value) if record.checkpoint else (number,)
        seen.setdefault(known, record)
    return list(seen.values())


def mean_chance(records: Iterable[Record]) -> float | None:
    """The chance level of records of one number, which runs on other queries differ in: its mean; None if none says."""
    stated = [record.chance for record in records if record.chance is not None]
    return statistics.mean(stated) if stated else None


def is_transfer(record: Record) -> bool:
    """Whether a record is about attacks made on another encoder."""
    return bool(record.surrogate) or record.metric.endswith("_drop")


def format_estimate(estimate: Estimate, *, digits: int = 1, unit: str = "", interval: bool = True) -> str:
    """An estimate in percent: "58.3 [50.1, 63.0]", "58.3 ± 1.2 (3 runs)", "58.3".

    Args:
        estimate: The number.
        digits: Digits of the number; an interval has one.
        unit: Stands behind the number, as " %".
        interval: Whether to show the interval of a single run.
    """
    if estimate.sd is not None:
        spread = f"{100 * estimate.value:.{digits}f} ± {100 * estimate.sd:.{digits}f}{unit}"
        return f"{spread} ({estimate.runs} runs)"
    shown = f"{format_points(estimate.value, digits=digits)}{unit}"
    if interval and estimate.low is not None and estimate.high is not None:
        shown += f" [{format_points(estimate.low)}, {format_points(estimate.high)}]"
    return shown


def format_plain(estimate: Estimate, *, interval: bool = True) -> str:
    """An estimate of a metric that is no share, with three significant digits: "0.0123 [0.011, 0.0135]".

    Args:
        estimate: The number.
        interval: Whether to show the interval of a single run.
    """
    if estimate.sd is not None:
        return f"{estimate.value:.3g} ± {estimate.sd:.2g} ({estimate.runs} runs)"
    shown = f"{estimate.value:.3g}"
    if interval and estimate.low is not None and estimate.high is not None:
        shown += f" [{estimate.low:.3g}, {estimate.high:.3g}]"
    return shown


def format_number(estimate: Estimate, metric: str, *, interval: bool = True) -> str:
    """An estimate in the unit of its metric: in percent, or as it is.

    Args:
        estimate: The number.
        metric: Of which metric.
        interval: Whether to show the interval of a single run.
    """
    show = format_plain if metric in PLAIN_METRICS else format_estimate
    return show(estimate, interval=interval)


def metrics_unit(metrics: Iterable[str]) -> str:
    """The unit of metrics that share a table, "%" for shares."""
    return " / ".join(dict.fromkeys(PLAIN_METRICS.get(metric, "%") for metric in metrics))


def format_points(share: float, *, digits: int = 1) -> str:
    """A share in points of a percent, without a sign before zero."""
    text = f"{100 * share:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def page_cell(estimate: Estimate | None, metric: str = "") -> TableCell:
    """A cell of a page in the unit of its metric: with its interval, or the standard deviation over several runs."""
    if estimate is None:
        return TableCell(ABSENT)
    if metric in PLAIN_METRICS:
        shown, _, interval = format_plain(estimate).partition(" ")
        return TableCell(minus_signs(shown), minus_signs(interval.strip("[]").replace(", ", " to ")))
    if estimate.sd is not None:
        small = f"± {100 * estimate.sd:.1f}, {estimate.runs} runs"
    elif estimate.low is None or estimate.high is None:
        small = ""
    else:
        small = f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    return TableCell(minus_signs(format_points(estimate.value)), minus_signs(small))


def minus_signs(text: str) -> str:
    """Hyphens as minus signs."""
    return text.replace("-", "−")
