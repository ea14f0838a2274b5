"""docs/slides.md: its blocks run in order, and give what the page says."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hsat.eval import read_records

PAGE = Path(__file__).parents[2] / "docs" / "slides.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names, folder = {"__name__": "slides"}, tmp_path_factory.mktemp("page")
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return names | {"folder": folder}


def test_slide_classifiers(page):
    np.testing.assert_allclose(page["scores"].sum(1), 1)
    bag = torch.randn(5, page["bank"].z.shape[1])
    for name in ("pooled", "own", "attention"):
        assert page[name].logits(bag).shape == (2,)
    assert len(set(page["honest"].fold.tolist())) == 3


def test_attacks_on_slides(page):
    result = page["result"]
    left = [result.accuracy("PGD-4", fraction) for fraction in result.fractions]
    assert result.accuracy("clean", 1.0) >= left[0] >= left[1] >= left[2]
    assert read_records(page["folder"] / "slides.jsonl") == result.records
    assert (page["folder"] / "fractions.png").stat().st_size > 1000
    assert {record.target for record in page["unlabelled"].records} == {"representation"}


def test_a_loop_of_ones_own(page):
    untouched = [number for number in range(len(page["clean"])) if number not in (0, 2)]
    assert torch.equal(page["bag"][untouched], page["clean"][untouched])
    assert not torch.equal(page["bag"][[0, 2]], page["clean"][[0, 2]])
    with torch.no_grad():
        assert float(page["objective"](page["x_adv"])) > float(page["objective"](page["slide"].images[[0, 2]]))
