"""Margin and difference of logits ratio against their equations written out, and their laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import PGD, Linf, dlr, margin

seeds = st.integers(0, 10_000)


def problem(seed: int, n: int = 6, classes: int = 5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (n,), generator=generator)


def given_logits(images):
    """A model whose logits are the pixels."""
    return images.flatten(1)


def images_of(logits):
    return logits[:, :, None, None]


def test_exact_values():
    x = images_of(torch.tensor([[3.0, 1.0, 0.0, -1.0], [3.0, 1.0, 0.0, -1.0], [3.0, 1.0, 0.0, -1.0]]))
    labels = torch.tensor([0, 1, 3])
    assert margin(given_logits, labels)(x).tolist() == [-2.0, 2.0, 4.0]
    torch.testing.assert_close(dlr(given_logits, labels)(x), torch.tensor([-2 / 3, 2 / 3, 4 / 3]))
    target = torch.tensor([1, 2, 0])
    assert margin(given_logits, labels, target=target)(x).tolist() == [-2.0, -1.0, 4.0]
    torch.testing.assert_close(dlr(given_logits, labels, target=target)(x), torch.tensor([-2, -1, 4]) / 3.5)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_against_the_equations_as_loops(seed):
    logits, labels = problem(seed)
    target = (labels + 1 + torch.arange(len(labels)) % 4) % 5
    x = images_of(logits)
    for i, (z, y, t) in enumerate(zip(logits.tolist(), labels.tolist(), target.tolist(), strict=True)):
        best_wrong = max(z[k] for k in range(5) if k != y)
        top = sorted(z, reverse=True)
        assert margin(given_logits, labels)(x)[i] == best_wrong - z[y]
        assert dlr(given_logits, labels)(x)[i] == pytest.approx(-(z[y] - best_wrong) / (top[0] - top[2]))
        expected = -(z[y] - z[t]) / (top[0] - (top[2] + top[3]) / 2)
        assert dlr(given_logits, labels, target=target)(x)[i] == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_the_ratio_ignores_shift_and_scale(seed, scale, shift):
    logits, labels = problem(seed)
    for options in ({}, {"target": (labels + 1) % 5}):
        ratio = dlr(given_logits, labels, **options)
        moved = ratio(images_of(scale * (logits + shift)))
        torch.testing.assert_close(moved, ratio(images_of(logits)), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_above_zero_means_misclassified_and_the_ratio_is_at_most_one(seed):
    logits, labels = problem(seed)
    wrong = logits.argmax(1) != labels
    for objective in (margin(given_logits, labels), dlr(given_logits, labels)):
        assert torch.equal(objective(images_of(logits)) > 0, wrong)
    right = dlr(given_logits, labels)(images_of(logits))[~wrong]
    assert ((right >= -1) & (right <= 0)).all()


def test_gradients_in_float64():
    logits, labels = problem(3)
    x = images_of(logits).requires_grad_()
    for objective in (
        margin(given_logits, labels),
        dlr(given_logits, labels),
        dlr(given_logits, labels, target=(labels + 2) % 5),
    ):
        assert torch.autograd.gradcheck(objective, x)


def test_equal_logits_give_finite_values_and_gradients():
    x = torch.zeros(2, 4, 1, 1, requires_grad=True)
    for objective in (dlr(given_logits, torch.tensor([0, 1])), margin(given_logits, torch.tensor([0, 1]))):
        value = objective(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert torch.equal(value, torch.tensor([0.0, 1e-12])) and grad.isfinite().all()  # class 0 wins the tie


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_value_and_success_agree_on_ties_too(seed, dtype):
    logits, labels = problem(seed)
    x = images_of(logits.round().to(dtype))
    for objective in (margin(given_logits, labels), dlr(given_logits, labels)):
        assert torch.equal(objective(x) > 0, objective.success(x))


def test_the_ratio_still_climbs_where_cross_entropy_has_no_gradient_left():
    w = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    model = lambda v: 1e4 * v.flatten(1) @ w.T
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = model(x).argmax(1)
    v = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(v), labels, reduction="sum"), v)
    assert (grad == 0).all(), "the problem is not hard enough to tell"
    attack = PGD(Linf(0.3), step_size=0.1, steps=6, random_start=False)
    for objective in (dlr(model, labels), margin(model, labels)):
        assert (model(attack(x, objective)).argmax(1) != labels).all()


@pytest.mark.parametrize("options", [{}, {"target": torch.tensor([1, 2, 3, 4, 0, 1])}], ids=["free", "target"])
def test_select_gives_the_same_values(options):
    logits, _ = problem(5)
    labels, index = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4, 1])
    x = images_of(logits)
    for objective in (margin(given_logits, labels, **options), dlr(given_logits, labels, **options)):
        assert torch.equal(objective.select(index)(x[index]), objective(x)[index])


def test_errors_name_the_culprit():
    logits, labels = problem(0)
    x = images_of(logits)
    with pytest.raises(ValueError, match=r"dlr needs at least 3 classes, the model gives 2; use `margin`"):
        dlr(given_logits, labels % 2)(x[:, :2])
    with pytest.raises(ValueError, match=r"dlr with a target needs at least 4 classes, the model gives 3"):
        dlr(given_logits, labels % 2, target=labels % 2 + 1)(x[:, :3])
    with pytest.raises(ValueError, match="margin needs at least 2 classes, the model gives 1"):
        margin(given_logits, labels * 0)(x[:, :1])
    with pytest.raises(ValueError, match="labels go from 0 to 7, but the model gives 5"):
        margin(given_logits, torch.tensor([0, 1, 2, 3, 4, 7]))(x)
    for objective in (margin, dlr):
        with pytest.raises(ValueError, match="target go from 1 to 9, but the model gives 5"):
            objective(given_logits, labels * 0, target=torch.tensor([1, 1, 1, 1, 1, 9]))(x)
        with pytest.raises(ValueError, match="holds the true class"):
            objective(given_logits, labels, target=labels)
        with pytest.raises(ValueError, match="must have the shape of labels"):
            objective(given_logits, labels, target=labels[:2])
    with pytest.raises(ValueError, match=r"labels must be \(n,\) int64 class numbers, got \(6,\) torch.float32"):
        margin(given_logits, labels.float())
    with pytest.raises(ValueError, match="got list"):
        margin(given_logits, [0, 1])
    with pytest.raises(ValueError, match=r"gave shape \(6, 5, 1, 1\) for 6 images.*\(6, classes\).*flatten"):
        margin(lambda v: v, labels)(x)
