"""Cohorts from tables: columns by name, paths by template, frames, and cells that are missing or lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hsat.data import from_frame, read_csv
from hsat.types.names import alike_names, is_missing

NAMES = {"path": "file", "class": "label", "patient": "case_id", "slide": "slide_id"}
WILDS = "patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path.parent


def test_only_the_named_columns_are_read_and_cells_are_text(tmp_path):
    root = write(
        tmp_path / "dataset.csv",
        "file,label,case_id,slide_id,split,patient",
        "a.png,1,004,01,0,NA",
        "b.png,0,4.50,1e3,1,",
    )
    cohort = read_csv(root, "dataset.csv", columns=NAMES)
    assert [tuple(row) for row in cohort.records] == [
        ("a.png", "1", "004", "01", ""),
        ("b.png", "0", "4.50", "1e3", ""),
    ]
    cohort = read_csv(root, "dataset.csv", columns=NAMES | {"split": "split"})
    assert cohort.splits == ("0", "1")


def test_paths_by_template_as_camelyon17_wilds_has_them(tmp_path):
    root = write(
        tmp_path / "metadata.csv", ",patient,node,x_coord,y_coord,tumor", "0,004,4,3328,21792,1", "1,004,4,3200,2,0"
    )
    cohort = read_csv(
        root, "metadata.csv", columns={"class": "tumor", "patient": "patient", "slide": "node"}, path_template=WILDS
    )
    assert cohort.records[0].path == "patches/patient_004_node_4/patch_patient_004_node_4_x_3328_y_21792.png"
    assert cohort.records[0].patient == "004" and cohort.class_names == ("0", "1")


def test_a_row_per_slide_stands_for_its_patches(tmp_path, write_png):
    for name in ("s1/b.png", "s1/a.png", "s2/a.png"):
        write_png(tmp_path / "patches" / name)
    (tmp_path / "patches/s1/notes.txt").touch()
    (tmp_path / "patches/s1/._a.png").touch()
    root = write(tmp_path / "d.csv", "case_id,slide_id,label", "p1,s1,tumour", "p2,s2,normal")
    columns = {name: NAMES[name] for name in ("class", "patient", "slide")}
    cohort = read_csv(root, "d.csv", columns=columns, path_template="patches/{slide}/*.png")
    assert [row.path for row in cohort.records] == ["patches/s1/a.png", "patches/s1/b.png", "patches/s2/a.png"]
    assert [row.patient for row in cohort.records] == ["p1", "p1", "p2"]
    with pytest.raises(ValueError, match=r"d\.csv, line 2: no image 'patches/s1/\*\.jpg'"):
        read_csv(root, "d.csv", columns=columns, path_template="patches/{slide}/*.jpg")
    with pytest.raises(ValueError, match=r"line 2: folder 'tiles/s1' .* cannot be read"):
        read_csv(root, "d.csv", columns=columns, path_template="tiles/{slide}/*")
    with pytest.raises(ValueError, match="has a \\* in a folder"):
        read_csv(root, "d.csv", columns=columns, path_template="*/{slide}/*.png")


def test_cells_are_no_patterns_and_a_number_does_not_go_on_in_the_star(tmp_path, write_png):
    for name in ("Slide[0] A_1.png", "Slide[0] A_1_mask.png", "SlideX A_1.png", "case1_0.png", "case10_0.png"):
        write_png(tmp_path / "t" / name)
    root = write(tmp_path / "d.csv", "slide,label", "Slide[0] A,tumour")
    columns = {"class": "label", "patient": "slide"}
    with pytest.warns(UserWarning, match="masks or labels of others"):
        cohort = read_csv(root, "d.csv", columns=columns, path_template="t/{slide}_*.png")
    assert [row.path for row in cohort.records] == ["t/Slide[0] A_1.png", "t/Slide[0] A_1_mask.png"]
    write(tmp_path / "d.csv", "slide,label", "case1,tumour")
    with pytest.raises(ValueError, match=r"line 2: .* takes 'case10_0.png' for 'case1', whose number goes on there"):
        read_csv(root, "d.csv", columns=columns, path_template="t/{slide}*.png")
    assert len(read_csv(root, "d.csv", columns=columns, path_template="t/{slide}_*.png")) == 1


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_separators_of_spreadsheets(tmp_path, separator):
    lines = ["path,class,patient,slide,split", "a.png,tumour,004,s,train", "b.png,normal,005,s,val"]
    root = write(tmp_path / "d.csv", *[line.replace(",", separator) for line in lines])
    assert read_csv(root, "d.csv").patient_names == ("004", "005")
    write(tmp_path / "d.csv", lines[0].replace(",", separator), "a.png")
    with pytest.raises(ValueError, match="line 2: 1 fields, but the header has 5; quote fields that hold"):
        read_csv(root, "d.csv")


def test_patients_in_several_splits_are_read_without_them(tmp_path):
    root = write(tmp_path / "d.csv", "path,class,patient,slide,split", "a.png,t,p,s,train", "b.png,t,p,s,val")
    with pytest.raises(ValueError, match=r"belongs to one split only: read without them \(keep_splits=False\)"):
        read_csv(root, "d.csv")
    assert read_csv(root, "d.csv", keep_splits=False).splits == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{stain}.png", r"asks for \{stain\}; .* has \{patient\}, \{class\}, \{slide\}"),
        ("{patient:>9}.png", "cells are put in as they are"),
        ("{patient!r}.png", "cells are put in as they are"),
        ("{patient.__class__}.png", "asks for"),
        ("{patient", "is not readable"),
        ("../{patient}.png", r"line 2: path '\.\./p1\.png' is refused"),
        ("/etc/{patient}", "line 2: path '/etc/p1' is refused: it is absolute"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    root = write(tmp_path / "m.csv", "patient,class,slide", "p1,a,s")
    with pytest.raises(ValueError, match=message):
        read_csv(root, "m.csv", columns={"class": "class", "patient": "patient"}, path_template=template)


def test_links_do_not_lead_a_template_out_of_the_root(tmp_path, write_png):
    write_png(tmp_path / "outside/s1/a.png")
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "root/in")
    root = write(tmp_path / "root/m.csv", "patient,class,slide", "p1,a,s1")
    options = {"columns": {"class": "class", "patient": "patient", "slide": "slide"}, "path_template": "in/{slide}/*"}
    with pytest.raises(ValueError, match=r"leads out of the cohort's root .* through a link"):
        read_csv(root, "m.csv", **options)
    assert len(read_csv(root, "m.csv", **options, allow_links=True)) == 1


@pytest.mark.parametrize(
    "cell", ["", " ", "nan", "NaN", "NA", "N/A", "n/a", "NULL", "null", "None", "<NA>", "#N/A", "NaT", "-", "?", "\\N"]
)
@pytest.mark.parametrize("column", [1, 2, 3])
def test_every_spelling_of_a_missing_value_is_refused_with_its_line(tmp_path, cell, column):
    row = ["b.png", "b", "p2", "s2"]
    row[column] = cell
    if cell == "None" and column == 1:
        row[column] = "NA"
    root = write(tmp_path / "manifest.csv", "path,class,patient,slide", "a.png,a,p1,s1", ",".join(row), "")
    name = ("path", "class", "patient", "slide")[column]
    with pytest.raises(
        ValueError, match=rf"manifest\.csv, line 3: {name} is (empty|.*a value is missing).*(fill it in|take)"
    ):
        read_csv(root)


def test_a_missing_split_is_no_split_and_rows_of_commas_are_left_out(tmp_path):
    root = write(
        tmp_path / "manifest.csv",
        "path,class,patient,slide,split",
        "a.png,a,p1,s,NA",
        ",,,,",
        "b.png,b,p2,s,val",
        ",,,,",
        "",
    )
    cohort = read_csv(root)
    assert [row.split for row in cohort.records] == ["", "val"]
    assert "left out: 2 rows of manifest.csv in which every cell is empty" in cohort.notes


def test_formulas_and_wrong_encodings_are_refused(tmp_path):
    for cell, message in (
        ("=A2&B2", "is the formula '=A2&B2'; save the table with values"),
        ("M\ufffdller", "wrong encoding"),
    ):
        root = write(tmp_path / "manifest.csv", "path,class,patient,slide", f"a.png,a,{cell},s")
        with pytest.raises(ValueError, match=rf"line 2: patient is .*{message[-20:]}"):
            read_csv(root)


def test_classes_that_may_be_meant_are_warned_of(tmp_path):
    root = write(tmp_path / "manifest.csv", "path,class,patient,slide", "a.png,none,p1,s", "b.png,b,p2,s")
    with pytest.warns(UserWarning, match="class 'none' .* if it is no class, take these rows or this folder out$"):
        assert read_csv(root).class_names == ("b", "none")


@pytest.mark.parametrize(
    ("first", "second"),
    [("P1", "p1"), ("p 1", "p1"), ("caf\u00e9", "cafe\u0301"), ("004", "4"), ("\uff11", "1"), ("4.0", "4")],
)
def test_ids_that_look_alike_are_warned_of(tmp_path, first, second):
    root = write(tmp_path / "manifest.csv", "path,class,patient,slide", f"a.png,a,{first},s", f"b.png,a,{second},s")
    with pytest.warns(UserWarning) as found:
        cohort = read_csv(root)
    assert len(cohort.patient_names) == 2
    assert any(f"{first!r} and patient {second!r} differ only in case" in str(one.message) for one in found)
    assert any("differ only in" in note for note in cohort.notes)


def test_slides_that_look_alike_and_numbers_that_became_decimals(tmp_path):
    root = write(
        tmp_path / "manifest.csv", "path,class,patient,slide", "a.png,a,1.0,S1", "b.png,a,1.0,s1", "c.png,a,2.0,s1"
    )
    with pytest.warns(UserWarning) as found:
        read_csv(root)
    texts = " ".join(str(one.message) for one in found)
    assert "slides 'S1' and 's1' of patient '1.0' differ only" in texts
    assert "patient '1.0' and 1 more look like whole numbers" in texts
    assert is_missing(" na ") and not is_missing("normal") and alike_names(["a", "b"]) == []


def test_without_a_column_of_patients(tmp_path):
    root = write(tmp_path / "m.csv", "file,label,slide_id", "a.png,a,s1", "b.png,b,s2")
    with pytest.warns(UserWarning, match="every patch counts as a slide and a patient of its own"):
        cohort = read_csv(root, "m.csv", columns={"path": "file", "class": "label"})
    assert cohort.patient_names == ("a.png", "b.png")
    with pytest.warns(UserWarning, match="every slide counts as one"):
        cohort = read_csv(root, "m.csv", columns={"path": "file", "class": "label", "slide": "slide_id"})
    assert cohort.patient_names == ("s1", "s2")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": "path"}, "columns names 'file'; what a column can be is path, class, patient"),
        ({"path": "file", "class": "grade"}, "has no column 'grade'; it has 'file', 'label', 'slide_id'"),
        ({"class": "label"}, "does not say which column is the path of a patch; .* or give path_template"),
        ({"path": "file"}, "does not say which column is the class"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    root = write(tmp_path / "m.csv", "file,label,slide_id", "a.png,a,s1")
    with pytest.raises(ValueError, match=message):
        read_csv(root, "m.csv", columns=columns)


def test_whole_slides_are_tiled_first(tmp_path):
    root = write(tmp_path / "manifest.csv", "path,class,patient,slide", "a.svs,a,p,s")
    with pytest.raises(ValueError, match=r"lists 'a\.svs', a whole slide; whole slides are cut into patches first"):
        read_csv(root)


class Frame(dict):
    """Stands for a data frame: iterating gives names, indexing columns."""


def test_frames(tmp_path):
    import numpy as np

    columns = {
        "file": [tmp_path / "a.png", f"{tmp_path}/b.png"],
        "label": ["a", "b"],
        "case_id": np.array([4.0, 5.0]),
        "slide_id": np.array([1, 2]),
    }
    cohort = from_frame(Frame(columns), tmp_path, columns=NAMES)
    assert [tuple(row)[:4] for row in cohort.records] == [("a.png", "a", "4", "1"), ("b.png", "b", "5", "2")]
    for missing in (None, float("nan"), np.nan, ""):
        with pytest.raises(ValueError, match="row 1: patient is empty"):
            from_frame(columns | {"case_id": [4, missing]}, tmp_path, columns=NAMES)
    with pytest.raises(ValueError, match="different lengths"):
        from_frame(columns | {"case_id": [4]}, tmp_path, columns=NAMES)
    with pytest.raises(TypeError, match="a frame maps names to columns"):
        from_frame(7, tmp_path)


def test_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"path": ["a.png", "b.png"], "class": ["a", "b"], "patient": ["004", None], "slide": [1, 2]}
    )
    with pytest.raises(ValueError, match="row 1: patient is empty"):
        from_frame(frame, tmp_path)
    assert from_frame(frame.fillna("005"), tmp_path).patient_names == ("004", "005")


def test_a_manifest_is_a_regular_file_of_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.csv").write_text("path,class,patient,slide\n")
    (root / "link.csv").symlink_to("../outside.csv")
    with pytest.raises(ValueError, match=r"path 'link\.csv' leads out of the cohort's root"):
        read_csv(root, "link.csv")
    for manifest, links in (("link.csv", True), ("../outside.csv", False), (tmp_path / "outside.csv", False)):
        with pytest.raises(ValueError, match="has a header and no rows"):
            read_csv(root, manifest, allow_links=links)
    os.mkfifo(root / "pipe.csv")
    with pytest.raises(ValueError, match=r"pipe\.csv is a named pipe \(FIFO\), not a manifest"):
        read_csv(root, "pipe.csv")
