"""From scores per patch to scores per slide and per patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from hsat.eval.options import GroupBy, Pooling, check_choice
from hsat.types import LEVELS, align_labels


@dataclass(frozen=True, eq=False)
class PooledScores:
    """One row per group, in ascending order of the group ids.

    Attributes:
        groups: (g,) the ids; with group_by="id_and_label" an id stands there once for each of its labels.
        scores: (g, classes) float64, rows sum to one when those of the patches do.
        labels: (g,) the label that all members share, or None when none were given.
        sizes: (g,) members of each group.
    """

    groups: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)


class LabelledRows(Protocol):
    """Rows with a class, a slide and a patient each: an `EmbeddingTable` or a `ScoreTable`."""

    @property
    def label(self) -> np.ndarray:
        """(n,) indices into class_names."""

    @property
    def slide(self) -> np.ndarray:
        """(n,) ids."""

    @property
    def patient(self) -> np.ndarray:
        """(n,) ids."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""


class LevelRows(NamedTuple):
    """The rows of one level.

    Attributes:
        scores: (g, classes).
        labels: (g,) columns of the scores.
        patients: (g,) ids.
    """

    scores: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def pool(
    scores: Any, groups: Any, labels: Any = None, *, pooling: Pooling = "mean", group_by: GroupBy = "id"
) -> PooledScores:
    """Pool the scores of patches into one row per group (slide or patient).

    Members are added one after the other in float64, in the order of the rows.  So scores of classes that would tie in
    exact arithmetic can differ in the last digit, which then decides in place of "ties go to the lower class".

    Args:
        scores: (n, classes), class scores of each patch as `predict_proba` gives them.
        groups: (n,) ids, integers or text.
        labels: (n,) class indices; they are carried along.
        pooling: "mean": the mean of the members' scores.  "paper": the arithmetic of the published evaluation, which
            takes scores that sum to one for logits: softmax of each row, sum over the group, division by the row sum.
        group_by: "id": rows of one id are a group, and their labels must agree.  "id_and_label": the published
            grouping, in which a patient with two labels is two groups; it needs labels.

    Returns:
        One row per group, in ascending order of the ids.

    Raises:
        ValueError: For lengths that differ, scores that are not finite, an unknown `pooling` or `group_by`, no rows at
            all, and with group_by="id" for a group whose members disagree about the label, naming the group.

    Example:
        >>> patients = pool([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], groups=[7, 7, 9], labels=[0, 0, 1])
        >>> patients.groups.tolist(), patients.scores.tolist(), patients.labels.tolist()
        ([7, 9], [[0.75, 0.25], [0.0, 1.0]], [0, 1])
    """
    scores = check_scores(scores)
    groups = _column("groups", groups, len(scores))
    check_choice("pooling", pooling, Pooling)
    check_choice("group_by", group_by, GroupBy)
    if group_by == "id_and_label" and labels is None:
        raise ValueError("group_by='id_and_label' needs labels; give them, or group_by='id'")
    names, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    shared = None
    if labels is not None:
        labels = _column("labels", labels, len(scores))
        if group_by == "id_and_label":
            pairs = np.stack((member_of, np.unique(labels, return_inverse=True)[1]), 1)
            _, first, member_of, sizes = np.unique(
                pairs, axis=0, return_index=True, return_inverse=True, return_counts=True
            )
            names, member_of = groups[first], member_of.reshape(-1)
        shared = labels[first]
        _check_agreement(names, labels, shared, member_of)
    if pooling == "paper":
        scores = softmax_rows(scores)
    total = np.zeros((len(names), scores.shape[1]))
    np.add.at(total, member_of, scores)
    pooled = total / (sizes[:, None] if pooling == "mean" else total.sum(1, keepdims=True))
    return PooledScores(groups=names, scores=pooled, labels=shared, sizes=sizes)


