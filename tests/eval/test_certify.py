"""Certified decisions of a half-space, whose smoothed form is known exactly, and what records say of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import CertifyOptions, Scoring, Smoothing, certify, read_records, write_records
from hsat.eval.certificates import ABSTAIN
from hsat.eval.confidence import clopper_pearson_lower
from hsat.report import plot_certified_accuracy
from hsat.types import HierarchicalBatch

scipy_stats = pytest.importorskip("scipy.stats")
NORMAL = scipy_stats.norm
SMOOTHING = Smoothing(sigma=0.25, samples=400, selection=20)
NEAREST, BARE = KNNClassifier(k=1), Scoring(bootstrap=0)


def test_half_space_is_certified_up_to_its_distance_and_not_beyond(half_space, certified):
    """For a half-space theorem 1 is tight: with p_A known, the radius is the distance to the boundary."""
    found, distance = certified.levels["patch"], half_space.distance.abs().numpy()
    sure = found.prediction != ABSTAIN
    assert sure[distance > 0.2].all() and (found.radius[~sure] == 0).all()
    np.testing.assert_array_equal(found.prediction[sure], (half_space.distance < 0).numpy()[sure])
    assert (found.radius <= distance).all()
    # what is lost is what the confidence costs: the bound of the expected count
    share = NORMAL.cdf(distance / SMOOTHING.sigma)
    wanted = [SMOOTHING.sigma * NORMAL.ppf(clopper_pearson_lower(round(p * 400), 400, 0.001)) for p in share]
    np.testing.assert_allclose(found.radius[sure], np.array(wanted)[sure], atol=0.08)


def exact_group_radius(distance: np.ndarray, sigma: float) -> float:
    """Largest r at which moving every patch straight to the boundary leaves the mean vote above one half."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        ahead = NORMAL.cdf((distance - middle) / sigma).mean() > 0.5
        low, high = (middle, high) if ahead else (low, middle)
    return low


def test_groups_of_a_half_space_are_certified_below_the_true_radius(half_space, certified):
    """For two classes and half-spaces the bounds are tight, and the worst attack is known: straight at the boundary."""
    for level, size in (("slide", 5), ("patient", 10)):
        found = certified.levels[level]
        assert len(found) == 40 // size
        for group in range(len(found)):
            distance = half_space.distance[group * size : (group + 1) * size].abs().numpy()
            true = exact_group_radius(distance, SMOOTHING.sigma)
            assert found.radius[group] <= true
            if true > 0.2:
                assert found.radius[group] > 0.45 * true, "not a certificate of nothing"
                assert found.prediction[group] == int(half_space.distance[group * size] < 0)


def test_records_hold_the_curve(certified, tmp_path):
    assert [(r.level, r.eps_value) for r in certified.records] == [
        (level, radius) for level in ("patch", "slide", "patient") for radius in (0, 0.1, 0.3, 9)
    ]
    for record in certified.records:
        found = certified.levels[record.level]
        right = [
            p == y and radius > record.eps_value
            for p, y, radius in zip(found.prediction, found.label, found.radius, strict=True)
        ]
        assert record.metric == "certified_accuracy" and record.value == sum(right) / len(right) == found.accuracy(
            record.eps_value
        )
        assert record.attack == "certificate: " + repr(SMOOTHING) and record.attack_name.startswith("certified-")
        assert (record.n, record.forwards, record.target) == (len(found), 420, "any")
        assert record.chance == 0.5, "half of the images lie on each side; a constant decision holds at every radius"
    curve = [record.value for record in certified.records[:4]]
    assert curve == sorted(curve, reverse=True) and curve[0] > 0.8 > curve[2] > curve[3] == 0
    assert all((r.low is None) == ("no_interval" in r.settings) for r in certified.records)
    assert certified.records[3].low == 0 and certified.records[3].settings["interval"].startswith("exact bound")
    assert read_records(write_records(tmp_path / "r.jsonl", certified.records)) == certified.records


def test_batches_do_not_matter_and_seeds_do(half_space, certified):
    def run(smoothing=SMOOTHING, **options):
        queries = half_space.batches(**options)
        return certify(half_space.encoder, half_space.bank, queries, smoothing, classifier=NEAREST, scoring=BARE).counts

    np.testing.assert_array_equal(run(size=7), certified.counts)
    np.testing.assert_array_equal(run(dataclasses.replace(SMOOTHING, chunk=31)), certified.counts)
    assert (run(dataclasses.replace(SMOOTHING, seed=1)) != certified.counts).any()
    assert not np.array_equal(certified.selected / 20, certified.counts / 400)


def test_toy_encoder_with_a_clean_and_a_noisy_bank(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(18,))
    smoothing = Smoothing(sigma=0.03, samples=60, selection=10)
    options = dict(classifier=KNNClassifier(k=15), scoring=Scoring(bootstrap=10))
    for noisy in (False, True):
        chosen = CertifyOptions(pooling="vote", noisy_bank=noisy)
        found = certify(toy_encoder, bank, queries, smoothing, options=chosen, **options)
        assert found.levels["patch"].accuracy(0.0) > 0.7
        assert found.records[0].settings["noisy_bank"] is noisy and found.records[0].settings["how"] == "vote"
        assert found.records[0].low is not None
    assert toy_encoder.training
    clean = embed(toy_encoder, bank)
    assert np.abs(found.classifier.table.z - clean.z).max() > 1e-3
    with pytest.raises(ValueError, match="noisy_bank=True needs the bank's images"):
        certify(toy_encoder, clean, queries, smoothing, options=CertifyOptions(noisy_bank=True), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"radii": (0.1, -1)}, "radii .*-1"), ({"radii": ()}, "radii"), ({"pooling": "paper"}, "'paper'")],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        CertifyOptions(**options)


def test_bad_calls(half_space):
    def run(bank=half_space.bank, queries=None):
        queries = half_space.batches() if queries is None else queries
        return certify(half_space.encoder, bank, queries, Smoothing(sigma=1, samples=1), classifier=NEAREST)

    with pytest.raises(ValueError, match="one class only"):
        run(bank=dataclasses.replace(half_space.bank, label=np.zeros(2, dtype=int)))
    with pytest.raises(ValueError, match="repeat patch ids"):
        run(queries=type(half_space.batches())([*half_space.batches(), *half_space.batches()]))
    with pytest.raises(ValueError, match="gave no batches"):
        run(queries=type(half_space.batches())())
    two = half_space.batches(size=40)
    two[0] = HierarchicalBatch(
        *(getattr(two[0], n) for n in ("images", "patch")), *[torch.zeros(40).long()] * 2, two[0].label
    )
    records = run(queries=two).records  # a slide of two classes: no level but that of the patches
    assert {record.level for record in records} == {"patch"}
    assert all("no slide level: patches of 1 of" in " ".join(record.flags) for record in records)


def test_the_picture_of_the_curve(certified, tmp_path):
    from PIL import Image

    with Image.open(plot_certified_accuracy(certified.records, tmp_path / "plots" / "curve.png")) as picture:
        assert picture.size[0] > picture.size[1] > 200
    with pytest.raises(ValueError, match="none of the 0 records has metric 'certified_accuracy'"):
        plot_certified_accuracy([], tmp_path / "none.png")


def test_the_page_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "honesty.md"
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
    assert names["diagnosis"].flags == () and names["diagnosis"].measures["images"] == 12
    assert "certified-0.05" in names["table"]
    assert not names["check"].violated
