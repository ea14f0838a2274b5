"""How few patches must change before the pooled decision of their slide or patient does."""

from __future__ import annotations

from typing import Literal

import numpy as np

from hsat.eval.options import Pooling
from hsat.eval.pooling import softmax_rows

Order = Literal["worst", "random"]
ORDERS = ("worst", "random")
_NEAR_TIE = 1e-9  # sums in another order differ by less; whoever comes this near is decided by the real pooling


def pooled_is_wrong(rows: np.ndarray, label: int, *, pooling: Pooling = "mean") -> bool:
    """Whether the pooled decision on the patches (n, classes) of one group is another class; exactly that of `pool`."""
    total = np.cumsum(softmax_rows(rows) if pooling == "paper" else rows, axis=0)[
        -1
    ]  # one after the other, as pool adds
    pooled = total / (len(rows) if pooling == "mean" else total.sum())
    return int(pooled.argmax()) != label


def min_patches_to_flip(
    clean: np.ndarray, attacked: np.ndarray, label: int, *, pooling: Pooling = "mean"
) -> int | None:
    """The smallest number of patches whose alteration makes the group's decision wrong; 0: it is; None: never.

    Pooling adds rows up, so the lead of a rival class over the true one is a sum of one term per patch, and altering a
    patch changes only its own.  The best k patches for that rival are then the k with the largest gain; the smallest k
    over all rivals is the minimum over all subsets.

    The decision is that of `pool`, whose float64 sums are rounded one after the other.  So where a rival and the true
    class would tie exactly, as with equal votes, rounding decides, and another subset of as many patches may round to
    the other side: the count is then one that suffices, and the minimum can be smaller.

    Args:
        clean, attacked: (n, classes), class scores of the group's patches as they are and after their attack; an
            altered patch takes its attacked row, the others keep their clean one.
        label: The true class.
        pooling: See `pool`.
    """
    if pooled_is_wrong(clean, label, pooling=pooling):
        return 0
    before, after = (softmax_rows(rows) if pooling == "paper" else rows for rows in (clean, attacked))
    fewest: int | None = None
    for rival in range(clean.shape[1]):
        if rival == label:
            continue
        lead = before[:, rival] - before[:, label]
        gain = after[:, rival] - after[:, label] - lead
        order = np.argsort(-gain, kind="stable")
        enough = np.flatnonzero(lead.sum() + np.cumsum(gain[order]) >= -_NEAR_TIE) + 1
        for count in enough[: None if fewest is None else int(np.searchsorted(enough, fewest))]:
            if pooled_is_wrong(_mixed(clean, attacked, order[:count]), label, pooling=pooling):
                fewest = int(count)
                break
    return fewest


def patches_to_flip_in_order(
    clean: np.ndarray, attacked: np.ndarray, label: int, order: np.ndarray, *, pooling: Pooling = "mean"
) -> int | None:
    """The same when the patches are altered in a given order: the first count at which the decision is wrong."""
    for count in range(len(clean) + 1):
        if pooled_is_wrong(_mixed(clean, attacked, order[:count]), label, pooling=pooling):
            return count
    return None


def patches_to_flip(
    clean: np.ndarray,
    attacked: np.ndarray,
    groups: np.ndarray,
    labels: np.ndarray,
    *,
    pooling: Pooling = "mean",
    order: Order = "worst",
    seed: int = 0,
) -> np.ndarray:
    """For every group, in ascending order of its id, the number of altered patches that it takes.

    Args:
        clean, attacked: (n, classes), as for `min_patches_to_flip`.
        groups: (n,) ids.
        labels: (n,) true classes, the same for all patches of a group.
        pooling: See `pool`.
        order: "worst": the attacker picks, see `min_patches_to_flip`.  "random": one draw per group, which depends on
            (seed, id of the group) only.
        seed: Of the random order.

    Returns:
        (g,) float64.  0: the decision is wrong as it is.  inf: altering every patch would not do.

    Raises:
        ValueError: For an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, got {order!r}")
    counts = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        mine, theirs, label = clean[rows], attacked[rows], int(labels[rows[0]])
        if order == "worst":
            count = min_patches_to_flip(mine, theirs, label, pooling=pooling)
        else:
            drawn = np.random.default_rng((seed, int(group))).permutation(len(rows))
            count = patches_to_flip_in_order(mine, theirs, label, drawn, pooling=pooling)
        counts.append(np.inf if count is None else float(count))
    return np.array(counts)


def _mixed(clean: np.ndarray, attacked: np.ndarray, altered: np.ndarray) -> np.ndarray:
    rows = clean.copy()
    rows[altered] = attacked[altered]
    return rows
