"""The decision of kNN as an objective: it is the classifier's own, it is never flat, and attacks on it succeed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import PGD, Linf, classification, feature_drift, margin
from hsat.classifiers import DecisionModel, KNNClassifier, search
from hsat.testing import check_feasible
from hsat.types import EmbeddingTable

CLASSES = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table_of(z, label, classes=CLASSES):
    index = np.arange(len(z))
    return EmbeddingTable(np.asarray(z), np.asarray(label), index, index, index, tuple("abcdefgh"[:classes]))


def problem(seed=0, *, m=60, n=20, d=5, classes=CLASSES):
    """Overlapping classes: bank, query embeddings (float64) and labels."""
    g = seeded(seed)
    label, own = torch.randint(0, classes, (m,), generator=g), torch.randint(0, classes, (n,), generator=g)
    centre = torch.randn(classes, d, generator=g)
    z = torch.randn(m, d, generator=g) + centre[label]
    query = (torch.randn(n, d, generator=g) + centre[own]).double()
    return table_of(z, label, classes), query, own


def same(v):
    return v


OBJECTIVES = {"margin": margin, "cross-entropy": classification}


def model_of(bank, encoder=same, *, k, temperature=0.07):
    """float64 logits, so that values can be compared with formulas."""
    return DecisionModel(encoder, KNNClassifier(k=k, temperature=temperature).fit(bank), wide=True)


@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.01])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_scores_and_decisions_are_the_classifiers(k, temperature):
    bank, z, label = problem()
    model = model_of(bank, k=k, temperature=temperature)
    knn = KNNClassifier(k=k, temperature=temperature).fit(bank)
    np.testing.assert_allclose(model.scores(z), knn.predict_proba(z), atol=1e-12)
    np.testing.assert_allclose(model.scores(z.float()), knn.predict_proba(z.float()), atol=1e-12)
    vote, wrong = margin(model, label), torch.from_numpy(knn.predict(z)) != label
    assert 0 < wrong.sum() < len(wrong), "the problem should have both"
    assert torch.equal(vote(z) > 0, wrong) and torch.equal(vote.success(z), wrong)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_ties_fall_as_in_the_classifier(data):
    """Few directions, each many times in the bank and with several labels: equal similarities and equal scores."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    rows = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=14))
    at, label = (torch.tensor(column) for column in zip(*rows, strict=True))
    k = data.draw(st.integers(1, len(rows)))
    bank = table_of(directions[at], label, 3)
    z, own = directions.double(), torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)))
    knn, model = KNNClassifier(k=k).fit(bank), model_of(bank, k=k)
    vote = margin(model, own)
    np.testing.assert_allclose(model.scores(z), knn.predict_proba(z), atol=1e-12)
    wrong = torch.from_numpy(knn.predict(z)) != own
    assert torch.equal(vote.success(z), wrong)
    assert torch.equal(vote(z) > 0, wrong)


@pytest.mark.parametrize("block", [search.BLOCK_BYTES, 200])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_any_number_of_rows_may_tie(noise, block, monkeypatch):
    """Far more rows than are proposed beyond k are equal, or nearly so: the earlier ones of the bank are neighbours."""
    monkeypatch.setattr(search, "BLOCK_BYTES", block)
    for seed in range(8):
        g = seeded(seed)
        direction = torch.nn.functional.normalize(torch.randn(3, 2 + seed % 3, generator=g), dim=1)
        rows = direction[torch.randint(0, 3, (90,), generator=g)]
        label = torch.randint(0, 3, (90,), generator=g)
        bank, k = table_of(rows + noise * torch.randn(rows.shape, generator=g), label, 3), 11 + 4 * seed
        z = (direction + 0.1 * torch.randn(direction.shape, generator=g)).double()
        unit, stored = torch.nn.functional.normalize(z, dim=1), torch.from_numpy(bank.z).double()
        similarity = (stored[None] * unit[:, None]).sum(2) / stored.norm(dim=1)
        near = torch.from_numpy(np.lexsort((np.tile(np.arange(90), (3, 1)), -similarity.numpy()))[:, :k])
        weight = (similarity.gather(1, near) / 0.07).softmax(1)
        expected = torch.zeros(3, 3, dtype=torch.float64).scatter_add(1, label[near], weight)
        model = model_of(bank, k=k)
        torch.testing.assert_close(model.scores(z), expected, atol=1e-9, rtol=0)
        for alone in range(3):
            torch.testing.assert_close(model.scores(z[alone : alone + 1]), expected[alone : alone + 1])


