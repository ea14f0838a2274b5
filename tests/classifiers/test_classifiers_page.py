"""The page about classifiers: its Python runs and does what it says."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from hsat.types import Classifier, FittedClassifier

PAGE = Path(__file__).resolve().parents[2] / "docs" / "classifiers.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names: dict = {"__name__": "page"}
    text = PAGE.read_text()
    with contextlib.chdir(tmp_path_factory.mktemp("page")), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start(1))
            exec(compile("\n" * line + found[1], str(PAGE), "exec", dont_inherit=True), names)
    return names


def accuracy(result, name):
    (value,) = (r.value for r in result.records if (r.attack_name, r.level, r.metric) == (name, "patch", "accuracy"))
    return value


def test_the_page_runs(page):
    assert torch.equal(page["again"].weight, page["probe"].weight)
    assert list(page["mixed"].scores["PGD-8"]) == [10, *map(repr, page["several"][1:])]
    for name in ("clean", "PGD-8"):
        assert accuracy(page["own"], name) == accuracy(page["plain"], name) == accuracy(page["by_head"], name)
    assert {record.level for record in page["plain"].records} == {"patch"}
    assert accuracy(page["directed"], "PGD-8") < accuracy(page["directed"], "clean")
    own = page["Direction"]()
    assert isinstance(own, Classifier) and isinstance(own.fit(page["bank"]), FittedClassifier)
