"""The vote with gradients: its logits and scores decide as the classifier does, are never flat, and cost no copy."""

from __future__ import annotations

import copy
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.classifiers import KNNClassifier, concat_tables, fit_shards, search
from hsat.types import EmbeddingTable, FittedClassifier

CLASSES = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(table, seed=0, *, m=60, n=20, d=5, classes=CLASSES):
    """Overlapping classes: bank, query embeddings (float64) and labels."""
    g = seeded(seed)
    label, own = torch.randint(0, classes, (m,), generator=g), torch.randint(0, classes, (n,), generator=g)
    centre = torch.randn(classes, d, generator=g)
    z = torch.randn(m, d, generator=g) + centre[label]
    query = (torch.randn(n, d, generator=g) + centre[own]).double()
    return table(z, label, classes=classes), query, own


def decides_alike(knn, z):
    """Logits and scores have one highest value per row, and it is the decision."""
    decision = knn.predict_proba(z).argmax(1)
    for values in (knn.logits(z), knn.scores(z)):
        assert values.isfinite().all()
        assert values.argmax(1).tolist() == decision.tolist()
    logits = knn.logits(z)
    assert logits.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    if logits.shape[1] > 1:
        top = logits.topk(2, dim=1).values
        assert (top[:, 0] > top[:, 1]).all(), "no other class ties with the decision"
    assert knn.predict(z).tolist() == decision.tolist()


def loops(bank, z, k, temperature):
    """The formula, with Python's own arithmetic: the logits of one embedding."""
    unit = [v / math.sqrt(sum(w * w for w in z)) for v in z]
    rows = bank.z.astype(np.float64)
    similar = [sum(a * b for a, b in zip(unit, row, strict=True)) / math.sqrt((row * row).sum()) for row in rows]
    near = sorted(range(len(rows)), key=lambda j: (-similar[j], j))[:k]
    logits = []
    for c in range(len(bank.class_names)):
        own = [similar[j] for j in near if bank.label[j] == c]
        anywhere = [s for s, y in zip(similar, bank.label, strict=True) if y == c]
        own = own or ([max(anywhere)] if anywhere else [-1.0])
        logits.append(math.log(sum(math.exp(s / temperature) for s in own)))
    return logits


