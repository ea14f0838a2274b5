"""Laws of the seeded draws: balance, distinctness, disjoint ranks, resumption."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.data.cohort import Cohort, PatchRecord
from hsat.data.sampler import PatientBatchSampler, PatientDraw, draw_images, order_patients, slot_seed

CLASS_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def patients_of(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and patient numbers (not 0, 1, ...) for classes of the given sizes."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return labels, 3 * np.arange(len(labels)) + 5


def cut(order: list, batch: int) -> list[list]:
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def cohort_of(sizes: list[int], *, split: str = "train") -> Cohort:
    """A cohort without files; patients of one slide and two patches, and one validation patient that comes first."""
    names = tuple(f"class{number}" for number in range(len(sizes)))
    records = [PatchRecord("v/0/0.png", names[0], "v", "0", "val")]
    for label, size in enumerate(sizes):
        for number in range(size):
            name = f"p{label}{number}"
            records += [PatchRecord(f"{name}/0/{k}.png", names[label], name, "0", split) for k in range(2)]
    return Cohort(root=Path("."), records=tuple(records), class_names=names, kind="rgb")


# --- the order of an epoch -------------------------------------------------------------------------------------------


@given(CLASS_SIZES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_balanced_epoch_has_equal_classes_and_full_rounds(sizes, batch, seed, epoch):
    labels, patients = patients_of(sizes)
    order = order_patients(labels, patients, batch=batch, seed=seed, epoch=epoch)
    label_of = dict(zip(patients.tolist(), labels.tolist(), strict=True))
    per_class = Counter(label_of[patient] for patient, _ in order)
    assert per_class == {label: max(sizes) for label in range(len(sizes))}
    counts = Counter(patient for patient, _ in order)
    for label, size in enumerate(sizes):
        drawn = sorted(counts[patient] for patient in patients[labels == label].tolist())
        rounds, rest = divmod(max(sizes), size)
        assert drawn == [rounds] * (size - rest) + [rounds + 1] * rest


@given(CLASS_SIZES, st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_occurrences_count_up_in_the_order_of_the_draws(sizes, batch, balance):
    labels, patients = patients_of(sizes)
    order = order_patients(labels, patients, batch=batch, seed=1, epoch=2, balance=balance)
    seen: dict[int, int] = {}
    for patient, occurrence in order:
        assert occurrence == seen.get(patient, 0)
        seen[patient] = occurrence + 1


@given(CLASS_SIZES, st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_a_patient_repeats_in_a_batch_only_when_the_others_are_used_up(sizes, batch, epoch):
    labels, patients = patients_of(sizes)
    order = [patient for patient, _ in order_patients(labels, patients, batch=batch, seed=0, epoch=epoch)]
    for number, members in enumerate(cut(order, batch)):
        most = max(Counter(members).values())
        for patient in set(order[(number + 1) * batch :]):
            assert members.count(patient) >= most - 1


@given(CLASS_SIZES, st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_full_batches_hold_no_patient_twice_where_that_is_possible(sizes, batch, epoch):
    labels, patients = patients_of(sizes)
    order = [patient for patient, _ in order_patients(labels, patients, batch=batch, seed=0, epoch=epoch)]
    batches = cut(order, batch)
    if len(order) % batch == 0 and max(Counter(order).values()) <= len(batches):
        assert all(len(set(members)) == batch for members in batches)


def test_the_tight_case_is_met_that_careless_orders_miss():
    """Two patients fill half of every batch: 4 batches of 4, patients 0 and 1 four times each, eight others once."""
    labels, patients = np.array([0] * 8 + [1, 1]), np.arange(10)
    for epoch in range(50):
        order = [patient for patient, _ in order_patients(labels, patients, batch=4, seed=0, epoch=epoch)]
        assert all({8, 9} <= set(members) and len(set(members)) == 4 for members in cut(order, 4))


@given(CLASS_SIZES, st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_an_unbalanced_epoch_is_a_permutation(sizes, batch):
    labels, patients = patients_of(sizes)
    order = order_patients(labels, patients, batch=batch, seed=0, epoch=0, balance=False)
    assert sorted(order) == [(patient, 0) for patient in patients.tolist()]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    labels, patients = patients_of([9, 4, 2])
    first = order_patients(labels, patients, batch=5, seed=3, epoch=7)
    np.random.seed(99)
    assert order_patients(labels, patients, batch=5, seed=3, epoch=7) == first
    assert order_patients(labels, patients, batch=5, seed=4, epoch=7) != first
    assert order_patients(labels, patients, batch=5, seed=3, epoch=8) != first


def test_patients_of_one_class_are_exchangeable():
    labels, patients = np.array([0] * 6 + [1] * 3), np.arange(9)
    orders = [[p for p, _ in order_patients(labels, patients, batch=4, seed=0, epoch=e)] for e in range(1500)]
    early = np.array([sum(p in order[:6] for order in orders) for p in range(6)]) / len(orders)
    assert early.max() - early.min() < 0.08  # five sigma


def test_classes_are_mixed_from_the_first_draw_on():
    """Six patients of one class against one patient six times: each draw is of either class with equal chance."""
    labels, patients = np.array([0] * 6 + [1]), np.arange(7)
    orders = [order_patients(labels, patients, batch=1, seed=0, epoch=epoch) for epoch in range(600)]
    for place in (0, 5, 11):
        assert abs(np.mean([order[place][0] == 6 for order in orders]) - 0.5) < 0.1  # five sigma


def test_who_is_drawn_once_more_changes_from_epoch_to_epoch():
    labels, patients = np.array([0, 0, 0, 1, 1]), np.arange(5)
    twice = set()
    for epoch in range(20):
        order = order_patients(labels, patients, batch=3, seed=0, epoch=epoch)
        twice |= {patient for patient, occurrence in order if occurrence == 1}
    assert twice == {3, 4}


@pytest.mark.parametrize(
    ("labels", "patients", "batch", "message"),
    [
        ([0], [1, 2], 1, r"equally long.*\(1,\) and \(2,\)"),
        ([], [], 1, "at least one patient"),
        ([0, 0], [4, 4], 1, "patient 4 is listed twice"),
        ([0], [1], 0, "batch must be at least 1 patient, got 0"),
    ],
)
def test_wrong_epochs_are_refused(labels, patients, batch, message):
    with pytest.raises(ValueError, match=message):
        order_patients(labels, patients, batch=batch, seed=0, epoch=0)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_slot_seeds_are_the_same_in_every_process():
    here = slot_seed(1, 2, "Müller 3", 4, 5)
    code = "from hsat.data.sampler import slot_seed; print(slot_seed(1, 2, 'Müller 3', 4, 5))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == here
    assert 0 <= here < 2**63


def test_slot_seeds_are_pinned():
    """A changed formula would silently change every run that is resumed."""
    assert slot_seed(0, 0, "NIO_001", 0, 0) == 4529357812530940700


def test_slot_seeds_differ_where_any_word_differs():
    words = [
        (s, e, n, o, k)
        for s in (0, 1)
        for e in (0, 1, 11)
        for n in ("", "1", "1 1", "a")
        for o in (0, 1)
        for k in (-1, 0, 1, 11)
    ]
    assert len({slot_seed(*word) for word in words}) == len(words)


# --- slides and patches ----------------------------------------------------------------------------------------------

SLIDES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def rows_of(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum([0, *lengths])
    return [list(range(10 + a, 10 + b)) for a, b in itertools.pairwise(ends)]


@given(SLIDES, st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_draws_repeat_a_slide_or_patch_only_when_all_are_drawn(lengths, wanted, each, seed):
    slides = rows_of(lengths)
    rows = draw_images(slides, slides_drawn=wanted, patches_drawn=each, rng=np.random.default_rng(seed))
    slide_of = {row: number for number, members in enumerate(slides) for row in members}
    parts = cut(rows, each)
    assert len(parts) == wanted
    assert all(len({slide_of[row] for row in part}) == 1 for part in parts)  # slide by slide
    drawn = Counter(slide_of[part[0]] for part in parts)
    assert max(drawn[number] for number in range(len(slides))) - min(drawn[n] for n in range(len(slides))) <= 1
    times = Counter(rows)
    for number in drawn:
        per_patch = [times[row] for row in slides[number]]
        assert max(per_patch) - min(per_patch) <= 1


def test_all_slides_and_patches_are_equally_likely():
    rng = np.random.default_rng(0)
    times = Counter(
        row for _ in range(3000) for row in draw_images(rows_of([4, 4, 4]), slides_drawn=2, patches_drawn=2, rng=rng)
    )
    assert all(abs(count / 3000 - 1 / 3) < 0.045 for count in times.values())  # five sigma
    assert len(times) == 12


@pytest.mark.parametrize(
    ("slides", "wanted", "each", "message"),
    [
        ([[1]], 0, 1, "at least 1, got 0 and 1"),
        ([[1]], 1, 0, "at least 1, got 1 and 0"),
        ([], 1, 1, "without slides"),
        ([[1], []], 1, 1, "slide number 1 of 2 holds no patches"),
    ],
)
def test_wrong_draws_are_refused(slides, wanted, each, message):
    with pytest.raises(ValueError, match=message):
        draw_images(slides, slides_drawn=wanted, patches_drawn=each, rng=np.random.default_rng(0))


# --- the batch sampler -----------------------------------------------------------------------------------------------


@given(CLASS_SIZES, st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ranks_share_an_epoch_without_overlap(sizes, batch, ranks, balance):
    cohort = cohort_of(sizes)
    draws = len(sizes) * max(sizes) if balance else sum(sizes)
    if draws < batch * ranks:
        return
    options = {"seed": 3, "balance": balance}
    single = PatientBatchSampler(cohort, batch_patients=batch * ranks, **options)
    parts = [
        PatientBatchSampler(cohort, batch_patients=batch, rank=r, world_size=ranks, **options) for r in range(ranks)
    ]
    for sampler in (single, *parts):
        sampler.set_epoch(4, strength=0.25)
    together = [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)]
    assert together == list(single)
    assert len({len(part) for part in parts}) == 1
    assert len(list(parts[0])) == len(parts[0]) == draws // (batch * ranks)


def test_a_draw_carries_epoch_occurrence_and_strength():
    sampler = PatientBatchSampler(cohort_of([4, 1]), batch_patients=2)
    sampler.set_epoch(6, strength=0.5)
    draws = [draw for members in sampler for draw in members]
    assert {(draw.epoch, draw.strength) for draw in draws} == {(6, 0.5)}
    assert sorted(draw.occurrence for draw in draws if draw.patient == 5) == [0, 1, 2, 3]
    assert all(isinstance(draw, PatientDraw) and type(draw.patient) is int for draw in draws)
    assert 0 not in {draw.patient for draw in draws}  # the validation patient


@given(st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_an_epoch_resumed_in_the_middle_goes_on_as_if_uninterrupted(start):
    cohort = cohort_of([6, 3, 2])
    whole, resumed = (PatientBatchSampler(cohort, batch_patients=3) for _ in range(2))
    whole.set_epoch(2)
    resumed.set_epoch(2, start_batch=start)
    assert list(resumed) == list(whole)[start:]
    assert len(resumed) == 6 - start
    resumed.set_epoch(3)
    assert len(resumed) == 6 == resumed.batches_per_epoch


def test_without_drop_last_every_draw_comes():
    sampler = PatientBatchSampler(cohort_of([5, 2]), batch_patients=4, drop_last=False)
    assert [len(members) for members in sampler] == [4, 4, 2]
    assert len(sampler) == 3
    few = PatientBatchSampler(cohort_of([1, 2]), batch_patients=50, drop_last=False)
    assert [len(members) for members in few] == [4]


def test_iterating_twice_gives_the_same_epoch_and_a_running_pass_keeps_its_epoch():
    sampler = PatientBatchSampler(cohort_of([6, 3]), batch_patients=3)
    first = list(sampler)
    running = iter(sampler)
    sampler.set_epoch(1)
    assert list(running) == first != list(sampler)


def test_the_repr_is_the_configuration():
    sampler = PatientBatchSampler(cohort_of([6, 3]), batch_patients=3, seed=8, rank=1, world_size=2)
    assert repr(sampler) == (
        "PatientBatchSampler(split='train', batch_patients=3, seed=8, balance=True, drop_last=True,"
        " order='spread', rank=1, world_size=2)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_patients": 0}, "batch_patients must be at least 1, got 0"),
        ({"batch_patients": 1, "rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
        ({"batch_patients": 1, "rank": -1}, "rank -1 of world_size 1"),
        ({"batch_patients": 1, "world_size": 2, "drop_last": False}, "2 ranks with unequal last batches"),
        ({"batch_patients": 7}, r"asks for 7 patients.*'train' has 6 \(balance=True\).*batch_patients=6 or fewer"),
        ({"batch_patients": 5, "balance": False}, r"has 4 \(balance=False\).*batch_patients=4 or fewer"),
        ({"batch_patients": 4, "world_size": 2}, r"on 2 rank\(s\) asks for 8.*batch_patients=3 or fewer"),
        ({"batch_patients": 1, "world_size": 7}, r"on 7 rank\(s\) asks for 7.*at most 6 rank\(s\)"),
        ({"batch_patients": 1, "split": "test"}, "test"),
    ],
)
def test_wrong_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PatientBatchSampler(cohort_of([3, 1]), **options)


@pytest.mark.parametrize(
    ("epoch", "options", "message"),
    [
        (-1, {}, "epoch must not be negative, got -1"),
        (0, {"strength": 1.5}, r"strength must be a number in \[0, 1\], got 1.5"),
        (0, {"start_batch": 4}, r"start_batch must lie in 0 .. 3, got 4"),
    ],
)
def test_wrong_epochs_of_a_sampler_are_refused(epoch, options, message):
    sampler = PatientBatchSampler(cohort_of([3, 1]), batch_patients=2)
    with pytest.raises(ValueError, match=message):
        sampler.set_epoch(epoch, **options)
