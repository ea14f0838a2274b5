"""Counts of what attacks did, and outcomes of ensembles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.eval import EnsembleOutcome
from hsat.eval.outcomes import AttackStats
from hsat.types import AttackResult, MemberStats


def test_counts_of_batches_are_added():
    stats, other = (
        AttackStats(images=3, forwards=30, never_moved=1),
        AttackStats(images=2, forwards=20, zero_gradient=2),
    )
    stats.merge(other.counts())
    assert stats == AttackStats(images=5, forwards=50, never_moved=1, zero_gradient=2)
    assert stats.fraction("forwards") == 10 and AttackStats().fraction("forwards") == 0


def test_a_result_is_counted_image_by_image():
    x = torch.zeros(4, 1, 2, 2)
    moved = x.clone()
    moved[1:] = 0.1
    still = torch.tensor([True, True, False, False])
    result = AttackResult(
        x_adv=moved,
        value=torch.zeros(4),
        start_value=torch.zeros(4),
        zero_gradient=torch.tensor([3, 0, 1, 0]),
        success=None,
        forwards=5,
        backwards=4,
        stationary=still,
    )
    stats = AttackStats()
    stats.add(result, x)
    expected = dict(images=4, forwards=20, backwards=16, zero_gradient=2, never_moved=1, stationary=2)
    assert stats.counts() == expected | dict(outside=0, rounded=0, not_finite=0, farthest=0.0)


def test_images_outside_are_counted_apart_from_rounding():
    x = torch.zeros(5, 1, 2, 2)
    zero, outside = torch.zeros(5), torch.tensor([0.0, 1e-7, 0.25, 0.125, torch.inf], dtype=torch.float64)
    result = AttackResult(x, zero, zero, zero.long(), None, 1, 1, outside=outside)
    stats, other = AttackStats(), AttackStats(images=5, outside=1, farthest=0.0625)
    stats.add(result, x)
    stats.merge(other.counts())
    assert (stats.outside, stats.rounded, stats.not_finite, stats.farthest) == (3, 1, 1, 0.25)
    left, lost = stats.feasibility_flags()
    assert left.startswith("3 of 10 images left the threat model by up to 0.25 at a pixel") and "1 of 10" in lost
    assert stats.flags(0.1)[-2:] == (left, lost)
    shares = {"outside_share": 0.3, "rounded_share": 0.1, "not_finite_share": 0.1, "farthest_outside": 0.25}
    assert stats.feasibility_settings() == shares
    assert AttackStats(images=9, rounded=9).feasibility_flags() == () and AttackStats().feasibility_settings() == {}
    coarse = AttackStats()
    coarse.add(
        AttackResult(x.half(), zero, zero, zero.long(), None, 1, 1, outside=torch.full((5,), 5e-4).double()), x.half()
    )
    assert (coarse.outside, coarse.rounded) == (0, 5), "float16 rounds by more"


@pytest.mark.parametrize(
    ("counts", "eps", "words"),
    [
        (dict(zero_gradient=2), 0.1, ["2.0%"]),
        (dict(never_moved=50), 0.1, ["50.0%"]),
        (dict(zero_gradient=1, never_moved=1), 0.1, []),
        (dict(zero_gradient=100, never_moved=100), 0.1, ["zero", "never moved"]),
        (dict(zero_gradient=100, never_moved=100), 0.0, []),
    ],
)
def test_one_image_in_a_hundred_is_no_flag(counts, eps, words):
    flags = AttackStats(images=100, **counts).masking_flags(eps)
    assert len(flags) == len(words) and all(word in flag for word, flag in zip(words, flags, strict=True))


def test_the_table_of_an_outcome_counts_down():
    members = (
        MemberStats(name="clean", attack="", black_box=False, seen=4, newly_broken=1),
        MemberStats(name="PGD", attack="PGD()", black_box=False, seen=3, newly_broken=2, forwards=30, backwards=27),
    )
    outcome = EnsembleOutcome(np.arange(4), np.array(["clean", "PGD", "", "PGD"]), np.zeros(4), members)
    assert outcome.robust.tolist() == [False, False, True, False]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in outcome.to_markdown().splitlines()]
    assert rows[2] == ["clean", "4", "1", "3 (75.0 %)", "0", "0"]
    assert rows[3] == ["PGD", "3", "2", "1 (25.0 %)", "30", "27"]
