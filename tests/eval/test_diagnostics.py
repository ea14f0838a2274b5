"""Planted models: each way of masking gradients is flagged with its reason, sound models are not flagged at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import (
    FGSM,
    L2,
    MIFGSM,
    PGD,
    AttackEnsemble,
    FittedUniversal,
    Linf,
    RandomNoise,
    Square,
    feature_drift,
)
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.embedding import embed
from hsat.eval import Diagnosis, RunOptions, Scoring, diagnose, evaluate_whitebox, read_records, write_records
from hsat.eval.diagnostics import HashSubset, examine
from hsat.eval.masking import CRITERIA, DiagnosisTarget
from hsat.types import HierarchicalBatch

PGD8 = PGD(Linf(8 / 255), step_size=3 / 255, steps=4)
KNN = KNNClassifier(k=15)
DRIFT = dict(classifier=KNN, target="features")
ATTACKS = (PGD8, MIFGSM(L2(0.5), step_size=0.2, steps=4), FGSM(Linf(4 / 255)))


class Planted(nn.Module):
    """Colour contrasts, which hold the class, beside textures; `how` says what comes between images and gradients."""

    def __init__(self, how: str = "sound", *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.how, self.weight = how, nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator) * 0.5)

    def features(self, images: Tensor) -> Tensor:
        if self.how == "rounding":
            images = (images * 16).round() / 16  # the gradient of round is zero
        texture = nn.functional.gelu(3 * nn.functional.conv2d(images - 0.5, self.weight)).mean((2, 3))
        mean = (images - 0.5).mean((2, 3))
        contrast = 40 * torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        if self.how == "saturated":
            contrast, texture = torch.sigmoid(1e4 * contrast), torch.sigmoid(1e4 * texture)
        z = torch.cat((contrast, texture, torch.ones_like(contrast[:, :1])), 1)
        if self.how == "dithering":
            z = z + 0.3 * torch.randn(z.shape, generator=None)
        if self.how == "dithering by image":
            seeds = images.detach().view(torch.int32).sum((1, 2, 3)).tolist()
            z = z + 0.3 * torch.stack([torch.randn(z.shape[1], generator=seeded(seed)) for seed in seeds])
        return z

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.features(images), dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**31)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


def reasons(found: Diagnosis) -> set[str]:
    return {flag.split(":")[0].replace(" ", "_") for flag in found.flags}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_a_sound_model_is_not_flagged(attack, bank, queries):
    found = diagnose(Planted(), bank, queries, attack, **DRIFT)
    assert found.flags == ()
    assert found.measures["images"] == 32 and found.measures["images_right"] >= 25
    assert found.measures["zero_gradient_share"] == found.measures["not_repeatable_share"] == 0
    assert found.measures["robust_to_unbounded_attack_share"] <= 0.05


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        (
            "rounding",
            {
                "zero_gradient",
                "never_moved",
                "black_box_beats_white_box",
                "loss_not_increasing",
                "robust_to_unbounded_attack",
            },
        ),
        (
            "saturated",
            {
                "zero_gradient",
                "never_moved",
                "black_box_beats_white_box",
                "loss_not_increasing",
                "robust_to_unbounded_attack",
            },
        ),
        ("dithering", {"not_repeatable"}),
        ("dithering by image", {"discontinuous"}),
    ],
)
def test_planted_models_are_flagged_with_their_reason(how, wanted, bank, queries):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = diagnose(Planted(how), bank, queries, PGD8, **DRIFT)
    assert wanted <= reasons(found)
    if how == "dithering by image":
        assert "not_repeatable" not in reasons(found), "it repeats, but for neighbouring images"
    for name in wanted:
        assert found.measures[f"{name}_share"] > 0.2


def test_dithering_hides_small_attacks(bank, queries):
    """At eps = 1/255 noise of the model's own drowns the gradient, and the other signs see it, too."""
    small = PGD(Linf(1 / 255), step_size=0.25 / 255, steps=6)
    found = diagnose(Planted("dithering by image"), bank, queries, small, **DRIFT)
    assert {"discontinuous", "black_box_beats_white_box", "loss_not_increasing"} <= reasons(found)


def test_an_attack_that_goes_nowhere_is_flagged_on_a_sound_model(bank, queries):
    """Not only models fail: steps too small to matter are found out as well."""

    timid = PGD(Linf(8 / 255), step_size=1e-12, steps=2)
    assert {"never_moved", "noise_beats_attack", "black_box_beats_white_box"} <= reasons(
        diagnose(Planted(), bank, queries, timid, **DRIFT)
    )