@pytest.mark.parametrize("index", ["flat", "stream"])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_logits_are_those_of_the_formula(table, k, index):
    bank, z, _ = problem(table, 3, n=8, classes=5)
    bank = table(bank.z, np.where(bank.label == 4, 0, bank.label), classes=5)  # one class without rows
    knn = KNNClassifier(k=k, index=index).fit(bank)
    expected = torch.tensor([loops(bank, row, k, 0.07) for row in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(knn.logits(z), expected)
    torch.testing.assert_close(knn.logits(z.float()), expected.float())
    assert knn.classes_with_rows == 4 and knn.reads == "unit" and isinstance(knn, FittedClassifier)
    assert (knn.logits(z)[:, 4] == -1 / 0.07).all()


@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.003])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_scores_are_those_of_predict_proba_bit_for_bit(table, k, temperature):
    bank, z, _ = problem(table)
    knn = KNNClassifier(k=k, temperature=temperature).fit(bank)
    np.testing.assert_array_equal(knn.scores(z.requires_grad_()).detach().numpy(), knn.predict_proba(z))
    assert knn.scores(z.float()).dtype == torch.float64
    decides_alike(knn, z.detach())


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=14),
    k=st.integers(1, 20),
    temperature=st.sampled_from([1e-20, 0.003, 0.07, 1e6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    width=st.sampled_from([1, 2, 7]),
    index=st.sampled_from(["flat", "stream"]),
    classes=st.sampled_from([3, 5]),
)
@pytest.mark.filterwarnings("ignore:k=")
def test_ties_duplicates_zeros_and_empty_classes_decide_alike(
    table, rows, k, temperature, dtype, width, index, classes
):
    """Few directions, each many times in the bank and with several labels: equal similarities and equal scores."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8], [0.0, 0.0]]).repeat(1, 4)[:, :width]
    at, label = (torch.tensor(column) for column in zip(*rows, strict=True))
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(table(directions[at], label, classes=classes))
    decides_alike(knn, directions.to(dtype))
    z = directions.to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(knn.logits(z).float().sum(), z)
    assert grad.dtype == dtype and (temperature < 0.001 or grad.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 30), noise=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]))
def test_crowds_decide_alike(table, seed, k, noise):
    g = seeded(seed % 2**31)
    few = torch.randn(3, 4, generator=g)
    rows = few[torch.randint(0, 3, (90,), generator=g)] + noise * torch.randn(90, 4, generator=g)
    knn = KNNClassifier(k=k).fit(table(rows, torch.randint(0, 3, (90,), generator=g), classes=3))
    for dtype in (torch.float32, torch.float64):
        decides_alike(knn, torch.cat((few, few + 0.1 * torch.randn(3, 4, generator=g))).to(dtype))


def test_a_tie_goes_to_the_lower_class_by_one_float(table):
    knn = KNNClassifier(k=2).fit(table([[1.0, 0.0], [1.0, 0.0]], [0, 1], classes=2))
    for dtype in (torch.float32, torch.float64):
        first, second = knn.logits(torch.tensor([[1.0, 0.0]], dtype=dtype))[0]
        assert second == torch.tensor(1 / 0.07, dtype=dtype)
        assert first == torch.nextafter(second, torch.tensor(torch.inf, dtype=dtype))


def test_one_class_has_one_logit(table):
    knn = KNNClassifier(k=2).fit(table(np.eye(3)))
    assert knn.logits(torch.eye(3)).shape == (3, 1) and (knn.scores(torch.eye(3)) == 1).all()


@pytest.mark.parametrize("k", [4, 60])
def test_gradients(table, k):
    bank, z, _ = problem(table, 5, n=6)
    knn = KNNClassifier(k=k).fit(bank)
    assert torch.autograd.gradcheck(knn.logits, (z.requires_grad_(),))
    assert torch.autograd.gradcheck(knn.scores, (z,))


def test_the_gradient_is_that_of_a_dense_product(table):
    """To rounding, which gradcheck's tolerance is far above."""
    bank, z, _ = problem(table, 6)
    z.requires_grad_()
    rows = torch.nn.functional.normalize(torch.from_numpy(bank.z).double(), dim=1)
    similarity = torch.nn.functional.normalize(z, dim=1) @ rows.T / 0.07
    dense = torch.stack([similarity[:, torch.from_numpy(bank.label) == c].logsumexp(1) for c in range(CLASSES)], 1)
    weight = torch.randn(dense.shape, generator=seeded(), dtype=torch.float64)
    expected = torch.autograd.grad((dense * weight).sum(), z)[0]
    logits = KNNClassifier(k=60).fit(bank).logits(z)
    torch.testing.assert_close(torch.autograd.grad((logits * weight).sum(), z)[0], expected, rtol=1e-10, atol=1e-12)


def test_a_safe_decision_and_a_lost_one_are_not_flat(table):
    """All neighbours share one class, so that the scores are constant; the logits still point to the other."""
    g = seeded(1)
    right = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0]]) + 0.01 * torch.randn(30, 3, generator=g), dim=1)
    rows = torch.cat((right, torch.tensor([[0.0, 1, 0], [-1, 0, 0.1]])))
    knn = KNNClassifier(k=20).fit(table(rows, [0] * 30 + [1, 1], classes=2))
    z = torch.tensor([[1.0, 0.02, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(knn.scores(z)[:, 0].sum(), z)[0].abs().max() < 1e-15
    for label, way in ((0, 1.0), (1, -1.0)):  # safe: towards the nearest row of class 1; lost: away from it
        logits = knn.logits(z)
        (grad,) = torch.autograd.grad((logits[:, 1 - label] - logits[:, label]).sum(), z)
        assert grad.isfinite().all() and way * grad[0, 1] > 0 and grad.norm() > 1


def test_a_class_that_enters_the_neighbours_does_not_jump(table):
    """Turning from class 0 to class 1, the logit of class 1 is continuous where its rows become neighbours."""
    angle, turn = (torch.linspace(0, math.pi / 2, n, dtype=torch.float64) for n in (40, 4001))
    bank = table(torch.stack((angle.cos(), angle.sin()), 1), [0] * 20 + [1] * 20, classes=2)
    logits = KNNClassifier(k=1).fit(bank).logits(torch.stack((turn.cos(), turn.sin()), 1))
    assert (logits[:, 1].diff().abs() < 0.02).all()
    assert ((logits[:, 1] - logits[:, 0]).diff() > -1e-9).all(), "each step towards class 1 raises the margin"


@pytest.mark.parametrize("index", ["flat", "stream"])
def test_blocks_of_the_bank_and_of_the_batch_change_nothing(table, monkeypatch, index):
    bank, z, _ = problem(table, 7)
    knn = KNNClassifier(k=9, index=index).fit(bank)
    z.requires_grad_()
    whole, (grad,) = knn.logits(z), torch.autograd.grad(knn.logits(z).sum(), z)
    alone = torch.cat([knn.logits(row[None]) for row in z])
    assert torch.equal(alone, whole)
    monkeypatch.setattr(search, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(search, "GATHER_BYTES", 1)
    monkeypatch.setattr("hsat.classifiers.knn_vote.CPU_SLICE_BYTES", 1)
    assert torch.equal(knn.logits(z), whole)
    torch.testing.assert_close(torch.autograd.grad(knn.logits(z).sum(), z)[0], grad, rtol=1e-12, atol=1e-12)


def test_low_precision_is_not_used_inside(table, monkeypatch):
    bank, z, _ = problem(table)
    knn = KNNClassifier(k=9).fit(bank)
    expected = knn.logits(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn.logits(z), expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert torch.equal(knn.logits(z), expected)


def test_the_bank_is_not_copied(table, monkeypatch):
    """Scaled down from 250,000 x 2048: neither logits nor gradients hold the bank once more."""
    rng = np.random.default_rng(0)
    bank = table(rng.standard_normal((40_000, 256), dtype=np.float32), rng.integers(0, 3, 40_000))
    knn = KNNClassifier(k=20).fit(bank)
    assert knn.tensors()["rows"].data_ptr() == bank.z.ctypes.data
    assert copy.deepcopy(knn) is knn and knn.to("cpu") is knn
    z = torch.randn(4, 256, generator=seeded(), requires_grad=True)
    monkeypatch.setattr(search, "BLOCK_BYTES", 2**21)
    tracemalloc.start()
    try:
        knn.logits(z).sum().backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bank.z.nbytes / 4


@pytest.mark.parametrize("index", ["IVF4,Flat;nprobe=1", "SQfp16", "HNSW16", "flat"])
@pytest.mark.parametrize("mapped", [False, True])
def test_banks_that_are_approximate_or_on_disk_decide_by_their_own_neighbours(table, tmp_path, index, mapped):
    bank, z, _ = problem(table, 8, m=300)
    if mapped:
        bank = EmbeddingTable.load(bank.save(tmp_path / "bank", dtype="float16"), memory_map=True)
    knn = KNNClassifier(k=9, index=index).fit(bank)
    if mapped:
        with pytest.warns(UserWarning, match=r"the bank is a file of .* GiB: every call of logits reads"):
            knn.logits(z)
    decides_alike(knn, z)
    logits, neighbours = knn.logits(z), knn.neighbours(z)
    last = torch.from_numpy(neighbours.similarity[:, -1]) / 0.07
    for c in range(CLASSES):
        absent = torch.from_numpy(~(bank.label[neighbours.row] == c).any(1))
        assert (logits[absent, c] <= last[absent] + 1e-9).all(), "a stand-in is no nearer than the k-th neighbour"
    (grad,) = torch.autograd.grad(knn.logits(z.requires_grad_()).sum(), z)
    assert grad.isfinite().all() and (grad != 0).any(1).all()


def test_missing_neighbours_have_no_say(table):
    """A list of the index may hold fewer than k rows."""
    z = np.concatenate((np.tile([[1.0, 0.0]], (60, 1)), np.tile([[0.0, 1.0]], (60, 1))))
    z += 1e-3 * np.random.default_rng(0).standard_normal(z.shape)
    knn = KNNClassifier(k=100, temperature=1.0, index="IVF2,Flat").fit(table(z, np.repeat([0, 1], 60), classes=2))
    decides_alike(knn, torch.eye(2))


def test_shards_have_the_logits_of_one_table(table):
    parts = [problem(table, seed, m=40)[0] for seed in (1, 2)]
    z = problem(table, 3)[1].requires_grad_()
    many, one = fit_shards(KNNClassifier(k=9), parts), KNNClassifier(k=9).fit(concat_tables(parts))
    assert torch.equal(many.logits(z), one.logits(z)) and torch.equal(many.scores(z), one.scores(z))
    grads = [torch.autograd.grad(knn.logits(z).sum(), z)[0] for knn in (many, one)]
    assert torch.equal(*grads)
    assert isinstance(many, FittedClassifier) and many.to("cpu").predict(z).tolist() == many.predict(z).tolist()


def test_embeddings_that_do_not_fit_are_named(table):
    bank, z, _ = problem(table)
    knn = KNNClassifier(k=3).fit(bank)
    with pytest.raises(ValueError, match=r"embeddings \(20, 4\), the bank's have width 5: not its bank"):
        knn.logits(z[:, :4])
    with pytest.raises(
        ValueError, match=r"embeddings on meta, the bank on cpu; move the classifier with \.to\('meta'\)"
    ):
        knn.logits(z.to("meta"))
    z[3, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite, first in row 3"):
        knn.logits(z)
    assert knn.logits(z[:0]).shape == (0, CLASSES)
