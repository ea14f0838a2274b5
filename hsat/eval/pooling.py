"""From scores per patch to scores per slide and per patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.conventions import How as How  # noqa: PLC0414 (offered here as well)
from hsat.eval.conventions import Keys


@dataclass(frozen=True, eq=False)
class PooledScores:
    """One row per group, in ascending order of the group ids.

    groups: (g,) the ids; with keys="id_and_label" an id stands there once for each of its labels.
    scores: (g, classes) float64, rows sum to one when those of the patches do.
    labels: (g,) the label that all members share, or None when none were given.  sizes: (g,) members of each group.
    """

    groups: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)


def pool(scores: Any, groups: Any, labels: Any = None, *, how: How = "mean", keys: Keys = "id") -> PooledScores:
    """Pool the scores of patches into one row per group (slide or patient).

    scores: (n, classes), class scores of each patch as `predict_proba` gives them.  groups: (n,) ids, integers or text.
    labels: (n,) class indices; they are carried along.

    keys="id": rows of one id are a group, and their labels must agree.  keys="id_and_label": the published grouping, in
    which a patient with two labels is two groups; it needs labels.

    how="mean": the mean of the members' scores.  how="paper": the arithmetic of the published evaluation, which takes
    scores that sum to one for logits: softmax of each row, sum over the group, division by the row sum.

    Raises ValueError for lengths that differ, scores that are not finite, an unknown `how` or `keys`, no rows at all,
    and with keys="id" for a group whose members disagree about the label, naming the group.
    """
    scores = check_scores(scores)
    groups = _column("groups", groups, len(scores))
    if how not in ("mean", "paper"):
        raise ValueError(f"how must be 'mean' or 'paper', got {how!r}")
    if keys not in ("id", "id_and_label") or (keys == "id_and_label" and labels is None):
        raise ValueError(f"keys must be 'id', or with labels 'id_and_label'; got {keys!r}")
    names, first, member_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    shared = None
    if labels is not None:
        labels = _column("labels", labels, len(scores))
        if keys == "id_and_label":
            pairs = np.stack((member_of, np.unique(labels, return_inverse=True)[1]), 1)
            _, first, member_of, sizes = np.unique(
                pairs, axis=0, return_index=True, return_inverse=True, return_counts=True
            )
            names, member_of = groups[first], member_of.reshape(-1)
        shared = labels[first]
        _check_agreement(names, labels, shared, member_of)
    if how == "paper":
        scores = softmax_rows(scores)
    total = np.zeros((len(names), scores.shape[1]))
    np.add.at(total, member_of, scores)
    pooled = total / (sizes[:, None] if how == "mean" else total.sum(1, keepdims=True))
    return PooledScores(groups=names, scores=pooled, labels=shared, sizes=sizes)


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
        found = sorted({int(label) for label in labels[member_of == group]})
        raise ValueError(
            f"group {names[group]} holds patches with labels {found}; a slide or patient has one label."
            " Check the ids: they must be unique over the cohort"
        )
