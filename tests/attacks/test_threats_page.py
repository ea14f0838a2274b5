"""docs/threats.md runs, and does what it says."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from hsat.attacks import Linf, to_stains
from hsat.data import srh_to_rgb
from hsat.testing import check_feasible

PAGE = Path(__file__).parents[2] / "docs" / "threats.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names, text = {"__name__": "threats"}, PAGE.read_text()
    with contextlib.chdir(tmp_path_factory.mktemp("threats")), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match.group(1), str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_every_threat_model_moves_what_it_may(page):
    x, found = page["x"], page["found"]
    check_feasible(found["Linf-8"], x, Linf(8 / 255))
    check_feasible(found["channels"], x, page["per_channel"])
    assert torch.equal(found["channels"][:, 0], x[:, 0])
    assert (found["middle"] != x).any()
    assert torch.equal(found["middle"][:, :, ~page["mask"]], x[:, :, ~page["mask"]])
    assert torch.equal(srh_to_rgb(found["raw-8"][:, 1:]), found["raw-8"])
    lit = ((x > 0.1) & (x < 0.8)).all(1)
    change = (to_stains(found["stain"]) - to_stains(x)).movedim(1, -1)[lit].abs()
    assert change[:, :2].max() <= 0.1 + 1e-4 and change[:, 2].max() < 1e-4
    for name, x_adv in found.items():
        assert (page["drift"](x_adv) > 0).all(), name


def test_the_evaluation_takes_them_all(page):
    records = page["result"].records
    attacked = [name for name in page["result"].tables if not name.startswith("noise")]
    assert attacked == ["clean", *page["attacks"], "universal-8"]
    eps = {record.attack_name: record.eps for record in records}
    assert eps["raw-8"] == eps["universal-8"] == eps["Linf-8"] == "8/255"
    assert eps["stain"] == "0.1"
    assert eps["L2"] == "1"
    assert torch.equal(page["again"].delta, page["universal"].delta)
    assert page["universal"].history[-1] > page["universal"].history[0]


def test_budgets(page):
    budget = page["budget"]
    assert len(budget.groups) == len(budget.smallest_fraction) == 2
    assert budget.accuracy(0.0) >= budget.accuracy(0.5) >= budget.accuracy(1.0)
    assert "attack@50%" in page["table"]


def test_files(page):
    export, kept = page["export"], page["kept"]
    assert list(kept) == ["clean", "raw-8", "raw-8 (files)"]
    assert len(export.cohort) == len(page["stored"]) == len(page["result"].tables["clean"])
    assert export.changed > 0.9
