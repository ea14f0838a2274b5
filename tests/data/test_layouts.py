from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hsat.data import read_csv, read_folders, read_opensrh

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "data.json").read_text())
INDEX, SPLITS = "meta/opensrh.json", "meta/train_val_split.json"


@pytest.fixture
def golden_root(tmp_path: Path) -> Path:
    (tmp_path / "meta").mkdir()
    for name in (INDEX, SPLITS):
        (tmp_path / name).write_text(json.dumps(GOLDEN[name]))
    return tmp_path


def change(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_opensrh_rows_are_those_of_the_published_dataset_in_order(golden_root: Path) -> None:
    with pytest.warns(UserWarning, match="NIO_010, NIO_011, NIO_012; they are left out"):
        cohort = read_opensrh(golden_root)
    for split in ("train", "val"):
        wanted = GOLDEN["results"][f"OpenSRHDataset/{split}/balance=False"]
        rows = [cohort.records[i] for i in cohort.rows(split)]
        assert [[row.path, row.class_name] for row in rows] == wanted["instances"]
        assert sorted({row.class_name for row in rows}) == wanted["classes"]
        assert all((row.patient, row.slide) == tuple(row.path.split("/")[1:3]) for row in rows)
    assert cohort.kind == "srh" and cohort.splits == ("train", "val")
    assert cohort.class_names == ("hgg", "lgg", "mening", "normal"), "one list for all splits, also where val lacks hgg"
    assert any("slide '1' of patient 'NIO_005' lists no tumor_patches" in note for note in cohort.notes)
    assert any("NIO_010, NIO_011, NIO_012" in note for note in cohort.notes)


def test_opensrh_unlisted_patients(golden_root: Path) -> None:
    with pytest.raises(ValueError, match=r"in no split of .*: NIO_010, NIO_011, NIO_012; list them, or pass"):
        read_opensrh(golden_root, unlisted="error")
    with pytest.warns(UserWarning, match="no usable patch for patients NIO_010; they are left out"):
        cohort = read_opensrh(golden_root, unlisted="keep", on_empty="skip")
    assert {cohort.records[i].patient for i in cohort.rows() if not cohort.records[i].split} == {"NIO_011", "NIO_012"}
    assert cohort.splits == ("train", "val") and len(cohort.rows("train")) == 30


@pytest.mark.filterwarnings("ignore:patients of meta")
def test_opensrh_a_patient_without_usable_patches_is_named(golden_root: Path) -> None:
    change(golden_root / SPLITS, lambda splits: splits["train"].append("NIO_010"))
    with pytest.raises(
        ValueError, match=r"opensrh\.json lists no usable patch for patients NIO_010; .*on_empty='skip'"
    ):
        read_opensrh(golden_root)


@pytest.mark.filterwarnings("ignore:patients of meta")
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (SPLITS, lambda s: s["train"].append("NIO_999"), r"train_val_split\.json lists patients whom .* 'NIO_999'"),
        (SPLITS, lambda s: s["val"].append("NIO_001"), "patient 'NIO_001' is listed in 'train' and 'val'"),
        (SPLITS, lambda s: s["val"].append("NIO_007"), "patient 'NIO_007' is listed twice in 'val'"),
        (SPLITS, lambda s: s["val"].append(7), "entry 3 of split 'val' must be a string, got 7"),
        (SPLITS, lambda s: s.update(val="NIO_007"), "'val' of the split file must be a list, got 'NIO_007'"),
        (INDEX, lambda p: p["NIO_001"].pop("class"), "patient 'NIO_001' has no 'class'; it has 'patient_id', 'slides'"),
        (INDEX, lambda p: p["NIO_001"].update(slides=[]), r"'slides' of patient 'NIO_001' must be an object, got \[\]"),
        (
            INDEX,
            lambda p: p["NIO_002"]["slides"]["1"].pop("tumor_patches"),
            "slide '1' of patient 'NIO_002' has no 'tumor_patches'",
        ),
        (
            INDEX,
            lambda p: p["NIO_002"]["slides"]["1"]["tumor_patches"].append(None),
            "entry 4 of 'tumor_patches' of slide '1' of patient 'NIO_002' must be a string, got None",
        ),
        (
            INDEX,
            lambda p: p["NIO_002"]["slides"]["1"]["tumor_patches"].append("../x.tif"),
            r"opensrh\.json, patient 'NIO_002': path '\.\./x\.tif' is refused",
        ),
        (
            INDEX,
            lambda p: p["NIO_002"]["slides"]["1"]["tumor_patches"].append(
                p["NIO_002"]["slides"]["1"]["tumor_patches"][0]
            ),
            "is listed twice",
        ),
    ],
)
def test_opensrh_each_defect_of_the_meta_files_is_named(
    golden_root: Path, name: str, edit: Callable[[dict], object], message: str
) -> None:
    change(golden_root / name, edit)
    with pytest.raises(ValueError, match=message):
        read_opensrh(golden_root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"train": [\n"NIO_001",]}', r"train_val_split\.json is not valid JSON: .* line 2, column"),
        (b'{"train": ["NIO_001"], "train": ["NIO_002"]}', "the key 'train' stands twice"),
        (b"[]", r"the whole file must be an object, got \[\]"),
        (b'"\xff"', "is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"train": [], "val": []}', "lists no usable patch for any patient"),
    ],
)
@pytest.mark.filterwarnings("ignore:patients of meta")
def test_opensrh_malformed_json_is_named(golden_root: Path, content: bytes, message: str) -> None:
    (golden_root / SPLITS).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_opensrh(golden_root)


