"""Accuracy, mean class accuracy and their kin, at patch, slide and patient level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.conventions import Absent, How, Keys, resolve_arithmetic
from hsat.eval.conventions import Compat as Compat  # noqa: PLC0414 (offered here as well)
from hsat.eval.pooling import PooledScores, check_scores, pool, softmax_rows
from hsat.types import EmbeddingTable

METRICS = ("accuracy", "mca", "map", "top2", "top3")


@dataclass(frozen=True, eq=False)
class Metrics:
    """How well scores find the labels; every number lies in [0, 1].

    accuracy: share of rows whose highest score is at the label.  mca: mean recall over the classes that occur in the
    truth.  map: mean over the same classes of the average precision.  top2, top3: share of rows whose label is among
    the two, three highest scores.  confusion: (classes, classes) int64, rows are the truth.  recall,
    average_precision: (classes,), NaN for classes that do not occur.  n: number of rows.
    """

    accuracy: float
    mca: float
    map: float
    top2: float
    top3: float
    n: int
    confusion: np.ndarray
    recall: np.ndarray
    average_precision: np.ndarray
    class_names: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """The five numbers by name, in the order of METRICS."""
        return {name: getattr(self, name) for name in METRICS}


def metrics(
    scores: Any,
    labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    absent: Absent | None = None,
    compat: Compat | None = None,
) -> Metrics:
    """Metrics of scores (n, classes) against class indices (n,).

    Ties between classes go to the class with the lower index, for accuracy and top-k alike.  Average precision is the
    sum of (recall step) x precision over the distinct values of the class's score, without interpolation; equal scores
    form one step.  A class that does not occur in the truth counts neither in mca nor in map.

    absent="zero" repeats the published mca, in which a class that is predicted but never true counts as recall 0; None
    is "skip", or "zero" under compat="paper".

    Raises ValueError for lengths that differ, labels outside the classes, scores that are not finite, class_names of
    another length and an unknown absent or compat.
    """
    scores, labels = check_scores(scores), np.asarray(labels)
    _check_labels(scores, labels, class_names)
    absent = resolve_arithmetic(compat, absent=absent).absent
    rank = true_rank(scores, labels)
    classes = scores.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    occurs, predicted = confusion.sum(1), confusion.sum(0)
    recall = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), occurs, out=recall, where=occurs > 0)
    precision = average_precision(scores, labels)
    counted = (occurs > 0) | (predicted > 0) if absent == "zero" else occurs > 0
    return Metrics(
        accuracy=float((rank == 0).mean()),
        mca=float(np.nan_to_num(recall)[counted].mean()),
        map=float(precision[occurs > 0].mean()),
        top2=float((rank < 2).mean()),
        top3=float((rank < 3).mean()),
        n=len(scores),
        confusion=confusion,
        recall=recall,
        average_precision=precision,
        class_names=() if class_names is None else tuple(class_names),
    )


def true_rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, (n,): higher score, or equal score and lower index."""
    own = scores[np.arange(len(scores)), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    count: np.ndarray = before.sum(1)
    return count


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision of each class against the rest; NaN where the class does not occur.

    weights: (..., n) non-negative weight of each row (leading axes are alternatives, as in a bootstrap); None is all
    ones.  Returns (..., classes).
    """
    weights = np.ones(len(scores)) if weights is None else weights
    columns = []
    for index in range(scores.shape[1]):
        order = np.argsort(-scores[:, index], kind="stable")
        value, hit = scores[order, index], labels[order] == index
        ends = np.flatnonzero(np.append(value[1:] != value[:-1], True))  # the last row of each run of equal scores
        sorted_weights = weights[..., order]
        seen = sorted_weights.cumsum(-1)[..., ends]
        found = (sorted_weights * hit).cumsum(-1)[..., ends]
        step = np.diff(found, axis=-1, prepend=0.0)
        precision = np.divide(found, seen, out=np.zeros(found.shape), where=seen > 0)
        total = found[..., -1]
        area = (step * precision).sum(-1)
        columns.append(np.divide(area, total, out=np.full(total.shape, np.nan), where=total > 0))
    return np.stack(columns, -1)


def match_classes(table: EmbeddingTable, class_names: Sequence[str]) -> np.ndarray:
    """The labels of a table as indices into another list of class names, matched by name, (n,) int64.

    Raises ValueError naming every class that occurs in the table and is missing from the list.
    """
    return align_labels(table.label, table.class_names, class_names)


def align_labels(labels: np.ndarray, own_names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """The same for labels (n,) that index `own_names`."""
    position = {name: index for index, name in enumerate(class_names)}
    used = {own_names[index] for index in np.unique(labels)}
    if unknown := sorted(used - position.keys()):
        raise ValueError(
            f"the queries hold classes {unknown} that the bank does not know; it knows {list(class_names)}."
            " Give both cohorts the same class names, or leave those rows out"
        )
    lookup = np.array([position.get(name, -1) for name in own_names], dtype=np.int64)
    matched: np.ndarray = lookup[labels]
    return matched


def level_scores(
    scores: Any,
    table: EmbeddingTable,
    *,
    class_names: Sequence[str] | None = None,
    how: How | None = None,
    keys: Keys | None = None,
    compat: Compat | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(scores, labels, patient ids) of the rows at each of the levels patch, slide and patient.

    The patch level has one row per row of the table.  With how="paper" its scores are softmaxed as in the published
    code, which moves the mean average precision and nothing else.
    """
    scores, chosen = check_scores(scores), resolve_arithmetic(compat, how=how, keys=keys)
    if len(scores) != len(table):
        raise ValueError(f"{len(scores)} rows of scores for a table of {len(table)} embeddings; give one per embedding")
    labels = match_classes(table, table.class_names if class_names is None else tuple(class_names))
    return pooled_levels(scores, labels, table.slide, table.patient, how=chosen.how, keys=chosen.keys)


def pooled_levels(
    scores: np.ndarray, labels: np.ndarray, slide: np.ndarray, patient: np.ndarray, *, how: How, keys: Keys
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same from scores (n, classes) and columns (n,): labels index the columns of the scores."""
    slides, first = np.unique(slide, return_index=True)
    by_slide = pool(scores, slide, labels, how=how, keys=keys)
    by_patient = pool(scores, patient, labels, how=how, keys=keys)
    return {
        "patch": (softmax_rows(scores) if how == "paper" else scores, labels, patient),
        "slide": _labelled(by_slide, patient[first][np.searchsorted(slides, by_slide.groups)]),
        "patient": _labelled(by_patient, by_patient.groups),
    }


def _labelled(pooled: PooledScores, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert pooled.labels is not None  # labels were given
    return pooled.scores, pooled.labels, patients


def score_levels(
    scores: Any,
    table: EmbeddingTable,
    *,
    class_names: Sequence[str] | None = None,
    how: How | None = None,
    absent: Absent | None = None,
    keys: Keys | None = None,
    compat: Compat | None = None,
) -> dict[str, Metrics]:
    """Metrics at the three levels, {"patch": ..., "slide": ..., "patient": ...}.

    scores: (n, classes), one row per row of `table`.  class_names: what the columns of scores are (the bank's classes);
    the table's labels are matched to them by name.  None means the table's own.
    how, keys: pooling and grouping, see `pool`; absent: see `metrics`.  compat="paper" chooses the published arithmetic
    for those that are None ("paper", "id_and_label", "zero"); otherwise None is hsat's ("mean", "id", "skip").
    """
    levels = level_scores(scores, table, class_names=class_names, how=how, keys=keys, compat=compat)
    names = table.class_names if class_names is None else tuple(class_names)
    return {
        level: metrics(rows, labels, class_names=names, absent=absent, compat=compat)
        for level, (rows, labels, _) in levels.items()
    }


def _check_labels(scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None) -> None:
    n, classes = scores.shape
    if labels.shape != (n,):
        raise ValueError(f"{n} rows of scores but labels has shape {labels.shape}; expected ({n},)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, the index of the true class; got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()} but scores have {classes} classes")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names {list(class_names)} for scores of {classes} classes")
