"""Certificates against known answers (a half-space), against attacks, and against themselves times three."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hsat.eval.certification.certificates import ABSTAIN, group_radius, patch_radius
from hsat.eval.certification.smoothing import count_votes, gaussian_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsat.eval import (
    Smoothing,
    certify,
    challenge_certificates,
    embed,
    plot_certified_accuracy,
    read_records,
    write_records,
)
from hsat.eval.statistics.binomial import binomial_tail, clopper_pearson_lower, clopper_pearson_upper
from hsat.types import EmbeddingTable, HierarchicalBatch

scipy_stats = pytest.importorskip("scipy.stats")
NORMAL = scipy_stats.norm
SMOOTH = Smoothing(sigma=0.25, samples=400, selection=20)


class HalfSpace:
    """An encoder whose kNN vote is the sign of w . (x - 1/2) with |w| = 1: its smoothed form is known exactly."""

    def __init__(self) -> None:
        w = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.w = w / w.norm()

    def __call__(self, images: Tensor) -> Tensor:
        side = self.side(images)
        return torch.stack((side, torch.full_like(side, 0.3)), 1).float()

    def side(self, images: Tensor) -> Tensor:
        """Signed distance of each image to the decision boundary, (n,)."""
        return ((images.double() - 0.5) * self.w).sum((1, 2, 3))

    def at(self, distance: Tensor) -> Tensor:
        """Images at these signed distances, (n, 3, 4, 4), well inside [0, 1]."""
        images = torch.rand(len(distance), 3, 4, 4, generator=torch.Generator().manual_seed(1)).double() * 0.2 + 0.4
        return (images + (distance - self.side(images))[:, None, None, None] * self.w).float()


class Loader(list):
    class dataset:
        class_names = ("above", "below")
        split = "val"


@pytest.fixture(scope="module")
def encoder() -> HalfSpace:
    return HalfSpace()


@pytest.fixture(scope="module")
def bank() -> EmbeddingTable:
    one = np.arange(2)
    return EmbeddingTable(np.array([[1, 0.3], [-1, 0.3]]), one, one, one, one, ("above", "below"))


DISTANCE = torch.cat((torch.linspace(0.02, 0.6, 20), -torch.linspace(0.02, 0.6, 20))).double()


def batches(encoder: HalfSpace, *, size: int = 16) -> Loader:
    """40 images in 8 slides and 4 patients; the label is the side."""
    images, index = encoder.at(DISTANCE), torch.arange(40)
    whole = (images, index + 100, index // 5, index // 10, (DISTANCE < 0).long())
    return Loader(HierarchicalBatch(*(part[at : at + size] for part in whole)) for at in range(0, 40, size))


@pytest.fixture(scope="module")
def certified(encoder, bank):
    return certify(encoder, bank, batches(encoder), smoothing=SMOOTH, k=1, bootstrap=20, radii=(0, 0.1, 0.3, 9))


# --- the binomial ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-7, 0.4), st.floats(0, 1))
def test_tails_and_bounds_are_those_of_scipy(n, share, alpha, p):
    count = round(share * n)
    assert binomial_tail(count, n, p) == pytest.approx(scipy_stats.binom.sf(count - 1, n, p), rel=1e-8, abs=1e-300)
    low, high = clopper_pearson_lower(count, n, alpha), clopper_pearson_upper(count, n, alpha)
    exact = scipy_stats.beta.ppf(alpha, count, n - count + 1) if count else 0.0
    assert low == pytest.approx(exact, abs=1e-10) and low <= count / n <= high
    assert high == pytest.approx(scipy_stats.beta.isf(alpha, count + 1, n - count) if count < n else 1.0, abs=1e-10)
    if count:
        assert binomial_tail(count, n, low) <= alpha * (1 + 1e-9), "never above the bound"


def test_bounds_of_all_and_of_many():
    assert clopper_pearson_lower(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000), abs=1e-12)
    expected = scipy_stats.beta.ppf(1e-6, 99_000, 1001)
    assert clopper_pearson_lower(99_000, 100_000, 1e-6) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("count", "n", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 0.5)])
def test_bad_bounds_are_refused(count, n, alpha):
    with pytest.raises(ValueError, match=r"must lie in|a bound needs"):
        clopper_pearson_lower(count, n, alpha)
    with pytest.raises(ValueError, match="p is a probability"):
        binomial_tail(1, 5, 1.5)


# --- votes under noise --------------------------------------------------------------------------------------------


def test_noise_is_of_the_draw_and_votes_are_counted_once(encoder):
    """Counts equal a loop over images and draws, whatever the chunk; rows sum to the draws."""
    images, patch = encoder.at(DISTANCE[:6] / 5), torch.arange(6) + 7
    expected = np.zeros((6, 2), dtype=int)
    for row in range(6):
        for draw in range(3, 20):
            noise = gaussian_noise((3, 4, 4), int(patch[row]), range(draw, draw + 1), sigma=0.5, seed=2)
            expected[row, int(encoder.side(images[row : row + 1] + noise)[0] < 0)] += 1
    assert len(np.unique(expected[:, 0])) > 1
    for chunk in (1, 4, 17, 50, 1000):
        widths = []

        def vote(noisy, widths=widths):
            widths.append(len(noisy))
            return (encoder.side(noisy) < 0).long().numpy()

        found = count_votes(vote, images, patch, classes=2, draws=range(3, 20), sigma=0.5, seed=2, chunk=chunk)
        np.testing.assert_array_equal(found, expected)
        assert max(widths) <= chunk and sum(widths) == 6 * 17


def test_noise_is_gaussian_and_not_clipped():
    noise = gaussian_noise((3, 8, 8), 5, range(200), sigma=0.5, seed=0)
    assert scipy_stats.kstest(noise.flatten().numpy() / 0.5, "norm").pvalue > 0.01
    assert not torch.equal(noise, gaussian_noise((3, 8, 8), 5, range(200), sigma=0.5, seed=1))
    assert torch.equal(noise[40:], gaussian_noise((3, 8, 8), 5, range(40, 200), sigma=0.5, seed=0))
    seen = []
    count_votes(
        lambda v: seen.append(v) or np.zeros(len(v), dtype=int),
        torch.ones(1, 3, 8, 8),
        torch.tensor([5]),
        classes=2,
        draws=range(200),
        sigma=0.5,
        seed=0,
        chunk=64,
    )
    assert torch.equal(torch.cat(seen), 1 + noise)


# --- patches ------------------------------------------------------------------------------------------------------


def test_radius_of_counts_known_by_hand():
    """p_A from all of 100 draws is alpha^(1/100); half of them is no majority; the choice comes from other draws."""
    selected = np.array([[9, 1, 0], [9, 1, 0], [1, 9, 0]])
    counts = np.array([[100, 0, 0], [50, 50, 0], [100, 0, 0]])
    prediction, radius = patch_radius(selected, counts, sigma=0.5, alpha=0.001)
    assert prediction.tolist() == [0, ABSTAIN, ABSTAIN]
    np.testing.assert_allclose(radius, [0.5 * NORMAL.ppf(0.001**0.01), 0, 0], atol=1e-9)


def test_half_space_is_certified_up_to_its_distance_and_not_beyond(certified):
    """For a half-space theorem 1 is tight: with p_A known, the radius is the distance to the boundary."""
    found, distance = certified.levels["patch"], DISTANCE.abs().numpy()
    sure = found.prediction != ABSTAIN
    assert sure[distance > 0.2].all() and (found.radius[~sure] == 0).all()
    np.testing.assert_array_equal(found.prediction[sure], (DISTANCE < 0).numpy()[sure])
    assert (found.radius <= distance).all()
    # what is lost is what the confidence costs: the bound of the expected count
    share = NORMAL.cdf(distance / SMOOTH.sigma)
    wanted = [SMOOTH.sigma * NORMAL.ppf(clopper_pearson_lower(round(p * 400), 400, 0.001)) for p in share]
    np.testing.assert_allclose(found.radius[sure], np.array(wanted)[sure], atol=0.08)


def test_certificates_fail_no_more_often_than_they_say():
    """From exact binomial counts at p = 0.6, the radius exceeds the true one with a probability of at most alpha."""
    rng, alpha, p = np.random.default_rng(0), 0.05, 0.6
    counts = rng.binomial(200, p, size=4000)
    _, radius = patch_radius(np.tile([1, 0], (4000, 1)), np.stack((counts, 200 - counts), 1), sigma=1.0, alpha=alpha)
    failures = int((radius > NORMAL.ppf(p)).sum())
    assert 0 < failures and binomial_tail(failures, 4000, alpha) > 0.001


# --- slides and patients ------------------------------------------------------------------------------------------


def exact_group_radius(distance: np.ndarray, sigma: float) -> float:
    """Largest r at which moving every patch straight to the boundary leaves the mean vote above one half."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        ahead = NORMAL.cdf((distance - middle) / sigma).mean() > 0.5
        low, high = (middle, high) if ahead else (low, middle)
    return low


