"""The criteria of masked gradients: a flag is rarer than the share that is tolerated explains."""

from __future__ import annotations

import numpy as np
import pytest

from hsat.eval.confidence import binomial_tail
from hsat.eval.masking import CRITERIA, FALSE_ALARM, judge_criterion


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.name)
def test_what_is_tolerated_is_not_flagged_by_chance(criterion):
    """A sound model at the tolerated share: the flag comes with a probability of at most its part of 1 %."""
    for n in (1, 5, 32, 200):
        fatal = [count for count in range(n + 1) if judge_criterion(criterion, np.arange(n) < count)[1]]
        if fatal:
            assert fatal == list(range(fatal[0], n + 1))
            assert binomial_tail(fatal[0], n, criterion.tolerated) < FALSE_ALARM / len(CRITERIA)
    share, flag = judge_criterion(criterion, np.arange(32) < 16)
    assert share == 0.5 and flag.startswith(criterion.name.replace("_", " ") + ":") and "16 of 32 images" in flag
    assert (
        judge_criterion(criterion, np.zeros(32, dtype=bool))
        == (0.0, "")
        == judge_criterion(criterion, np.zeros(0, dtype=bool))
    )
