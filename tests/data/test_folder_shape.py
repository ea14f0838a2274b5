"""Folders that are neither classes nor patients are not read as such, and the calls that are named read them."""

from __future__ import annotations

import os
import re

import pytest

from hsat.data import find_cohort, read_class_folders, read_csv, read_folders
from hsat.data.folder_shape import FolderShape
from hsat.data.survey import list_folders

READERS = {"read_csv": read_csv, "read_folders": read_folders, "read_class_folders": read_class_folders}
pytestmark = pytest.mark.filterwarnings("ignore:.*no patients are known")
TWO = ("1.png", "2.png")


def read_as_told(root):
    """The refusal, and the cohorts of the calls in it that need nothing filled in."""
    with pytest.raises(ValueError) as caught:
        find_cohort(root)
    calls = re.findall(r"call (read_\w+\(.*?\)) and give the Cohort", str(caught.value))
    blank = ("TABLE.csv", "COLUMN", "WHAT_STANDS")
    return str(caught.value), [eval(call, dict(READERS)) for call in calls if not any(word in call for word in blank)]


def below(folders, names=TWO):
    return [f"{folder}/{name}" for folder in folders for name in names]


def test_slides_of_one_person_are_no_patients(make):
    names = [f"{label}/TCGA-AA-{case}-01Z-00-DX{i}" for label, case in (("a", 3556), ("b", 3557)) for i in (1, 2)]
    message, (as_slides, as_patients) = read_as_told(make(*below(names)))
    assert "slides of one person" in message
    assert as_slides.patient_names == ("TCGA-AA-3556", "TCGA-AA-3557") and len(as_patients.patient_names) == 4
    assert len({(row.patient, row.slide) for row in as_slides.records}) == 4


def test_one_person_in_two_folders_of_patients(make):
    names = ["a/TCGA-AA-3556-01Z-00-DX1/s", "a/TCGA-AA-3556-01Z-00-DX2/s", "b/TCGA-AA-3557-01Z-00-DX1/s"]
    _, (as_slides, as_patients) = read_as_told(make(*below(names)))
    assert as_slides.patient_names == ("TCGA-AA-3556", "TCGA-AA-3557") and len(as_patients.patient_names) == 3


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["benign/40X", "benign/100X", "malignant/40X"], "are magnifications, no patients"),
        (["40X/benign", "100X/benign"], "are magnifications, no classes; give the folder of one of them"),
        (["a/P001/10x", "a/P001/20x", "b/P002/10x"], "are magnifications, no slides"),
        (["images", "masks"], "'masks' beside 'images' are masks, no patches; give the folder of the images"),
        (["a/P001/images", "a/P001/masks", "b/P002/images"], "are masks, no patches; move the masks elsewhere"),
        (["train/a/images", "test/a/images", "train/b/images"], "between class and patch are no patients"),
        (["a/train", "a/test", "b/train", "b/test"], "inside 'a', 'b' are splits by their names"),
        (["P001/P001_S1", "P002/P002_S1"], "named as patients or slides are, not as classes"),
        (["TCGA-AA-3556/x1", "TCGA-AA-3557/x2"], "path_template='{patient}/{slide}/*.png'"),
        (["train/TCGA-AA-3556", "test/TCGA-AA-3557"], "path_template='{split}/{slide}/*.png'"),
        (["train/P001/a", "train/P002/a", "test/P003/a"], "path_template='{split}/{patient}/{class}/*.png'"),
        (["train", "test"], "are splits by their names and hold patches without folders of classes"),
    ],
)  # fmt: skip
def test_what_is_neither_class_nor_patient_is_refused(make, folders, words):
    assert words in read_as_told(make(*below(folders)))[0]


def test_slides_that_are_magnifications_are_read_as_one_slide_of_each_patient(make):
    _, (cohort,) = read_as_told(make(*below(["a/P001/10x", "a/P001/20x", "b/P002/10x"])))
    assert cohort.patient_names == ("P001", "P002") and len({row.slide for row in cohort.records}) == 2


def test_patients_with_folders_of_classes_are_read_as_such(make):
    cohort = find_cohort(make(*below(["10253/0", "10253/1", "10254/0", "10255/1"])))
    assert cohort.patient_names == ("10253", "10254", "10255") and cohort.class_names == ("0", "1")
    assert cohort.splits == () and "patient/class/patch" in cohort.notes[0]


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["Kather_texture_5000/01_TUMOR", "Kather_texture_5000/02_STROMA"], ("01_TUMOR", "02_STROMA")),
        (["BACH/Photos/Benign", "BACH/Photos/Normal"], ("Benign", "Normal")),
        (["set/tumour/P001", "set/normal/P002"], ("normal", "tumour")),
    ],
)
def test_folders_around_the_classes_are_stepped_into(make, folders, classes):
    root = make(*below(folders))
    os.makedirs(root / folders[0].split("/")[0] / "WSI")  # without images
    cohort = find_cohort(root)
    assert cohort.class_names == classes and "its only folder" in " ".join(cohort.notes)


def test_one_class_of_patients_stays_a_class(make):
    cohort = find_cohort(make(*below(["tumour/P001", "tumour/P002"])))
    assert cohort.class_names == ("tumour",) and cohort.patient_names == ("P001", "P002")


def test_levels(make):
    root = make(*below(["train/a/p1", "val/b/p2"]))
    shape = FolderShape.of(root, list_folders(root), depth=3, is_split=False)
    assert shape.is_split and shape.below == 2 and shape.names(0) == ["a", "b"] and shape.within(1) == [["p1"], ["p2"]]
    assert shape.problem() == "" and not shape.starts_with_people
