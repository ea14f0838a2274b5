"""Folders as they are downloaded: which layouts are found, and which are refused with the call to write."""

from __future__ import annotations

import os
import re

import pytest

from hsat.data import ReadOptions, find_cohort, find_splits, read_class_folders, read_csv, read_folders

READERS = {"read_csv": read_csv, "read_folders": read_folders, "read_class_folders": read_class_folders}


def calls_in(message):
    """The calls that a message names, made."""
    calls = re.findall(r"call (read_\w+\(.*?\)) and give the Cohort", message)
    assert calls, message
    return [eval(call, dict(READERS)) for call in calls]


def refusal(root):
    with pytest.raises(ValueError) as caught:
        find_cohort(root)
    return str(caught.value)


NCT = [f"{split}/{name}/{name}-{i}.png" for split in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K") for name in "ADI LYM".split()
       for i in (1, 2)]  # fmt: skip


def test_splits_by_known_names(make):
    cohort = find_cohort(make(*NCT))
    assert cohort.class_names == ("ADI", "LYM") and len(cohort.patient_names) == 8
    assert find_splits(cohort.splits) == ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K")


@pytest.mark.parametrize(
    ("names", "levels"),
    [
        (["Train/a/p1/1.png", "Val/b/p2/1.png"], "split/class/patient/patch"),
        (["Training/a/p1/s/1.png", "Testing/b/p2/s/1.png"], "split/class/patient/slide/patch"),
        (["train/0/1.png", "valid/1/1.png"], "split/class/patch"),
    ],
)
def test_splits_in_any_case_and_at_any_depth(make, names, levels):
    cohort = find_cohort(make(*names))
    assert f"read as folders {levels}" in cohort.notes[0]
    assert len(cohort.class_names) == 2 and all(find_splits(cohort.splits))


@pytest.mark.filterwarnings("ignore:.*no patients are known", "ignore:.*have folders under several classes")
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["left/ADI/1.png", "left/TUM/1.png", "right/ADI/2.png", "right/TUM/2.png"], {"ADI", "TUM"}),
        (["colon/colon_aca/1.png", "colon/colon_n/1.png", "lung/lung_n/1.png"], {"colon_aca", "colon_n", "lung_n"}),
        (["set_a/grade1/1.png", "set_a/grade2/1.png", "set_b/grade1/2.png"], {"grade1", "grade2"}),
        (["left/ADI/p1/1.png", "right/ADI/p2/1.png", "right/TUM/p3/1.png"], {"ADI", "TUM"}),
    ],
)
def test_collections_of_classes_are_refused_with_both_calls(make, names, classes):
    message = refusal(make(*names))
    assert "collection/class/" in message
    as_collections, as_patients = calls_in(message)
    assert set(as_collections.class_names) == classes
    assert set(as_patients.class_names) == {name.split("/")[0] for name in names}


def test_patients_with_several_classes_stay_patients(make):
    cohort = find_cohort(make("tumour/004/1.png", "normal/004/2.png", "normal/012/1.png"))
    assert set(cohort.patient_names) == {"004", "012"} and cohort.class_names == ("normal", "tumour")


@pytest.mark.filterwarnings("ignore:.*no patients are known")
def test_folders_of_slides_are_no_classes(make):
    message = refusal(make("TCGA-A1-0021/1.png", "TCGA-A1-0043/1.png"))
    assert "named as patients or slides are, not as classes" in message and "path_template='{slide}/*.png'" in message
    assert "normal" in find_cohort(make("normal/1.png")).class_names, (
        "one name without a number is enough to be classes"
    )


WILDS = "patient,node,x_coord,y_coord,tumor,slide,center,split"


def test_a_table_beside_one_folder_is_named_with_its_columns_and_the_call(make):
    root = make("patches/patient_004_node_4/patch_x_1.png", "patches/patient_009_node_1/patch_x_2.png")
    (root / "metadata.csv").write_text(f"{WILDS}\n004,4,1,2,1,0,0,0\n009,1,2,2,0,1,0,1\n")
    message = refusal(root)
    assert "the table metadata.csv with the columns patient, node, x_coord" in message
    assert f"read_csv({str(root)!r}, 'metadata.csv', columns={{'class': 'tumor', 'patient': 'patient'" in message
    assert "path_template=" in message and "patches/patient_004_node_4/patch_x_1.png" in message


