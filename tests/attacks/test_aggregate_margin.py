"""Slide and patient objectives: the pooled decision of evaluation, as a function of all patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import PGD, Linf, aggregate_margin, margin
from hsat.classifiers import DecisionModel, KNNClassifier, NearestCentroid
from hsat.eval import pool
from hsat.types import EmbeddingTable

CLASSES = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(v):
    return v


def model_of(bank, encoder=same, *, k):
    return DecisionModel(encoder, KNNClassifier(k=k).fit(bank))


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
    knn = KNNClassifier(k=k, temperature=temperature).fit(bank)
    whole = aggregate_margin(DecisionModel(same, knn), group, label)
    pooled = pool(knn.predict_proba(z), group.numpy(), label.numpy())
    wrong = torch.from_numpy(pooled.scores.argmax(1) != pooled.labels)
    np.testing.assert_array_equal(whole.groups, pooled.groups)
    np.testing.assert_array_equal(whole.labels, pooled.labels)
    np.testing.assert_allclose(whole.scores(z), pooled.scores, atol=1e-12)
    assert torch.equal(whole.values(z) > 0, wrong) and torch.equal(whole.wrong(z), wrong)
    assert whole(z).shape == () and torch.equal(whole(z), whole.values(z).sum())


def test_values_are_those_of_the_formula_where_every_class_votes():
    bank, z, group, label = problem(1)
    model = model_of(bank, k=50)
    whole, scores = aggregate_margin(model, group, label), model.scores(z)
    for value, name, own in zip(whole.values(z).tolist(), whole.groups, whole.labels, strict=True):
        rows = scores[group == name]
        mean = [math.log(sum(float(row[c]) for row in rows) / len(rows)) for c in range(CLASSES)]
        assert value == pytest.approx(max(m for c, m in enumerate(mean) if c != own) - mean[own], abs=1e-9)


def test_groups_of_one_are_the_patches():
    bank, z, _, label = problem(2)
    alone = aggregate_margin(model_of(bank, k=6), torch.arange(len(z)), label)
    torch.testing.assert_close(alone.values(z), margin(model_of(bank, k=6), label)(z))
    assert alone.values(z.float()).dtype == torch.float64, "whatever the model's own logits are"


@pytest.mark.parametrize("k", [5, 50])
def test_gradients(k):
    bank, z, group, label = problem(3, n=8, groups=3)
    assert torch.autograd.gradcheck(aggregate_margin(model_of(bank, k=k), group, label), (z.requires_grad_(),))


def test_every_patch_of_a_safe_group_has_a_direction():
    """All votes are unanimous and right: the mean score is exactly one, and flat; the objective is not."""
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0]]) + 0.05 * torch.randn(20, 3, generator=seeded()))
    z = torch.cat((rows, torch.tensor([[0.0, 1, 0], [0, 0, 1]]))).numpy()
    index = np.arange(22)
    bank = EmbeddingTable(z, [0] * 20 + [1, 2], index, index, index, tuple("abc"))
    query = torch.tensor([[1.0, 0.1, 0], [1, 0, 0.2], [1, -0.1, 0]], dtype=torch.float64, requires_grad=True)
    whole = aggregate_margin(model_of(bank, k=10), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(whole.scores(query), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(whole(query), query)
    assert (grad.norm(dim=1) > 1e-3).all() and float(whole(query.detach())) < 0


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
    whole = aggregate_margin(model_of(bank, encoder, k=10), torch.arange(12) % 6, label)
    assert not whole.wrong(x).any()
    x_adv = PGD(Linf(0.1), step_size=0.02, steps=12)(x, whole, generator=seeded())
    assert whole.wrong(x_adv).all()


def test_errors():
    bank, z, group, label = problem()
    model = model_of(bank, k=5)
    with pytest.raises(
        ValueError, match=r"group 7 holds images with labels \[0, 1\]; a slide or patient has one label"
    ):
        aggregate_margin(model, torch.tensor([5, 7, 7]), torch.tensor([2, 0, 1]))
    with pytest.raises(ValueError, match=r"groups must be integers \(24,\), one id per label; got torch.int64 \(3,\)"):
        aggregate_margin(model, group[:3], label)
    with pytest.raises(ValueError, match="groups for 24 images, but 3 embeddings"):
        aggregate_margin(model, group, label)(z[:3])
    with pytest.raises(ValueError, match="one value per image"):
        PGD(Linf(0.1), step_size=0.1, steps=1)(
            torch.rand(24, 1, 2, 2),
            aggregate_margin(model_of(bank, lambda v: v.flatten(1), k=5), group, label),
            success=lambda v: torch.zeros(24, dtype=torch.bool),
        )
    with pytest.raises(ValueError, match="labels run from 0 to 3, but there are 3 classes"):
        aggregate_margin(model, torch.arange(2), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"labels must be integers \(n,\).*got torch.float32 \(1,\)"):
        aggregate_margin(model, torch.arange(1), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="aggregate_margin needs at least 2 classes, the model gives 1"):
        aggregate_margin(lambda v: v[:, :1], torch.arange(1), torch.tensor([0]))(z[:1])


def test_any_classifier_and_any_model_of_logits_serve():
    """The scores of others than kNN are the softmax of their logits, with which the formula agrees in every bit."""
    bank, z, group, label = problem(4)
    centroid = NearestCentroid().fit(bank)
    whole = aggregate_margin(DecisionModel(same, centroid), group, label)
    plain = aggregate_margin(centroid.logits, group, label)
    pooled = pool(centroid.predict_proba(z), group.numpy(), label.numpy())
    np.testing.assert_allclose(whole.scores(z), pooled.scores, atol=1e-12)
    torch.testing.assert_close(plain.values(z), whole.values(z))
    torch.testing.assert_close(plain.scores(z), whole.scores(z))
    assert torch.equal(plain.wrong(z), whole.wrong(z)) and torch.equal(plain.wrong(z), whole.values(z) > 0)
    assert torch.autograd.gradcheck(plain, (z.requires_grad_(),))
