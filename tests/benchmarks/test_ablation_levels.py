"""The ablation's verdicts: they say what the numbers say, also where the paper's order does not appear."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from hsat.eval import Record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ablation():
    path = ROOT / "benchmarks" / "ablation_levels.py"
    spec = importlib.util.spec_from_file_location("ablation_levels", path)
    module = importlib.util.module_from_spec(spec)
    before = sys.path.copy()
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules[spec.name]


def records_of(ablation, by_method):
    """One record per method, seed, level, condition and metric; values as given for PGD-8, 0.9 otherwise."""
    found = []
    for model, values in by_method.items():
        for seed, value in enumerate(values):
            for level in ablation.PAPER:
                for attack in ("clean", "PGD-4", "PGD-8"):
                    for metric in ("accuracy", "mca"):
                        found.append(
                            Record(
                                model=model,
                                attack="",
                                attack_name=attack,
                                eps="8/255",
                                eps_value=8 / 255,
                                target="features",
                                level=level,
                                metric=metric,
                                value=value if attack == "PGD-8" else 0.9,
                                n=10,
                                k=20,
                                temperature=0.07,
                                seed=seed,
                            )
                        )
    return found


def test_the_paper_order_is_found_where_it_is(ablation):
    values = {"HiDisc": [0.1, 0.1], "HSAT-Patch": [0.4, 0.3], "HSAT-Slide": [0.5, 0.4], "HSAT": [0.6, 0.7]}
    found = ablation.verdicts(records_of(ablation, values), "features", "PGD-8")["patch"]
    assert found["paper_order_of_means"] and found["seeds_in_paper_order"] == 2
    assert found["slide minus patch"] == pytest.approx([0.1, 0.1])
    assert found["patient minus slide"] == pytest.approx([0.1, 0.3])
    assert found["every HSAT variant beats HiDisc"]


def test_another_order_is_said_to_be_another(ablation):
    values = {"HiDisc": [0.5, 0.5], "HSAT-Patch": [0.4, 0.3], "HSAT-Slide": [0.3, 0.4], "HSAT": [0.6, 0.2]}
    judged = ablation.verdicts(records_of(ablation, values), "features", "PGD-8")
    found = judged["slide"]
    assert not found["paper_order_of_means"] and found["seeds_in_paper_order"] == 0
    assert not found["every HSAT variant beats HiDisc"]
    text = " ".join(ablation.sentences(judged, "features", 2))
    assert "NOT the paper's" in text and "0 of 2 seeds" in text and "(paper 50.3 / 55.1 / 57.0)" in text


def test_the_table_gives_mean_and_range(ablation):
    values = {name: [0.25, 0.75] for name in ablation.METHODS}
    lines = ablation.table(records_of(ablation, values), "features")
    assert any("| patch | HSAT |" in line and "50.0 [25.0, 75.0]" in line for line in lines)


def test_every_method_sees_the_same_number_of_images(ablation):
    images = {times * slides * patches for _, times, slides, patches in ablation.METHODS.values()}
    assert images == {4}