def test_groups_of_a_half_space_are_certified_below_the_true_radius(certified):
    """For two classes and half-spaces the bounds are tight, and the worst attack is known: straight at the boundary."""
    for level, size in (("slide", 5), ("patient", 10)):
        found = certified.levels[level]
        assert len(found) == 40 // size
        for group in range(len(found)):
            distance = DISTANCE[group * size : (group + 1) * size].abs().numpy()
            true = exact_group_radius(distance, SMOOTH.sigma)
            assert found.radius[group] <= true
            if true > 0.2:
                assert found.radius[group] > 0.45 * true, "not a certificate of nothing"
                assert found.prediction[group] == int(DISTANCE[group * size] < 0)


@pytest.mark.parametrize("how", ["mean", "vote"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_group_certificates_are_sound(how, data):
    """With bounds that hold, no allowed shift of the patches' probabilities changes the decision inside the radius.

    The probabilities are drawn inside the confidence bounds, the attack is the worst that the lemma allows: the
    decision's class falls, one rival rises.
    """
    m, classes, n, sigma = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 4)), 200, 0.5
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    truth = rng.dirichlet(np.r_[4.0, np.full(classes - 1, 0.4)], size=m)
    counts = np.array([rng.multinomial(n, row) for row in truth])
    share = counts / n  # lies inside its own bounds
    winner, radius = group_radius(counts, counts, sigma=sigma, alpha=0.01, how=how)
    if winner == ABSTAIN:
        assert radius == 0
        return
    for rival in set(range(classes)) - {winner}:
        for step in (0.0, 0.5, 1.0):
            shift = step * radius / sigma
            own = NORMAL.cdf(NORMAL.ppf(share[:, winner]) - shift)
            other = np.minimum(NORMAL.cdf(NORMAL.ppf(share[:, rival]) + shift), 1 - own)
            if how == "mean":
                assert own.mean() > other.mean()
            else:  # a patch whose own class may fall to one half may vote for the rival
                assert (own > 0.5).sum() > (own <= 0.5).sum()


