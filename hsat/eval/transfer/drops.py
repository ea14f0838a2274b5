"""How much of a target's accuracy a surrogate's adversarial images take away, as records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsat.eval.measuring import Frame
from hsat.eval.records import Record
from hsat.eval.scoring import level_scores
from hsat.eval.statistics.bootstrap import no_interval
from hsat.eval.statistics.intervals import interval_around
from hsat.eval.statistics.resampling import metric_values, patient_draws
from hsat.types import EmbeddingTable

OTHERS = "others"  # the surrogate of records that average over all surrogates but the target itself
DROPS = {"accuracy": "accuracy_drop", "mca": "mca_drop"}
_OF_ONE = ("surrogate_checkpoint", "stationary_share", "zero_gradient_share", "never_moved_share")  # of one surrogate
_Place = tuple[int, str, str]  # k, level, metric


@dataclass(frozen=True, eq=False)
class Drops:
    """Records of the drops under one attack, and their values over the resamples, by (k, level, metric)."""

    records: dict[_Place, Record]
    resampled: dict[_Place, np.ndarray]


def resampled_metrics(
    frame: Frame, scores: Mapping[int, np.ndarray], table: EmbeddingTable, *, seed: int
) -> dict[_Place, np.ndarray]:
    """Accuracy and mca in resamples of the patients, (resamples,) each; nothing where there can be no interval.

    The draw depends on the seed and the number of patients only, so that two conditions of the same queries are
    measured on the same resamples and their difference is paired.
    """
    found: dict[_Place, np.ndarray] = {}
    people, chosen = len(np.unique(table.patient)), frame.arithmetic
    if no_interval(people, frame.bootstrap):
        return found
    draws = patient_draws(people, frame.bootstrap, np.random.default_rng(seed))
    for k, rows in scores.items():
        levels = level_scores(rows, table, class_names=frame.class_names, how=chosen.how, keys=chosen.keys)
        for level, (pooled, labels, patients) in levels.items():
            member_of = np.unique(patients, return_inverse=True)[1]
            values = metric_values(pooled, labels, member_of, draws, names=tuple(DROPS), absent=chosen.absent)
            found |= {(k, level, metric): value for metric, value in values.items()}
    return found


def drops_of(
    clean: Sequence[Record],
    attacked: Sequence[Record],
    *,
    clean_resampled: Mapping[_Place, np.ndarray],
    attacked_resampled: Mapping[_Place, np.ndarray],
    people: int,
) -> Drops:
    """Clean minus attacked for each number of one target under one surrogate's attack, with paired intervals.

    clean, attacked: records with the same k, levels and metrics.  people: number of patients.  The rest of a drop's
    record is the attacked one's.
    """
    before = {(r.k, r.level, r.metric): r.value for r in clean}
    records, resampled = {}, {}
    for record in attacked:
        if record.metric in DROPS:
            place = (record.k, record.level, record.metric)
            if place in clean_resampled:
                resampled[place] = clean_resampled[place] - attacked_resampled[place]
            drop = dataclasses.replace(record, metric=DROPS[record.metric], value=before[place] - record.value)
            records[place] = _with_interval(drop, resampled.get(place), people)
    return Drops(records, resampled)


def average_drops(drops: Mapping[str, Drops], *, people: int) -> list[Record]:
    """The mean drop of one target under one attack over surrogates, by their names; the same patients are resampled.

    forwards and backwards are those of all surrogates together, since each had to be attacked.
    """
    found = []
    for place, first in next(iter(drops.values())).records.items():
        parts = {name: each.records[place] for name, each in drops.items()}
        gaps = [each.resampled[place] for each in drops.values() if place in each.resampled]
        mean = dataclasses.replace(
            first,
            surrogate=OTHERS,
            value=float(np.mean([record.value for record in parts.values()])),
            flags=tuple(f"{name}: {flag}" for name, record in parts.items() for flag in record.flags),
            settings={key: first.settings[key] for key in first.settings if key not in _OF_ONE}
            | {"surrogates": list(parts)},
            forwards=sum(record.forwards for record in parts.values()),
            backwards=sum(record.backwards for record in parts.values()),
        )
        found.append(_with_interval(mean, np.mean(gaps, axis=0) if gaps else None, people))
    return found


def _with_interval(record: Record, resampled: np.ndarray | None, people: int) -> Record:
    settings = {key: value for key, value in record.settings.items() if key not in ("interval", "no_interval")}
    if resampled is None:
        reason = no_interval(people, settings["bootstrap"])
        return dataclasses.replace(record, low=None, high=None, settings=settings | {"no_interval": reason})
    found = interval_around(
        record.value,
        resampled,
        people=people,
        method="t",
        confidence=0.95,
        difference=True,
    )
    settings |= {"no_interval": found.reason} if found.reason else {}
    return dataclasses.replace(record, low=found.low, high=found.high, settings=settings)
