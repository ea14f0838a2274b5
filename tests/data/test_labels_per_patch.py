"""Cohorts whose patches of one patient bear different labels: loading, splits, draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.data import (
    Cohort,
    HierarchicalDataset,
    PatientBatchSampler,
    PatientDraw,
    collate,
    hierarchical_loader,
    read_csv,
)
from hsat.data.records import PatchRecord
from hsat.data.splits import split_by_patient


@pytest.fixture
def mixed_root(tmp_path: Path, write_png) -> Path:
    """Six patients with two slides of one tumour and four normal patches each."""
    rows = ["path,class,patient,slide"]
    for patient in ("004", "009", "012", "015", "017", "020"):
        for slide in "ab":
            for k in range(5):
                write_png(tmp_path / f"{patient}{slide}{k}.png", seed=k)
                rows.append(f"{patient}{slide}{k}.png,{'normal' if k else 'tumour'},{patient},{slide}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return tmp_path


def test_nothing_is_renamed_or_dropped(mixed_root):
    cohort = read_csv(mixed_root)
    assert len(cohort) == 60 and cohort.patient_names == ("004", "009", "012", "015", "017", "020")
    assert cohort.label.tolist() == [1, 0, 0, 0, 0] * 12
    assert any("6 of 6 patients have patches of several classes" in note for note in cohort.notes)
    split = cohort.with_split(val_fraction=1 / 3)
    counts = split.summary()
    assert counts["val"]["tumour"] == {"patients": 2, "slides": 4, "patches": 4}
    assert {r.patient for r in split.records if r.split == "val"}.isdisjoint(
        {r.patient for r in split.records if r.split == "train"}
    )


@st.composite
def cohorts_of_mixed_patients(draw):
    patients = draw(st.integers(4, 12))
    records = []
    for number in range(patients):
        counts = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
        for name, count in zip("abc", counts, strict=True):
            records += [PatchRecord(f"{number}/{name}{k}", name, f"p{number}", "s") for k in range(count)]
    return records


@pytest.mark.filterwarnings("ignore:class .* has a single patient")
@settings(max_examples=60, deadline=None)
@given(cohorts_of_mixed_patients(), st.integers(0, 5), st.floats(0.1, 0.6))
def test_splits_are_by_patient_and_keep_classes_on_both_sides(records, seed, fraction):
    try:
        split = split_by_patient(records, val_fraction=fraction, seed=seed, names=("train", "val"))
    except ValueError:  # no class with two patients
        assert all(len({r.patient for r in records if r.class_name == name}) <= 1 for name in "abc")
        return
    sides = {side: {row.patient for row in split if row.split == side} for side in ("train", "val")}
    assert not sides["train"] & sides["val"] and sides["train"] and sides["val"]
    assert [row._replace(split="") for row in split] == records
    again = split_by_patient(records, val_fraction=fraction, seed=seed, names=("train", "val"))
    assert again == split


def test_stratification_comes_near_to_the_wanted_share_of_each_class():
    rng = np.random.default_rng(0)
    records = []
    for number in range(40):
        tumour = int(rng.integers(0, 50)) if number % 2 else 0
        for k in range(60):
            name = "tumour" if k < tumour else "normal"
            records.append(PatchRecord(f"{number}/{k}", name, f"p{number:02d}", "s"))
    for seed in range(5):
        split = split_by_patient(records, val_fraction=0.3, seed=seed, names=("train", "val"))
        for name in ("tumour", "normal"):
            of_class = [row.split for row in split if row.class_name == name]
            assert abs(of_class.count("val") / len(of_class) - 0.3) < 0.03


def test_draws_take_the_classes_of_a_slide_in_turn(mixed_root):
    cohort = read_csv(mixed_root)
    plain = HierarchicalDataset(cohort, None, image_size=8, transform="none", patches=2, views=1)
    balanced = plain.balance_classes()
    assert "balance_classes" in repr(balanced) and "balance_classes" not in repr(plain)
    labels = {name: [] for name in ("plain", "balanced")}
    for epoch in range(20):
        draw = PatientDraw(0, epoch)
        labels["plain"].append(plain[draw].label.tolist())
        labels["balanced"].append(balanced[draw].label.tolist())
    assert all(sorted(row[:2]) == sorted(row[2:]) == [0, 1] for row in labels["balanced"])
    assert any(sorted(row[:2]) == [0, 0] for row in labels["plain"])
    assert torch.equal(balanced[PatientDraw(1, 3)].patch, balanced[PatientDraw(1, 3)].patch)
    assert torch.equal(
        plain[0].patch, HierarchicalDataset(cohort, None, image_size=8, transform="none", views=1)[0].patch
    )


def test_batches_of_patients_with_several_classes(mixed_root):
    cohort = read_csv(mixed_root)
    dataset = HierarchicalDataset(cohort, None, image_size=8, transform="none").balance_classes()
    sampler = PatientBatchSampler(cohort, None, batch_patients=3)
    assert sampler.labels.tolist() == [0] * 6 and sampler.draws_per_epoch == 6
    true, slots = (next(iter(hierarchical_loader(dataset, sampler, ids=ids))) for ids in ("true", "slots"))
    assert torch.equal(true.label, slots.label) and sorted(set(true.label.tolist())) == [0, 1]
    assert true.counts["patient"] == 3 and collate([dataset[0]]).counts["patch"] == 4


def test_labels_of_slides_and_patients_by_column(tmp_path, write_png):
    lines = ["path,class,patient,slide,slide_label,patient_label"]
    for k, (name, slide, said) in enumerate([("n", "1", "t"), ("t", "1", "t"), ("n", "2", "NA"), ("n", "2", "")]):
        write_png(tmp_path / f"{k}.png", seed=k)
        lines.append(f"{k}.png,{name},p,{slide},{said},t")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    cohort = read_csv(tmp_path)
    assert cohort.slide_labels == {("p", "1"): "t"} and cohort.patient_labels == {"p": "t"}
    assert cohort.slide_label.tolist() == [1, 1, -1, -1] and cohort.patient_label.tolist() == [1] * 4
    plain = Cohort(root=tmp_path, records=cohort.records, class_names=cohort.class_names, kind="rgb")
    assert plain.slide_label is None and plain.fingerprint() != cohort.fingerprint()
    assert cohort.without(["0.png", "1.png"]).slide_labels == {}
    (tmp_path / "manifest.csv").write_text("\n".join([*lines[:2], lines[2].replace(",t,t", ",n,t")]))
    with pytest.raises(ValueError, match=r"line 3: slide_label of slide \('p', '1'\) is 'n' here and 't' above"):
        read_csv(tmp_path)
    with pytest.raises(ValueError, match="patient 'q' has a label and no patch"):
        Cohort(root=tmp_path, records=cohort.records, class_names=("n", "t"), kind="rgb", patient_labels={"q": "n"})
    with pytest.raises(ValueError, match="has the label 'x', which is none of the classes"):
        Cohort(root=tmp_path, records=cohort.records, class_names=("n", "t"), kind="rgb", patient_labels={"p": "x"})