def test_votes_of_patches_by_hand():
    """Three certified patches for class 0 and two lost ones: the majority ends where the first of the three goes."""
    full, half = [1000, 0, 0], [500, 500, 0]
    counts = np.array([full, full, [990, 10, 0], half, half])
    winner, radius = group_radius(counts, counts, sigma=1.0, alpha=0.001, how="vote")
    expected = NORMAL.ppf(clopper_pearson_lower(990, 1000, 0.001 / 5))
    assert winner == 0 and radius == pytest.approx(expected, abs=1e-9)
    assert group_radius(counts[:4], counts[:4], sigma=1.0, alpha=0.001, how="vote")[0] == 0
    assert group_radius(counts[2:], counts[2:], sigma=1.0, alpha=0.001, how="vote") == (ABSTAIN, 0.0)
    with pytest.raises(ValueError, match="unknown pooling 'paper'"):
        group_radius(counts, counts, sigma=1.0, alpha=0.001, how="paper")
    with pytest.raises(ValueError, match="at least two classes"):
        group_radius(counts[:, :1], counts[:, :1], sigma=1.0, alpha=0.001, how="mean")


def test_a_single_patch_and_its_mean_by_hand():
    """One patch, two classes: bounds at alpha / 2 each, and the margin l - (1 - l) ends at l = 1/2."""
    counts = np.array([[90, 10]])
    winner, radius = group_radius(counts, counts, sigma=0.3, alpha=0.01, how="mean")
    assert winner == 0
    assert radius == pytest.approx(0.3 * NORMAL.ppf(clopper_pearson_lower(90, 100, 0.005)), abs=1e-9)


# --- attacks never beat certificates ------------------------------------------------------------------------------


def test_no_attack_beats_a_certificate_and_a_wrong_one_is_caught(encoder, certified):
    options = dict(steps=5, copies=4, samples=300)
    honest = challenge_certificates(encoder, certified, batches(encoder), **options)
    assert honest.tested == int((certified.levels["patch"].prediction != ABSTAIN).sum()) > 25
    assert not honest.refuted and honest.changed <= 1
    wrong = challenge_certificates(encoder, certified, batches(encoder), inflate=3.0, **options)
    assert wrong.refuted and wrong.changed > 0.5 * wrong.tested


def test_the_challenge_would_find_a_boundary_crossed_by_a_hair(encoder, certified, bank):
    """Radii of the true distance times 1.3 are wrong by little: an attack that is any good still shows it."""
    patch = certified.levels["patch"]
    boasting = dataclasses.replace(patch, radius=DISTANCE.abs().numpy(), prediction=(DISTANCE < 0).long().numpy())
    claimed = dataclasses.replace(certified, levels={"patch": boasting})
    options = dict(steps=10, copies=8, samples=1000, share=1.0)
    assert not challenge_certificates(encoder, claimed, batches(encoder), share=0.9, steps=10, samples=300).refuted
    assert challenge_certificates(encoder, claimed, batches(encoder), inflate=1.5, **options).refuted


