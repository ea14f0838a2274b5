"""All bad files of a cohort at once, and lists of exclusions."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from hsat.data import FileCheck, read_csv, read_exclusions, read_folders
from hsat.data.file_check import FileProblem


def picture(seed, side=32):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture
def bad_root(tmp_path):
    """Nine files: two sound ones, and one or two of each problem."""
    files = {
        "a1": picture(1),
        "a2": picture(2),
        "copy": picture(1),
        "near": np.clip(picture(2).astype(int) + 2, 0, 255).astype(np.uint8),
        "blank": np.full((32, 32, 3), 240, np.uint8),
        "large": picture(3, 48),
        "said_a": picture(4),
        "said_b": picture(4),
    }
    rows = ["path,class,patient,slide,split"]
    for name, pixels in files.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        split = "val" if name in ("copy", "near") else "train"
        rows.append(f"{name}.png,{'b' if name == 'said_b' else 'a'},{name},s,{split}")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a1.png").read_bytes()[:60])
    rows += ["broken.png,b,broken,s,val", "gone.png,b,gone,s,val"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize("workers", [1, 4])
def test_everything_is_found_in_one_pass(bad_root, workers):
    seen = []
    check = read_csv(bad_root).check_files(workers=workers, progress=seen.append)
    assert check.files == 10 == sum(seen)
    found = {(one.path, one.problem): one.detail for one in check.problems}
    assert found.keys() == {
        ("broken.png", "unreadable"),
        ("gone.png", "unreadable"),
        ("said_a.png", "contradicting"),
        ("said_b.png", "contradicting"),
        ("copy.png", "duplicate"),
        ("near.png", "near duplicate"),
        ("large.png", "size"),
        ("blank.png", "blank"),
    }
    assert found["gone.png", "unreadable"] == "there is no such file"
    assert found["copy.png", "duplicate"] == "the same file as a1.png in split 'train' and of patient 'a1'"
    assert found["near.png", "near duplicate"] == "looks like a2.png of split 'train'"
    assert found["large.png", "size"] == "48 x 48, most are 32 x 32" and check.sizes == {(32, 32): 7, (48, 48): 1}
    assert str(check).startswith(
        "10 files: 2 unreadable, 2 contradicting, 1 duplicate, 1 near duplicate, 1 size, 1 blank"
    )


def test_lists_of_exclusions(bad_root, tmp_path_factory):
    cohort = read_csv(bad_root)
    check = cohort.check_files()
    path = check.write(tmp_path_factory.mktemp("lists") / "files.csv")
    assert read_exclusions(path) == check.paths() and len(check.paths()) == 5
    kept = cohort.without(read_exclusions(path))
    assert [row.path for row in kept.records] == ["a1.png", "a2.png", "near.png", "blank.png", "large.png"]
    assert kept.class_names == cohort.class_names and kept.notes[-1] == "left out: 5 excluded patches"
    assert kept.check_files().paths() == ()
    path.write_text(path.read_text().replace("of class 'b'\",yes", "of class 'b'\",no"))
    assert "said_a.png" not in read_exclusions(path)
    path.write_text(path.read_text().replace(",yes", ",maybe"))
    with pytest.raises(ValueError, match=r"files\.csv, row 2: exclude is 'maybe'; write yes or no"):
        read_exclusions(path)
    path.write_text("a1.png\n\na2.png\n")
    assert read_exclusions(path) == ("a1.png", "a2.png")
    with pytest.raises(ValueError, match=r"none of the 1 excluded paths, such as 'x\.png', is in the cohort"):
        cohort.without(["x.png"])
    with pytest.raises(ValueError, match="none of the 1 excluded paths is in the cohort"):
        cohort.without(["root:x:0:0"])
    with pytest.raises(ValueError, match=r"all 10 patches .* are excluded"):
        cohort.without(row.path for row in cohort.records)
    with pytest.raises(ValueError, match="unknown problem 'odd'"):
        check.paths(["odd"])


def test_lists_as_spreadsheets_write_them(tmp_path):
    path = FileCheck(1, (FileProblem("=a/1.png", "unreadable", "-x"),), {}).write(tmp_path / "files.csv")
    assert path.read_text().splitlines()[1] == "'=a/1.png,unreadable,'-x,yes"
    assert read_exclusions(path) == ("=a/1.png",)
    path.write_text(path.read_text().replace(",", ";"))
    assert read_exclusions(path) == ("=a/1.png",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exclude,path\nyes\n", "row 2: no path, and exclude is yes"),
        ("exclude,path\nno\n\nyes, \n", "row 4: no path"),
        ("path,exclude\n" + "a" * 140_000 + ",yes\n", "line 2: field larger than field limit"),
        ("path,exclude\na," + "b" * 999 + "\n", r"exclude is 'b{60}'\.\.\. \(999 characters\); write yes or no"),
    ],
)
def test_damaged_lists_are_named(text, said, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"list\.csv.*{said}"):
        read_exclusions(tmp_path / "list.csv")


def test_a_list_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="named pipe"):
        read_exclusions(tmp_path / "pipe")


def test_without_splits_patients_are_compared(tmp_path, write_png):
    for name in ("a/p1/s/1.png", "a/p1/s/2.png", "a/p2/s/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        moved = int(name.endswith("2.png")) + 2 * int("p2" in name)
        Image.fromarray(np.clip(picture(5).astype(int) + moved, 0, 255).astype(np.uint8)).save(tmp_path / name)
    problems = read_folders(tmp_path).check_files().problems
    assert [(one.path, one.problem, one.detail) for one in problems] == [
        ("a/p2/s/1.png", "near duplicate", "looks like a/p1/s/1.png of patient 'p1'")
    ]
