"""Functions around modules in training mode: their embeddings depend on the batch, or on the call, and are flagged."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hsat.attacks import Linf, RandomNoise
from hsat.classifiers import KNNClassifier
from hsat.eval import RunOptions, Scoring, evaluate_classifier, evaluate_drift, evaluate_whitebox
from hsat.eval.batch_dependence import describe_instability

RUN = RunOptions(noise=False)
ATTACKS = {"noise": RandomNoise(Linf(8 / 255))}


@pytest.mark.parametrize("kind", ["batchnorm", "dropout"])
def test_a_function_around_a_module_in_training_mode_is_flagged(toy_batches, kind):
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(8) if kind == "batchnorm" else torch.nn.Dropout(0.5)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer, torch.nn.ReLU(), torch.nn.Flatten())
    bank, queries = toy_batches(seed=0, sizes=(24,)), toy_batches(seed=1, sizes=(12,), first_id=1000)
    run, attacks = RunOptions(noise=False), {"noise": RandomNoise(Linf(8 / 255))}

    def evaluate():
        return evaluate_whitebox(
            module.forward,
            bank,
            queries,
            attacks,
            classifier=KNNClassifier(k=3),
            scoring=Scoring(bootstrap=0),
            run=run,
        )

    module.train()
    state = torch.random.get_rng_state()
    words = "others of its batch" if kind == "batchnorm" else "from call to call"
    with pytest.warns(UserWarning, match=f"{words}.*call .eval.*training mode"):
        result = evaluate()
    if kind == "batchnorm":  # dropout draws in the evaluation itself
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(any(words in flag for flag in record.flags) for record in result.records)
    module.eval()
    assert not any("training mode" in flag for record in evaluate().records for flag in record.flags)


def test_loaders_of_every_kind_are_asked_and_iterators_are_left_alone():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten()).train()
    pairs = TensorDataset(images, torch.tensor([0, 1] * 3))
    for loader in ([images], [(images,)], DataLoader(pairs, batch_size=3)):
        with pytest.warns(UserWarning, match="others of its batch"):
            evaluate_drift(norm.forward, loader, ATTACKS, run=RUN)
    with pytest.warns(UserWarning, match="others of its batch"):
        evaluate_classifier(lambda x: norm(x)[:, :2], DataLoader(pairs, batch_size=3), ATTACKS, run=RUN)
    result = evaluate_drift(lambda x: x.flatten(1), iter([images]), ATTACKS, run=RUN)
    assert result.records[0].n == 6 and result.records[0].flags == ()


def test_a_single_image_in_batch_norm_is_told_and_other_errors_are_not():
    norm = torch.nn.BatchNorm1d(4).train()
    assert "others of its batch" in describe_instability(lambda x: norm(x.flatten(1)), torch.rand(2, 1, 2, 2))
    assert describe_instability(lambda x: x @ torch.ones(7), torch.rand(2, 1, 2, 2)) == ""


def test_rounding_is_no_instability():
    scale = iter((1, 1 + 1e-4, 1 + 1e-4))
    assert describe_instability(lambda x: next(scale) * x.flatten(1), torch.rand(4, 1, 2, 2)) == ""
    scale = iter((1, 1.02, 1.02))
    assert "by 2.0% of their length" in describe_instability(
        lambda x: next(scale) * x.flatten(1), torch.rand(4, 1, 2, 2)
    )