def test_limits_and_strangers_of_the_challenge(encoder, certified):
    found = challenge_certificates(encoder, certified, batches(encoder), limit=3, steps=1, copies=1, samples=50)
    assert found.tested == 3
    other = batches(encoder)
    other[0] = HierarchicalBatch(other[0].images, other[0].patch + 999, other[0].slide, other[0].patient)
    with pytest.raises(ValueError, match=r"patch 1\d\d\d was not certified"):
        challenge_certificates(encoder, certified, other, steps=1)
    nothing = dataclasses.replace(certified.levels["patch"], prediction=np.full(40, ABSTAIN))
    with pytest.raises(ValueError, match="no patch is certified"):
        challenge_certificates(encoder, dataclasses.replace(certified, levels={"patch": nothing}), batches(encoder))


# --- records and callers ------------------------------------------------------------------------------------------


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
        assert record.attack == "certificate: " + repr(SMOOTH) and record.attack_name.startswith("certified-")
        assert (record.n, record.forwards, record.target) == (len(found), 420, "any")
    curve = [record.value for record in certified.records[:4]]
    assert curve == sorted(curve, reverse=True) and curve[0] > 0.8 > curve[2] > curve[3] == 0
    assert all((r.low is None) == ("no_interval" in r.settings) for r in certified.records)
    assert certified.records[3].low == 0 and certified.records[3].settings["interval"].startswith("exact bound")
    assert read_records(write_records(tmp_path / "r.jsonl", certified.records)) == certified.records


def test_batches_do_not_matter_and_seeds_do(encoder, bank, certified):
    def run(smoothing=SMOOTH, **options):
        return certify(encoder, bank, batches(encoder, **options), smoothing=smoothing, k=1, bootstrap=0).counts

    np.testing.assert_array_equal(run(size=7), certified.counts)
    np.testing.assert_array_equal(run(dataclasses.replace(SMOOTH, chunk=31)), certified.counts)
    assert (run(dataclasses.replace(SMOOTH, seed=1)) != certified.counts).any()
    assert not np.array_equal(certified.selected / 20, certified.counts / 400)


def test_toy_encoder_with_a_clean_and_a_noisy_bank(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(18,))
    smoothing = Smoothing(sigma=0.03, samples=60, selection=10)
    options = dict(smoothing=smoothing, k=15, bootstrap=10, how="vote")
    for noisy in (False, True):
        found = certify(toy_encoder, bank, queries, noisy_bank=noisy, **options)
        assert found.levels["patch"].accuracy(0.0) > 0.7
        assert found.records[0].settings["noisy_bank"] is noisy and found.records[0].settings["how"] == "vote"
        assert found.records[0].low is not None
    assert toy_encoder.training
    clean = embed(toy_encoder, bank)
    assert np.abs(found.knn.table.z - clean.z).max() > 1e-3
    with pytest.raises(ValueError, match="noisy_bank=True needs the bank's images"):
        certify(toy_encoder, clean, queries, noisy_bank=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"sigma": math.nan}, "sigma must be above 0"),
        ({"sigma": 0.1, "samples": 0}, "samples must be a whole number of at least 1"),
        ({"sigma": 0.1, "alpha": 0.7}, "alpha must lie between 0 and 0.5"),
    ],
)
def test_bad_smoothing(options, message):
    with pytest.raises(ValueError, match=message):
        Smoothing(**options)


def test_bad_calls(encoder, bank):
    def run(bank=bank, queries=None, **options):
        return certify(encoder, bank, queries or batches(encoder), smoothing=Smoothing(sigma=1, samples=1), **options)

    with pytest.raises(ValueError, match="radii must be numbers of at least 0"):
        run(radii=(0.1, -1))
    with pytest.raises(ValueError, match="unknown pooling 'paper'"):
        run(how="paper")
    with pytest.raises(ValueError, match="one class only"):
        run(bank=dataclasses.replace(bank, label=np.zeros(2, dtype=int)))
    with pytest.raises(ValueError, match="repeat patch ids"):
        run(queries=Loader([*batches(encoder), *batches(encoder)]), k=1)
    with pytest.raises(ValueError, match="gave no batches"):
        certify(encoder, bank, Loader(), smoothing=SMOOTH, k=1)
    two = batches(encoder, size=40)
    two[0] = HierarchicalBatch(
        *(getattr(two[0], n) for n in ("images", "patch")), *[torch.zeros(40).long()] * 2, two[0].label
    )
    with pytest.raises(ValueError, match="slide 0 holds patches with different labels"):
        run(queries=two, k=1)


# --- the picture and the page -------------------------------------------------------------------------------------


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
    assert names["found"].flags == () and names["found"].measures["images"] == 12
    assert "certified-0.05" in names["table"]
    assert not names["challenge"].refuted
