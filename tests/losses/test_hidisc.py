from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsat.losses import HiDiscLoss, supcon_loss
from hsat.losses.supcon import group_terms
from hsat.types import LEVELS, HierarchicalBatch, Levels

PUBLISHED_ORDER = ("patient", "slide", "patch")
NAMES = {"p": "patient", "s": "slide", "pt": "patch"}
LAMBDAS = ((1.0, 1.0, 1.0), (0.5, 2.0, 3.25))


def slot_levels(patients: int, slides: int, patches: int, views: int) -> Levels:
    return HierarchicalBatch.from_grid(torch.zeros(patients, slides, patches, views, 1, 1, 1)).levels


@st.composite
def nested(draw: st.DrawFn) -> tuple[Tensor, Levels]:
    """Embeddings with nested ids; the first two images are views of one patch."""
    n = draw(st.integers(2, 12))
    patch = draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))
    patch[1] = patch[0]
    slide_of, patient_of = [draw(st.lists(st.integers(0, 4), min_size=8, max_size=8)) for _ in range(2)]
    slide = [slide_of[p] for p in patch]
    patient = [patient_of[s] for s in slide]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return z, Levels(*map(torch.tensor, (patch, slide, patient)))


def published_keys(golden: dict[str, np.ndarray]) -> list[str]:
    return [name.removeprefix("loss/") for name in golden if name.startswith("loss/")]


def test_published_values_and_gradients(golden: dict[str, np.ndarray]) -> None:
    """Every shape that has a positive pair at the levels of the code, all codes, temperatures and weights."""
    keys = published_keys(golden)
    assert len(keys) > 120
    for key in keys:
        shape, dtype, tau, lam, code = key.split("/")
        temperature, tolerance = float(tau[3:]), 1e-10 if dtype == "float64" else 1e-4
        weights = dict(zip(PUBLISHED_ORDER, LAMBDAS[int(lam[3:])], strict=True))
        wanted = [NAMES[letter] for letter in code.split("_")]
        feat = torch.from_numpy(golden[f"feat/{shape}"]).to(getattr(torch, dtype))
        levels = slot_levels(*feat.shape[:4])
        z = feat.flatten(0, 3).requires_grad_()
        loss = HiDiscLoss.from_code(code, temperature=temperature, **{level: weights[level] for level in wanted})
        terms, rescaled = loss(z, levels), temperature / 0.07
        got = [getattr(terms, name).item() * rescaled for name in (*PUBLISHED_ORDER, "total")]
        assert np.abs(np.array(got) - golden[f"loss/{key}"]).max() < tolerance, key
        if f"grad/{key}" not in golden:
            continue
        whole = torch.from_numpy(golden[f"grad/{key}"]).reshape(z.shape)
        rows = z.detach()
        tangential = whole - (whole * rows).sum(1, keepdim=True) * rows
        (grad,) = torch.autograd.grad(terms.total, z)
        assert (grad * rescaled - tangential).abs().max() < tolerance, key
        by_level = group_terms(z, [getattr(levels, level) for level in wanted], temperature=temperature)
        total = sum(weights[level] * term for level, term in zip(wanted, by_level, strict=True))
        (grad,) = torch.autograd.grad(total, z)
        assert (grad * rescaled - whole).abs().max() < tolerance, key


def test_published_base_temperature_only_scales(golden: dict[str, np.ndarray]) -> None:
    z, levels = torch.from_numpy(golden["feat/4x2x2x2x16"]).flatten(0, 3), slot_levels(4, 2, 2, 2)
    for tau, base in [("0.07", "0.07"), ("0.5", "0.07"), ("0.5", "0.5"), ("0.07", "1.0")]:
        terms = HiDiscLoss(temperature=float(tau))(z, levels)
        got = np.array([getattr(terms, name).item() for name in (*PUBLISHED_ORDER, "total")])
        assert np.abs(got * float(tau) / float(base) - golden[f"basetemp/{tau}_{base}"]).max() < 1e-10


@given(nested())
@settings(max_examples=40, deadline=None)
def test_terms_are_supcon_of_each_level(batch: tuple[Tensor, Levels]) -> None:
    z, levels = batch
    terms = HiDiscLoss(patch=0.5, slide=2.0, patient=3.0, temperature=0.2)(z, levels)
    for level in LEVELS:
        torch.testing.assert_close(getattr(terms, level), supcon_loss(z, getattr(levels, level), temperature=0.2))
    torch.testing.assert_close(terms.total, 0.5 * terms.patch + 2 * terms.slide + 3 * terms.patient)


@given(nested(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_order_of_images_and_names_of_ids_do_not_matter(batch: tuple[Tensor, Levels], seed: int) -> None:
    z, levels = batch
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    renamed = Levels(*((getattr(levels, level)[order] * 7919 - 10**12) for level in LEVELS))
    torch.testing.assert_close(HiDiscLoss()(3 * z[order], renamed), HiDiscLoss()(z, levels))


@given(nested(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_gradient_of_the_shared_matrix_is_the_sum_over_levels(batch: tuple[Tensor, Levels], seed: int) -> None:
    z, levels = batch
    z = z.requires_grad_()
    weights = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    loss = HiDiscLoss(**dict(zip(LEVELS, weights, strict=True)), temperature=0.3)
    apart = sum(w * supcon_loss(z, getattr(levels, g), temperature=0.3) for g, w in zip(LEVELS, weights, strict=True))
    torch.testing.assert_close(torch.autograd.grad(loss(z, levels).total, z), torch.autograd.grad(apart, z))


def test_a_patch_drawn_twice_is_a_positive_where_slots_make_it_a_negative() -> None:
    """Two draws of a patch, at right angles: true ids pull them together, slot ids push them apart."""
    z = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]].requires_grad_()
    true = Levels(*(torch.tensor([0, 0, 0, 0, 1, 1]) for _ in LEVELS))
    slots = Levels(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1]))
    only_patches = HiDiscLoss.from_code("pt", temperature=0.5)
    (by_true_ids,) = torch.autograd.grad(only_patches(z, true).total, z)
    (by_slots,) = torch.autograd.grad(only_patches(z, slots).total, z)
    assert by_true_ids[0, 1] < 0 < by_slots[0, 1]


