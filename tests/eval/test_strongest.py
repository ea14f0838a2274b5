"""The ensemble: never weaker than its members, survivors only, honest counts, and its flag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hsat.eval.engine.ensemble_records import black_box_flag
from hsat.eval.engine.strongest import Casualties, Member
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.eval import (
    KNNClassifier,
    MemberCount,
    Strongest,
    casualties_table,
    embed,
    evaluate_transfer,
    evaluate_whitebox,
    paper_attacks,
    strongest_attacks,
)
from hsat.testing import check_feasible
from hsat.types import AttackResult

EPS = 2.2 / 255
QUICK = dict(steps=4, step_size=1 / 255, vote_steps=5, restarts=2, queries=6)
SMALL = Strongest(Linf(EPS), **QUICK)
FAST = dict(k=15, bootstrap=0)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


def right(result, name, k=15):
    """(n,) bool: patches that are classified as what they are."""
    return result.scores[name][k].argmax(1) == result.tables[name].label


def accuracy(result, name):
    return right(result, name).mean()


@pytest.fixture
def found(toy_encoder, bank, queries):
    return evaluate_whitebox(toy_encoder, bank, queries, {"strongest": SMALL}, keep_examples=36, **FAST)


def test_no_image_withstands_that_a_paper_attack_fells(toy_encoder, bank, queries, found):
    ours = right(found, "strongest")
    for target in ("features", "embedding"):
        attacks = paper_attacks((EPS,), steps=4, step_size=1 / 255)
        single = evaluate_whitebox(toy_encoder, bank, queries, attacks, target=target, **FAST)
        for name in attacks:
            assert not (ours & ~right(single, name)).any(), (target, name)
            assert ours.mean() < accuracy(single, name) < accuracy(found, "clean")


def test_what_is_reported_is_who_was_felled(found):
    fallen = found.casualties["strongest"]
    np.testing.assert_array_equal(fallen.robust, right(found, "strongest"))
    np.testing.assert_array_equal(fallen.felled_by == "clean", ~right(found, "clean"))
    np.testing.assert_array_equal(fallen.margin > 0, ~fallen.robust)
    np.testing.assert_array_equal(fallen.patch, found.tables["strongest"].patch)
    names = [each.name for each in fallen.members]
    drifts = ["PGD features", "PGD embedding", "MIFGSM features", "MIFGSM embedding"]
    assert names == ["clean", *drifts, "APGD vote 1", "APGD vote 2", "APGD vote-ce", "Square"]
    standing = len(fallen.patch)
    for each in fallen.members:
        assert each.seen == standing and each.felled == (fallen.felled_by == each.name).sum()
        standing -= each.felled
    assert standing == fallen.robust.sum() > 0
    assert f"| Square | {fallen.members[-1].seen} |" in casualties_table(fallen)


def test_images_lie_in_the_ball_and_are_the_ones_that_were_scored(toy_encoder, bank, queries, found):
    images = torch.cat([batch.images for batch in queries])
    check_feasible(found.examples["strongest"], images, SMALL.threat)
    toy_encoder.eval()
    again = KNNClassifier(k=15).fit(embed(toy_encoder, bank))
    z = toy_encoder.features(found.examples["strongest"]).detach()
    np.testing.assert_array_equal(again.predict(z) == found.tables["strongest"].label, right(found, "strongest"))


def test_only_survivors_are_attacked_and_every_pass_is_counted(toy_encoder, bank, queries, monkeypatch):
    table, images, plain = embed(toy_encoder, bank), [], toy_encoder.features
    monkeypatch.setattr(toy_encoder, "features", lambda x: images.append(len(x)) or plain(x))
    result = evaluate_whitebox(toy_encoder, table, queries, {"strongest": SMALL}, **FAST)
    fallen = result.casualties["strongest"]
    spent = sum(each.forwards for each in fallen.members)
    # the clean batch is what is measured, not what is attacked
    assert sum(images) - len(fallen.patch) == spent
    passes = {each.name: each.backwards / max(1, each.seen) for each in fallen.members}
    assert passes["PGD features"] == 4 and passes["APGD vote 1"] == 5 and passes["Square"] == 0
    record = result.records[-1]
    assert record.forwards == pytest.approx(spent / 36)
    assert record.settings["members"]["Square"]["seen"] == fallen.members[-1].seen
    assert record.settings["withstood"] == fallen.robust.sum()


def test_neither_batches_nor_the_fallen_matter(toy_encoder, bank, toy_batches, queries):
    one = evaluate_whitebox(toy_encoder, bank, queries, {"s": SMALL}, keep_examples=36, **FAST)
    halves = [half for batch in queries for half in (_part(batch, slice(0, 7)), _part(batch, slice(7, None)))]
    named = dict(class_names=("cyan", "green", "red"))
    other = evaluate_whitebox(toy_encoder, bank, halves, {"s": SMALL}, keep_examples=36, **named, **FAST)
    np.testing.assert_array_equal(one.casualties["s"].felled_by, other.casualties["s"].felled_by)
    np.testing.assert_allclose(one.examples["s"], other.examples["s"], atol=1e-6)
    spoilt = [_part(batch, slice(None), wrong=slice(0, None, 2)) for batch in queries]
    spoilt = evaluate_whitebox(toy_encoder, bank, spoilt, {"s": SMALL}, keep_examples=36, **named, **FAST)
    for start, stop in ((0, 20), (20, 36)):
        odd = slice(start + 1, stop, 2)
        np.testing.assert_array_equal(one.casualties["s"].felled_by[odd], spoilt.casualties["s"].felled_by[odd])


def _part(batch, rows, wrong=slice(0, 0)):
    label = batch.label.clone()
    label[wrong] = (label[wrong] + 1) % 3
    columns = {name: getattr(batch, name)[rows] for name in ("images", "patch")}
    columns |= {name: batch.patch[rows] for name in ("slide", "patient")}  # so that labels may differ
    return type(batch)(**columns, label=label[rows])


def test_attacks_of_the_same_call_are_members(toy_encoder, bank, queries, found):
    pgd = PGD(SMALL.threat, step_size=1 / 255, steps=4)
    larger = PGD(Linf(8 / 255), step_size=2 / 255, steps=4)
    both = evaluate_whitebox(toy_encoder, bank, queries, {"s": SMALL, "PGD": pgd, "PGD-8": larger}, noise=True, **FAST)
    members = {each.name: each for each in both.casualties["s"].members}
    assert list(both.tables)[-3:] == ["s", "PGD", "PGD-8"]  # the order that was asked for
    assert "PGD" in members and "PGD features" not in members and "PGD-8" not in members
    assert members["PGD"].forwards == members["PGD"].backwards == 0
    assert not (right(both, "s") & ~right(both, "PGD")).any()
    assert right(both, "s").sum() == right(found, "strongest").sum()


class Stepped(nn.Module):
    """The toy encoder behind a staircase of half grey levels: it sees nearly the same, and has no gradients."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def features(self, images):
        flat = (images * 510).round() / 510
        return self.inner.features(flat + 0 * images)

    def forward(self, images):
        return self.features(images)


