"""Slide and patient objectives: the pooled decision of evaluation, as a function of all patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import PGD, Linf, aggregate_margin, soft_knn
from hsat.eval import KNNClassifier, pool
from hsat.types import EmbeddingTable

CLASSES = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(v):
    return v


def problem(seed=0, *, n=24, groups=7):
    """Bank, query embeddings (float64), group ids that are neither sorted nor dense, and labels by group."""
    g = seeded(seed)
    own = torch.randint(0, CLASSES, (50,), generator=g)
    centre = torch.randn(CLASSES, 4, generator=g)
    index = np.arange(50)
    z = torch.randn(50, 4, generator=g) + centre[own]
    bank = EmbeddingTable(z.numpy(), own.numpy(), index, index, index, tuple("abc"))
    group = torch.randint(0, groups, (n,), generator=g)
    label = torch.randint(0, CLASSES, (groups,), generator=g)[group]
    query = torch.randn(n, 4, generator=g) + centre[label]
    return bank, query.double(), 100 - 3 * group, label


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 6, 50]), st.sampled_from([0.07, 0.5]))
def test_the_sign_is_the_pooled_decision(seed, k, temperature):
    bank, z, group, label = problem(seed)
    margin = aggregate_margin(same, bank, group, label, k=k, temperature=temperature)
    knn = KNNClassifier(k=k, temperature=temperature).fit(bank)
    pooled = pool(knn.predict_proba(z), group.numpy(), label.numpy())
    wrong = torch.from_numpy(pooled.scores.argmax(1) != pooled.labels)
    np.testing.assert_array_equal(margin.groups, pooled.groups)
    np.testing.assert_array_equal(margin.labels, pooled.labels)
    np.testing.assert_allclose(margin.scores(z), pooled.scores, atol=1e-12)
    assert torch.equal(margin.values(z) > 0, wrong) and torch.equal(margin.wrong(z), wrong)
    assert margin(z).shape == () and torch.equal(margin(z), margin.values(z).sum())


def test_values_are_those_of_the_formula_where_every_class_votes():
    bank, z, group, label = problem(1)
    margin = aggregate_margin(same, bank, group, label, k=50)
    scores = soft_knn(same, bank, label, k=50).scores(z)
    for value, name, own in zip(margin.values(z).tolist(), margin.groups, margin.labels, strict=True):
        rows = scores[group == name]
        mean = [math.log(sum(float(row[c]) for row in rows) / len(rows)) for c in range(CLASSES)]
        assert value == pytest.approx(max(m for c, m in enumerate(mean) if c != own) - mean[own], abs=1e-9)


def test_groups_of_one_are_the_patches():
    bank, z, _, label = problem(2)
    alone = aggregate_margin(same, bank, torch.arange(len(z)), label, k=6)
    torch.testing.assert_close(alone.values(z), soft_knn(same, bank, label, k=6)(z))


@pytest.mark.parametrize("k", [5, 50])
def test_gradients(k):
    bank, z, group, label = problem(3, n=8, groups=3)
    assert torch.autograd.gradcheck(aggregate_margin(same, bank, group, label, k=k), (z.requires_grad_(),))


def test_every_patch_of_a_safe_group_has_a_direction():
    """All votes are unanimous and right: the mean score is exactly one, and flat; the objective is not."""
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0]]) + 0.05 * torch.randn(20, 3, generator=seeded()))
    z = torch.cat((rows, torch.tensor([[0.0, 1, 0], [0, 0, 1]]))).numpy()
    index = np.arange(22)
    bank = EmbeddingTable(z, [0] * 20 + [1, 2], index, index, index, tuple("abc"))
    query = torch.tensor([[1.0, 0.1, 0], [1, 0, 0.2], [1, -0.1, 0]], dtype=torch.float64, requires_grad=True)
    margin = aggregate_margin(same, bank, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), k=10)
    torch.testing.assert_close(margin.scores(query), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(margin(query), query)
    assert (grad.norm(dim=1) > 1e-3).all() and float(margin(query.detach())) < 0


def test_an_attack_on_the_slides_turns_them():
    weight = torch.randn(48, 4, generator=seeded(2), dtype=torch.float64)
    encoder = lambda v: ((v - 0.5).double().flatten(1) @ weight).tanh()
    tint = torch.randn(3, 3, 4, 4, generator=seeded(3)) * 0.1
    make = lambda n, seed: (
        0.5 + tint[torch.arange(n) % 3] + 0.03 * torch.randn(n, 3, 4, 4, generator=seeded(seed))
    ).clamp(0, 1)
    index = np.arange(60)
    bank = EmbeddingTable(encoder(make(60, 4)).numpy(), index % 3, index, index, index, tuple("abc"))
    x, label = make(12, 5), torch.arange(12) % 3
    margin = aggregate_margin(encoder, bank, torch.arange(12) % 6, label, k=10)
    assert not margin.wrong(x).any()
    x_adv = PGD(Linf(0.1), step_size=0.02, steps=12)(x, margin, generator=seeded())
    assert margin.wrong(x_adv).all()


def test_errors():
    bank, z, group, label = problem()
    with pytest.raises(
        ValueError, match=r"group 7 holds images with labels \[0, 1\]; a slide or patient has one label"
    ):
        aggregate_margin(same, bank, torch.tensor([5, 7, 7]), torch.tensor([2, 0, 1]), k=5)
    with pytest.raises(ValueError, match=r"groups must be integers \(24,\), one id per label; got torch.int64 \(3,\)"):
        aggregate_margin(same, bank, group[:3], label, k=5)
    with pytest.raises(ValueError, match="groups for 24 images, but 3 embeddings"):
        aggregate_margin(same, bank, group, label, k=5)(z[:3])
    with pytest.raises(ValueError, match="one value per image"):
        PGD(Linf(0.1), step_size=0.1, steps=1)(
            torch.rand(24, 1, 2, 2),
            aggregate_margin(lambda v: v.flatten(1), bank, group, label, k=5),
            success=lambda v: torch.zeros(24, dtype=torch.bool),
        )
