"""Whether one model is better than another: differences on the same patients, from class scores that were kept.

`save_scores` keeps the scores of a cohort's patches, model by model and condition by condition, as one file;
`compare_models` needs nothing else.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from hsat.eval.confidence import (
    Interval,
    Method,
    bootstrap_draws,
    check_bootstrap_options,
    confidence_interval,
    jackknife,
    missing_interval_reason,
    weighted_metrics,
)
from hsat.eval.metrics import METRICS
from hsat.eval.options import Scoring
from hsat.eval.pooling import LevelRows, check_scores, pool_by_level
from hsat.eval.records import Count
from hsat.files import STRICT, atomic_path, load_arrays
from hsat.types import GROUP_LABELS, LEVELS
from hsat.untrusted import open_regular

ROUNDING = 1e-12
"""Differences of means this near to zero are zero: their sums were rounded in another order."""

_IDS = ("label", "patch", "slide", "patient")
_TEXT = ("cohort", "split", "model", "condition", "classifier")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The class scores that one model gives the patches of a cohort under one condition.

    Attributes:
        scores: (n, classes) as `predict_proba` gives them; column i belongs to class_names[i].
        label: (n,) indices into class_names.
        patch, slide, patient: (n,) ids; a patch stands there once.
        class_names: Names of the classes.
        cohort, split, model: Where the patches come from, and who scored them.
        condition: "clean" or an attack's name.
        k: Neighbours; 0 for a classifier without.
        classifier: Its settings as text, for one without neighbours.
        slide_label, patient_label: (n,) indices into class_names, -1 for unknown; see `EmbeddingTable`.

    Raises:
        ValueError: Naming the column that does not fit.
        TypeError: For ids that are no integers.
    """

    scores: np.ndarray
    label: np.ndarray
    patch: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    class_names: tuple[str, ...]
    cohort: str = ""
    split: str = ""
    model: str = ""
    condition: str = "clean"
    k: int = 0
    classifier: str = ""
    slide_label: np.ndarray | None = None
    patient_label: np.ndarray | None = None

    def __post_init__(self) -> None:
        scores = check_scores(self.scores)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if scores.shape[1] != len(self.class_names):
            raise ValueError(f"scores of {scores.shape[1]} classes but {len(self.class_names)} class names")
        for name in _IDS:
            ids = np.asarray(getattr(self, name))
            if ids.shape != (len(scores),):
                raise ValueError(f"{len(scores)} rows of scores but {name} has shape {ids.shape}")
            if not np.issubdtype(ids.dtype, np.integer):
                raise TypeError(f"{name} must hold integers, got {ids.dtype}")
            object.__setattr__(self, name, ids.astype(np.int64))
        if self.label.min() < 0 or self.label.max() >= len(self.class_names):
            raise ValueError(
                f"labels run from {self.label.min()} to {self.label.max()} for {len(self.class_names)} class names"
            )
        patches, times = np.unique(self.patch, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"patch {patches[times > 1][0]} stands {times.max()} times in the table; wanted once")

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of model `model` minus the same of model `against`, on the same patients.

    Attributes:
        model, against: Names of the two models.
        condition, k, level, metric: What was measured.
        value, value_against: The two numbers.
        difference: The first minus the second, in [-1, 1].
        low, high: Its interval; None where there is none.
        not_above: Share of the resamples in which the difference is not above zero by more than rounding, 1e-12 (None
            without resamples): near 0 where `model` is reliably better, near 1 where it is not.
        n: Rows at this level.
        patients: How many were resampled.
        reason: Why there is no interval.
    """

    model: str
    against: str
    condition: str
    k: Count
    level: str
    metric: str
    value: float
    value_against: float
    difference: float
    low: float | None
    high: float | None
    not_above: float | None
    n: Count
    patients: Count
    reason: str = ""
    classifier: str = ""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


def paired_difference(
    a: ScoreTable,
    b: ScoreTable,
    *,
    generator: np.random.Generator,
    names: Sequence[str] = METRICS,
    levels: Sequence[str] = LEVELS,
    scoring: Scoring = Scoring(),
    confidence: float = 0.95,
    method: Method = "t",
) -> tuple[Difference, ...]:
    """How much higher each metric of `a` is than that of `b`, at each level, with an interval from resampled patients.

    Rows are matched by patch id, in whatever order they stand; both tables must hold the same patches of one cohort,
    with the same slides, patients and classes (matched by name).  Every resample draws the same patients for both
    models and for all levels, so what makes a patient hard for both cancels: this interval is the right one for the
    question which model is better, and usually far shorter than the two models' own intervals suggest.

    Where every resample gives the same difference, as for two equal models, there is no interval, and `reason` says so.

    Args:
        a, b: The two models' scores.
        generator: Draws the patients.
        names: Which metrics.
        levels: Which of patch, slide and patient; those at which the groups have no label of their own are left out.
        scoring: The arithmetic and the number of resamples; its layer does not apply.
        confidence: In (0, 1).
        method: See `bootstrap_intervals`; "t" works on the plain scale here.

    Returns:
        One difference per level and metric.

    Raises:
        ValueError: For tables that do not match, naming what differs, and for unknown options.
    """
    check_bootstrap_options(names, scoring.bootstrap, confidence, method)
    if unknown := [level for level in levels if level not in LEVELS]:
        raise ValueError(f"unknown levels {unknown}; choose from {list(LEVELS)}")
    b = _align(a, b)
    patient_ids = np.unique(a.patient)
    n_patients = len(patient_ids)
    reason = missing_interval_reason(n_patients, scoring.bootstrap)
    weights = [np.ones((1, n_patients))]  # every patient once, then the resamples, then each patient left out
    if not reason:
        weights.append(bootstrap_draws(n_patients, scoring.bootstrap, generator))
        weights += [jackknife(n_patients)] if method == "bca" else []
    pooled = [
        pool_by_level(table.scores, table, pooling=scoring.pooling, group_by=scoring.group_by) for table in (a, b)
    ]
    differences = []
    for level in (level for level in levels if level in pooled[0]):
        of_a, of_b = (_values(rows[level], patient_ids, weights, names, scoring) for rows in pooled)
        for name in names:
            values = [first[name] - second[name] for first, second in zip(of_a, of_b, strict=True)]
            interval = Interval(None, None, reason)
            if not reason:
                interval = confidence_interval(
                    float(values[0][0]),
                    values[1],
                    n_patients=n_patients,
                    method=method,
                    confidence=confidence,
                    left_out=values[2] if len(values) > 2 else None,
                    difference=True,
                )
            differences.append(
                Difference(
                    model=a.model,
                    against=b.model,
                    condition=a.condition,
                    k=a.k,
                    level=level,
                    metric=name,
                    value=float(of_a[0][name][0]),
                    value_against=float(of_b[0][name][0]),
                    difference=float(values[0][0]),
                    low=interval.low,
                    high=interval.high,
                    not_above=None if reason else float((values[1] <= ROUNDING).mean()),
                    n=len(pooled[0][level].labels),
                    patients=n_patients,
                    reason=interval.reason,
                    classifier=a.classifier,
                )
            )
    return tuple(differences)


def _values(
    rows: LevelRows, patient_ids: np.ndarray, weights: Sequence[np.ndarray], names: Sequence[str], scoring: Scoring
) -> list[dict[str, np.ndarray]]:
    """The metrics of a level under each of the arrays of weights."""
    member_of = np.searchsorted(patient_ids, rows.patients)
    return [
        weighted_metrics(rows.scores, rows.labels, member_of, part, names=names, absent_classes=scoring.absent_classes)
        for part in weights
    ]


def _align(a: ScoreTable, b: ScoreTable) -> ScoreTable:
    """The rows of b in the order of a's; ValueError unless both describe the same patches."""
    if a.cohort and b.cohort and a.cohort != b.cohort:
        raise ValueError(
            f"the tables come from different cohorts (fingerprints {a.cohort[:12]} and {b.cohort[:12]}),"
            " whose ids mean different patches; evaluate both models on one cohort"
        )
    alone = [np.setdiff1d(one.patch, other.patch) for one, other in ((a, b), (b, a))]
    if len(alone[0]) or len(alone[1]):
        both = np.concatenate(alone)
        shown = ", ".join(map(str, both[:5])) + (", ..." if len(both) > 5 else "")
        raise ValueError(
            f"a paired difference needs the same patches in both tables: {len(alone[0])} are only in the first and"
            f" {len(alone[1])} only in the second (patch ids {shown})"
        )
    rows = np.argsort(b.patch)[np.argsort(np.argsort(a.patch))]
    own, other = np.array(a.class_names)[a.label], np.array(b.class_names)[b.label[rows]]
    pairs = [("class", own, other)]
    pairs += [(name, getattr(a, name), getattr(b, name)[rows]) for name in ("slide", "patient")]
    for name, first, second in pairs:
        if (different := first != second).any():
            at = int(np.flatnonzero(different)[0])
            raise ValueError(
                f"patch {a.patch[at]} has {name} {first[at]} in the first table and {second[at]} in the second;"
                f" {different.sum()} patches differ so"
            )
    given = [name for name in GROUP_LABELS if getattr(b, name) is not None]
    columns = {name: getattr(b, name)[rows] for name in ("scores", *_IDS, *given)}
    return replace(b, **columns)


