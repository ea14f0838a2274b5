from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.training import augmentation_strength, cosine_with_warmup, epsilon_schedule, paper_clean_weight


def test_published_epsilons(golden_numbers: dict) -> None:
    for name, values in golden_numbers["epsilon"].items():
        numbers = dict(part.split("=") for part in name.split(","))
        eps, warmup = float(numbers["eps"]) / 255, int(numbers["warmup"])
        at = values["at"] if isinstance(values, dict) else dict(enumerate(values))
        for epoch, grey_levels in at.items():
            assert 255 * epsilon_schedule(int(epoch), warmup=warmup, eps=eps) == pytest.approx(grey_levels, abs=1e-12)


def test_published_strengths(golden: dict[str, np.ndarray], golden_numbers: dict) -> None:
    for epochs, run in golden_numbers["strength"].items():
        for epoch, strength in run["changes"]:
            assert augmentation_strength(epoch, int(epochs)) == pytest.approx(strength, abs=1e-15)
    every = [augmentation_strength(epoch, 400) for epoch in range(400)]
    np.testing.assert_allclose(every, golden["strength_400_every50"].repeat(50), rtol=0, atol=1e-15)


def test_published_learning_rates(golden: dict[str, np.ndarray], golden_numbers: dict) -> None:
    rates = [cosine_with_warmup(step, steps=1000, warmup=100) for step in range(1001)]
    np.testing.assert_allclose(rates, golden["lr_1000_100"], rtol=0, atol=1e-12)
    for name, values in golden_numbers["lr"].items():
        warmup = int(name.split("=")[-1])
        got = [cosine_with_warmup(step, steps=10, warmup=warmup) for step in range(11)]
        np.testing.assert_allclose(got, values, rtol=0, atol=1e-12)


def test_learning_rate_schedule_of_torch() -> None:
    """The multiplier is the one in force at a step: step 0 of a warm-up learns nothing."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps=10, warmup=2))
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.5 * (1 + math.cos(math.pi / 8)) / 2])


def test_published_weights_of_the_mixed_loss(golden_numbers: dict) -> None:
    """Published: ((1 - w) clean + (1 + w) adversarial) / 2 with w = 0.66 (1 - strength)."""
    for epochs in ("100", "120", "400"):
        run = golden_numbers["strength"][epochs]
        for (_, strength), weight in zip(run["changes"], run["loss_weight_0_66"], strict=True):
            assert paper_clean_weight(strength) == pytest.approx((1 - weight) / 2, abs=1e-15)
    assert paper_clean_weight(1.0) == 0.5
    assert paper_clean_weight(0.0, lam=1.0) == 0.0


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_epsilon_starts_ends_and_stays_between(warmup: int, eps: float, start: float) -> None:
    radii = [epsilon_schedule(epoch, warmup=warmup, eps=eps, start=start) for epoch in range(warmup + 2)]
    assert radii[0] == (start if eps else 0.0)
    assert radii[warmup:] == [eps, eps]
    if warmup > 1:
        assert radii[warmup - 1] == eps
    assert all(min(start, eps) - 1e-12 <= radius <= max(start, eps) + 1e-12 for radius in radii)
    steps = np.diff(radii[:warmup])
    if eps and len(steps):
        np.testing.assert_allclose(steps, steps[0], atol=1e-12)


@given(st.integers(1, 500), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_strength_falls_in_plateaus_and_never_reaches_zero(epochs: int, plateau: int) -> None:
    strengths = [augmentation_strength(epoch, epochs, plateau) for epoch in range(epochs)]
    assert strengths[0] == 1.0
    assert min(strengths) > 0
    changes = [epoch for epoch in range(1, epochs) if strengths[epoch] < strengths[epoch - 1]]
    assert changes == list(range(plateau, epochs, plateau))


@given(st.integers(1, 200), st.data())
@settings(max_examples=40, deadline=None)
def test_cosine_rises_then_falls(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps))
    rates = [cosine_with_warmup(step, steps=steps, warmup=warmup) for step in range(steps + 3)]
    assert rates[warmup] == 1.0
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert (np.diff(rates[warmup : steps + 1]) < 0).all()
    assert rates[steps + 1 :] == [0.0, 0.0]


def test_warmup_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match="warmup=20 is longer than the run of epochs=10"):
        epsilon_schedule(0, warmup=20, eps=8 / 255, epochs=10)
    with pytest.raises(ValueError, match="warmup=20 is longer than the run of steps=10"):
        cosine_with_warmup(0, steps=10, warmup=20)


def test_eps_in_grey_levels() -> None:
    with pytest.raises(ValueError, match=r"eps must lie in \[0, 1\].*got 8. For 8 grey levels write 8/255"):
        epsilon_schedule(0, warmup=0, eps=8)


def test_numbers_below_their_least() -> None:
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        epsilon_schedule(-1, warmup=0, eps=0.1)
    with pytest.raises(ValueError, match="plateau must be at least 1, got 0"):
        augmentation_strength(0, 10, 0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        cosine_with_warmup(0, steps=0, warmup=0)


def test_epoch_behind_the_run() -> None:
    with pytest.raises(ValueError, match="epoch=10 lies behind the run of epochs=10; the last one is 9"):
        augmentation_strength(10, 10)


def test_strength_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 1.5"):
        paper_clean_weight(1.5)
