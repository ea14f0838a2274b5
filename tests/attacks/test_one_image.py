"""Batches of one image: every attack, threat model and objective; what cannot be done says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.attacks import (
    APGD,
    BIM,
    DIFGSM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    NFGSM,
    NIFGSM,
    PGD,
    TIFGSM,
    VMIFGSM,
    Linf,
    Masked,
    RandomNoise,
    RawChannels,
    Reparametrized,
    Square,
    Stains,
    UniversalPerturbation,
    aggregate_margin,
    classification,
    dlr,
    feature_drift,
    hierarchical,
    margin,
    match_features,
    worst_case,
)
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.data import srh_to_rgb
from hsat.losses import HiDiscLoss
from hsat.stains import estimate_stains
from hsat.types import EmbeddingTable, HierarchicalBatch, Levels

SHAPES = [(1, 3, 8, 8), (1, 1, 8, 8), (1, 3, 1, 1), (1, 3, 1, 5)]
MASK = torch.zeros(8, 8)
MASK[2, 3] = 1  # one pixel
THREATS = {
    "linf": Linf(8 / 255),
    "l2": L2(0.3),
    "linf of one eps per image": Linf(torch.tensor([8 / 255])),
    "l2 of one eps per image": L2(torch.tensor([0.3])),
    "linf of four axes": Linf(torch.full((1, 1, 1, 1), 8 / 255)),
}
LABEL = torch.zeros(1, dtype=torch.long)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def image(shape=(1, 3, 8, 8)):
    return torch.rand(shape, generator=seeded(5))


def encoder(v):
    weight = torch.randn(v.shape[1], 5, generator=seeded(1))
    return (v - 0.5).mean((2, 3)) @ weight


def bank_of(rows, class_names):
    index = np.arange(rows)
    return EmbeddingTable(np.eye(5)[:rows], [0, 1, 2, 1, 1][:rows], index, index, index, tuple(class_names))


BANK, ONE_ROW = bank_of(5, "abc"), bank_of(1, "ab")


def model_of(bank, encode=encoder, *, k):
    return DecisionModel(encode, KNNClassifier(k=k).fit(bank))


def attacks_of(threat, step=0.02):
    number = {"step_size": step, "steps": 2}
    return [
        PGD(threat, **number, restarts=2),
        BIM(threat, **number),
        MIFGSM(threat, **number),
        FGSM(threat),
        FFGSM(threat),
        RandomNoise(threat),
        APGD(threat, steps=1),
        APGD(threat, steps=3, restarts=2),
        DIFGSM(threat, **number),
        NIFGSM(threat, **number, scales=2),
        TIFGSM(threat, **number, size=3),
        VMIFGSM(threat, **number, samples=1),
        Square(threat, queries=1),
        Square(threat, queries=3, area=1.0),
        worst_case(PGD(threat, **number), Square(threat, queries=2)),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
@pytest.mark.parametrize("ids", [None, torch.tensor([3])], ids=["no ids", "ids"])
def test_every_attack(shape, threat, ids):
    x = image(shape)
    for attack in attacks_of(threat):
        result = attack.run(x, feature_drift(encoder, x), generator=seeded(), ids=ids)
        assert result.x_adv.shape == x.shape and torch.equal(threat.project(result.x_adv, x), result.x_adv), attack
        assert not torch.equal(result.x_adv, x), attack


@pytest.mark.parametrize(
    "make",
    [
        *(lambda x, d=distance: feature_drift(encoder, x, d) for distance in ("cosine", "l2", "l1")),
        *(lambda x, k=k: margin(model_of(BANK, k=k), LABEL) for k in (1, 5)),
        lambda x: margin(model_of(ONE_ROW, k=1), LABEL),
        lambda x: aggregate_margin(model_of(BANK, k=1), LABEL, LABEL),
        lambda x: aggregate_margin(model_of(ONE_ROW, k=1), LABEL, LABEL),
        lambda x: classification(encoder, LABEL),
        lambda x: margin(encoder, LABEL),
        lambda x: dlr(encoder, LABEL),
        lambda x: match_features(encoder, torch.ones(1, 5)),
        lambda x: lambda v: v.sum(),
    ],
)
def test_every_objective(make):
    x = image()
    for attack in (*attacks_of(THREATS["linf"]), NFGSM(THREATS["linf"])):
        x_adv = attack(x, make(x), generator=seeded())
        assert x_adv.isfinite().all() and not torch.equal(x_adv, x), attack


def test_masked_stains_raw_channels_and_universal():
    x, both = image(), Linf(0.1, low=-1, high=1)
    for threat in (Linf(0.1), L2(0.3)):
        for attack in attacks_of(Masked(threat, MASK)):
            changed = attack(x, feature_drift(encoder, x), generator=seeded()) != x
            assert changed.any() and not changed[..., MASK == 0].any(), attack
    for per_pixel in (True, False):
        for attack in (PGD(both, step_size=0.05, steps=2), APGD(both, steps=2), Square(both, queries=2)):
            x_adv = Reparametrized(Stains(per_pixel=per_pixel), attack)(
                x, feature_drift(encoder, x), generator=seeded()
            )
            assert x_adv.isfinite().all() and not torch.equal(x_adv, x), attack
    raw = srh_to_rgb(0.2 * torch.rand(2, 8, 8, generator=seeded(1)))[None]
    x_adv = Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(0.01), step_size=0.005, steps=2))(
        raw, feature_drift(encoder, raw), generator=seeded()
    )
    assert x_adv.shape == raw.shape and not torch.equal(x_adv, raw)
    batch = HierarchicalBatch(x, LABEL, LABEL, LABEL)
    fitted = UniversalPerturbation(threat=Linf(0.1), step_size=0.05, epochs=1).fit([batch], encoder, generator=seeded())
    assert not torch.equal(fitted(x, encoder), x)


def test_what_one_image_cannot_do_is_named():
    levels = Levels(LABEL, LABEL, LABEL)
    with pytest.raises(ValueError, match=r"the patch term .* has no positive pair: the 1 images"):
        FGSM(Linf(0.1))(image(), hierarchical(encoder, HiDiscLoss(), levels))
    with pytest.raises(ValueError, match="margin needs at least 2 classes, the model gives 1"):
        margin(lambda v: encoder(v)[:, :1], LABEL)(image())
    with pytest.raises(ValueError, match="aggregate_margin needs at least 2 classes, the model gives 1"):
        aggregate_margin(model_of(bank_of(1, "a"), k=1), LABEL, LABEL)(image())
    with pytest.raises(ValueError, match=r"256 stained pixels have one hue only.*vectors="):
        estimate_stains(torch.tensor([0.4, 0.2, 0.6]).view(1, 3, 1, 1).expand(1, 3, 16, 16))


@pytest.mark.parametrize(
    "make",
    [
        feature_drift,
        lambda f, x: feature_drift(f, x, reference=torch.ones(1, 5)),
        lambda f, x: match_features(f, torch.ones(1, 5)),
        lambda f, x: margin(model_of(BANK, f, k=1), LABEL),
        lambda f, x: aggregate_margin(model_of(BANK, f, k=1), LABEL, LABEL),
        lambda f, x: classification(f, LABEL),
        lambda f, x: margin(f, LABEL),
        lambda f, x: dlr(f, LABEL),
    ],
)
def test_a_function_that_squeezes_is_told_so(make):
    """squeeze() turns (n, d, 1, 1) into (n, d), and (1, d, 1, 1) into (d,)."""
    with pytest.raises(ValueError, match=r"gave shape \(5,\) for 1 images; expected \(1, .*flatten\(1\)"):
        make(lambda v: encoder(v)[..., None, None].squeeze(), image())(image())