def test_a_tiny_ball_is_no_sign_of_masking(bank, queries):
    """A 40,000th of a grey level: drifts are as small as the rounding of float32, so that it is chance who wins."""
    tiny = PGD(Linf(1e-7), step_size=0.5e-7, steps=2)
    assert not {"black_box_beats_white_box", "black_box_breaks"} & reasons(
        diagnose(Planted(), bank, queries, tiny, **DRIFT)
    )


def test_an_objective_of_ones_own(bank, queries):
    """It is what the attack climbs and what all values are: the mean brightness, which no decision depends on."""

    def brightness(images: Tensor, labels: Tensor):
        assert len(labels) == len(images) and set(labels.tolist()) <= {0, 1, 2}
        return lambda x: x.mean((1, 2, 3))

    encoder = Planted().eval().requires_grad_(False)
    model = DecisionModel(encoder, KNN.fit(embed(encoder, bank)))
    subject = DiagnosisTarget(attack=PGD8, attacked=encoder.features, model=model, objective=brightness)
    found = examine(subject, queries, device=torch.device("cpu"))
    assert found.measures["accuracy_attack"] >= 0.9
    assert found.measures["noise_beats_attack_share"] == found.measures["loss_not_increasing_share"] == 0


def test_signs_of_decisions_and_accuracies(bank, queries):
    found = diagnose(Planted(), bank, queries, PGD8, **DRIFT).measures
    assert found["accuracy_attack"] < found["accuracy_black_box"] <= found["accuracy_noise"] <= found["accuracy_clean"]
    assert found["images_right"] == round(32 * found["accuracy_clean"])
    assert set(found) == {
        "images",
        "images_right",
        *(f"accuracy_{name}" for name in ("clean", "noise", "attack", "black_box")),
        *(f"{criterion.name}_share" for criterion in CRITERIA),
    }


def test_surrogates_uncover_a_model_that_hides_its_gradient(bank, queries):
    """The same model without the rounding lends its gradients: its adversarial images beat the white-box attack."""
    alone = diagnose(Planted("rounding"), bank, queries, PGD8, **DRIFT)
    lent = diagnose(Planted("rounding"), bank, queries, PGD8, surrogates=[Planted()], **DRIFT)
    assert "black_box_breaks" not in reasons(alone)
    assert "black_box_breaks" in reasons(lent)
    assert lent.measures["accuracy_black_box"] < alone.measures["accuracy_black_box"]
    assert diagnose(Planted(), bank, queries, PGD8, surrogates=[Planted(seed=3)], **DRIFT).flags == ()


def test_same_seed_same_diagnosis_for_any_batches(bank, queries, toy_batches):
    encoder = Planted()
    other = toy_batches(seed=2, sizes=(20, 16))
    other[:] = reversed(other)
    first = diagnose(encoder, bank, queries, PGD8, run=RunOptions(diagnose=12), **DRIFT)
    assert diagnose(encoder, bank, queries, PGD8, run=RunOptions(diagnose=12), **DRIFT) == first
    assert diagnose(encoder, embed(encoder, bank), other, PGD8, run=RunOptions(diagnose=12), **DRIFT) == first
    assert encoder.training and encoder.weight.requires_grad and encoder.weight.grad is None


def test_the_embedding_can_be_the_target(toy_encoder, bank, queries):
    assert diagnose(toy_encoder, bank, queries, PGD8, classifier=KNN, target="embedding").flags == ()


def test_the_subset_is_a_fair_choice(toy_batches):
    """Whatever the order and the batches; every patch has its chance; all of them where there are not enough."""
    whole = toy_batches(seed=0, sizes=(40,))
    parts = toy_batches(seed=0, sizes=(40,))

    def chosen(batches, *, seed: int, size: int = 10):
        subset = HashSubset(size, seed=seed)
        for batch in batches:
            subset.add(batch, batch.label)
        return subset.batches()

    (kept,) = chosen(whole, seed=1)
    assert len(kept) == 10
    index = kept.patch
    assert torch.equal(kept.images, whole[0].images[index]) and torch.equal(kept.label, whole[0].label[index])
    pieces = [cut(parts[0], slice(a, a + 8)) for a in (32, 0, 16, 8, 24)]
    again = chosen(pieces, seed=1)
    assert [len(batch) for batch in again] == [8, 2], "no wider than the batches that came"
    assert torch.equal(torch.cat([batch.patch for batch in again]), kept.patch)
    often = np.bincount(np.concatenate([chosen(whole, seed=s)[0].patch.numpy() for s in range(60)]), minlength=40)
    assert often.min() >= 4 and often.max() <= 30
    assert len(chosen(whole, seed=0, size=99)[0]) == 40


