"""docs/other_libraries.md runs with what is installed, and does what it says."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch

from hsat.attacks import Linf
from hsat.testing import check_feasible

PAGE = Path(__file__).parents[2] / "docs" / "other_libraries.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names, text = {"__name__": "other_libraries"}, PAGE.read_text()
    with (
        contextlib.chdir(tmp_path_factory.mktemp("other_libraries")),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the libraries', on import
        torch.manual_seed(0)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match.group(1), str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_their_attacks_are_measured_beside_ours(page):
    result, count = page["result"], 1 + sum(page["there"].values())
    names = ["clean", "noise-8", "PGD-8", "torchattacks PGD", "foolbox PGD", "ART FGSM"]
    assert list(result.tables) == [name for name in names if name in result.tables] and len(result.tables) == 2 + count
    accuracy = {r.attack_name: r for r in result.records if (r.level, r.metric) == ("patch", "accuracy")}
    for name in page["attacks"]:
        assert accuracy[name].value < accuracy["clean"].value, name
        assert not any("left the threat model" in flag for flag in accuracy[name].flags)


def test_our_decision_is_attacked_by_them(page):
    images, labels, model = page["images"], page["labels"], page["model"]
    assert len(page["broken"]) == 1 + sum(page["there"].values())
    before = (model(images).argmax(1) == labels).float().mean()
    for name, x_adv in page["broken"].items():
        check_feasible(Linf(8 / 255).project(x_adv.detach(), images), images, Linf(8 / 255))
        assert (x_adv - images).abs().max() < 8 / 255 + 1e-6
        assert (model(x_adv).argmax(1) == labels).float().mean() < before, name