def compare_models(
    tables: Iterable[ScoreTable],
    *,
    against: str | None = None,
    seed: int = 0,
    names: Sequence[str] = METRICS,
    levels: Sequence[str] = LEVELS,
    scoring: Scoring = Scoring(),
    confidence: float = 0.95,
    method: Method = "t",
) -> tuple[Difference, ...]:
    """Paired differences of every model's tables from those of one model, by condition and classifier.

    Args:
        tables: Of several models, as `score_tables` or `load_scores` gives them.
        against: The model that the others are compared with; the first one's by default.  Conditions or k that it
            lacks are left out.
        seed: The resamples depend on it and the number of patients only.
        names, levels, scoring, confidence, method: See `paired_difference`.

    Returns:
        One difference per model, condition, classifier, level and metric.

    Raises:
        ValueError: For fewer than two models, an unknown `against`, and a table that comes twice.
    """
    tables = tuple(tables)
    models = list(dict.fromkeys(table.model for table in tables))
    reference = models[0] if against is None and models else against
    if len(models) < 2 or reference not in models:
        raise ValueError(f"to compare models {reference!r} and at least one other are needed; there are {models}")
    places = {(table.model, table.condition, table.k, table.classifier): table for table in tables}
    if len(places) < len(tables):
        raise ValueError(
            f"{len(tables)} tables but {len(places)} combinations of model, condition and classifier; name models"
        )
    differences: list[Difference] = []
    for (model, condition, k, classifier), table in places.items():
        other = places.get((str(reference), condition, k, classifier))
        if model != reference and other is not None:
            differences += paired_difference(
                table,
                other,
                generator=np.random.default_rng(seed),
                names=names,
                levels=levels,
                scoring=scoring,
                confidence=confidence,
                method=method,
            )
    return tuple(differences)


