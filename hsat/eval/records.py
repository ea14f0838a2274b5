"""A number with everything that is needed to trust it, as JSON lines and as a Markdown table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from hsat.attacks.threat import eps_text, eps_value
from hsat.eval.confidence import Interval, bootstrap_intervals
from hsat.eval.flags import accuracy_flags
from hsat.eval.metrics import METRICS, Metrics, metrics
from hsat.eval.options import Scoring, software_versions
from hsat.eval.outcomes import AttackStats
from hsat.eval.pooling import pool_by_level, unreported_levels
from hsat.files import STRICT, read_fields, read_json_lines, write_json_lines
from hsat.types import EmbeddingTable

_STARTS = {"FFGSM": True, "FGSM": False, "RandomNoise": True}  # attacks whose start is not an option
_WITHOUT_ADVERSARY = ("RandomNoise", "NaturalShift")  # conditions to compare attacks with
SCHEMA = 3

Count = Annotated[int, Field(ge=0)]
_SHARES = ("accuracy", "mca", "map", "certified_accuracy", "smallest_fraction")  # metrics between 0 and 1
_ROUNDING = 1e-9


class _MeasuredSettings(BaseModel):
    """Entries of settings that are reckoned with; a file need not have them."""

    model_config = STRICT | {"extra": "ignore"}

    zero_gradient_share: float = 0.0
    never_moved_share: float = 0.0
    stationary_share: float = 0.0
    bank_rows: Count = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number: what was measured, of what, under which attack, and how certain it is.

    Attributes:
        model, checkpoint: Name of the encoder that is measured, and what identifies its weights.
        attack, attack_name: repr of the attack ("" for clean images), and its short name, the column of a table.
        eps, eps_value: Size of the threat model as text ("8/255"), and the same in units of the pixel range.
        target: The layer whose drift the attack maximises, or "decision".
        level, metric: Such as "patient" and "accuracy".
        value, low, high: The metric and its interval, in [0, 1]; low and high are None where there is no interval.
        chance: What knowing nothing reaches (`chance_levels`); None where that has no meaning, and in older files.
        n: Rows at this level.
        k, temperature: Of the neighbours' vote; 0 for classifiers without.
        seed, versions: Of noise and resamples; of the software.
        cohort, split: Of the queries.
        surrogate: In a transfer, the encoder that was attacked while `model` was measured; "" otherwise.
        flags: Reasons to distrust the number.
        forwards, backwards: Passes per image that the attack spent.
        settings: Whatever else decides the number.
        classifier: What decided; "" in files of schema 1.
        schema: Version of these fields; records that are made now have SCHEMA.
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
    chance: float | None = None
    n: Count
    k: Count
    temperature: float
    seed: Count
    versions: dict[str, str] = field(default_factory=dict)
    cohort: str = ""
    split: str = ""
    checkpoint: str = ""
    surrogate: str = ""
    flags: tuple[str, ...] = ()
    forwards: float = 0.0
    backwards: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    classifier: str = ""
    schema: Count = 1

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        object.__setattr__(self, "flags", tuple(self.flags))


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> Path:
    """Write one JSON object per line; the file appears whole or not at all.

    Args:
        path: The file.
        records: Of any evaluation.

    Returns:
        The file.

    Raises:
        ValueError: For NaN or infinity.
    """
    return write_json_lines(path, map(dataclasses.asdict, records))


def read_records(path: str | os.PathLike[str]) -> tuple[Record, ...]:
    """Read what `write_records` wrote; empty lines are skipped.

    Args:
        path: The file, one JSON object per line.

    Returns:
        The records in their order.

    Raises:
        ValueError: Naming the line, for text that is not a JSON object, for fields that are missing, unknown or given
            twice, for values of another kind, NaN and infinity among them, and for a share that is none: chance,
            accuracies and their intervals lie in [0, 1].
    """
    return tuple(_as_record(values, where) for where, values in read_json_lines(path))


def _as_record(values: dict[str, Any], where: str) -> Record:
    fields = dataclasses.fields(Record)
    known = {one.name for one in fields}
    needed = {one.name for one in fields if one.default is one.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{where}: fields {missing} are missing; every record needs {sorted(needed)}")
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{where}: unknown fields {unknown}; a record has {sorted(known)}")
    record = read_fields(Record, values, where)
    read_fields(_MeasuredSettings, record.settings, f"{where}, settings")
    shares = ("value", "low", "high", "chance") if record.metric in _SHARES else ("chance",)
    for name in shares:
        share = getattr(record, name)
        if share is not None and not -_ROUNDING <= share <= 1 + _ROUNDING:
            raise ValueError(f"{where}: {name} of {record.metric} is {share}, which must lie in [0, 1]")
    return record


@dataclass(frozen=True, kw_only=True)
class AttackFacts:
    """What records say of one condition, beside its numbers.

    Attributes:
        name: The column of a table; "clean" for the queries as they are.
        attack: The attack; None for the queries as they are.
        stats: What it did.
        flags: Further reasons to distrust the numbers.
        settings: Further settings.
        surrogate: In a transfer, the encoder that was attacked; "" otherwise.
        text: What stands for the attack where there is none, as of a certificate.
        radius: The size of its ball.
        forwards: Its forward passes per image.
    """

    name: str
    attack: object = None
    stats: AttackStats = field(default_factory=AttackStats)
    flags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    surrogate: str = ""
    text: str = ""
    radius: float = 0.0
    forwards: float | None = None

    @property
    def is_clean(self) -> bool:
        """Whether these are the queries as they are."""
        return self.attack is None and not self.text

    def is_attack_on(self, model: str) -> bool:
        """Whether this is an attack, and no noise or natural shift, on the encoder which is measured."""
        hostile = self.attack is not None and type(self.attack).__name__ not in _WITHOUT_ADVERSARY
        return hostile and self.surrogate in ("", model)

    @property
    def eps(self) -> float | torch.Tensor:
        """Size of the ball; 0 without an attack, the attack's own where it moves numbers of another space."""
        if self.attack is None:
            return self.radius
        eps: float | torch.Tensor = getattr(getattr(self.attack, "threat", self.attack), "eps", 0.0)
        return eps