def test_a_tie_lost_to_a_lower_class_counts_as_wrong():
    bank = table_of([[1.0, 0.0], [1.0, 0.0]], [0, 1], 2)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    vote = margin(model_of(bank, k=2), torch.tensor([0, 1]))
    safe, lost = vote(z).tolist()
    assert -1e-12 < safe <= 0 < lost < 1e-12
    assert vote.success(z).tolist() == [False, True]


def loops(bank, z, label, k, temperature):
    """The formula, with Python's own arithmetic: (margin, cross-entropy) of one embedding."""
    unit = [v / math.sqrt(sum(w * w for w in z)) for v in z]
    rows = bank.z.astype(np.float64)
    similar = [sum(a * b for a, b in zip(unit, row, strict=True)) / math.sqrt((row * row).sum()) for row in rows]
    near = sorted(range(len(rows)), key=lambda j: (-similar[j], j))[:k]
    votes = []
    for c in range(len(bank.class_names)):
        own = [similar[j] for j in near if bank.label[j] == c]
        anywhere = [s for s, y in zip(similar, bank.label, strict=True) if y == c]
        own = own or ([max(anywhere)] if anywhere else [-1.0])
        votes.append(math.log(sum(math.exp(s / temperature) for s in own)))
    lead = max(v for c, v in enumerate(votes) if c != label) - votes[label]
    return lead, math.log(sum(map(math.exp, votes))) - votes[label]


@pytest.mark.parametrize("k", [1, 5, 30])
def test_values_are_those_of_the_formula(k):
    bank, z, label = problem(3, n=8, classes=5)
    bank = dataclasses.replace(bank, label=np.where(bank.label == 4, 0, bank.label))  # one class without rows
    label = label.clamp(max=4)
    expected = [loops(bank, row, y, k, 0.07) for row, y in zip(z.tolist(), label.tolist(), strict=True)]
    lead, entropy = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected, strict=True))
    model = model_of(bank, k=k)
    torch.testing.assert_close(margin(model, label)(z), lead)
    torch.testing.assert_close(classification(model, label)(z), entropy)


def test_cross_entropy_is_minus_the_log_of_the_score_where_every_class_votes():
    bank, z, label = problem()
    model = model_of(bank, k=60)
    torch.testing.assert_close(classification(model, label)(z), -model.scores(z).gather(1, label[:, None])[:, 0].log())


