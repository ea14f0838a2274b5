"""The synthetic cohort: a real OpenSRH folder, the same bytes for the same settings, and classes that can be told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.data import read_opensrh, read_patch, synthetic, write_synthetic_cohort
from hsat.data.textures import TISSUES, blobs, clouds, draw_variation, fibres, grain, paint_patch

SMALL = dict(patients_per_class=3, slides=2, patches=3, size=24, classes=("hgg", "normal"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_synthetic_cohort(tmp_path_factory.mktemp("synthetic") / "cohort", seed=3, **SMALL)


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_an_opensrh_folder(folder):
    cohort = read_opensrh(folder)
    assert cohort.class_names == ("hgg", "normal")
    assert (len(cohort), len(cohort.patient_names), len(cohort.slide_names)) == (2 * 3 * 2 * 3, 6, 12)
    assert set(cohort.splits) == {"train", "val"}
    cohort.file_sizes()
    assert not cohort.notes


def test_names_and_lists_are_the_published_ones(folder):
    meta = json.loads((folder / "meta/opensrh.json").read_text())
    first, last = meta["SYN_001"], meta["SYN_006"]
    assert (first["patient_id"], first["class"], last["class"]) == ("SYN_001", "hgg", "normal")
    assert first["slides"]["2"]["slide_id"] == "SYN_001-2"
    assert first["slides"]["2"]["tumor_patches"] == [
        f"studies/SYN_001/2/patches/SYN_001-2-{place}.tif" for place in ("0_24_0_24", "0_24_24_48", "0_24_48_72")
    ]
    assert first["slides"]["2"]["normal_patches"] == first["slides"]["2"]["nondiagnostic_patches"] == []
    assert last["slides"]["1"]["tumor_patches"] == [] and len(last["slides"]["1"]["normal_patches"]) == 3


def test_files_hold_two_16_bit_planes_inside_the_range(folder):
    for path in folder.rglob("*.tif"):
        planes = tifffile.imread(path)
        assert planes.shape == (2, 24, 24) and planes.dtype == np.uint16
        assert planes.max() < 65535 and planes.std(axis=(1, 2)).min() > 0.01 * 65536
        image = read_patch(path, kind="srh")
        assert tuple(image.shape) == (3, 24, 24)


@pytest.mark.parametrize("name", TISSUES)
def test_the_three_channels_are_neither_flat_nor_clipped(name):
    for number in range(4):
        rng = np.random.default_rng(number)
        planes = (
            paint_patch(
                TISSUES[name], draw_variation(rng, strength=1.0), draw_variation(rng, strength=0.6), rng, size=48
            )
            / 65536
        )
        channels = np.stack([planes[1] - planes[0] + 5000 / 65536, *planes])
        inside = (channels > 0) & (channels < 1)
        assert inside[1:].mean() > 0.999 and inside[0].mean() > 0.6
        low, high = np.quantile(channels, (0.02, 0.98), axis=(1, 2))
        assert (high - low > 16 / 255).all(), "an attack of 8 grey levels could flatten a channel"


def test_same_seed_same_bytes_and_another_seed_other_pictures(folder, tmp_path):
    assert digests(write_synthetic_cohort(tmp_path / "again", seed=3, **SMALL)) == digests(folder)
    other = digests(write_synthetic_cohort(tmp_path / "other", seed=4, **SMALL))
    tifs = [name for name in other if name.endswith(".tif")]
    assert not {other[name] for name in tifs} & {digests(folder)[name] for name in tifs}


def test_no_two_patches_are_alike(folder):
    found = [digest for name, digest in digests(folder).items() if name.endswith(".tif")]
    assert len(set(found)) == len(found)


def test_a_patients_pictures_do_not_depend_on_the_others(folder, tmp_path):
    larger = write_synthetic_cohort(
        tmp_path / "larger", seed=3, **{**SMALL, "patients_per_class": {"hgg": 5, "normal": 4}, "slides": 3}
    )
    there, here = digests(larger), digests(folder)
    assert all(there[name] == here[name] for name in here if name.startswith("studies/SYN_001"))


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    fraction=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.99]),
)
def test_split_is_by_patient_and_every_class_is_on_either_side(counts, fraction):
    chosen = {"patients_per_class": dict(zip(TISSUES, counts, strict=False)), "val_fraction": fraction}
    classes = tuple(chosen["patients_per_class"])
    with TemporaryDirectory() as folder:
        meta = write_synthetic_cohort(folder, classes=classes, slides=1, patches=1, size=16, **chosen) / "meta"
        patients = json.loads((meta / "opensrh.json").read_text())
        split = json.loads((meta / "train_val_split.json").read_text())
    assert len(patients) == sum(counts)
    assert sorted(split["train"] + split["val"]) == sorted(patients), "each is on one side"
    for name, count in chosen["patients_per_class"].items():
        assert sum(patient["class"] == name for patient in patients.values()) == count
        held_out = sum(patients[patient]["class"] == name for patient in split["val"])
        assert held_out == 0 if fraction == 0 else 1 <= held_out <= count - 1
        assert abs(held_out - fraction * count) <= 1


def test_a_cohort_of_the_same_settings_is_kept(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tif")}
    assert write_synthetic_cohort(folder, seed=3, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.tif")} == before


def test_other_settings_in_the_same_place_are_an_error_that_names_them(folder):
    with pytest.raises(
        ValueError, match=r"other settings \(seed 3 there, 5 wanted\); remove it or choose another root"
    ):
        write_synthetic_cohort(folder, seed=5, **SMALL)


def test_a_cohort_that_lost_files_is_not_passed_off_as_whole(tmp_path):
    root = write_synthetic_cohort(tmp_path / "cohort", **SMALL)
    sorted(root.rglob("*.tif"))[0].unlink()
    with pytest.raises(
        ValueError, match=r"lacks 1 of its files, first studies/SYN_001/1/patches/SYN_001-1-0_24_0_24.tif"
    ):
        write_synthetic_cohort(root, **SMALL)


def test_damaged_settings_are_named(tmp_path):
    root = write_synthetic_cohort(tmp_path / "cohort", **SMALL)
    (root / "meta/synthetic.json").write_text("{")
    with pytest.raises(ValueError, match=r"synthetic\.json is not the settings of a synthetic cohort"):
        write_synthetic_cohort(root, **SMALL)


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"holds other files"):
        write_synthetic_cohort(tmp_path, **SMALL)
    with pytest.raises(FileExistsError, match=r"is not a folder"):
        write_synthetic_cohort(tmp_path / "mine.txt", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(read_opensrh(write_synthetic_cohort(tmp_path / "empty", **SMALL))) == 36


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    painted = []

    def fail_later(*args, **options):
        painted.append(args)
        if len(painted) > 2 * SMALL["slides"] * SMALL["patches"]:  # two patients are written
            assert [*tmp_path.rglob("*.tif")]
            raise KeyboardInterrupt
        return paint_patch(*args, **options)

    monkeypatch.setattr(synthetic, "paint_patch", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_cohort(tmp_path / "cohort", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_the_same_cohort_agree(tmp_path, monkeypatch):
    target = tmp_path / "cohort"

    def paint_after_another(*args, **options):
        monkeypatch.setattr(synthetic, "paint_patch", paint_patch)
        write_synthetic_cohort(target, **SMALL)  # the other process is done first
        return paint_patch(*args, **options)

    monkeypatch.setattr(synthetic, "paint_patch", paint_after_another)
    assert len(read_opensrh(write_synthetic_cohort(target, **SMALL))) == 36
    assert list(tmp_path.iterdir()) == [target]


def test_patients_and_slides_draw_from_streams_of_their_own(tmp_path, monkeypatch):
    strengths = {}

    def keep(rng, *, strength):
        strengths.setdefault(strength, []).append(rng.standard_normal())
        return draw_variation(rng, strength=strength)

    monkeypatch.setattr(synthetic, "draw_variation", keep)
    write_synthetic_cohort(tmp_path / "cohort", **SMALL)
    patients, slides = strengths[synthetic.PATIENT_STRENGTH], strengths[synthetic.SLIDE_STRENGTH]
    assert len({*patients, *slides}) == len(patients) + len(slides) == 6 + 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"classes": ("hgg", "glioma")},
            ValueError,
            r"classes must be different names out of hgg.*got \('hgg', 'glioma'",
        ),
        ({"classes": ("hgg", "hgg")}, ValueError, r"classes must be different names"),
        ({"classes": ()}, ValueError, r"classes must be different names"),
        ({"classes": "hgg"}, TypeError, r"got the text 'hgg'; write \('hgg',\)"),
        ({"patients_per_class": {"hgg": 3}}, ValueError, r"names \['hgg'\] but classes are \['hgg', 'normal'\]"),
        ({"patients_per_class": 1}, ValueError, r"\['hgg'\] must be at least 2, one to train on and one to hold out"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must lie in \[0, 1\).*got 1.0"),
        ({"seed": -1}, ValueError, r"seed must be at least 0; got -1"),
        ({"slides": 0}, ValueError, r"slides must be at least 1; got 0"),
        ({"patches": 0}, ValueError, r"patches must be at least 1; got 0"),
        ({"size": 8}, ValueError, r"size must be at least 16; got 8"),
        ({"size": 48.0}, TypeError, r"size must be a whole number, got 48.0"),
    ],
)
def test_impossible_settings_are_named(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        write_synthetic_cohort(tmp_path / "cohort", **{**SMALL, **options})
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_patients_one_per_class_will_do(tmp_path):
    root = write_synthetic_cohort(tmp_path / "cohort", **{**SMALL, "patients_per_class": 1, "val_fraction": 0})
    assert read_opensrh(root).splits == ("train",)


def test_a_blob_alone_has_the_area_of_its_disc():
    area = [
        blobs(np.random.default_rng(seed), 96, count=1, radius=8.0, elongation=1.0, spread=0.0).sum()
        for seed in range(40)
    ]
    assert max(area) == pytest.approx(np.pi * 64, rel=0.06)  # those that lie inside the patch
    assert blobs(np.random.default_rng(0), 32, count=0, radius=8.0, elongation=1.0, spread=0.0).sum() == 0


def test_fibres_cover_what_they_should_and_run_along_their_angle():
    rng = np.random.default_rng(0)
    plane = fibres(rng, 96, width=1.5, length=12.0, angle=0.0, coverage=0.3)
    assert plane.mean() == pytest.approx(0.3, abs=0.05)
    assert plane.min() >= 0 and plane.max() <= 1
    along, across = np.abs(np.diff(plane, axis=1)).mean(), np.abs(np.diff(plane, axis=0)).mean()
    assert along < 0.4 * across
    assert fibres(rng, 32, width=1.5, length=9.0, angle=0.0, coverage=0.0).sum() == 0


def test_grain_has_one_period_and_clouds_are_smooth():
    rng = np.random.default_rng(0)
    plane = grain(rng, 128, period=4.0)
    assert (plane.mean(), plane.std()) == (pytest.approx(0.0, abs=1e-9), pytest.approx(1.0))
    power = np.abs(np.fft.fft2(plane)) ** 2
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    assert (power * frequency).sum() / power.sum() == pytest.approx(1 / 4, rel=0.05)
    assert np.abs(np.diff(clouds(rng, 128, width=16.0), axis=0)).mean() < 0.1