def save_scores(path: str | os.PathLike[str], tables: Iterable[ScoreTable]) -> Path:
    """Write score tables into one compressed .npz file; it appears whole or not at all.

    Args:
        path: The file.
        tables: Of one or several models.

    Returns:
        The file.
    """
    path = Path(path)
    arrays: dict[str, Any] = {}
    headers: list[dict[str, Any]] = []
    for number, table in enumerate(tables):
        given = [name for name in GROUP_LABELS if getattr(table, name) is not None]
        arrays |= {f"{number}/{name}": getattr(table, name) for name in ("scores", *_IDS, *given)}
        text: dict[str, Any] = {name: getattr(table, name) for name in _TEXT}
        headers.append(text | {"k": int(table.k), "class_names": list(table.class_names)})
    with atomic_path(path) as working, working.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(headers)), **arrays)
    return path


def load_scores(path: str | os.PathLike[str]) -> tuple[ScoreTable, ...]:
    """Read what `save_scores` wrote; never unpickles.

    Args:
        path: The file.

    Returns:
        The tables in their order.

    Raises:
        ValueError: For any other or damaged file.
        FileNotFoundError: Where no file is.
    """
    try:
        with open_regular(path, kind="file of scores") as file:
            arrays = load_arrays(file)
        headers = json.loads(str(arrays["about"]))
        return tuple(_score_table(arrays, number, text) for number, text in enumerate(headers))
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)}: no file of scores as save_scores writes it ({error})") from error


def _score_table(arrays: Any, number: int, text: dict[str, Any]) -> ScoreTable:
    given = [name for name in GROUP_LABELS if f"{number}/{name}" in arrays]
    columns = {name: arrays[f"{number}/{name}"] for name in ("scores", *_IDS, *given)}
    names = tuple(str(name) for name in text["class_names"])
    text = {"classifier": "", **text}  # which older files lack
    words: dict[str, Any] = {name: str(text[name]) for name in _TEXT}
    return ScoreTable(**columns, class_names=names, k=int(text["k"]), **words)