def test_logits_are_wide_only_where_that_is_wanted():
    bank, z, label = problem()
    knn, z = KNNClassifier(k=9).fit(bank), z.float()
    usual, wide = DecisionModel(same, knn), model_of(bank, k=9)
    assert usual(z).dtype == torch.float32 and wide(z).dtype == torch.float64
    assert torch.equal(wide(z), knn.logits(z.double())) and torch.equal(usual(z), knn.logits(z))
    assert usual(z).argmax(1).tolist() == wide(z).argmax(1).tolist()
    torch.testing.assert_close(margin(usual, label)(z).double(), margin(wide, label)(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("k", [4, 60])
def test_gradients(k, loss):
    bank, z, label = problem(5, n=6)
    model = model_of(bank, k=k)
    assert torch.autograd.gradcheck(OBJECTIVES[loss](model, label), (z.requires_grad_(),))
    assert torch.autograd.gradcheck(model.scores, (z,))


def test_the_gradient_is_that_of_a_dense_product():
    """To rounding, which gradcheck's tolerance is far above."""
    bank, z, label = problem(6)
    z.requires_grad_()
    rows = torch.nn.functional.normalize(torch.from_numpy(bank.z).double(), dim=1)
    similarity = torch.nn.functional.normalize(z, dim=1) @ rows.T / 0.07
    votes = torch.stack([similarity[:, torch.from_numpy(bank.label) == c].logsumexp(1) for c in range(CLASSES)], 1)
    dense = votes.logsumexp(1) - votes.gather(1, label[:, None])[:, 0]
    expected = torch.autograd.grad(dense.sum(), z)[0]
    gradient = torch.autograd.grad(classification(model_of(bank, k=60), label)(z).sum(), z)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_rows_that_lie_close_together_are_told_apart():
    """Similarities differ in the sixth digit: products rounded to fewer would propose other neighbours."""
    g = seeded(3)
    centre, away = torch.randn(8, generator=g).double(), torch.randn(8, generator=g).double()
    rows = centre + 1e-3 * torch.randn(300, 8, generator=g)
    bank = table_of(rows, torch.randint(0, 2, (300,), generator=g), 2)
    z = (centre + 0.05 * away)[None]
    unit, stored = torch.nn.functional.normalize(z, dim=1), torch.from_numpy(bank.z).double()
    similarity = (stored @ unit[0] / stored.norm(dim=1)).sort(descending=True).values
    for k in (3, 9, 21):
        model = model_of(bank, k=k, temperature=1.0)
        np.testing.assert_allclose(model(z).logsumexp(1), similarity[:k].logsumexp(0), rtol=1e-10)
        np.testing.assert_allclose(model.fitted.neighbours(z).similarity[0], similarity[:k], atol=1e-12)


def test_a_safe_decision_and_a_lost_one_are_not_flat():
    """All neighbours share one class, so that the scores are constant; the objective still points to the other."""
    g = seeded(1)
    right = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0]]) + 0.01 * torch.randn(30, 3, generator=g), dim=1)
    model = model_of(
        table_of(torch.cat((right, torch.tensor([[0.0, 1, 0], [-1, 0, 0.1]]))), [0] * 30 + [1, 1], 2), k=20
    )
    z = torch.tensor([[1.0, 0.02, 0.0]], dtype=torch.float64, requires_grad=True)
    (flat,) = torch.autograd.grad(model.scores(z)[:, 0].sum(), z)
    assert flat.abs().max() < 1e-15
    for label, way in ((0, 1.0), (1, -1.0)):  # safe: towards the nearest row of class 1; lost: away from it
        for loss, objective in OBJECTIVES.items():
            value = objective(model, torch.tensor([label]))(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
            assert value.isfinite().all() and grad.isfinite().all()
            assert way * grad[0, 1] > 0
            if loss == "margin":
                assert grad.norm() > 1 and (value > 0).item() == (label == 1)


def test_the_margin_is_continuous_for_the_class_that_enters():
    """Turning from class 0 to class 1, the margin does not jump where rows of class 1 become neighbours."""
    angle = torch.linspace(0, math.pi / 2, 40, dtype=torch.float64)
    bank = table_of(torch.stack((angle.cos(), angle.sin()), 1), [0] * 20 + [1] * 20, 2)
    turn = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)
    z = torch.stack((turn.cos(), turn.sin()), 1)
    model = model_of(bank, k=1)
    assert (model(z)[:, 1].diff().abs() < 0.02).all()
    vote = margin(model, torch.zeros(4001, dtype=torch.int64))
    assert (vote(z).diff() > -1e-9).all(), "each step towards class 1 raises the margin"


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_blocks_of_the_bank_and_of_the_batch_change_nothing(monkeypatch, loss):
    bank, z, label = problem(7)
    z.requires_grad_()
    vote = OBJECTIVES[loss](model_of(bank, k=9), label)
    whole, (grad,) = vote(z), torch.autograd.grad(vote(z).sum(), z)
    monkeypatch.setattr(search, "BLOCK_BYTES", 200)
    monkeypatch.setattr(search, "GATHER_BYTES", 1)
    monkeypatch.setattr("hsat.classifiers.knn_vote.CPU_SLICE_BYTES", 1)
    assert torch.equal(vote(z), whole)
    torch.testing.assert_close(torch.autograd.grad(vote(z).sum(), z)[0], grad, rtol=1e-12, atol=1e-12)


def test_low_precision_products_are_not_trusted(monkeypatch):
    bank, z, label = problem()
    vote = margin(model_of(bank, k=9), label)
    expected = vote(z)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert torch.equal(vote(z), expected)


