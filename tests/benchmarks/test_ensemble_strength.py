"""The comparison of the ensemble with other libraries' attacks: it can lose, and says what was not compared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hsat.attacks import Linf

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "ensemble_strength.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("ensemble_strength", FILE)
    module = sys.modules["ensemble_strength"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ensemble_strength"]


class Bright(nn.Module):
    """Says whether an image is brighter than grey."""

    def forward(self, images):
        mean = images.mean((1, 2, 3)) - 0.5
        return torch.stack((-mean, mean), 1)


@pytest.fixture
def problem(benchmark):
    x = torch.full((3, 3, 4, 4), 0.49)
    return benchmark.Problem(Bright(), x, torch.zeros(3, dtype=torch.int64), Linf(4 / 255), x, 0)


def test_results_are_judged_after_projection_and_passes_are_counted(benchmark, problem):
    def outside(given):
        given.model(given.x.clone().requires_grad_())
        with torch.no_grad():
            given.model(given.x[:1])
        return torch.stack((given.x[0] + 1, given.x[1], given.x[2] + 3 / 255))

    result = benchmark.measure(problem, problem.model, outside)
    assert result["robust"] == [False, True, False]
    assert result["outside the ball"] == 1 and (result["forwards"], result["backwards"]) == (4, 3)


def test_a_part_is_kept_and_a_missing_package_is_said(benchmark, problem, monkeypatch, tmp_path):
    calls = []
    attack = lambda given: calls.append(1) or given.x
    attacks = {"mine": ("hsat", attack), "theirs": ("no_such_package", attack), "never": ("hsat", attack)}
    monkeypatch.setattr(benchmark, "ATTACKS", attacks)
    measure = lambda name, finished: benchmark.measured(
        problem, problem.model, name, tmp_path / f"{name}.json", finished=finished
    )
    assert measure("mine", False) == measure("mine", True) and len(calls) == 1
    assert measure("theirs", False) == {"missing": "no_such_package is not installed"}
    assert measure("never", True) == {"missing": "not run"}


def test_the_ensemble_can_lose(benchmark):
    about = {"decision": "knn", "encoder": "hsat", "ball": "Linf 4/255", "patches": 10, "clean": 0.9}
    numbers = {"seconds": 2.0, "forwards": 7, "backwards": 5, "outside the ball": 0}
    lost = {"it breaks and hsat does not": 3, "hsat breaks and it does not": 1, "share of AutoAttack's time": 1.0}
    rows = [
        about | {"attack": benchmark.OURS, "left": 5} | numbers | {"it breaks and hsat does not": 0},
        about | {"attack": benchmark.AUTO, "left": 3} | numbers | lost,
        about | {"attack": "ART", "missing": "art is not installed"},
    ]
    text = benchmark.document(rows, {"machine": "one"})
    assert "breaks and hsat's ensemble does not: 3, in 1 comparisons." in text
    assert "Not compared: ART (art is not installed, 1 times)." in text
    assert "| hsat | Linf 4/255 | AutoAttack (standard) | 30.0 | 3 | 1 | 2.0 | 1.00 | 7 | 5 | 0 |" in text
    assert "Clean: hsat 90.0 %." in text and "| ART | art is not installed |" in text
