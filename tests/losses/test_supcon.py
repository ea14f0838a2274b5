from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsat.losses import supcon_loss
from hsat.losses.supcon import group_terms


def loops(z: Tensor, group: list[int], temperature: float) -> float:
    """Equation 2 of arXiv:2004.11362, term by term."""
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in z.double().tolist()]
    n = len(rows)
    per_anchor = []
    for i in range(n):
        similarity = {j: sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / temperature for j in range(n)}
        others = [j for j in range(n) if j != i]
        positives = [j for j in others if group[j] == group[i]]
        if positives:
            denominator = sum(math.exp(similarity[j]) for j in others)
            per_anchor.append(-sum(math.log(math.exp(similarity[p]) / denominator) for p in positives) / len(positives))
    return sum(per_anchor) / len(per_anchor)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, d = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    group = draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    group[draw(st.integers(1, n - 1))] = group[0]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.tensor(group)


temperatures = st.sampled_from([0.07, 0.5, 2.0])


@given(batches(), temperatures)
@settings(max_examples=60, deadline=None)
def test_equals_the_loops(batch: tuple[Tensor, Tensor], temperature: float) -> None:
    z, group = batch
    got = supcon_loss(z, group, temperature=temperature)
    assert got.item() == pytest.approx(loops(z, group.tolist(), temperature), rel=1e-10, abs=1e-10)


