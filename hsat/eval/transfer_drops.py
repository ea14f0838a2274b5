"""Results of attacks that were made on other encoders: drops of a target's accuracy, with paired intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from hsat.eval.confidence import (
    Interval,
    bootstrap_draws,
    confidence_interval,
    missing_interval_reason,
    weighted_metrics,
)
from hsat.eval.evaluation import ScoredClassifier, ScoresKey
from hsat.eval.pooling import pool_by_level
from hsat.eval.records import Record, RecordTemplate
from hsat.eval.result_files import SavedResult
from hsat.types import EmbeddingTable

OTHERS = "others"  # the surrogate of records that average over all surrogates but the target itself
DROPS = {"accuracy": "accuracy_drop", "mca": "mca_drop"}
_OF_ONE_SURROGATE = ("surrogate_checkpoint", "stationary_share", "zero_gradient_share", "never_moved_share")

Pair = tuple[str, str]
_Place = tuple[ScoresKey, str, str]  # classifier, level, metric


@dataclass(frozen=True, eq=False, repr=False)
class TransferResult(SavedResult):
    """The result of `evaluate_transfer`.

    Attributes:
        records: See there.
        clean: Class scores (n, classes) of the queries as they are, by target and classifier (see `WhiteboxResult`).
        attacked: The same by (surrogate, attack, target) and classifier.
        queries: Ids and labels of the queries, without embeddings; rows of scores follow it.
        class_names: Columns of the scores, by target.
        made: The (surrogate, attack) pairs that this call attacked, in order; the others came from `resume_dir`.
    """

    records: tuple[Record, ...]
    clean: dict[str, dict[ScoresKey, np.ndarray]]
    attacked: dict[tuple[str, str, str], dict[ScoresKey, np.ndarray]]
    queries: EmbeddingTable
    class_names: dict[str, tuple[str, ...]]
    made: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class TransferDrop:
    """Records of the drops under one attack, and their values over the resamples, by (classifier, level, metric)."""

    records: dict[_Place, Record]
    resampled: dict[_Place, np.ndarray]


def resample_metrics(
    template: RecordTemplate, scores: Mapping[ScoresKey, np.ndarray], table: EmbeddingTable
) -> dict[_Place, np.ndarray]:
    """Accuracy and mca in resamples of the patients, (resamples,) each; nothing where there can be no interval.

    The draw depends on the seed and the number of patients only, so that two conditions of the same queries are
    measured on the same resamples and their difference is paired.
    """
    values: dict[_Place, np.ndarray] = {}
    n_patients, scoring = len(np.unique(table.patient)), template.scoring
    if missing_interval_reason(n_patients, scoring.bootstrap):
        return values
    draws = bootstrap_draws(n_patients, scoring.bootstrap, np.random.default_rng(template.seed))
    for key, rows in scores.items():
        levels = pool_by_level(
            rows, table, class_names=template.class_names, pooling=scoring.pooling, group_by=scoring.group_by
        )
        for level, (pooled, labels, patients) in levels.items():
            member_of = np.unique(patients, return_inverse=True)[1]
            drawn = weighted_metrics(
                pooled, labels, member_of, draws, names=tuple(DROPS), absent_classes=scoring.absent_classes
            )
            values |= {(key, level, metric): value for metric, value in drawn.items()}
    return values


def transfer_drop(
    clean: Sequence[Record],
    attacked: Sequence[Record],
    *,
    clean_resampled: Mapping[_Place, np.ndarray],
    attacked_resampled: Mapping[_Place, np.ndarray],
    classifiers: Sequence[ScoredClassifier],
    table: EmbeddingTable,
) -> TransferDrop:
    """Clean minus attacked for each number of one target under one surrogate's attack, with paired intervals.

    The rest of a drop's record is the attacked one's.  A drop whose whole interval lies below 0 is flagged.
    """
    keys = {classifier.text: classifier.key for classifier in classifiers}
    before = {(keys[r.classifier], r.level, r.metric): r.value for r in clean}
    n_patients = len(np.unique(table.patient))
    records, resampled = {}, {}
    for record in attacked:
        if record.metric in DROPS:
            place = (keys[record.classifier], record.level, record.metric)
            if place in clean_resampled:
                resampled[place] = clean_resampled[place] - attacked_resampled[place]
            drop = _with_interval(
                record, DROPS[record.metric], before[place] - record.value, resampled.get(place), n_patients
            )
            if record.surrogate != record.model and drop.high is not None and drop.high < 0:
                gain = f"{record.level} {record.metric} above that of the clean images, beyond luck"
                drop = dataclasses.replace(drop, flags=(*drop.flags, gain))
            records[place] = drop
    return TransferDrop(records, resampled)


def average_drops(drops: Mapping[str, TransferDrop], *, n_patients: int) -> list[Record]:
    """The mean drop of one target under one attack over surrogates, by their names; the same patients are resampled.

    forwards and backwards are those of all surrogates together, since each had to be attacked.
    """
    records = []
    for place, first in next(iter(drops.values())).records.items():
        parts = {name: drop.records[place] for name, drop in drops.items()}
        gaps = [drop.resampled[place] for drop in drops.values() if place in drop.resampled]
        settings = {key: value for key, value in first.settings.items() if key not in _OF_ONE_SURROGATE}
        mean = dataclasses.replace(
            first,
            surrogate=OTHERS,
            flags=tuple(f"{name}: {flag}" for name, record in parts.items() for flag in record.flags),
            settings=settings | {"surrogates": list(parts)},
            forwards=sum(record.forwards for record in parts.values()),
            backwards=sum(record.backwards for record in parts.values()),
        )
        value = float(np.mean([record.value for record in parts.values()]))
        records.append(_with_interval(mean, first.metric, value, np.mean(gaps, axis=0) if gaps else None, n_patients))
    return records


def _with_interval(record: Record, metric: str, value: float, resampled: np.ndarray | None, n_patients: int) -> Record:
    settings = {key: entry for key, entry in record.settings.items() if key not in ("interval", "no_interval")}
    if resampled is None:
        interval = Interval(None, None, missing_interval_reason(n_patients, settings["bootstrap"]))
    else:
        interval = confidence_interval(
            value, resampled, n_patients=n_patients, method="t", confidence=0.95, difference=True
        )
    if interval.reason:
        settings["no_interval"] = interval.reason
    return dataclasses.replace(
        record, metric=metric, value=value, low=interval.low, high=interval.high, chance=None, settings=settings
    )


def check_pairs(encoders: Mapping[str, object], pairs: Sequence[Pair] | None) -> tuple[Pair, ...]:
    """The pairs of surrogate and target: what was asked for, else all.

    Raises:
        TypeError: For encoders that are no mapping of callables, and pairs that are no pairs of names.
        ValueError: For names that are unknown, doubled or taken, naming them.
    """
    if not isinstance(encoders, Mapping) or not encoders:
        raise TypeError(f"encoders must be a mapping such as {{'a': encoder}}, got {type(encoders).__name__}")
    for name, encoder in encoders.items():
        if not isinstance(name, str) or not callable(encoder):
            raise TypeError(
                f"encoders must map names to encoders, or to functions that load one; got {name!r}: {encoder!r}"
            )
    if taken := {"", OTHERS} & encoders.keys():
        raise ValueError(f"an encoder cannot be called {taken.pop()!r}: records need that name for something else")
    if pairs is None:
        return tuple((surrogate, target) for surrogate in encoders for target in encoders)
    chosen = [tuple(pair) if not isinstance(pair, str) else () for pair in pairs]
    if not chosen or any(len(pair) != 2 for pair in chosen):
        raise TypeError(f"pairs must hold (surrogate, target) names, as in (('a', 'b'),); got {pairs!r}")
    if unknown := sorted({name for pair in chosen for name in pair} - encoders.keys()):
        raise ValueError(f"pairs name {unknown}, which are no encoders; there are {list(encoders)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"pairs hold a pair twice: {chosen}")
    return cast(tuple[Pair, ...], tuple(chosen))
