"""Searches that remember decisions end where others end, and ask the model less often."""

from __future__ import annotations

import pytest
import torch

from hsat.attacks import APGD, PGD, Linf, Square, margin
from hsat.attacks.decision_memory import DecisionTest, QueryTest, RememberedModel, gaps

X = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3 * 16, 3, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(6)


def net(images):
    return images.flatten(1) @ WEIGHT


LABELS = net(X).argmax(1)


@pytest.mark.parametrize("kind", ["apgd", "square", "pgd"])
def test_a_remembered_decision_is_the_decision(kind):
    threat = Linf(9 / 255)
    attack = {
        "apgd": APGD(threat, steps=9),
        "square": Square(threat, queries=20, area=0.3),
        "pgd": PGD(threat, step_size=2 / 255, steps=9),
    }[kind]
    plain = margin(net, LABELS)
    asked = []
    expected = attack.run(
        X,
        plain,
        ids=IDS,
        generator=torch.Generator().manual_seed(0),
        success=lambda v: asked.append(len(v)) or plain.success(v),
    )
    model = RememberedModel(net)
    result = attack.run(
        X,
        margin(model, LABELS),
        ids=IDS,
        generator=torch.Generator().manual_seed(0),
        success=DecisionTest(model, LABELS),
    )
    assert torch.equal(result.x_adv, expected.x_adv) and torch.equal(result.success, expected.success)
    assert expected.success.any() and not expected.success.all()
    if kind != "pgd":  # PGD asks before it takes a gradient, so nothing is known then
        assert model.forwards - len(X) * 2 < sum(asked)


def test_passes_are_counted_by_image():
    model = RememberedModel(net)
    leaf = X.clone().requires_grad_()
    model(leaf)
    with torch.no_grad():
        model(leaf[:2])
    model(X[:1])
    assert (model.forwards, model.backwards) == (9, 6)
    assert torch.equal(model.images, X[:1]) and torch.equal(model.logits, net(X[:1]))


def test_other_images_are_asked_about_and_what_succeeded_stays():
    model = RememberedModel(net)
    test, wrong = DecisionTest(model, LABELS), 1 - X
    expected = net(wrong).argmax(1) != LABELS
    assert expected.any() and not expected.all()
    assert not test(X).any() and model.forwards == 6
    assert not test(X).any() and model.forwards == 6
    assert torch.equal(test(wrong), expected) and model.forwards == 12
    assert torch.equal(test(X), expected)  # broken once is broken


@pytest.mark.parametrize(("here", "after", "given_up"), [(-0.8, 2, True), (-0.4, 2, False), (-0.4, 4, True)])
def test_a_search_by_queries_gives_up_where_gradients_led_farther(here, after, given_up):
    def logits(images):
        none = images[:, 0, 0, 0] * 0
        return torch.stack((none - here, none), 1)

    labels, clean = torch.zeros(1, dtype=torch.int64), torch.tensor([-1.0])
    model = RememberedModel(lambda images: logits(images) * 1e9)  # scores that tell nothing
    test = QueryTest(model, labels, logits, clean=clean, reached=torch.tensor([-0.1]), queries=8)
    masked = QueryTest(model, labels, logits, clean=clean, reached=clean, queries=8)
    for call in range(1, after + 1):
        assert bool(test(X[:1])) == (given_up and call == after)
        assert not masked(X[:1]).any()  # gradients led nowhere: the search goes on
    assert model.forwards > 0


def test_gaps_are_those_to_the_true_class():
    values = gaps(torch.tensor([[1.0, 3.0, 2.5]]), torch.tensor([1]))
    assert values.tolist() == [[-2.0, -torch.inf, -0.5]]
