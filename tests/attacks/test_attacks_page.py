"""docs/attacks.md runs, and does what it says."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

import hsat
from hsat.attacks import Linf, RandomNoise
from hsat.testing import check_feasible

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names, text = {"__name__": "attacks"}, PAGE.read_text()
    with contextlib.chdir(tmp_path_factory.mktemp("attacks")), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match.group(1), str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_apgd(page):
    x, threat = page["x"], Linf(2 / 255)
    for name in ("on_loss", "on_ratio"):
        check_feasible(page[name].x_adv, x, threat)
    assert (page["on_loss"].value > page["on_loss"].start_value).all()
    assert (page["on_loss"].forwards, page["on_loss"].backwards) == (2 * 21, 2 * 20)
    assert torch.equal(page["on_ratio"].success, page["net"](page["on_ratio"].x_adv).argmax(1) != page["labels"])


def test_transfer_attacks_beat_noise_on_their_own_model(page):
    drift = hsat.feature_drift(page["net"], page["x"])
    noisy = drift(RandomNoise(Linf(8 / 255))(page["x"], drift, generator=torch.Generator().manual_seed(5)))
    for name in ("ahead", "resized", "blurred", "tuned"):
        check_feasible(page[name], page["x"], Linf(8 / 255))
        assert (drift(page[name]) > noisy).all(), name


def test_scores_only(page):
    found = page["found"]
    assert found.backwards == 0
    assert found.forwards <= 100
    assert torch.equal(found.success, found.value > 0)


def test_the_page_names_every_search(page):
    words = set(re.findall(r"\w+", PAGE.read_text()))
    assert {"APGD", "NIFGSM", "DIFGSM", "TIFGSM", "VMIFGSM", "Square", "margin", "dlr"} <= words
