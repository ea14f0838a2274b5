"""What is no tensor of images, and models that give no tensor: errors say what to type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hsat import embed
from hsat.attacks import (
    APGD,
    FGSM,
    PGD,
    AttackEnsemble,
    Linf,
    NaturalShift,
    RandomNoise,
    Square,
    classification,
    feature_drift,
    margin,
)
from hsat.types import HierarchicalBatch

THREAT = Linf(8 / 255)
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
X, Y = torch.rand(4, 3, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(THREAT),
        PGD(THREAT, step_size=2 / 255, steps=2),
        APGD(THREAT, steps=2),
        Square(THREAT, queries=3),
        RandomNoise(THREAT),
        AttackEnsemble(THREAT),
        NaturalShift.standard()["blur 1"],
    ],
    ids=lambda attack: type(attack).__name__,
)
@pytest.mark.parametrize("images", [X.numpy(), X.tolist()], ids=["array", "list"])
def test_arrays_and_lists_are_no_images(attack, images):
    with pytest.raises(TypeError, match=r"images must be a tensor .* write torch\.as_tensor\(images\)"):
        attack(images, classification(NETWORK, Y))


def both(x):
    return NETWORK(x), None


@pytest.mark.parametrize(
    "call",
    [
        lambda: feature_drift(both, X),
        lambda: classification(both, Y)(X),
        lambda: margin(both, Y)(X),
        lambda: embed(both, [HierarchicalBatch(X, Y, Y, Y, label=Y)], class_names=tuple("abcd")),
    ],
    ids=["feature_drift", "classification", "margin", "embed"],
)
def test_a_model_that_gives_a_tuple_is_named(call):
    with pytest.raises(TypeError, match=r"gave tuple for 4 images; expected a tensor .* model\(x\)\[0\]"):
        call()


def test_an_array_of_embeddings_is_no_output_either():
    with pytest.raises(TypeError, match="gave ndarray"):
        feature_drift(lambda x: np.zeros((len(x), 3)), X)
