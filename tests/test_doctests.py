"""The examples in the package's docstrings run and give what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import hsat

ROOT = Path(hsat.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITH_EXAMPLES = {
    "hsat.attacks.apgd.APGD",
    "hsat.attacks.ensemble.AttackEnsemble",
    "hsat.attacks.feature_matching.match_features",
    "hsat.attacks.margins.dlr",
    "hsat.attacks.margins.margin",
    "hsat.attacks.momentum.DIFGSM",
    "hsat.attacks.momentum.NIFGSM",
    "hsat.attacks.momentum.TIFGSM",
    "hsat.attacks.momentum.VMIFGSM",
    "hsat.attacks.natural_shift.NaturalShift",
    "hsat.attacks.objectives.classification",
    "hsat.attacks.objectives.feature_drift",
    "hsat.attacks.objectives.hierarchical",
    "hsat.attacks.pgd.BIM",
    "hsat.attacks.pgd.FFGSM",
    "hsat.attacks.pgd.FGSM",
    "hsat.attacks.pgd.MIFGSM",
    "hsat.attacks.pgd.PGD",
    "hsat.attacks.pgd.RandomNoise",
    "hsat.attacks.square.Square",
    "hsat.attacks.threat.L2",
    "hsat.attacks.threat.Linf",
    "hsat.classifiers",  # KNNClassifier.fit
    "hsat.classifiers.decision_model.DecisionModel",
    "hsat.classifiers.head.Head",
    "hsat.classifiers.linear_probe.LinearProbe",
    "hsat.classifiers.nearest_centroid.NearestCentroid",
    "hsat.embedding.embed",
    "hsat.eval",  # evaluate_whitebox, evaluate_budget, evaluate_transfer and their options
    "hsat.eval.classifier.evaluate_classifier",
    "hsat.eval.metrics.metrics",
    "hsat.eval.pooling.pool",
    "hsat.losses.hidisc.HiDiscLoss",
    "hsat.losses.supcon.supcon_loss",
    "hsat.models",  # build_encoder, save_encoder, load_encoder, load_checkpoint
    "hsat.models.frozen.frozen",
    "hsat.models.wrapper.wrap_encoder",
    "hsat.recipes.read_recipe",
    "hsat.training",  # Trainer, held_out_validation
    "hsat.training.config.TrainConfig",
    "hsat.training.schedules.epsilon_schedule",
    "hsat.training.step.adversarial_step",
    "hsat.types.batch.HierarchicalBatch",
    "hsat.types.batch.Levels",
    "hsat.types.table.EmbeddingTable",
}


def module_name(path: Path) -> str:
    return ".".join(("hsat", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def collect() -> dict[str, doctest.DocTest]:
    """The docstrings with examples, by name; modules without any are not imported."""
    files = [path for path in sorted(ROOT.rglob("*.py")) if ">>>" in path.read_text()]
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for path in files for test in finder.find(importlib.import_module(module_name(path)))]
    return {test.name: test for test in tests if test.examples}


TESTS = collect()


@pytest.mark.parametrize("name", TESTS)
def test_the_example_gives_what_it_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    shown: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner.run(TESTS[name], out=shown.append)
    assert runner.failures == 0, "".join(shown)
    assert not list(tmp_path.iterdir())


def test_the_main_public_functions_have_an_example():
    assert set(TESTS) >= WITH_EXAMPLES


def test_a_wrong_example_would_be_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(wrong, out=lambda text: None)
    assert runner.failures == 1