def test_a_table_of_slides_gives_a_call_that_reads_it(make):
    root = make("patches/s_1/1.png", "patches/s_1/2.png", "patches/s_2/1.png")
    (root / "dataset.csv").write_text("case_id,slide_id,label\np1,s_1,tumour\np2,s_2,normal\n")
    (cohort,) = calls_in(refusal(root))
    assert len(cohort) == 3 and cohort.class_names == ("normal", "tumour") and cohort.patient_names == ("p1", "p2")
    for name in ("s_1", "s_2"):
        (root / "patches" / name).rename(root / name)
    (root / "patches").rmdir()
    message = refusal(root)
    assert "which its column slide_id lists, so that they are no classes" in message
    assert len(calls_in(message)[0]) == 3


def test_a_table_whose_columns_are_plain_is_read(make):
    root = make("img/1.png", "img/2.png", "img/3.png")
    (root / "meta.csv").write_text(
        "file,label,case_id,split\nimg/1.png,a,p1,train\nimg/2.png,b,p2,Val\nimg/3.png,b,p3,\n"
    )
    cohort = find_cohort(root)
    assert cohort.class_names == ("a", "b") and cohort.patient_names == ("p1", "p2", "p3")
    assert cohort.splits == ("train", "Val") and "path from column file" in cohort.notes[0]
    assert find_cohort(root / "meta.csv") == cohort
    (root / "meta.csv").write_text("file,label,wsi,fold\nimg/1.png,a,p1,0\nimg/2.png,b,p2,1\nimg/gone.png,b,p3,1\n")
    assert "columns={'path': 'file', 'class': 'label', 'slide': 'wsi'})" in refusal(root)


def test_images_beside_a_table_do_not_lose_their_labels(make):
    root = make("1.png", "2.png")
    (root / "labels.csv").write_text("filename,label\n1.png,a\n2.png,b\n")
    assert find_cohort(root).class_names == ("a", "b")
    (root / "labels.csv").write_text("id,label\n1,a\n2,b\n")
    assert "lies beside patches without folders of classes" in refusal(root)
    (root / "labels.csv").unlink()
    assert find_cohort(root).notes[0].endswith("read as images without labels, for no folders of classes hold them")


def test_other_tables_are_left_alone_and_named(make):
    root = make("a/p1/s/1.png", "b/p2/s/1.png")
    (root / "notes.csv").write_text("name,remark\na,first\nb,second\n")
    cohort = find_cohort(make("a/p1/s/2.png"))
    assert cohort.class_names == ("a", "b") and "not read: the table notes.csv" in cohort.notes[-1]


def test_a_generic_folder_is_no_class(make):
    cohort = find_cohort(make("images/a/p1/s/1.png", "images/b/p2/s/1.png"))
    assert cohort.class_names == ("a", "b") and "its only folder 'images' is no class" in cohort.notes[0]


def test_a_generic_folder_of_slides_is_refused_and_of_images_has_no_labels(make):
    root = make("tiles/slide_12/1.png", "tiles/slide_13/1.png")
    assert "of which no table says the class" in refusal(root)
    for path in (root / "tiles").rglob("*.png"):
        path.rename(root / "tiles" / f"{path.parent.name}.png")
    for name in ("slide_12", "slide_13"):
        (root / "tiles" / name).rmdir()
    assert "images without labels" in " ".join(find_cohort(root).notes)


def test_options_choose_the_layout(make):
    root = make("a/x-p1-1.png", "b/x-p2-1.png")
    assert find_cohort(root, options=ReadOptions(patient=r"-(p\d)-")).patient_names == ("p1", "p2")
    (root / "t.csv").write_text("f,c\na/x-p1-1.png,one\nb/x-p2-1.png,two\n")
    columns = {"path": "f", "class": "c"}
    named = find_cohort(root, options=ReadOptions(columns=columns, manifest="t.csv"))
    assert (
        named.class_names
        == ("one", "two")
        == find_cohort(root / "t.csv", options=ReadOptions(columns=columns)).class_names
    )


def test_whole_slides_and_half_an_opensrh_folder_say_what_to_do(tmp_path, make):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/1.svs").write_bytes(b"x")
    message = refusal(tmp_path / "slides")
    assert "whole slides are cut into patches first, as by CLAM" in message and "Give the Cohort" not in message
    assert "meta/opensrh.json is missing" in refusal(make("studies/NIO_001/1/patches/1.png"))


