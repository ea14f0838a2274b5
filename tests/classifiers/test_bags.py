"""Slides as bags: bags of tables, and the mean of the patches' scores as a slide's decision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import aggregate_margin
from hsat.attacks.bags import slide_objective
from hsat.classifiers import (
    DecisionModel,
    Head,
    KNNClassifier,
    MeanPooling,
    NearestCentroid,
    bag_scores,
    bags_of,
    predict_slides,
)
from hsat.eval import pool
from hsat.types import EmbeddingTable, SlideClassifier

NAMES = ("a", "b", "c")


def same(v):
    return v


@pytest.fixture
def bank(table):
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (60,), generator=g)
    z = torch.randn(60, 4, generator=g) + 1.5 * torch.eye(3, 4)[label]
    return table(z.numpy(), label.numpy(), class_names=NAMES)


@pytest.fixture
def bag():
    return torch.randn(17, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


FITTED = {
    "centroid": lambda bank: NearestCentroid(temperature=0.5).fit(bank),
    "knn of all": lambda bank: KNNClassifier(k=60, temperature=0.5).fit(bank),
    "knn": lambda bank: KNNClassifier(k=3).fit(bank),
}


@pytest.mark.parametrize("name", FITTED)
def test_mean_pooling_is_the_pool_of_the_patches(name, bank, bag):
    fitted = FITTED[name](bank)
    slide = MeanPooling(fitted)
    assert isinstance(slide, SlideClassifier) and slide.class_names == NAMES
    pooled = pool(fitted.predict_proba(bag), np.zeros(17)).scores[0]
    np.testing.assert_allclose(slide.scores(bag).numpy(), pooled, atol=1e-12)
    logits = slide.logits(bag)
    assert int(logits.argmax()) == int(pooled.argmax()) and bool(logits.isfinite().all())
    if name != "knn":  # whose votes can be zero
        np.testing.assert_allclose(logits.numpy(), np.log(pooled), atol=1e-9)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("label", range(3))
def test_its_margin_is_the_old_objective_of_a_level(name, label, bank, bag):
    """Value and gradient of `aggregate_margin` with all patches in one group."""
    fitted = FITTED[name](bank)
    groups, labels = torch.zeros(17, dtype=torch.int64), torch.full((17,), label)
    old = aggregate_margin(DecisionModel(same, fitted), groups, labels)
    new = slide_objective(same, MeanPooling(fitted), bag, label=label, chunk=17)
    values, gradients = [], []
    for objective in (old, new):
        leaf = bag.clone().requires_grad_()
        value = objective(leaf)
        gradients.append(torch.autograd.grad(value, leaf)[0])
        values.append(value.detach())
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-9)
    assert bool(values[1] > 0) == bool(values[0] > 0) == bool(old.wrong(bag)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert bool(gradients[0].any()), "it must not vanish where all votes agree"


def test_a_head_pools_raw_features(bank, bag):
    torch.manual_seed(0)
    slide = MeanPooling(Head(nn.Linear(4, 3).double(), NAMES))
    assert slide.reads == "raw"
    torch.testing.assert_close(slide.representation(bag), bag.mean(0))
    unit = MeanPooling(NearestCentroid().fit(bank))
    assert unit.reads == "unit"
    torch.testing.assert_close(unit.representation(bag), nn.functional.normalize(bag, dim=1).mean(0))
    assert "Head" in repr(slide) and repr(unit) == "MeanPooling(NearestCentroid(temperature=0.07))"


def test_fingerprints_tell_banks_and_settings_apart(bank, table):
    other = table(bank.z[::-1].copy(), bank.label, class_names=NAMES)
    made = [MeanPooling(NearestCentroid().fit(bank)), MeanPooling(NearestCentroid().fit(other))]
    made += [MeanPooling(KNNClassifier(k=k).fit(one)) for k in (3, 4) for one in (bank, other)]
    torch.manual_seed(0)
    made += [MeanPooling(Head(nn.Linear(4, 3), NAMES)) for _ in range(2)]
    digests = [one.fingerprint() for one in made]
    assert len(set(digests)) == len(made)
    assert MeanPooling(KNNClassifier(k=3).fit(bank)).fingerprint() == digests[2]


def test_an_unfitted_classifier_is_refused():
    with pytest.raises(TypeError, match=r"needs a fitted classifier of patches.*\.fit\(bank\).*KNNClassifier"):
        MeanPooling(KNNClassifier())


def slides_table(**changes):
    columns = dict(
        z=np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]),
        label=[1, 0, 1, 0],
        patch=[0, 1, 2, 3],
        slide=[7, 5, 7, 5],
        patient=[1, 0, 1, 0],
        class_names=("x", "y"),
    )
    return EmbeddingTable(**columns | changes)


def test_bags_of_a_table():
    bags = list(bags_of(slides_table()))
    assert [(bag.slide, bag.patient, bag.label) for bag in bags] == [(5, 0, 0), (7, 1, 1)]
    np.testing.assert_allclose(bags[1].rows, [[3, 4], [0, 2]])
    np.testing.assert_allclose(list(bags_of(slides_table(), reads="unit"))[1].rows, [[0.6, 0.8], [0, 1]])
    with pytest.raises(ValueError, match=r"slide 7 holds patches of the classes \['x', 'y'\]"):
        list(bags_of(slides_table(label=[0, 0, 1, 0])))
    unit = slides_table(z=np.eye(2)[[0, 1, 1, 0]])
    with pytest.raises(ValueError, match="does not know their lengths"):
        list(bags_of(unit))


class OnlyLogits:
    class_names, reads = ("y", "x"), "raw"

    def logits(self, bag):
        return bag.sum(0).flip(0)

    def to(self, device):
        return self


def test_slides_of_a_table_are_classified_by_name():
    scores = predict_slides(OnlyLogits(), slides_table())
    wanted = torch.tensor([[0.0, 3.0], [6.0, 3.0]], dtype=torch.float64).softmax(1)
    np.testing.assert_allclose(scores, wanted, atol=1e-12)
    with pytest.raises(ValueError, match=r"classes \['z'\]"):
        predict_slides(OnlyLogits(), slides_table(class_names=("x", "z")))
    tied = bag_scores(OnlyLogits(), torch.zeros(3, 2))
    assert int(tied.argmax()) == 0, "ties go to the lower class"
