"""What names of folders and files say."""

from __future__ import annotations

import re

import pytest

from hsat.data.folder_names import (
    are_class_names,
    case_of,
    is_generic,
    is_magnification,
    is_mask_folder,
    is_person,
    is_split_like,
    name_masks,
    person_pattern,
    repeated,
    slides_of_one,
)


@pytest.mark.parametrize(
    ("rule", "said", "not_said"),
    [
        (is_generic, "images Patches TILES", "tumour 0 my_images"),
        (is_split_like, "train Testing test_images train-patches valid", "tumour images fold1 training_day"),
        (is_mask_folder, "masks Ground_Truth gt tumour_masks annotations label", "images masked masquerade tumour"),
        (is_magnification, "40X x20 2.5x 100x", "40 x MAX 40xx x1 7x"),
        (is_person, "10253 TCGA-AA-3556 patient_1 case7 Slide-2 P01 pt_12", "tumour p1 grade1 01_TUMOR patient case"),
    ],
)
def test_rules_of_one_name(rule, said, not_said):
    assert {name: rule(name) for name in (said + " " + not_said).split()} == dict.fromkeys(
        said.split(), True
    ) | dict.fromkeys(not_said.split(), False)


def test_names_that_may_be_classes():
    assert (
        are_class_names(["01_TUMOR", "02_STROMA"]) and are_class_names(["MSS", "MSI"]) and are_class_names(["0", "1"])
    )
    assert (
        not are_class_names(["tumour"]) and not are_class_names(["P001", "P002"]) and not are_class_names(["12", "13"])
    )


@pytest.mark.parametrize(
    ("names", "slides", "found"),
    [
        (["P001_S1", "P002_S1", "P001_S2"], ("P001_S1", "P001_S2"), {"P001_S1": "P001", "P002_S1": "P002"}),
        (["B 12-slide 1", "B 12-slide 2b"], ("B 12-slide 1", "B 12-slide 2b"), {"B 12-slide 1": "B 12"}),
        (["TCGA-05-4249-01Z-00-DX1", "TCGA-05-4249-01Z-00-DX2"], None, {"TCGA-05-4249-01Z-00-DX1": "TCGA-05-4249"}),
        (["TCGA-05-4249", "TCGA-05-4250"], (), {}),
        (["C3L-00001-1", "C3L-00001-2", "C3N-00001-2"], ("C3L-00001-1", "C3L-00001-2"), {"C3L-00001-1": "C3L-00001"}),
        (["P_1", "P_2", "2019-001", "2019-002", "patient_004_node_1", "patient_004_node_2"], (), {}),
    ],
)  # fmt: skip
def test_slides_of_one_person_and_the_expression_that_finds_them(names, slides, found):
    assert slides_of_one(names) == (tuple(names) if slides is None else slides)
    for name, person in found.items():
        match = re.search(person_pattern(slides_of_one(names)), f"class/{name}/1.png")
        assert match and match[1] == person


def test_barcodes_of_people():
    assert case_of("blk-ABC-TCGA-AA-3504-01Z-00-DX1") == "TCGA-AA-3504" and case_of("GTEX-1117F-0126") == "GTEX-1117F"
    assert case_of("patient_4") == ""


def test_masks_of_images_by_their_names():
    masks = [f"a/x{word}.png" for word in ("_mask", "-labelled", ".gt", "_anno", "_ground_truth", " seg")]
    assert name_masks(["a/x.png", *masks, "a/y_mask.png", "a/x_tumour.png"]) == masks


def test_repeated_names():
    assert repeated([["a", "b", "b"], ["c"], ["c", "a"]]) == ["a", "c"]