def test_a_level_without_weight_is_zero_and_needs_no_pair() -> None:
    z = torch.randn(4, 3)
    levels = Levels(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0]))
    terms = HiDiscLoss(patch=0.0)(z, levels)
    assert terms.patch.item() == 0.0
    assert terms.total.item() == pytest.approx(terms.slide.item() + terms.patient.item())


def test_takes_a_batch_and_its_levels_alike() -> None:
    batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 1, 2, 2))
    z = torch.randn(16, 4)
    assert HiDiscLoss()(z, batch) == HiDiscLoss()(z, batch.levels)


def test_gradcheck_of_the_three_levels() -> None:
    z = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = HiDiscLoss(patch=0.7, slide=1.3, patient=0.4, temperature=0.4)
    levels = slot_levels(2, 2, 1, 2)
    assert torch.autograd.gradcheck(lambda v: loss(v, levels).total, z)
    assert torch.autograd.gradgradcheck(lambda v: loss(v, levels).total, z)
    assert torch.autograd.gradcheck(lambda v: loss(v, levels)[1:], z)


def test_autocast_changes_neither_loss_nor_gradient() -> None:
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    levels = slot_levels(2, 2, 2, 2)
    plain = HiDiscLoss()(z, levels)
    (plain_grad,) = torch.autograd.grad(plain.total, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = HiDiscLoss()(z, levels)
        (inside_grad,) = torch.autograd.grad(inside.total, z)
    assert inside == plain
    assert torch.equal(inside_grad, plain_grad)


@pytest.mark.parametrize("code", ["p_s_pt", "p_s", "p_pt", "s_pt", "p", "s", "pt"])
def test_codes_name_their_levels(code: str) -> None:
    loss = HiDiscLoss.from_code(code, temperature=0.5)
    weighted = {level for level in LEVELS if getattr(loss, level)}
    assert weighted == {NAMES[letter] for letter in code.split("_")}
    assert loss.temperature == 0.5


def test_codes_take_weights() -> None:
    assert HiDiscLoss.from_code("s_pt", slide=2.5) == HiDiscLoss(patch=1.0, slide=2.5, patient=0.0)


def test_repr_is_complete_and_replace_makes_variants() -> None:
    loss = HiDiscLoss(patch=0.5, temperature=0.1, gather=True)
    assert eval(repr(loss)) == loss
    assert dataclasses.replace(loss, gather=False).gather is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.patch = 2.0  # type: ignore[misc]


def test_gather_without_a_process_group_is_the_plain_loss() -> None:
    z, levels = torch.randn(16, 4), slot_levels(2, 2, 2, 2)
    assert HiDiscLoss(gather=True)(z, levels) == HiDiscLoss()(z, levels)


@pytest.mark.parametrize(
    ("level", "levels", "counts"),
    [
        ("patch", Levels(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])), "4 images lie in 4"),
        ("slide", Levels(torch.arange(4), torch.arange(4), torch.tensor([0, 0, 1, 1])), "4 images lie in 4"),
        ("patient", Levels(torch.arange(3), torch.arange(3), torch.arange(3)), "3 images lie in 3"),
    ],
)
def test_no_positive_pair_at_a_wanted_level(level: str, levels: Levels, counts: str) -> None:
    loss = HiDiscLoss(**{name: float(name == level) * 2 for name in LEVELS})
    wanted = rf"the {level} term \(weight 2.0\) has no positive pair: the {counts} groups.*or set {level}=0"
    with pytest.raises(ValueError, match=wanted):
        loss(torch.randn(len(levels), 2), levels)


def test_numbers_of_embeddings_and_ids_differ() -> None:
    with pytest.raises(ValueError, match="15 embeddings but ids for 16 images"):
        HiDiscLoss()(torch.randn(15, 4), slot_levels(2, 2, 2, 2))


def test_embeddings_with_an_axis_of_one() -> None:
    with pytest.raises(ValueError, match=r"got shape \(16, 1, 4\); squeeze the axis of size one"):
        HiDiscLoss()(torch.randn(16, 1, 4), slot_levels(2, 2, 2, 2))


def test_ids_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="needs Levels or a HierarchicalBatch beside z, got Tensor"):
        HiDiscLoss()(torch.randn(2, 4), torch.zeros(2))  # type: ignore[arg-type]


def test_unknown_code() -> None:
    with pytest.raises(ValueError, match=r"unknown loss code 'pt_s'; the codes are p_s_pt, p_s, p_pt, s_pt, p, s, pt"):
        HiDiscLoss.from_code("pt_s")


def test_weight_for_a_level_that_the_code_leaves_out() -> None:
    with pytest.raises(ValueError, match=r"slide=2\.0 was given, but the code 'p_pt' leaves the slide level out"):
        HiDiscLoss.from_code("p_pt", slide=2.0)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weight_out_of_range(weight: float) -> None:
    with pytest.raises(ValueError, match="must be finite and at least 0, got slide="):
        HiDiscLoss(slide=weight)


def test_all_weights_zero() -> None:
    with pytest.raises(ValueError, match="all weights are zero"):
        HiDiscLoss(patch=0.0, slide=0.0, patient=0.0)


def test_temperature_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"temperature must be a positive finite number, got 0.*0\.07"):
        HiDiscLoss(temperature=0.0)
