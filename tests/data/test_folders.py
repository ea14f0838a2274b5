"""Folders of classes without patients, hints that name the reader that fits, and what computers add to folders."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from hsat.data import read_class_folders, read_csv, read_folders, read_opensrh
from hsat.data.survey import walk_folders

BREAKHIS = [
    f"{name}/SOB/{sub}/SOB_{letter}_{code}_14-{patient}/{zoom}X/SOB_{letter}_{code}-14-{patient}-{zoom}-00{k}.png"
    for name, letter, sub, code in (("benign", "B", "adenosis", "A"), ("malignant", "M", "lobular", "LC"))
    for patient in ("22549AB", "4659")
    for zoom in (40, 100)
    for k in (1, 2)
]


def test_classes_without_patients(tmp_path, write_png):
    for name in ("TUM/TUM-A.png", "TUM/TUM-B.png", "ADI/ADI-A.png"):
        write_png(tmp_path / name)
    with pytest.warns(UserWarning, match="no patients are known.*the three levels coincide, intervals are too narrow"):
        cohort = read_class_folders(tmp_path)
    assert cohort.class_names == ("ADI", "TUM") and len(cohort.patient_names) == len(cohort.slide_names) == 3
    assert any("levels coincide" in note for note in cohort.notes)


def test_patients_in_file_names(tmp_path, write_png):
    for seed, name in enumerate(BREAKHIS):
        write_png(tmp_path / name, seed=seed)
    cohort = read_class_folders(tmp_path, patient=r"SOB_[BM]_[A-Z]+-(\d+-\w+)-\d", slide=r"-\d+-(?=00)|/(\d+X)/")
    assert cohort.class_names == ("benign", "malignant") and cohort.patient_names == ("14-22549AB", "14-4659")
    assert len(cohort.slide_names) == 4 and cohort.slide_names[0][1] in ("100X", "40X")
    cohort = read_class_folders(tmp_path, slide=r"-(\d+-\w+)-\d+-")
    assert cohort.patient_names == tuple(slide for _, slide in cohort.slide_names)
    with pytest.raises(ValueError, match=r"patient='\(zzz\)' finds nothing in 16 paths: 'benign/"):
        read_class_folders(tmp_path, patient="(zzz)")
    with pytest.raises(ValueError, match=r"patient='\(' is no regular expression"):
        read_class_folders(tmp_path, patient="(")
    with pytest.raises(ValueError, match="if their paths hold the patient, call read_class_folders with patient="):
        read_class_folders(tmp_path)


def test_split_folders_of_classes(tmp_path, write_png):
    for name in ("train/a/1.png", "val/a/2.png", "train/b/3.png"):
        write_png(tmp_path / name)
    with pytest.warns(UserWarning, match="no patients"):
        cohort = read_class_folders(tmp_path, split_folders=True)
    assert cohort.splits == ("train", "val") and cohort.class_names == ("a", "b")


@pytest.mark.parametrize("options", [{}, {"split_folders": True}])
def test_hints_name_the_reader_that_fits_and_no_circle(tmp_path, write_png, options):
    write_png(tmp_path / "nct/ADI/ADI-A.png")
    with pytest.raises(
        ValueError, match=r"images lie in class/patch folders; call read_class_folders \(layout='classes'\)"
    ):
        read_folders(tmp_path / "nct", **options)
    write_png(tmp_path / "deep/train/a/p/s/1.png")
    with pytest.raises(ValueError, match="read_folders with split_folders=True"):
        read_folders(tmp_path / "deep")
    write_png(tmp_path / "plain/a/p/s/1.png")
    with pytest.raises(ValueError, match=r"images lie in class/patient/slide/patch folders; call read_folders"):
        read_class_folders(tmp_path / "plain", **options)
    with pytest.raises(FileNotFoundError, match=r"Here images lie in class/patch folders; call read_class_folders"):
        read_opensrh(tmp_path / "nct")
    write_png(tmp_path / "nct/x.png")
    with pytest.raises(ValueError, match="1 images 0 folders deep, 1 images 1 folders deep, so that no layout"):
        read_folders(tmp_path / "nct", **options)


def test_whole_slides_and_arrays_say_what_to_do(tmp_path):
    for name in ("slides/1.svs", "slides/2.ndpi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for reader in (read_folders, read_class_folders):
        with pytest.raises(ValueError, match="it holds 2 whole slides; whole slides are cut into patches first"):
            reader(tmp_path / "slides")
    (tmp_path / "h5").mkdir()
    (tmp_path / "h5/1.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="1 files of arrays, which are no images"):
        read_folders(tmp_path / "h5")


def test_what_computers_add_is_skipped_and_counted(tmp_path, write_png):
    for name in ("a/p1/s/0.png", "b/p2/s/0.png", "__MACOSX/a/p1/s/._0.png", "a/p1/s/@eaDir/0.png/t.jpg"):
        write_png(tmp_path / name) if not name.endswith("jpg") else (tmp_path / name).parent.mkdir(parents=True)
    for name in ("a/p1/s/._0.png", "a/p1/s/Thumbs.db", "._a", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    cohort = read_folders(tmp_path)
    assert [row.path for row in cohort.records] == ["a/p1/s/0.png", "b/p2/s/0.png"]
    assert cohort.notes == ("passed over: 5 files and folders that computers add (__MACOSX, @eaDir, ._*)",)


def test_the_kind_is_found_in_the_first_files_and_stated(tmp_path):
    rng = np.random.default_rng(0)
    for name, pixels in (
        ("rgb", rng.integers(0, 255, (8, 8, 3), np.uint8)),
        ("srh", rng.integers(0, 9, (2, 8, 8), np.uint16)),
    ):
        (tmp_path / name / "a/p/s").mkdir(parents=True)
        tifffile.imwrite(tmp_path / name / "a/p/s/1.tif", pixels)
        cohort = read_folders(tmp_path / name)
        assert cohort.kind == name and any(f"kind {name!r}" in note for note in cohort.notes)
    (tmp_path / "rgb/a/p/s/2.tif").write_bytes((tmp_path / "srh/a/p/s/1.tif").read_bytes())
    with pytest.raises(ValueError, match="the first TIFF files are of different kinds"):
        read_folders(tmp_path / "rgb")
    assert read_folders(tmp_path / "rgb", kind="rgb").kind == "rgb"
    (tmp_path / "rgb/m.csv").write_text("path,class,patient,slide\nnone.tif,a,p,s")
    assert read_csv(tmp_path / "rgb", "m.csv").kind == "srh"


def test_masks_beside_patches_are_counted(tmp_path, write_png):
    names = (
        "a/p1/s/x.png",
        "a/p1/s/x_mask.png",
        "a/p1/s/y-Label.png",
        "b/p2/s/face_mask.png",
        "b/p2/s/z_seg.png",
        "b/p2/s/z.png",
    )
    for seed, name in enumerate(names):
        write_png(tmp_path / name, seed=seed)
    with pytest.warns(UserWarning, match="2 images are called as masks or labels of others and were read as patches"):
        cohort = read_folders(tmp_path)
    assert len(cohort) == 6 and "'a/p1/s/x_mask.png', 'b/p2/s/z_seg.png'" in cohort.notes[0]


def test_folders_without_an_end_are_refused(tmp_path, write_png):
    write_png(tmp_path / "a" / "p1" / "1.png")
    (tmp_path / "a" / "p2" / "/".join("d" * 150)).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"folders of {tmp_path} lie more than 100 deep in each other, from 'a' on"):
        read_class_folders(tmp_path, patient="^a/([^/]+)")
    assert max(folder.count("/d") for folder, _, _ in walk_folders(tmp_path)) == 98
    assert max(folder.count("/d") for folder, _, _ in walk_folders(tmp_path / "a")) == 99
