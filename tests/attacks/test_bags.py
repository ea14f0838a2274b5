"""The decision on a slide as an objective: exact gradients in chunks, constants for untouched patches, all targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hsat.attacks import APGD, MIFGSM, PGD, AttackEnsemble, Linf, RandomNoise, Square, slide_objective
from hsat.attacks.bags import encode_in_chunks
from hsat.classifiers import MIL, GatedAttention
from hsat.testing import check_feasible

NAMES = ("a", "b", "c")


class Sum(nn.Module):
    """Logits are linear in the bag: the optimum in a ball is known."""

    def forward(self, bag):
        return torch.stack((bag.sum(), -bag.sum()))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return layers.double().eval().requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def classifier():
    torch.manual_seed(2)
    return MIL(GatedAttention(16, 3, hidden=6).double(), NAMES).requires_grad_(False)


def value_and_gradient(objective, images):
    leaf = images.clone().requires_grad_()
    value = objective(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("target", ["decision", "cross_entropy", "own_decision", "representation"])
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_have_the_gradient_of_one_piece(target, chunk, encoder, classifier, images):
    clean = encoder(images.flip(0))  # another slide, so that no target is stationary
    label = 1 if target in ("decision", "cross_entropy") else None
    index = torch.tensor([0, 2, 3, 5, 6, 7, 10])
    pieces, whole = (
        slide_objective(encoder, classifier, clean, target=target, label=label, index=index, chunk=size)
        for size in (chunk, 64)
    )
    value, gradient = value_and_gradient(pieces, images[index])
    wanted_value, wanted = value_and_gradient(whole, images[index])
    torch.testing.assert_close(value, wanted_value, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-14)
    assert value.shape == () and bool(wanted.any())


def test_activations_are_kept_for_one_chunk_only(images):
    """What the graph holds on to between forward and backward: inputs and embeddings, no activation of the encoder."""

    class Wide(nn.Module):
        def forward(self, x):
            return (x.flatten(1).repeat(1, 50).sin() * 2).tanh().mean(1, keepdim=True)

    def saved(chunk):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
        leaf = images.clone().requires_grad_()
        with hooks:
            total = encode_in_chunks(Wide(), leaf, chunk=chunk).sum()
        return sum(sizes), torch.autograd.grad(total, leaf)[0]

    (pieces, gradient), (whole, wanted) = saved(2), saved(11)
    torch.testing.assert_close(gradient, wanted)
    assert whole > 50 * images.numel() > 20 * pieces


def test_the_other_patches_are_constants(encoder, classifier, images):
    clean, index = encoder(images), torch.tensor([7, 2])
    objective = slide_objective(encoder, classifier, clean, label=0, index=index)
    other = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    bag = objective.bag(other)
    untouched = [number for number in range(11) if number not in (7, 2)]
    assert torch.equal(bag[untouched], clean[untouched])
    torch.testing.assert_close(bag[[7, 2]], encoder(other))
    assert torch.equal(clean, encoder(images)), "the clean embeddings stay what they are"
    torch.testing.assert_close(objective(images[index]), slide_objective(encoder, classifier, clean, label=0)(images))


def test_values(encoder, classifier, images):
    clean = encoder(images)
    logits = classifier.logits(clean)
    own = int(logits.argmax())
    others = torch.cat((logits[:own], logits[own + 1 :]))
    for target, label in (("decision", own), ("own_decision", None)):
        objective = slide_objective(encoder, classifier, clean, target=target, label=label)
        torch.testing.assert_close(objective(images), others.max() - logits[own])
    entropy = slide_objective(encoder, classifier, clean, target="cross_entropy", label=own)
    torch.testing.assert_close(entropy(images), -logits.log_softmax(0)[own])
    drift = slide_objective(encoder, classifier, clean, target="representation")
    assert drift.stationary_at_clean and abs(float(drift(images))) < 1e-12
    assert not entropy.stationary_at_clean


ATTACKS = {
    "PGD": PGD(Linf(8 / 255), step_size=2 / 255, steps=6),
    "restarts": PGD(Linf(8 / 255), step_size=2 / 255, steps=6, restarts=2),
    "MIFGSM": MIFGSM(Linf(8 / 255), step_size=2 / 255, steps=6),
    "APGD": APGD(Linf(8 / 255), steps=8),
    "Square": Square(Linf(8 / 255), queries=30),
    "noise": RandomNoise(Linf(8 / 255)),
    "ensemble": AttackEnsemble(Linf(8 / 255), steps=2, decision_steps=2, restarts=1, queries=5),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_take_it_and_stay_feasible(name, encoder, classifier, images):
    clean, index = encoder(images), torch.tensor([1, 4, 9])
    label = int(classifier.logits(clean).argmax())
    objective = slide_objective(encoder, classifier, clean, label=label, index=index, chunk=2)
    result = ATTACKS[name].run(images[index], objective, generator=torch.Generator().manual_seed(0), ids=index)
    check_feasible(result.x_adv, images[index], Linf(8 / 255))
    assert result.value.shape == ()
    if name != "noise":
        assert float(objective(result.x_adv)) > float(objective(images[index]))


def test_a_linear_slide_is_climbed_to_its_known_optimum():
    """Margin = -2 sum of all pixels' means: every pixel of the chosen patches goes down by eps."""
    images = torch.full((4, 3, 5, 5), 0.5)

    def encode(x):
        return x.mean((2, 3))

    index = torch.tensor([3, 1])
    objective = slide_objective(encode, MIL(Sum(), ("a", "b")), encode(images), label=0, index=index)
    attack = PGD(Linf(0.25), step_size=0.125, steps=2, random_start=False)
    result = attack.run(images[index], objective)
    torch.testing.assert_close(result.x_adv, torch.full_like(images[index], 0.25))
    assert float(result.value) == pytest.approx(-2 * (4 * 3 * 0.5 - 2 * 3 * 0.25))


def test_errors_name_the_culprit(encoder, classifier, images):
    clean = encoder(images)
    with pytest.raises(ValueError, match="unknown target 'margin'"):
        slide_objective(encoder, classifier, clean, target="margin")
    with pytest.raises(ValueError, match="needs the slide's class, a number below 3; got None"):
        slide_objective(encoder, classifier, clean)
    with pytest.raises(ValueError, match="index runs from 2 to 11, but the slide has 11 patches"):
        slide_objective(encoder, classifier, clean, label=0, index=torch.tensor([2, 11]))
    with pytest.raises(ValueError, match="each once"):
        slide_objective(encoder, classifier, clean, label=0, index=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="about 2 patches of the slide, got 11 images"):
        slide_objective(encoder, classifier, clean, label=0, index=torch.tensor([2, 4]))(images)
    with pytest.raises(TypeError, match="has no representation"):
        slide_objective(encoder, MIL(Sum(), ("a", "b")), clean, target="representation")
    with pytest.raises(ValueError, match="one class only"):
        slide_objective(encoder, MIL(nn.Linear(16, 1), ("a",)), clean, label=0)(images)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        slide_objective(encoder, classifier, clean, label=0, chunk=0)