def test_a_selection_and_another_batch_share_the_model():
    bank, z, label = problem()
    model = model_of(bank, k=9)
    vote, index, other = margin(model, label), torch.tensor([3, 0, 11]), (label + 1) % CLASSES
    assert torch.equal(vote.select(index)(z[index]), vote(z)[index])
    assert vote.select(index).model is model
    assert torch.equal(margin(model, other)(z), margin(model_of(bank, k=9), other)(z))


def test_a_zero_embedding_has_a_finite_gradient():
    bank, z, label = problem()
    z[0] = 0
    model = model_of(bank, k=9)
    np.testing.assert_allclose(model.scores(z)[0].sum(), 1.0)
    (grad,) = torch.autograd.grad(margin(model, label)(z.requires_grad_()).sum(), z)
    assert grad.isfinite().all()


def images_and_encoder(n=12):
    g = seeded(2)
    weight = torch.randn(3 * 16, 6, generator=g, dtype=torch.float64)
    encoder = lambda v: ((v - 0.5).double().flatten(1) @ weight).tanh()
    label = torch.arange(n) % 3
    tint = torch.randn(3, 3, 4, 4, generator=seeded(3)) * 0.1
    make = lambda count, seed: (
        0.5 + tint[torch.arange(count) % 3] + 0.03 * torch.randn(count, 3, 4, 4, generator=seeded(seed))
    ).clamp(0, 1)
    bank = table_of(encoder(make(90, 4)), np.arange(90) % 3, 3)
    return make(n, 5), label, encoder, bank


def test_attacks_turn_the_vote_and_early_stopping_is_the_vote():
    x, label, encoder, bank = images_and_encoder()
    threat = Linf(0.1)
    vote = margin(model_of(bank, encoder, k=10), label)
    assert not vote.success(x).any(), "clean images are classified well"
    attack = PGD(threat, step_size=0.02, steps=12)
    result = attack.run(x, vote, generator=seeded())
    check_feasible(result.x_adv, x, threat)
    wrong = torch.from_numpy(KNNClassifier(k=10).fit(bank).predict(encoder(result.x_adv))) != label
    assert wrong.all() and torch.equal(result.value > 0, wrong)
    assert (result.zero_gradient == 0).all()
    stopped = attack.run(x, vote, generator=seeded(), success=vote.success)
    assert stopped.success.all() and vote.success(stopped.x_adv).all()
    assert stopped.backwards < result.backwards


def test_half_precision_images():
    x, label, encoder, bank = images_and_encoder()
    vote = margin(model_of(bank, encoder, k=10), label)
    for dtype in (torch.float16, torch.bfloat16):
        x_adv = PGD(Linf(0.1), step_size=0.02, steps=5)(x.to(dtype), vote, generator=seeded())
        assert (vote(x_adv) > vote(x.to(dtype))).all()


def test_drift_leaves_the_class_less_often_than_the_vote_does():
    x, label, encoder, bank = images_and_encoder(30)
    attack, vote = PGD(Linf(0.05), step_size=0.01, steps=10), margin(model_of(bank, encoder, k=10), label)
    drift = attack(x, feature_drift(encoder, x), generator=seeded(), ids=torch.arange(30))
    aimed = attack(x, vote, generator=seeded(), ids=torch.arange(30))
    assert vote.success(aimed).sum() > vote.success(drift).sum()


def test_what_does_not_fit_is_named():
    bank, z, label = problem()
    vote = margin(model_of(bank, k=3), label)
    with pytest.raises(ValueError, match=r"embeddings \(20, 4\), the bank's have width 5: not its bank"):
        vote(z[:, :4])
    with pytest.raises(ValueError, match=r"the model gave shape \(3, 4\) for 20 images"):
        vote(z[:3])
    with pytest.raises(ValueError, match="embeddings on meta, the bank on cpu"):
        vote(z.to("meta"))
    with pytest.raises(ValueError, match="labels go from 0 to 4, but the model gives 4 classes"):
        margin(model_of(bank, k=3), torch.tensor([0, 4]))(z[:2])
    with pytest.raises(ValueError, match=r"labels must be \(n,\) int64 class numbers, got \(1,\) torch.float32"):
        margin(model_of(bank, k=3), torch.tensor([0.0]))