def test_opensrh_missing_files(tmp_path: Path, opensrh_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cohort root .*nowhere does not exist"):
        read_opensrh(tmp_path / "nowhere")
    (opensrh_root / SPLITS).unlink()
    with pytest.raises(FileNotFoundError, match=r"train_val_split\.json is missing; .*layout='folders'"):
        read_opensrh(opensrh_root)
    (opensrh_root / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"opensrh\.json is missing"):
        read_opensrh(opensrh_root)


def test_opensrh_options(opensrh_root: Path) -> None:
    seven = ("hgg", "lgg", "mening", "metast", "normal", "pituitary", "schwannoma")
    cohort = read_opensrh(opensrh_root, class_names=seven)
    assert cohort.class_names == seven and set(cohort.label.tolist()) == {0, 1, 4}
    cohort.file_sizes()
    with pytest.raises(ValueError, match="patient 'NIO_002': unknown class 'lgg'"):
        read_opensrh(opensrh_root, class_names=("hgg", "normal"))
    with pytest.raises(ValueError, match="on_empty must be 'error' or 'skip', got 'drop'"):
        read_opensrh(opensrh_root, on_empty="drop")
    with pytest.raises(ValueError, match="unlisted must be 'skip', 'keep' or 'error', got 'drop'"):
        read_opensrh(opensrh_root, unlisted="drop")
    with pytest.raises(TypeError, match="on_emtpy"):
        read_opensrh(opensrh_root, on_emtpy="skip")


def test_folders_in_order_of_name(folders_root: Path) -> None:
    cohort = read_folders(folders_root)
    assert [row.path for row in cohort.records] == [
        "adenoma/a1/s1/1.png",
        "adenoma/a1/s1/2.png",
        "adenoma/a1/s2/1.png",
        "adenoma/a2/s1/1.png",
        "polyp/p1/s1/1.png",
    ]
    assert cohort.kind == "rgb" and cohort.class_names == ("adenoma", "polyp") and cohort.splits == ()
    assert cohort.slide_names == (("a1", "s1"), ("a1", "s2"), ("a2", "s1"), ("p1", "s1"))
    assert cohort.notes == ()
    cohort.file_sizes()


def test_folders_with_splits(folders_root: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (folders_root / "polyp").rename(tmp_path / "polyp")
    folders_root.rename(tmp_path / "both/train")
    (tmp_path / "both/val").mkdir()
    (tmp_path / "polyp").rename(tmp_path / "both/val/polyp")
    cohort = read_folders(tmp_path / "both", split_folders=True)
    assert cohort.splits == ("train", "val") and cohort.rows("val").tolist() == [4]
    with pytest.raises(
        ValueError, match=r"folder 'train/adenoma/a1/s1' .*class/patient/slide/patch; .*split_folders=True"
    ):
        read_folders(tmp_path / "both")


def test_folders_pass_over_what_is_no_image_and_say_so(folders_root: Path) -> None:
    (folders_root / "README.md").touch()
    (folders_root / ".cache").mkdir()
    (folders_root / "adenoma/a1/s1/.DS_Store").touch()
    (folders_root / "adenoma/a1/notes.txt").touch()
    cohort = read_folders(folders_root)
    assert len(cohort) == 5
    assert cohort.notes == ("passed over: 2 files outside slide folders, README.md, adenoma/a1/notes.txt",)
    (folders_root / "adenoma/a1/s1/3.gif").touch()
    with pytest.warns(UserWarning, match=r"hold files that are not read: 1 ending in '\.gif'"):
        assert len(read_folders(folders_root)) == 5


@pytest.mark.parametrize("empty", ["adenoma/a1/s9", "adenoma/a9", "serrated"])
def test_folders_an_empty_class_patient_or_slide_is_named(folders_root: Path, empty: str) -> None:
    (folders_root / empty).mkdir()
    with pytest.raises(
        ValueError, match=rf"folders of .* without a patch: '{empty}'; remove them, or pass on_empty='skip'"
    ):
        read_folders(folders_root)
    with pytest.warns(UserWarning, match=rf"'{empty}'; they are left out"):
        cohort = read_folders(folders_root, on_empty="skip")
    assert len(cohort) == 5 and any(empty in note for note in cohort.notes)


def test_folders_a_patient_under_two_classes(folders_root: Path, write_png: Callable[..., Path]) -> None:
    write_png(folders_root / "polyp/a1/s7/1.png")
    with pytest.raises(
        ValueError,
        match=r"patient 'a1' is in several classes, 'adenoma' \(adenoma/a1/s1/1\.png\)"
        r" and 'polyp' \(polyp/a1/s7/1\.png\); 1 patients are\. .*mixed='drop_minority'",
    ):
        read_folders(folders_root, mixed="error")
    with pytest.warns(
        UserWarning, match="1 of 3 patients have folders under several classes: 'a1'; each counts as one"
    ):
        cohort = read_folders(folders_root)
    assert [row.class_name for row in cohort.records if row.patient == "a1"] == ["adenoma"] * 3 + ["polyp"]
    assert any("labels belong to patches" in note for note in cohort.notes)
    with pytest.warns(UserWarning, match="1 patches of 1 patients with several classes: 'a1'"):
        cohort = read_folders(folders_root, mixed="drop_minority")
    assert [row.path for row in cohort.records if row.patient == "a1"] == [
        "adenoma/a1/s1/1.png",
        "adenoma/a1/s1/2.png",
        "adenoma/a1/s2/1.png",
    ]
    with pytest.raises(ValueError, match="mixed must be one of 'keep', 'error', 'drop_minority'; got 'majority'"):
        read_folders(folders_root, mixed="majority")


def test_folders_images_at_a_wrong_depth(folders_root: Path, write_png: Callable[..., Path]) -> None:
    write_png(folders_root / "adenoma/a1/9.png")
    with pytest.raises(
        ValueError, match=r"image 'adenoma/a1/9\.png' lies 2 folders deep; wanted class/patient/slide/patch"
    ):
        read_folders(folders_root)


def test_folders_links_in_a_circle_and_pipes(folders_root: Path) -> None:
    (folders_root / "adenoma/a3").symlink_to(folders_root / "adenoma")
    with pytest.raises(ValueError, match=r"folder 'adenoma/a3' of .* is a link to a folder that it lies in"):
        read_folders(folders_root)
    (folders_root / "adenoma/a3").unlink()
    os.mkfifo(folders_root / "adenoma/a1/s1/pipe.png")
    with pytest.raises(ValueError, match=r"'adenoma/a1/s1/pipe\.png' is not a regular file"):
        read_folders(folders_root)


def test_folders_that_may_not_be_read(folders_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "a2":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"folder cannot be read \(Permission denied\): .*adenoma/a2"):
        read_folders(folders_root)


def test_folders_without_images_and_mixed_kinds(tmp_path: Path, folders_root: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing holds no images \(\.png, .*\) in class/patient/slide folders"):
        read_folders(tmp_path / "nothing")
    (folders_root / "polyp/p1/s1/2.tif").touch()
    with pytest.raises(ValueError, match=r"some patches are TIFF and some are not.*kind='rgb'"):
        read_folders(folders_root)
    assert read_folders(folders_root, kind="rgb").kind == "rgb"
    for image in folders_root.rglob("*.png"):
        image.rename(image.with_suffix(".TIFF"))
    assert read_folders(folders_root).kind == "srh"


HEADER = "path,class,patient,slide,split,stain\n"


def manifest(root: Path, text: str | bytes, name: str = "manifest.csv") -> Path:
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def test_csv_keeps_order_and_ignores_other_columns(tmp_path: Path) -> None:
    text = '\ufeffpath,stain,slide,split,patient,class\n"b/x,1.png",HE,s1,val,p2,b\n\na/1.png,HE,s1,,p1,a\n'
    cohort = read_csv(manifest(tmp_path, text))
    assert cohort.records == (("b/x,1.png", "b", "p2", "s1", "val"), ("a/1.png", "a", "p1", "s1", ""))
    assert cohort.class_names == ("a", "b") and cohort.kind == "rgb" and cohort.splits == ("val",)
    other = tmp_path / "lists"
    other.mkdir()
    manifest(other, "path,class,patient,slide\na/1.png,a,p1,s1\n", "mine.csv")
    assert len(read_csv(tmp_path, other / "mine.csv")) == len(read_csv(tmp_path, "lists/mine.csv")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class,patient\n", r"manifest .* has no column 'slide'; it has 'path', 'class', 'patient'; say which"),
        ("path;class;patient;slide\n", "has a header and no rows"),
        ("", "has no column 'path', 'class', 'patient', 'slide'; it has nothing"),
        ("path,class,patient,slide,path\n", "has the column 'path' twice"),
        (HEADER, "has a header and no rows"),
        (HEADER + "a.png,a,p,s,train,x\nb.png,a,p,s\n", "line 3: 4 fields, but the header has 6"),
        (
            HEADER + "a.png,a,p,s,train,x\n../b.png,a,p,s,train,x\n",
            r"manifest\.csv, line 3: path '\.\./b\.png' is refused",
        ),
        (HEADER + "/b.png,a,p,s,train,x\n", "line 2: path '/b.png' is refused: it is absolute"),
        (HEADER + 'a.png,a,p,s,train,"x\ny"\nb.png,a,,s,train,x\n', "line 4: patient is empty"),
        (
            HEADER + "a.png,a,p,s,train,x\nb.png,a,p,s,val,x\n",
            r"'p' is in two splits, 'train' \(manifest.csv, line 2\)",
        ),
        (
            HEADER + "a.png,a,p,s,train,x\na.png,a,p,s,train,x\n",
            "listed twice: manifest.csv, line 2 and manifest.csv, line 3",
        ),
        (HEADER + 'a.png,"a,p,s,train,x\n', "is not readable as CSV"),
        (HEADER.encode() + b"a\xff.png,a,p,s,train,x\n", "is not UTF-8 text"),
    ],
)
def test_csv_each_defect_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(manifest(tmp_path, text))


def test_csv_unknown_class_missing_file_and_mixed_patients(tmp_path: Path) -> None:
    manifest(tmp_path, HEADER + "a.png,a,p,s,train,x\nb.png,b,p,s,train,x\nc.png,b,p,s,train,x\nd.png,a,q,s,val,x\n")
    with pytest.raises(FileNotFoundError, match=r"manifest .*other\.csv is missing; .*path, class, patient, slide"):
        read_csv(tmp_path, "other.csv")
    with pytest.warns(UserWarning, match="left out 1 patches of 1 patients"):
        cohort = read_csv(tmp_path, mixed="drop_minority")
    assert [row.path for row in cohort.records] == ["b.png", "c.png", "d.png"]
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"line 5: unknown class 'a'; class_names are \('b',\)"),
    ):
        read_csv(tmp_path, mixed="drop_minority", class_names=("b",))