def pool_by_level(
    scores: Any,
    table: LabelledRows,
    *,
    class_names: Sequence[str] | None = None,
    pooling: Pooling = "mean",
    group_by: GroupBy = "id",
) -> dict[str, LevelRows]:
    """The rows at each of the levels patch, slide and patient.

    Args:
        scores: (n, classes), one row per row of `table`.
        table: Labels and ids of the patches.
        class_names: What the columns of the scores are (the bank's classes); the table's labels are matched to them by
            name.  None means the table's own.
        pooling, group_by: See `pool`.

    Returns:
        {"patch": ..., "slide": ..., "patient": ...}; a level at which some group has no label of its own is left out
        (see `own_labels`; with group_by="id_and_label" there is none).  The patch level has one row per row of the
        table.  With
        pooling="paper" its scores are softmaxed as in the published code, which moves the mean average precision and
        nothing else.

    Raises:
        ValueError: As `pool` does, for another number of rows, and for a class that `class_names` lacks.
    """
    scores = check_scores(scores)
    if len(scores) != len(table.label):
        raise ValueError(
            f"{len(scores)} rows of scores for a table of {len(table.label)} embeddings; give one per embedding"
        )
    labels = align_labels(table.label, table.class_names, table.class_names if class_names is None else class_names)
    names = table.class_names if class_names is None else class_names
    levels = {"patch": LevelRows(softmax_rows(scores) if pooling == "paper" else scores, labels, table.patient)}
    for level in LEVELS[1:]:
        ids, own = getattr(table, level), labels
        if group_by == "id":
            stated, _ = own_labels(table, level)
            if stated is None:
                continue
            own = align_labels(stated, table.class_names, names)
        pooled = pool(scores, ids, own, pooling=pooling, group_by=group_by)
        assert pooled.labels is not None  # labels were given
        groups, first = np.unique(ids, return_index=True)
        patients = table.patient[first][np.searchsorted(groups, pooled.groups)]
        levels[level] = LevelRows(pooled.scores, pooled.labels, patients)
    return levels


def own_labels(table: LabelledRows, level: str) -> tuple[np.ndarray | None, str]:
    """What the slides or patients of a table are.

    A group's own label is that of the table's column `slide_label` or `patient_label`, else the one that all its
    patches share.

    Args:
        table: Labels and ids of the patches.
        level: "slide" or "patient".

    Returns:
        (n,) the label of the group that each row belongs to, in the table's classes, and ""; or None and why, where
        the patches of a group disagree and no column says what it is.
    """
    groups, first, member_of = np.unique(getattr(table, level), return_index=True, return_inverse=True)
    common, column = table.label[first], getattr(table, f"{level}_label", None)
    stated = np.full(len(groups), -1) if column is None else column[first]
    mixed = np.zeros(len(groups), dtype=bool)
    mixed[member_of[table.label != common[member_of]]] = True
    unknown = int((mixed & (stated < 0)).sum())
    if unknown:
        return None, (
            f"no {level} level: patches of {unknown} of {len(groups)} {level}s are of several classes and no"
            f" {level}_label says what the {level} is"
        )
    return np.where(stated < 0, common, stated)[member_of], ""


def unreported_levels(table: LabelledRows, *, group_by: GroupBy = "id") -> tuple[str, ...]:
    """Why levels are left out of `pool_by_level`, a text for each."""
    reasons = (own_labels(table, level)[1] for level in LEVELS[1:] if group_by == "id")
    return tuple(reason for reason in reasons if reason)


def softmax_rows(scores: np.ndarray) -> np.ndarray:
    """Softmax of each row, float64: what the published code does to scores that already sum to one."""
    weights = np.exp(scores - scores.max(1, keepdims=True))
    shares: np.ndarray = weights / weights.sum(1, keepdims=True)
    return shares


def check_scores(scores: Any) -> np.ndarray:
    """The scores as a float64 array (n, classes), n and classes at least 1; ValueError for anything else."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"scores must be (n, classes), got shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(
            f"scores of shape {array.shape} hold nothing to evaluate; at least one row and one class needed"
        )
    finite = np.isfinite(array).all(1)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(f"scores are not finite in {len(rows)} of {len(array)} rows, first in row {rows[0]}")
    return array


def _column(name: str, values: Any, n: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{n} rows of scores but {name} has shape {array.shape}; expected ({n},)")
    return array


def _check_agreement(names: np.ndarray, labels: np.ndarray, shared: np.ndarray, member_of: np.ndarray) -> None:
    wrong = np.flatnonzero(labels != shared[member_of])
    if len(wrong):
        group = member_of[wrong[0]]
        mixed = sorted({int(label) for label in labels[member_of == group]})
        raise ValueError(
            f"group {names[group]} holds patches with labels {mixed}; a group of patches that is pooled has"
            " one label. Check that ids are unique over the cohort; where patches of a slide or patient do differ, give"
            " the slide's or patient's own label for each patch"
        )
