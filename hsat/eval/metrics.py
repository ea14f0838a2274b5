"""Accuracy, mean class accuracy and their kin, at patch, slide and patient level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.options import AbsentClasses, Scoring, check_choice
from hsat.eval.pooling import LabelledRows, check_scores, pool_by_level

_SHARES_SUM = 1e-6
METRICS = ("accuracy", "mca", "map", "top2", "top3")


@dataclass(frozen=True, eq=False)
class Metrics:
    """How well scores find the labels; every number lies in [0, 1].

    Attributes:
        accuracy: Share of rows whose highest score is at the label.
        mca: Mean recall over the classes that occur in the truth.
        map: Mean over the same classes of the average precision.
        top2, top3: Share of rows whose label is among the two, three highest scores; a class without any vote (share 0
            of a row of shares) is not.
        n: Number of rows.
        confusion: (classes, classes) int64, rows are the truth.
        recall, average_precision: (classes,), NaN for classes that do not occur.
        class_names: Names of the classes, where they were given.
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

    @property
    def chance(self) -> dict[str, float]:
        """The chance level of each number, by name; see `chance_levels`."""
        return _chance_of_counts(self.confusion.sum(1))

    def as_dict(self) -> dict[str, float]:
        """The five numbers by name, in the order of METRICS."""
        return {name: getattr(self, name) for name in METRICS}


def metrics(
    scores: Any, labels: Any, *, class_names: Sequence[str] | None = None, absent_classes: AbsentClasses = "skip"
) -> Metrics:
    """Metrics of scores against class indices.

    Ties between classes go to the class with the lower index, for accuracy and top-k alike.  Average precision is the
    sum of (recall step) x precision over the distinct values of the class's score, without interpolation; equal scores
    form one step.  A class that does not occur in the truth counts neither in mca nor in map.

    Args:
        scores: (n, classes).
        labels: (n,) class indices.
        class_names: Names of the classes, for the result.
        absent_classes: "zero" repeats the published mca, in which a class that is predicted but never true counts as
            recall 0.

    Returns:
        The metrics of all rows.

    Raises:
        ValueError: For lengths that differ, labels outside the classes, scores that are not finite, class_names of
            another length and an unknown `absent_classes`.
        TypeError: For labels that are no integers.

    Example:
        >>> result = metrics([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1])
        >>> round(result.accuracy, 4), result.mca, result.confusion.tolist()
        (0.6667, 0.75, [[1, 0], [1, 1]])
    """
    check_choice("absent_classes", absent_classes, AbsentClasses)
    scores, labels = check_scores(scores), np.asarray(labels)
    _check_labels(scores, labels, class_names)
    rank = rank_of_true_class(scores, labels)
    classes = scores.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    occurs, predicted = confusion.sum(1), confusion.sum(0)
    recall = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), occurs, out=recall, where=occurs > 0)
    precision = average_precision(scores, labels)
    counted = (occurs > 0) | (predicted > 0) if absent_classes == "zero" else occurs > 0
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


def chance_levels(labels: Any) -> dict[str, float]:
    """What scores reach that know how frequent the classes are, and nothing of the images.

    These are the `metrics` of the classes' shares as the scores of every row.

    Args:
        labels: (n,) true classes of the rows of one level, as integers.

    Returns:
        Shares in [0, 1] by the names of METRICS.  accuracy: the share of the largest class (always say that one).  mca:
        one over the number of classes that occur.  top2, top3: the shares of the two, three largest classes together.
        map: the mean prevalence of the classes that occur, the average precision of scores without order.

    Raises:
        ValueError: Without labels, for there is then no chance level.

    Example:
        >>> chance_levels([0, 0, 0, 1, 2])["accuracy"]
        0.6
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be (n,) with n >= 1, got shape {labels.shape}; without them there is no chance")
    return _chance_of_counts(np.unique(labels, return_counts=True)[1])


def _chance_of_counts(counts: np.ndarray) -> dict[str, float]:
    """The chance levels of classes of these sizes; empty classes do not count."""
    shares = np.sort(counts[counts > 0])[::-1] / counts.sum()
    top = {name: min(1.0, float(shares[:k].sum())) for name, k in (("accuracy", 1), ("top2", 2), ("top3", 3))}
    found = top | {"mca": 1 / len(shares), "map": float(shares.mean())}
    return {name: found[name] for name in METRICS}


def rank_of_true_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the true one, (n,): higher score, or equal score and lower index.

    In a row of shares (none below 0, sum 1), as a kNN's vote is, all classes come before a true class with the share 0:
    it has no vote, and no place among the first ones.
    """
    own = scores[np.arange(len(scores)), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    count: np.ndarray = before.sum(1)
    shares = (scores >= 0).all(1) & (np.abs(scores.sum(1) - 1) <= _SHARES_SUM)
    count[shares & (own[:, 0] == 0)] = scores.shape[1]
    return count


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision of each class against the rest.

    Args:
        scores: (n, classes).
        labels: (n,) class indices.
        weights: (..., n) non-negative weight of each row (leading axes are alternatives, as in a bootstrap); None is
            all ones.

    Returns:
        (..., classes); NaN where the class does not occur.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    columns = []
    for index in range(scores.shape[1]):
        order = np.argsort(-scores[:, index], kind="stable")
        value, hit = scores[order, index], labels[order] == index
        ends = np.flatnonzero(np.append(value[1:] != value[:-1], True))  # the last row of each run of equal scores
        sorted_weights = weights[..., order]
        seen = sorted_weights.cumsum(-1)[..., ends]
        hits = (sorted_weights * hit).cumsum(-1)[..., ends]
        step = np.diff(hits, axis=-1, prepend=0.0)
        precision = np.divide(hits, seen, out=np.zeros(hits.shape), where=seen > 0)
        total = hits[..., -1]
        area = (step * precision).sum(-1)
        columns.append(np.divide(area, total, out=np.full(total.shape, np.nan), where=total > 0))
    return np.stack(columns, -1)


def metrics_by_level(
    scores: Any, table: LabelledRows, *, class_names: Sequence[str] | None = None, scoring: Scoring = Scoring()
) -> dict[str, Metrics]:
    """Metrics at the three levels, {"patch": ..., "slide": ..., "patient": ...}.

    Args:
        scores: (n, classes), one row per row of `table`.
        table: Labels and ids of the patches.
        class_names: What the columns of the scores are (the bank's classes); the table's labels are matched to them by
            name.  None means the table's own.
        scoring: Pooling, grouping and what absent classes count; `PAPER.scoring` is the published arithmetic.

    Returns:
        Metrics by "patch", "slide" and "patient".

    Raises:
        ValueError: As `pool_by_level` and `metrics` do.
    """
    names = table.class_names if class_names is None else tuple(class_names)
    levels = pool_by_level(scores, table, class_names=names, pooling=scoring.pooling, group_by=scoring.group_by)
    return {
        level: metrics(rows.scores, rows.labels, class_names=names, absent_classes=scoring.absent_classes)
        for level, rows in levels.items()
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
