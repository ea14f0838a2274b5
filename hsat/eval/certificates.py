"""From votes under noise to certified radii: of a patch, and of a group of patches that are all attacked at once.

Notation: sigma, the noise; p_c(x), the probability that the base classifier answers c on x + noise; Phi, the normal
distribution function.  Two facts carry everything (Cohen et al., arXiv:1902.02918, theorem 1; Salman et al.,
arXiv:1906.04584, lemma 2, both from Neyman and Pearson).  For every d with norm at most r

    Phi(Phi^-1(p_c(x)) - r / sigma)  <=  p_c(x + d)  <=  Phi(Phi^-1(p_c(x)) + r / sigma).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hsat.eval.confidence import clopper_pearson_lower, clopper_pearson_upper

ABSTAIN = -1
GroupPooling = Literal["mean", "vote"]
POOLINGS = ("mean", "vote")
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Certificates:
    """Certified decisions at one level, one row per patch, slide or patient.

    Attributes:
        groups: (g,) ids.
        prediction: (g,) int64 class, -1 where the smoothed classifier abstains.
        radius: (g,) float64, the L2 radius, in units of the pixel range, inside which the decision cannot be changed; 0
            where it abstains.  For slides and patients every patch may be moved by that much at the same time.
        label, patient: (g,) int64.
    """

    groups: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    label: np.ndarray
    patient: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)

    def holds(self, radius: float) -> np.ndarray:
        """Whether the decision is right, and certified against every attack of L2 norm at most `radius`.

        Args:
            radius: At least 0, in units of the pixel range.

        Returns:
            (g,) bool.

        Raises:
            ValueError: For a radius below 0.
        """
        if not radius >= 0:
            raise ValueError(f"a radius is at least 0, got {radius}")
        right: np.ndarray = (self.prediction == self.label) & (self.radius > radius)
        return right

    def accuracy(self, radius: float) -> float:
        """Certified accuracy: the share of rows for which the certificate `holds`.

        Args:
            radius: At least 0, in units of the pixel range.

        Returns:
            A share in [0, 1].
        """
        return float(self.holds(radius).mean())


def patch_radius(
    selected: np.ndarray, counts: np.ndarray, *, sigma: float, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """CERTIFY of arXiv:1902.02918: (prediction, radius) of each patch, (n,) each.

    radius = sigma Phi^-1(p_A), rounded down, where p_A > 1/2; else -1 and 0.  The theorem gives the open ball: attacks
    of norm below the radius.

    Args:
        selected: (n, classes) votes that choose the class.
        counts: (n, classes) votes of fresh draws, from which the lower bound p_A comes (Clopper-Pearson, 1 - alpha).
        sigma: The noise.
        alpha: Probability that a certificate is wrong.
    """
    winner = selected.argmax(1)
    lower = clopper_pearson_lower(counts[np.arange(len(counts)), winner], counts.sum(1), alpha)
    sure = lower > 0.5
    radius = sigma * _quantile(np.where(sure, lower, 0.5))
    radius = np.where(sure, np.maximum(0.0, np.nextafter(radius, 0.0)), 0.0)  # rounded to the safe side
    return np.where(sure, winner, ABSTAIN), radius


def group_radius(
    selected: np.ndarray, counts: np.ndarray, *, sigma: float, alpha: float, pooling: GroupPooling
) -> tuple[int, float]:
    """(prediction, radius) of a slide or patient from its m patches, each of which may be attacked at once.

    The decision A is the class of most selecting votes.  The group's certificate is wrong with probability at most
    alpha.

    pooling="mean": the group answers the class of the highest mean of p_c over its patches.  With l a lower bound of
    p_A and u_c upper bounds of p_c, m x classes of them, each at alpha / (m classes) (Bonferroni: all hold together),
    an attack of radius r leaves A ahead of c if the mean over patches of l(r) - min(u_c(r), 1 - l(r)) is above 0, where
    l(r) and u_c(r) are the bounds moved by r / sigma as above.  (p_c <= 1 - p_A; the bound falls in p_A.)

    pooling="vote": the group answers the class that most of its patches' smoothed classifiers answer.  Patches are
    certified at alpha / m each; those that are not certified at r all go to the strongest other class.

    Both margins fall as r grows, so the radius is found by halving, from the certified side.

    Args:
        selected, counts: (m, classes), as in `patch_radius`.
        sigma, alpha: As in `patch_radius`.
        pooling: "mean" or "vote".

    Raises:
        ValueError: For an unknown pooling and for fewer than two classes.
    """
    if counts.shape[1] < 2:
        raise ValueError(f"a certificate needs at least two classes to decide between, got {counts.shape[1]}")
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r} of certificates; choose one of {list(POOLINGS)}")
    margin, winner = (_mean_margin if pooling == "mean" else _vote_margin)(selected, counts, sigma, alpha)
    if not margin(0.0) > 0:
        return ABSTAIN, 0.0
    low, high = 0.0, sigma
    while margin(high) > 0:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if margin(middle) > 0 else (low, middle)
    return winner, low


Margin = Callable[[float], float]


def _mean_margin(selected: np.ndarray, counts: np.ndarray, sigma: float, alpha: float) -> tuple[Margin, int]:
    winner = int(selected.sum(0).argmax())
    share, total = alpha / counts.size, counts.sum(1)
    lower = _quantile(clopper_pearson_lower(counts[:, winner], total, share))
    others = np.delete(counts, winner, axis=1)
    upper = _quantile(clopper_pearson_upper(others, total[:, None], share))

    def margin(r: float) -> float:
        own = _normal(lower - r / sigma)[:, None]
        rival = np.minimum(_normal(upper + r / sigma), 1.0 - own)
        return float((own - rival).mean(0).min(initial=1.0))

    return margin, winner


def _vote_margin(selected: np.ndarray, counts: np.ndarray, sigma: float, alpha: float) -> tuple[Margin, int]:
    prediction, radius = patch_radius(selected, counts, sigma=sigma, alpha=alpha / len(counts))
    sure = prediction != ABSTAIN
    classes = counts.shape[1]
    winner = int(np.bincount(prediction[sure], minlength=classes).argmax())

    def margin(r: float) -> float:
        votes = np.bincount(prediction[sure & (radius > r)], minlength=classes)
        lost = len(prediction) - votes.sum()
        return float(votes[winner] - lost - np.delete(votes, winner).max(initial=0))

    return margin, winner


def _quantile(p: np.ndarray) -> np.ndarray:
    """Phi^-1, with -inf at 0 and inf at 1."""
    from scipy.special import ndtri

    value: np.ndarray = ndtri(p)
    return value


def _normal(x: np.ndarray) -> np.ndarray:
    """Phi."""
    from scipy.special import ndtr

    value: np.ndarray = ndtr(x)
    return value