def test_subsets_of_several_ranks_are_one(toy_batches):
    batches = toy_batches(seed=0, sizes=(5, 9, 4, 6))
    whole, parts = HashSubset(7, seed=3), [HashSubset(7, seed=3) for _ in range(2)]
    for number, batch in enumerate(batches):
        for subset in (whole, parts[number % 2]):
            subset.add(batch, batch.label)
    merged = parts[1].merge(parts)
    for one, other in zip(whole.batches(), merged.batches(), strict=True):
        assert torch.equal(one.patch, other.patch) and torch.equal(one.images, other.images)


def cut(batch, rows):
    names = ("images", "patch", "slide", "patient", "label")
    return HierarchicalBatch(**{name: getattr(batch, name)[rows] for name in names})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": RandomNoise(Linf(0.1))}, "RandomNoise"),
        ({"attack": Square(Linf(0.1), queries=5)}, "Square"),
        ({"attack": FittedUniversal(threat=Linf(0.1), delta=torch.zeros(1, 3, 8, 8))}, "FittedUniversal"),
        ({"attack": PGD(Linf(0.0), step_size=0.1, steps=1)}, "eps 0 moves nothing"),
        ({"attack": lambda x, objective: x}, "needs an attack with a threat model"),
        ({"attack": AttackEnsemble(Linf(0.1))}, "AttackEnsemble"),
        ({"run": RunOptions(diagnose=0)}, "diagnose.* at least 1; got 0"),
        ({"target": "head"}, "'head'"),
    ],
)
def test_bad_arguments_are_named(options, message, bank, queries):
    with pytest.raises(ValueError, match=message):
        diagnose(Planted(), bank, queries, **DRIFT | {"attack": PGD8} | options)


def test_no_queries(bank, queries):
    with pytest.raises(ValueError, match="gave no batches"):
        diagnose(Planted(), bank, type(queries)(), PGD8, **DRIFT)


def test_never_moved_knows_the_random_start(bank, queries):
    """An attack whose gradient is zero ends at its random start, which is another image than the clean one."""
    encoder, batch = Planted("rounding"), queries[0]
    noise = RandomNoise(PGD8.threat)(batch.images, None, generator=seeded(0), ids=batch.patch)
    ended = PGD8(batch.images, feature_drift(encoder.features, batch.images), generator=seeded(0), ids=batch.patch)
    assert torch.equal(noise, ended) and not torch.equal(ended, batch.images)
    assert diagnose(encoder, bank, queries, PGD8, **DRIFT).measures["never_moved_share"] == 1.0


# --- inside an evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["features", "decision"])
def test_an_evaluation_puts_the_flags_into_every_record_of_the_attack(target, bank, queries, tmp_path):
    attacks = {"PGD-8": PGD8, "PGD-0": PGD(Linf(0.0), step_size=0.01, steps=1)}
    options = dict(target=target, classifier=[KNN, KNNClassifier(k=5)], scoring=Scoring(bootstrap=0))
    run = RunOptions(diagnose=32)
    found = evaluate_whitebox(Planted("rounding"), bank, queries, attacks, run=run, **options)
    alone = diagnose(Planted("rounding"), bank, queries, PGD8, **DRIFT)
    for record in found.records:
        words = {flag.split(":")[0] for flag in record.flags}
        if record.attack_name == "PGD-8":
            assert {"zero gradient", "never moved", "black box beats white box", "robust to unbounded attack"} <= words
            if target == "features":
                assert record.flags[-len(alone.flags) :] == alone.flags
                assert record.settings["diagnosis"] == alone.measures
        else:
            assert not words & {"zero gradient", "never moved"} and "diagnosis" not in record.settings
    assert read_records(write_records(tmp_path / "r.jsonl", found.records)) == found.records
    plain = evaluate_whitebox(Planted("rounding"), bank, queries, attacks, **options)
    assert [r.value for r in plain.records] == [r.value for r in found.records]
    assert not any("diagnosis" in record.settings for record in plain.records)


@pytest.mark.parametrize("target", ["features", "decision"])
def test_an_evaluation_of_a_sound_model_has_no_flags(target, bank, queries):
    options = dict(target=target, classifier=KNN, scoring=Scoring(bootstrap=0))
    run = RunOptions(noise=False, diagnose=24)
    found = evaluate_whitebox(Planted(), bank, queries, {"PGD-8": PGD8}, run=run, **options)
    assert {flag for record in found.records for flag in record.flags} == set()
    assert found.records[-1].settings["diagnosis"]["images"] == 24
