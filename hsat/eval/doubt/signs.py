"""Signs of masked gradients: what is counted, how much of it a sound model may show, and when that is too much.

Every sign is a yes or no for each image.  A sound model shows it for a tolerated share of the images at most; a flag is
raised when the count is too high for that share, by an exact one-sided binomial test.  A handful of odd images among
few raises nothing, and the more images are looked at, the smaller the excess that is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsat.eval.statistics.binomial import binomial_tail

FALSE_ALARM = 0.01
"""Probability that a sound model, at all its tolerated shares, gets any flag: shared out over the signs."""


@dataclass(frozen=True)
class Sign:
    """One sign: `tolerated` is the share of images in which a sound model may show it, `text` says what was seen."""

    name: str
    tolerated: float
    text: str


SIGNS = (
    # A dead ReLU network loses all its gradient at an image now and then; more than one in a hundred is a pattern.
    Sign("zero_gradient", 0.01, "the gradient was exactly zero in some step"),
    Sign("never_moved", 0.01, "the attack ended where it began, at the image or at its random start"),
    # Random directions in thousands of dimensions are nearly orthogonal to the gradient: noise has no chance against it
    # but by an attack that went astray in single images.
    Sign("noise_wins", 0.05, "random noise of the same size reached the value of the attack"),
    Sign("black_box_wins", 0.05, "a search without gradients rose clearly higher than the attack"),
    # Steps of one size end up circling around the maximum, so that a little up and down is no sign.
    Sign("not_rising", 0.05, "the objective did not rise, or fell again with twice the steps"),
    # The vote is not what a drift maximises: an image may be moved far and still be recognised.
    Sign("black_box_fools", 0.10, "a search without gradients changed the decision and the attack did not"),
    # Without a bound on the perturbation any image can become any other.
    Sign("withstands_everything", 0.10, "the decision stayed right under an attack of unlimited size"),
    # Equal arithmetic gives equal results, and small changes of an image small changes of its embedding.
    Sign("not_repeatable", 0.01, "the same image gave another embedding in a second pass (a randomised model)"),
    Sign("jumps", 0.05, "a thousandth of a perturbation moved the embedding by over a tenth of what all of it did"),
)


def judge(sign: Sign, seen: np.ndarray) -> tuple[float, str]:
    """(share of images, flag) for a sign; seen: (n,) bool.  The flag is "" where the share can be tolerated."""
    if not len(seen):
        return 0.0, ""
    count = int(seen.sum())
    share = count / len(seen)
    if share <= sign.tolerated or binomial_tail(count, len(seen), sign.tolerated) >= FALSE_ALARM / len(SIGNS):
        return share, ""
    name = sign.name.replace("_", " ")
    return share, f"{name}: {sign.text} for {count} of {len(seen)} images ({sign.tolerated:.0%} would be tolerated)"