def test_masked_gradients_are_found_by_transfer_and_flagged(toy_encoder, bank, queries):
    masked = Stepped(toy_encoder)
    ensemble = {"s": Strongest(Linf(3 / 255), steps=4, step_size=1 / 255, vote_steps=3, restarts=1, queries=4)}
    alone = evaluate_whitebox(masked, bank, queries, ensemble, **FAST)
    helped = evaluate_whitebox(masked, bank, queries, ensemble, surrogates={"smooth": toy_encoder}, **FAST)
    felled = {each.name: each.felled for each in helped.casualties["s"].members}
    assert felled["transfer from smooth"] >= 5
    assert accuracy(helped, "s") < accuracy(alone, "s")
    flags = [flag for record in helped.records if record.attack_name == "s" for flag in record.flags]
    assert any("black box beats white box" in flag for flag in flags)
    assert any("gradient exactly zero" in flag for flag in flags)


def test_a_sound_encoder_gets_no_flag_at_patch_level_and_pools_are_bounds(found):
    ours = [record for record in found.records if record.attack_name == "strongest"]
    assert all(record.flags == () for record in ours if record.level == "patch")
    assert all("an attack on the pool may do more" in record.flags[-1] for record in ours if record.level != "patch")
    assert all(record.attack == repr(SMALL) and "APGD vote 1" in record.settings["member_attacks"] for record in ours)


