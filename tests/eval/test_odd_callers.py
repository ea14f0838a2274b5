"""What callers get wrong, or write a little differently."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.attacks import L2, PGD, Linf
from hsat.eval import KNNClassifier, embed, eps_text, evaluate_whitebox


@pytest.fixture
def toy(toy_encoder, toy_batches):
    return toy_encoder, embed(toy_encoder, toy_batches(seed=1, sizes=(20,))), toy_batches(seed=2, sizes=(6,))


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        (
            [PGD(Linf(0.1), step_size=0.1, steps=1)],
            r"attacks must be a mapping such as \{'PGD-8': PGD\(\.\.\.\)\}, got list",
        ),
        (PGD(Linf(0.1), step_size=0.1, steps=1), "attacks must be a mapping .*, got PGD"),
        ({"mine": lambda x, objective: x}, "attack 'mine' has no method run, as hsat.types.Attack wants"),
    ],
)
def test_attacks_that_are_no_mapping_of_attacks(toy, attacks, message):
    with pytest.raises(TypeError, match=message):
        evaluate_whitebox(*toy, attacks, k=3, bootstrap=0)


@pytest.mark.parametrize("k", ["5", 2.5, None, (3, "4")])
def test_k_that_is_no_number(toy, k):
    with pytest.raises(ValueError, match="k must be a number of at least 1, or several"):
        evaluate_whitebox(*toy, {}, k=k, bootstrap=0)


def test_k_from_numpy(toy):
    result = evaluate_whitebox(*toy, {}, k=np.arange(3, 5), bootstrap=0)
    assert {record.k for record in result.records} == {3, 4} and {type(r.k) for r in result.records} == {int}
    assert type(KNNClassifier(k=np.int64(4)).fit(toy[1]).k) is int
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got True"):
        KNNClassifier(k=True)


def test_a_bank_that_is_no_table(toy):
    with pytest.raises(TypeError, match="the bank must be an EmbeddingTable, as embed gives, got ndarray"):
        KNNClassifier(k=2).fit(toy[1].z)


def test_noise_of_two_norms_with_one_eps_is_kept_apart(toy):
    attacks = {"linf": PGD(Linf(0.5), step_size=0.1, steps=1), "l2": PGD(L2(0.5), step_size=0.1, steps=1)}
    result = evaluate_whitebox(*toy, attacks, k=3, bootstrap=0, noise=True)
    assert list(result.tables) == ["clean", "noise-0.5", "noise-L2-0.5", "linf", "l2"]
    assert [
        next(r.attack for r in result.records if r.attack_name == name)[:21] for name in ("noise-0.5", "noise-L2-0.5")
    ] == [
        "RandomNoise(threat=Li",
        "RandomNoise(threat=L2",
    ]


def test_eps_of_a_float32_tensor_reads_as_the_float_does():
    for eps in (0.1, 0.2, 0.4, 8 / 255, 51 / 255, 0.05):
        assert eps_text(torch.tensor([eps])) == eps_text(eps)
    assert eps_text(torch.tensor([0.1, 0.2])) == "0.1..0.2"