def test_tables_whose_cells_are_names_of_files_give_a_call_that_reads_them(make):
    root = make("train/abc_1.png", "train/abc_2.png", "train/cde_1.png", "test/efg_1.png")
    (root / "other.csv").write_text("id,label\nefg_1,0\n")
    (root / "train.csv").write_text("image_id,label\nabc,0\ncde,1\n")
    message = refusal(root)
    assert "splits by their names and hold no folders of classes" in message
    with pytest.warns(UserWarning, match="no patients are known"):
        (cohort,) = calls_in(message)
    assert cohort.class_names == ("0", "1") and len(cohort) == 3
    (root / "other.csv").unlink()
    for path in (root / "test").iterdir():
        path.unlink()
    (root / "train.csv").write_text("filename,label,patient_id\nabc_1.png,0,p\nabc_2.png,0,p\ncde_1.png,1,q\n")
    (cohort,) = calls_in(refusal(root))
    assert [row.path for row in cohort.records] == ["train/abc_1.png", "train/abc_2.png", "train/cde_1.png"]
    assert cohort.patient_names == ("p", "q")


def test_a_table_with_the_columns_of_a_manifest_is_read_or_refused_never_passed_over(make):
    root = make("Bilder/Fall 1/1.png", "Bilder/Fall 2/2.png")
    lines = "path;class;patient;slide\nBilder/Fall 1/1.png;a;p1;s\nBilder/Fall 2/2.png;b;p2;s\n"
    (root / "tabelle.csv").write_text(lines, encoding="utf-8-sig")
    assert find_cohort(root).patient_names == ("p1", "p2")
    (root / "tabelle.csv").write_text(lines, encoding="utf-16")
    assert "tabelle.csv is not UTF-8 text" in refusal(root)
    (root / "tabelle.csv").write_text(lines.replace("/", "\\"))
    assert "it holds a backslash; write forward slashes" in refusal(root)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.h5", "EmbeddingTable.from_h5"),
        ("x.xlsx", "save it as CSV"),
        ("x.json", "from_frame"),
        ("x.zip", "is a file"),
    ],
)
def test_other_files_in_place_of_a_folder_say_what_to_do(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path / name)


def test_people_in_the_names_of_files_are_pointed_out(make):
    cohort = find_cohort(make(*[f"{c}/blk-TCGA-AA-35{i}{p}-01Z-{i}.png" for c in "ab" for i in (10, 12) for p in "ab"]))
    assert "pass patient='(TCGA-" in cohort.notes[-1]


def test_masks_are_named_also_in_one_folder_of_images(make):
    assert any("masks or labels of others" in note for note in find_cohort(make("1.png", "1_mask.png")).notes)


def test_the_folder_around_the_classes_is_named_where_an_expression_finds_the_patients(make):
    root = make("BreaKHis/breast/benign/x-p1-1.png", "BreaKHis/breast/malignant/x-p2-1.png")
    with pytest.warns(UserWarning, match="all patches are of the class 'BreaKHis', and lie in the folders 'benign'"):
        read_class_folders(root, patient=r"-(p\d)-")


def test_a_manifest_is_never_passed_over_for_folders(make):
    root = make("a/p1/1.png", "b/p2/1.png")
    assert len(find_cohort(root).patient_names) == 2
    manifest = root / "manifest.csv"
    manifest.write_text('path,class,patient,slide\n"a/p1/1.png,a,REAL,s\n' + "#" * 140_000)
    assert f"{manifest} cannot be read as a table" in refusal(root)
    manifest.write_text("path,class,patient\na/p1/1.png,a,p\nb/p2/1.png,b,q\n")
    assert "the table manifest.csv with the columns path, class, patient: say which one is what" in refusal(root)
    assert refusal(root).endswith("; or rename it, and the folders are read")
    assert len(calls_in(refusal(root))[0]) == 2
    manifest.write_text("id,md5\n1,2\n")
    assert "not read: the table manifest.csv with the columns id, md5" in find_cohort(root).notes


def test_tables_that_were_not_read_are_named(make):
    root = make("a/p1/1.png", "b/p2/1.png")
    os.mkfifo(root / "notes.csv")
    assert any("notes.csv is a named pipe" in note for note in find_cohort(root).notes)
    (root / "deep" / "er" / "st" / "x").mkdir(parents=True)
    (root / "deep" / "er" / "st" / "x" / "1.png").write_bytes(b"x")
    assert "notes.csv is a named pipe" in refusal(root)