@dataclass(frozen=True, kw_only=True)
class ClassifierFacts:
    """What records say of the classifier that made the scores.

    Attributes:
        name: Its settings, as they would be typed.
        k: Neighbours that vote; 0 for a classifier without neighbours.
        temperature: Of the vote; 0 for a classifier without one.
        attacked: Whether attacks on the decision are against this classifier.
        settings: Further settings, such as the quality of an approximate index.
    """

    name: str
    k: int = 0
    temperature: float = 0.0
    attacked: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecordTemplate:
    """What all records of one evaluation have in common; it builds each record once.

    Attributes:
        target: What the attacks maximised, as records state it.
        scoring: How scores became numbers.
        seed: Of noise and bootstrap.
        model, checkpoint, cohort, split: See `Record`.
        class_names: Columns of the scores.
        flags: Reasons to distrust all records.
        settings: Entries of all records' settings.
        versions: Of the software.
        clean: Accuracy on clean images by classifier and level, which no attack should leave more of.
    """

    target: str
    scoring: Scoring
    seed: int
    model: str
    checkpoint: str
    cohort: str
    split: str
    class_names: tuple[str, ...]
    flags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=software_versions)
    clean: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def with_clean(self, records: Iterable[Record]) -> RecordTemplate:
        """The template that holds attacked accuracies against the clean ones among these records."""
        clean = [record for record in records if record.metric == "accuracy" and not record.attack]
        return dataclasses.replace(self, clean={(one.classifier, one.level): one.value for one in clean})

    def of_files(self, cohort: str, settings: Mapping[str, Any]) -> RecordTemplate:
        """The template of records that were measured on files of another cohort."""
        return dataclasses.replace(self, cohort=cohort, settings={**self.settings, **settings, "from_files": True})

    def build(
        self,
        facts: AttackFacts,
        classifier: ClassifierFacts,
        *,
        level: str,
        metric: str,
        value: float,
        n: int,
        interval: Interval,
        chance: float | None = None,
        extra: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> Record:
        """One record.

        Args:
            facts: The condition.
            classifier: The classifier.
            level: "patch", "slide" or "patient".
            metric: Name of the metric.
            value: Its value.
            n: Rows at this level.
            interval: Its interval; where it is missing or unusual the settings say why.
            chance: Its chance level, where that has a meaning.
            extra: Further settings of this record alone.
            flags: Further flags of this record alone.
        """
        eps, stats = facts.eps, facts.stats
        settings = {
            **self.settings,
            **classifier.settings,
            **_attack_settings(facts),
            **facts.settings,
            **(extra or {}),
        }
        if interval.reason:
            settings["no_interval" if interval.low is None else "interval"] = interval.reason
        beside: tuple[str, ...] = ()
        if metric == "accuracy":
            clean = self.clean.get((classifier.name, level)) if facts.is_attack_on(self.model) else None
            beside = accuracy_flags(value, level=level, chance=chance if facts.is_clean else None, clean=clean)
        return Record(
            model=self.model,
            attack=facts.text if facts.attack is None else repr(facts.attack),
            attack_name=facts.name,
            eps=eps_text(eps),
            eps_value=eps_value(eps),
            target=self.target,
            level=level,
            metric=metric,
            value=value,
            low=interval.low,
            high=interval.high,
            chance=chance,
            n=n,
            k=classifier.k,
            temperature=classifier.temperature,
            seed=self.seed,
            versions=dict(self.versions),
            cohort=self.cohort,
            split=self.split,
            checkpoint=self.checkpoint,
            surrogate=facts.surrogate,
            flags=(*self.flags, *stats.flags(eps_value(eps)), *beside, *facts.flags, *flags),
            forwards=stats.fraction("forwards") if facts.forwards is None else facts.forwards,
            backwards=stats.fraction("backwards"),
            settings=settings,
            classifier=classifier.name,
            schema=SCHEMA,
        )

    def measure(
        self,
        facts: AttackFacts,
        classifier: ClassifierFacts,
        scores: np.ndarray,
        queries: EmbeddingTable,
    ) -> list[Record]:
        """One record per level and metric of a condition.

        Args:
            facts: The condition.
            classifier: The classifier.
            scores: (n, classes), one row per query.
            queries: Ids and labels of the queries.
        """
        unreported = () if facts.attack else unreported_levels(queries, group_by=self.scoring.group_by)
        levels = measure_levels(scores, queries, class_names=self.class_names, scoring=self.scoring, seed=self.seed)
        return [
            self.build(
                facts,
                classifier,
                level=level,
                metric=metric,
                value=getattr(measured, metric),
                n=measured.n,
                interval=intervals[metric],
                chance=measured.chance[metric],
                flags=unreported if level == "patch" else (),
            )
            for level, (measured, intervals) in levels.items()
            for metric in METRICS
        ]


def measure_levels(
    scores: np.ndarray, queries: EmbeddingTable, *, class_names: Sequence[str], scoring: Scoring, seed: int
) -> dict[str, tuple[Metrics, dict[str, Interval]]]:
    """Metrics and their intervals at each level."""
    levels = pool_by_level(scores, queries, class_names=class_names, pooling=scoring.pooling, group_by=scoring.group_by)
    return {
        level: (
            metrics(pooled, labels, absent_classes=scoring.absent_classes),
            bootstrap_intervals(
                pooled,
                labels,
                patients,
                generator=np.random.default_rng(seed),
                resamples=scoring.bootstrap,
                absent_classes=scoring.absent_classes,
            ),
        )
        for level, (pooled, labels, patients) in levels.items()
    }


def _attack_settings(facts: AttackFacts) -> dict[str, Any]:
    """What goes into a record's settings about an attack and how it went."""
    attack, stats = facts.attack, facts.stats
    if attack is None:
        return {}
    kind = type(attack).__name__
    random_start = getattr(attack, "random_start", _STARTS.get(kind))
    settings: dict[str, Any] = {"random_start": random_start, "stationary_share": stats.fraction("stationary")}
    settings["zero_gradient_share"] = stats.fraction("zero_gradient")
    settings["never_moved_share"] = stats.fraction("never_moved")
    if kind == "BIM" and random_start:
        settings["note"] = "BIM with a random start is PGD"
    return settings | stats.feasibility_settings()
