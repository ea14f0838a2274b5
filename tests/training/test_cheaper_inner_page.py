"""docs/cheaper_inner.md runs and does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hsat.attacks import FFGSM, PGD
from hsat.testing import check_feasible

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("the_documents", ROOT / "tests" / "test_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute(ROOT / "docs" / "cheaper_inner.md", tmp_path_factory.mktemp("page"))


def test_the_safeguard_decided(page):
    assert page["gap"].strong > page["gap"].clean
    assert all(isinstance(attack, FFGSM if page["gap"].share >= 0.5 else PGD) for attack in page["used"])


def test_replays_move_and_stay_in_the_ball(page):
    assert len(page["seen"]) == 4
    for x_adv in page["seen"]:
        check_feasible(x_adv, page["batch"].images, page["ball"])
    assert not torch.equal(page["seen"][0], page["seen"][3])


def test_the_second_epoch_begins_elsewhere(page):
    first, second = page["warm"]
    assert len(page["starts"]) == 16
    assert not torch.equal(first, second)
    check_feasible(second, page["batch"].images, page["ball"])
