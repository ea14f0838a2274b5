"""Perturbations that are kept: by patch and place, within the int8 error, and back from a checkpoint bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import L2, Linf
from hsat.training import WarmStarts, load_training_state, save_checkpoint
from hsat.types import HierarchicalBatch

BALL = Linf(8 / 255)


def batch_of(patches: list[int], seed: int = 0, side: int = 4) -> HierarchicalBatch:
    ids = torch.tensor(patches)
    x = torch.rand(len(patches), 3, side, side, generator=torch.Generator().manual_seed(seed))
    return HierarchicalBatch(x, ids, ids // 10, ids // 100)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), eps=st.sampled_from([0.0, 1 / 255, 8 / 255, 1.0]), ball=st.sampled_from([Linf, L2]))
def test_comes_back_within_half_a_level_of_127(seed, eps, ball):
    threat, batch, starts = ball(eps), batch_of([1, 1, 2, 3], seed), WarmStarts()
    x_adv = threat.random_start(batch.images, seeded(seed))
    starts.keep(batch, x_adv)
    found = starts.points(batch, threat, generator=seeded(5))
    half_level = (x_adv - batch.images).abs().amax((1, 2, 3)) / 254
    error = found - x_adv
    if ball is Linf:
        assert (error.abs().amax((1, 2, 3)) <= half_level + 1e-6).all()
    else:  # the projection moves no point further from one of the ball: in the Euclidean norm, not per pixel
        assert (error.square().sum((1, 2, 3)).sqrt() <= half_level * 48**0.5 + 1e-6).all()
    assert torch.equal(threat.project(found, batch.images), found)


def test_views_keep_their_own_and_the_order_of_a_batch_does_not_matter():
    starts, batch = WarmStarts(), batch_of([1, 1, 2])
    x_adv = BALL.random_start(batch.images, seeded(0))
    starts.keep(batch, x_adv)
    other = HierarchicalBatch(
        batch.images[[2, 0, 1]], *(getattr(batch, n)[[2, 0, 1]] for n in ("patch", "slide", "patient"))
    )
    found = starts.points(other, BALL)
    torch.testing.assert_close(found, x_adv[[2, 0, 1]], rtol=0, atol=1e-3)
    assert (found[1] - found[2]).abs().max() > 0.01
    assert len(starts) == 3 and starts.nbytes == 3 * 48


def test_unknown_images_begin_where_a_random_start_would():
    starts, batch = WarmStarts(), batch_of([1, 2, 3, 4])
    drawn = BALL.random_start(batch.images, seeded(3))
    assert torch.equal(starts.points(batch, BALL, generator=seeded(3)), drawn)
    known = HierarchicalBatch(batch.images[1:2], batch.patch[1:2], batch.slide[1:2], batch.patient[1:2])
    starts.keep(known, known.images)
    found = starts.points(batch, BALL, generator=seeded(3))
    assert torch.equal(found[1], batch.images[1])
    assert torch.equal(found[[0, 2, 3]], drawn[[0, 2, 3]])


def test_kept_perturbations_follow_the_ball():
    starts, batch = WarmStarts(), batch_of([1])
    starts.keep(batch, (batch.images + 8 / 255).clamp(0, 1))
    small = Linf(1 / 255)
    found = starts.points(batch, small)
    assert torch.equal(found, small.project((batch.images + 8 / 255).clamp(0, 1), batch.images))


def test_capacity_drops_the_longest_unused():
    starts = WarmStarts(capacity=2)
    for patch in (1, 2, 1, 3):
        batch = batch_of([patch])
        starts.keep(batch, batch.images)
    assert starts.state_dict()["keys"].tolist() == [[1, 0], [3, 0]]


def test_a_checkpoint_brings_everything_back(tmp_path):
    starts, batch, model = WarmStarts(), batch_of([7, 7, 8]), torch.nn.Linear(1, 1)
    for state in (starts.state_dict(),):  # the empty one too
        WarmStarts().load_state_dict(state)
    starts.keep(batch, BALL.random_start(batch.images, seeded(1)))
    extra = {"warm": starts.state_dict()}
    save_checkpoint(tmp_path / "last.pt", model=model, epoch=0, step=1, config={}, extra=extra)
    again = WarmStarts()
    again.load_state_dict(load_training_state(tmp_path / "last.pt", model=model).extra["warm"])
    for drawn in (starts, again):
        drawn.keep(batch_of([9]), batch_of([9]).images)
    assert torch.equal(*(s.points(batch, BALL, generator=seeded(2)) for s in (starts, again)))
    assert starts.state_dict()["keys"].tolist() == again.state_dict()["keys"].tolist()


def test_misuse_is_named():
    starts, batch = WarmStarts(), batch_of([12])
    with pytest.raises(
        ValueError, match=r"x_adv must have the shape of the images, \(1, 3, 4, 4\); got \(1, 3, 5, 5\)"
    ):
        starts.keep(batch, torch.zeros(1, 3, 5, 5))
    starts.keep(batch, batch.images)
    with pytest.raises(ValueError, match=r"patch 12 was kept with shape \(3, 4, 4\) and now has \(3, 5, 5\)"):
        starts.points(batch_of([12], side=5), BALL)
    with pytest.raises(ValueError, match="capacity must be a number of images >= 1 or None, got 0"):
        WarmStarts(capacity=0)
    state = starts.state_dict()
    with pytest.raises(ValueError, match="1 keys, 0 scales and 1 perturbations"):
        starts.load_state_dict(state | {"scales": state["scales"][:0]})