@dataclass(frozen=True)
class Shift:
    """An attack that adds a constant to every pixel and says that it followed a gradient, or that it did not."""

    threat: Linf
    by: float
    backwards: int = 1

    def run(self, x, objective, *, generator, ids):
        x_adv, none = (x + self.by).clamp(0, 1), torch.zeros(len(x))
        return AttackResult(x_adv, none, none, none.long(), none.bool(), 1, self.backwards)


@dataclass(frozen=True, repr=False)
class Chosen(Strongest):
    """An ensemble of given members."""

    given: tuple[Shift, ...] = ()

    def members(self, *, layers, surrogates):
        return tuple(Member(name=str(i), attack=each, climbs="vote") for i, each in enumerate(self.given))


@pytest.mark.parametrize(
    ("shifts", "unmoved"),
    [
        ([(0.0, 1)], True),
        ([(0.0, 1), (1e-7, 1)], False),  # too little to be stronger, but it moved
        ([(0.0, 1), (1e-7, 0)], True),  # what is not led by gradients says nothing about them
        ([(1e-7, 0)], False),
    ],
)
def test_never_moved_means_that_every_gradient_left_it_in_place(toy_encoder, bank, queries, shifts, unmoved):
    members = tuple(Shift(Linf(EPS), by, backwards) for by, backwards in shifts)
    result = evaluate_whitebox(toy_encoder, bank, queries, {"s": Chosen(Linf(EPS), given=members)}, **FAST)
    record = result.records[-1]
    standing = right(result, "clean").mean()
    assert record.settings["never_moved_share"] == pytest.approx(standing if unmoved else 0) and standing > 0.5
    assert any("never moved" in flag for flag in record.flags) == unmoved


def test_an_attack_of_the_same_call_that_moved_counts(toy_encoder, bank, queries):
    still, moves = (Shift(Linf(EPS), by) for by in (0.0, 1e-7))
    ensemble = Chosen(Linf(EPS), given=(still,))
    for other, unmoved in ((still, 1.0), (moves, 0.0)):
        result = evaluate_whitebox(toy_encoder, bank, queries, {"other": other, "s": ensemble}, **FAST)
        assert result.records[-1].settings["never_moved_share"] == unmoved


@pytest.mark.parametrize(
    ("felled", "reached", "flagged"), [(0, 0, False), (1, 3, False), (5, 100, False), (5, 9, True)]
)
def test_the_flag_wants_more_than_luck(felled, reached, flagged):
    square = MemberCount(name="Square", attack="Square()", black_box=True, seen=reached, felled=felled)
    found = Casualties(np.arange(2), np.array(["", "Square"]), np.zeros(2), (square,))
    assert bool(black_box_flag(found)) == flagged


def test_several_k_are_flagged_and_one_decides(toy_encoder, bank, queries):
    result = evaluate_whitebox(toy_encoder, bank, queries, {"s": SMALL}, k=(15, 3), bootstrap=0)
    np.testing.assert_array_equal(result.casualties["s"].robust, right(result, "s", 15))
    flags = {record.k: record.flags for record in result.records if record.attack_name == "s"}
    assert any("by the vote of 15 neighbours, not of 3" in flag for flag in flags[3])


def test_names_settings_and_refusals(toy_encoder, bank, queries):
    made = strongest_attacks((4 / 255, 8 / 255))
    assert list(made) == ["strongest-4", "strongest-8"]
    assert "step_size=2/255" in repr(made["strongest-8"])
    with pytest.raises(ValueError, match="restarts must be a whole number >= 1, got 0"):
        Strongest(Linf(EPS), restarts=0)
    with pytest.raises(TypeError, match="threat must be a threat model"):
        Strongest(8 / 255)
    with pytest.raises(TypeError, match="has no method run"):
        evaluate_transfer({"a": toy_encoder}, bank, queries, {"s": SMALL})
    with pytest.raises(TypeError, match=r"surrogates must map names to encoders; those of \['b'\]"):
        evaluate_whitebox(toy_encoder, bank, queries, {"s": SMALL}, surrogates={"b": 3})
