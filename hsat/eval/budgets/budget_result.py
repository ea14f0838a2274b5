"""What an attacker with a budget of patches achieves: the counts per group, and their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsat.eval.measuring import Frame, measured_record
from hsat.eval.records import Record, eps_text, eps_value
from hsat.eval.statistics.bootstrap import bootstrap_intervals, no_interval
from hsat.eval.statistics.intervals import Interval, interval_around
from hsat.eval.statistics.resampling import patient_draws
from hsat.eval.tally import Tally, attack_settings, suspicions
from hsat.types import Attack, EmbeddingTable


@dataclass(frozen=True, eq=False)
class BudgetResult:
    """What `evaluate_hierarchical_budget` found, one entry per slide or patient in ascending order of its id.

    groups, labels, patients: (g,) ids, true classes (columns of the scores) and patients.  sizes: (g,) patches.
    needed: (g,) float64, the smallest number of altered patches that makes the decision wrong; 0 where it is wrong as
    it is, inf where altering all of them would not do.  clean, attacked: embeddings of all patches.
    records: accuracy at each budget, and the mean smallest fraction.
    """

    records: tuple[Record, ...]
    level: str
    groups: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    sizes: np.ndarray
    needed: np.ndarray
    clean: EmbeddingTable
    attacked: EmbeddingTable

    @property
    def smallest_fraction(self) -> np.ndarray:
        """needed / sizes, (g,); inf where the decision never changes."""
        fraction: np.ndarray = self.needed / self.sizes
        return fraction

    def withstands(self, fraction: float) -> np.ndarray:
        """(g,) bool: is the decision right whatever floor(fraction * size) patches are altered?"""
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction of the patches lies in [0, 1]; got {fraction}")
        right: np.ndarray = self.needed > np.floor(fraction * self.sizes + 1e-9)
        return right

    def accuracy(self, fraction: float) -> float:
        """Share of groups that are right although that fraction of their patches is altered; never rises with it."""
        return float(self.withstands(fraction).mean())

    def flipped(self, fraction: float) -> float:
        """Share of the groups that were right and are wrong once that fraction may be altered; NaN if none was."""
        right = self.needed > 0
        return float((~self.withstands(fraction))[right].mean()) if right.any() else float("nan")


def budget_records(
    result: BudgetResult,
    frame: Frame,
    tally: Tally,
    *,
    attack: Attack,
    name: str,
    k: int,
    order: str,
    fractions: Sequence[float],
) -> list[Record]:
    """Clean accuracy, accuracy at each budget, and the mean smallest fraction (inf counts as 1)."""
    eps = getattr(getattr(attack, "threat", attack), "eps", 0.0)
    finite = np.minimum(result.smallest_fraction, 1.0)
    counts = {
        "already_wrong": int((result.needed == 0).sum()),
        "never_flipped": int(np.isinf(result.needed).sum()),
    }
    clean = Record(
        **frame.identity,
        attack="",
        attack_name="clean",
        eps=eps_text(0.0),
        eps_value=0.0,
        flags=frame.flags,
        settings=frame.settings,
        level=result.level,
        metric="accuracy",
        value=result.accuracy(0.0),
        n=len(result.groups),
        k=k,
    )
    head = dataclasses.replace(
        clean,
        attack=repr(attack),
        eps=eps_text(eps),
        eps_value=eps_value(eps),
        flags=frame.flags + suspicions(tally, eps_value(eps)),
        forwards=tally.share("forwards"),
        backwards=tally.share("backwards"),
        settings=frame.settings | attack_settings(attack, tally) | counts | {"order": order},
    )
    found = [_with_interval(clean, result, 0.0, frame)]
    for fraction in sorted(set(fractions)):
        label = f"{name}@{100 * fraction:g}%"
        settings = head.settings | {"budget_fraction": fraction}
        at = dataclasses.replace(head, attack_name=label, value=result.accuracy(fraction), settings=settings)
        found.append(_with_interval(at, result, fraction, frame))
    summary = head.settings | {"note": "smallest fraction of patches that changes the decision; never counts as 1"}
    mean = dataclasses.replace(
        head, attack_name=name, metric="smallest_fraction", value=float(finite.mean()), settings=summary
    )
    interval = _mean_interval(finite, result.patients, seed=mean.seed, resamples=frame.bootstrap)
    return [*found, measured_record(mean, mean.metric, mean.value, interval)]


def _mean_interval(values: np.ndarray, patients: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """The interval of the mean of values in [0, 1], one per group, over resampled patients."""
    people, member_of = np.unique(patients, return_inverse=True)
    if reason := no_interval(len(people), resamples):
        return Interval(None, None, reason)
    draws = patient_draws(len(people), resamples, np.random.default_rng(seed))[:, member_of]
    drawn = draws @ values / draws.sum(1)
    return interval_around(float(values.mean()), drawn, people=len(people), method="t", confidence=0.95)


def _with_interval(record: Record, result: BudgetResult, fraction: float, frame: Frame) -> Record:
    """The record with the interval of its accuracy: right and wrong as the two classes of a score."""
    right = result.withstands(fraction)
    interval = bootstrap_intervals(
        np.stack((right, ~right), 1).astype(float),
        np.zeros(len(right), dtype=np.int64),
        result.patients,
        generator=np.random.default_rng(record.seed),
        names=("accuracy",),
        resamples=frame.bootstrap,
    )["accuracy"]
    return measured_record(record, record.metric, record.value, interval)
