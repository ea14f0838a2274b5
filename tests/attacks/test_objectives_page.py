"""docs/objectives.md runs and does what it says."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from hsat.classifiers import KNNClassifier
from hsat.testing import check_feasible

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names = {"__name__": "objectives"}
    with contextlib.chdir(tmp_path_factory.mktemp("page")), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = PAGE.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block.group(1), str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_vote(page):
    x, labels, vote = page["x"], page["labels"], page["vote"]
    knn = KNNClassifier(k=10).fit(page["bank"])
    clean, wrong = (torch.from_numpy(knn.predict(page["net"](v))) != labels for v in (x, page["x_adv"]))
    assert clean.sum() < wrong.sum() and torch.equal(page["fooled"], wrong)
    assert torch.equal(page["quick"].success, vote.success(page["quick"].x_adv))
    assert (page["entropy"](page["x_adv"]) > page["entropy"](x)).all()
    torch.testing.assert_close(page["scores"], torch.from_numpy(knn.predict_proba(page["net"](x))))
    assert page["next_batch"].model is vote.model


def test_guide_worst_of_and_levels(page):
    x, net = page["x"], page["net"]
    similarity = lambda v: torch.nn.functional.cosine_similarity(net(v), page["targets"])
    assert (similarity(page["pulled"]) > similarity(x)).all()
    assert page["strongest"].success.sum() >= page["quick"].success.sum()
    alone = page["attack"].run(x, page["vote"], generator=torch.Generator().manual_seed(0))
    assert (page["judged"].value >= alone.value).all()
    assert page["slide_margin"].wrong(page["turned"]).sum() > page["slide_margin"].wrong(x).sum()
    for name in ("pulled", "turned"):
        check_feasible(page[name], x, page["attack"].threat)


def test_evaluation_and_order(page):
    record = page["result"].records[-1]
    assert (record.target, record.settings["attacked_k"]) == ("decision", 10)
    assert page["same"] > 0.98