@given(batches(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_does_not_see_order_names_of_groups_or_lengths_of_rows(batch: tuple[Tensor, Tensor], seed: int) -> None:
    z, group = batch
    generator = torch.Generator().manual_seed(seed)
    wanted = supcon_loss(z, group)
    order = torch.randperm(len(z), generator=generator)
    names = torch.randperm(7, generator=generator) * 10**15 - 3
    lengths = 10 ** (6 * torch.rand(len(z), 1, generator=generator, dtype=torch.float64) - 3)
    torch.testing.assert_close(supcon_loss(z[order], group[order]), wanted)
    torch.testing.assert_close(supcon_loss(z, names[group + 3]), wanted)
    torch.testing.assert_close(supcon_loss(z * lengths, group), wanted)


@pytest.mark.parametrize(
    ("dtype", "powers"), [(torch.float32, (-100, -60, 70, 125)), (torch.float64, (-960, -43, 60, 1020))]
)
def test_rows_of_any_scale_give_the_same_bits(dtype: torch.dtype, powers: tuple[int, ...]) -> None:
    """Powers of two change no digit, of the loss or of the gradient, which is the inverse of the scale."""
    z = torch.randn(6, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 0.5
    unit, group = z / z.abs().amax(1, keepdim=True), [0, 0, 1, 1, 2, 2]

    def loss_and_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.clone().requires_grad_()
        loss = supcon_loss(rows, group)
        return loss.detach(), torch.autograd.grad(loss, rows)[0]

    wanted, gradient = loss_and_gradient(unit)
    for power in powers:
        scale = torch.full((6, 1), 2.0**power, dtype=dtype)
        scale[::2] = 1.0  # each row has a scale of its own
        loss, scaled = loss_and_gradient(unit * scale)
        assert torch.equal(loss, wanted), power
        if -100 < power < 100:  # else the gradient overflows or vanishes
            torch.testing.assert_close(scaled * scale, gradient, rtol=1e-6, atol=0)
    assert supcon_loss((1e-42 if dtype == torch.float32 else 1e-310) * unit, group).isfinite()


def test_rows_of_zeros_stay_zero() -> None:
    z = torch.tensor([[0.0, 0.0], [1e25, 0.0], [0.0, 1e-30]], requires_grad=True)
    loss = supcon_loss(z, [0, 0, 1], temperature=1.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


@given(batches())
@settings(max_examples=30, deadline=None)
def test_gradient_is_tangential_and_lone_images_still_push(batch: tuple[Tensor, Tensor]) -> None:
    z, group = batch
    z = z.requires_grad_()
    (grad,) = torch.autograd.grad(supcon_loss(z, group), z)
    assert (grad * z).sum(1).abs().max() < 1e-7
    if z.shape[1] > 2 and len(z) > 2:  # two images of a group leave nothing to learn
        assert grad.abs().sum(1).min() > 0


def test_two_images_of_one_group_cost_nothing() -> None:
    assert supcon_loss(torch.eye(2), [5, 5]).item() == pytest.approx(0.0, abs=1e-6)


def test_exact_answer_for_orthogonal_pairs() -> None:
    """Two identical pairs at right angles: the denominator is e^(1/T) + 2, the numerator e^(1/T)."""
    z = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    expected = math.log(math.exp(1 / 0.5) + 2) - 1 / 0.5
    assert supcon_loss(z, [7, 7, 9, 9], temperature=0.5).item() == pytest.approx(expected, rel=1e-12)


def test_an_anchor_without_positive_is_left_out_of_the_mean() -> None:
    """Two equal images and one at right angles: both anchors pay log(e^2 + 1) - 2; the third pays nothing."""
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    assert supcon_loss(z, [0, 0, 1], temperature=0.5).item() == pytest.approx(math.log(math.exp(2) + 1) - 2)


@pytest.mark.parametrize("case", ["nolabel", "labels", "singleview_pairs"])
@pytest.mark.parametrize("tau", ["0.07", "0.5"])
def test_published_values_and_gradients(golden: dict[str, np.ndarray], case: str, tau: str) -> None:
    feat = torch.from_numpy(golden["supcon/feat"])
    feat = feat[:, :1] if case == "singleview_pairs" else feat
    ids = {"nolabel": range(6), "labels": golden["supcon/labels"].tolist(), "singleview_pairs": [0, 0, 1, 1, 2, 2]}
    group = torch.tensor(list(ids[case])).repeat_interleave(feat.shape[1])
    rows = feat.flatten(0, 1).requires_grad_()
    rescaled = float(tau) / 0.07
    loss = group_terms(rows, [group], temperature=float(tau))[0] * rescaled
    (grad,) = torch.autograd.grad(loss, rows)
    key = f"supcon/{case}/float64/tau{tau}/all"
    assert loss.item() == pytest.approx(float(golden[f"{key}/loss"]), abs=1e-10)
    assert np.abs(grad.numpy() - golden[f"{key}/grad"].reshape(grad.shape)).max() < 1e-10
    normalised = supcon_loss(5 * rows.detach(), group, temperature=float(tau)) * rescaled
    assert normalised.item() == pytest.approx(float(golden[f"{key}/loss"]), abs=1e-10)


def test_gradcheck_once_and_twice() -> None:
    z = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    group = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda v: supcon_loss(v, group, temperature=0.3), z)
    assert torch.autograd.gradgradcheck(lambda v: supcon_loss(v, group, temperature=0.3), z)
    other = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    both = lambda v: group_terms(v, [group, other], temperature=0.3)
    assert torch.autograd.gradcheck(both, z)
    assert torch.autograd.gradgradcheck(both, z)


def test_backward_may_run_twice() -> None:
    z = torch.randn(6, 4, requires_grad=True)
    loss = supcon_loss(z, [0, 0, 1, 1, 2, 2])
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)


def test_autocast_changes_neither_loss_nor_gradient() -> None:
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    group = torch.arange(8).repeat(2)
    plain = supcon_loss(z, group)
    (plain_grad,) = torch.autograd.grad(plain, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supcon_loss(z, group)
        (inside_grad,) = torch.autograd.grad(inside, z)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert torch.equal(inside_grad, plain_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_widened(dtype: torch.dtype) -> None:
    z = (100 * torch.randn(8, 32, generator=torch.Generator().manual_seed(2))).to(dtype).requires_grad_()
    loss = supcon_loss(z, [0, 1] * 4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(supcon_loss(z.detach().double(), [0, 1] * 4).item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, z)
    assert grad.dtype == dtype


def test_agrees_with_pytorch_metric_learning() -> None:
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        z = torch.randn(20, 8, generator=generator, dtype=torch.float64).requires_grad_()
        group = torch.randint(0, 6, (20,), generator=generator)
        group[:2], group[-1] = 1, 9  # a pair, and an image without a positive
        theirs = peer.SupConLoss(temperature=0.1)(z, group)
        ours = supcon_loss(z, group, temperature=0.1)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))


def test_no_positive_pair() -> None:
    with pytest.raises(ValueError, match=r"no positive pair: the 3 images lie in 3 groups of one; draw at least two"):
        supcon_loss(torch.eye(3), [1, 2, 3])


def test_number_of_ids_differs() -> None:
    with pytest.raises(ValueError, match=r"3 embeddings but group has shape \(2,\); expected \(3,\)"):
        supcon_loss(torch.eye(3), [1, 1])


def test_ids_that_are_not_integers() -> None:
    with pytest.raises(TypeError, match=r"group must hold integer ids, got torch\.float32"):
        supcon_loss(torch.eye(2), [1.0, 1.0])


def test_embeddings_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"must be \(n, d\).*got shape \(2, 1, 4\); squeeze the axis of size one"):
        supcon_loss(torch.zeros(2, 1, 4), [1, 1])


def test_embeddings_that_are_not_floats() -> None:
    with pytest.raises(TypeError, match=r"embeddings must be floats, got torch\.int64"):
        supcon_loss(torch.eye(2).long(), [1, 1])


@pytest.mark.parametrize("temperature", [0.0, -0.1, 1e-39, math.inf, math.nan])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive finite number, got"):
        supcon_loss(torch.eye(2), [1, 1], temperature=temperature)


def test_a_learned_temperature_gets_its_gradient():
    z, ids = torch.randn(6, 4, dtype=torch.float64), [0, 0, 1, 1, 2, 2]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = supcon_loss(z, ids, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, temperature)
    step = 1e-6
    around = [supcon_loss(z, ids, temperature=0.3 + sign * step) for sign in (1, -1)]
    torch.testing.assert_close(gradient, (around[0] - around[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss.detach(), supcon_loss(z, ids, temperature=0.3))


def test_ids_that_are_text_are_refused_with_what_to_type():
    with pytest.raises(TypeError, match="return_inverse=True"):
        supcon_loss(torch.randn(4, 3), ["a", "a", "b", "b"])
