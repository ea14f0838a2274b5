from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hsat.data import Cohort, read_cohort, read_opensrh
from hsat.data.cohort import PatchRecord

ROWS = [
    PatchRecord("b/p2/s1/1.tif", "b", "p2", "s1", "train"),
    PatchRecord("a/p1/s1/1.tif", "a", "p1", "s1", "train"),
    PatchRecord("b/p2/s2/1.tif", "b", "p2", "s2", "train"),
    PatchRecord("a/p1/s1/2.tif", "a", "p1", "s1", "train"),
    PatchRecord("a/p3/s1/1.tif", "a", "p3", "s1", "val"),
]


def cohort_of(rows: list[PatchRecord], root: Path, class_names: tuple[str, ...] = ("a", "b")) -> Cohort:
    return Cohort(root=root, records=rows, class_names=class_names, kind="srh")


def write_files(root: Path, rows: list[PatchRecord] = ROWS) -> Path:
    for i, row in enumerate(rows):
        (root / row.path).parent.mkdir(parents=True, exist_ok=True)
        (root / row.path).write_bytes(bytes(i + 1))
    return root


def test_arrays_number_slides_and_patients_in_order_of_appearance(tmp_path: Path) -> None:
    cohort = cohort_of(ROWS, tmp_path)
    assert cohort.patient_names == ("p2", "p1", "p3")
    assert cohort.slide_names == (("p2", "s1"), ("p1", "s1"), ("p2", "s2"), ("p3", "s1"))
    assert cohort.splits == ("train", "val")
    wanted = {"patch": [0, 1, 2, 3, 4], "slide": [0, 1, 2, 1, 3], "patient": [0, 1, 0, 1, 2], "label": [1, 0, 1, 0, 0]}
    for name, values in wanted.items():
        array = getattr(cohort, name)
        assert array.tolist() == values and array.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_rows_of_a_split(tmp_path: Path) -> None:
    cohort = cohort_of(ROWS, tmp_path)
    assert cohort.rows("train").tolist() == [0, 1, 2, 3]
    assert cohort.rows("val").tolist() == [4]
    assert cohort.rows(None).tolist() == [0, 1, 2, 3, 4] and cohort.rows("val").dtype == np.int64
    with pytest.raises(ValueError, match="split 'test' is not in this cohort; it has 'train', 'val'"):
        cohort.rows("test")
    unsplit = cohort_of([row._replace(split="") for row in ROWS], tmp_path)
    assert unsplit.splits == ()
    with pytest.raises(ValueError, match=r"it has none; call with_split\(\) first"):
        unsplit.rows("train")


def test_summary_counts_every_class_of_every_split(tmp_path: Path) -> None:
    summary = cohort_of(ROWS, tmp_path, ("a", "b", "c")).summary()
    assert summary == {
        "train": {
            "a": {"patients": 1, "slides": 1, "patches": 2},
            "b": {"patients": 1, "slides": 2, "patches": 2},
            "c": {"patients": 0, "slides": 0, "patches": 0},
        },
        "val": {
            "a": {"patients": 1, "slides": 1, "patches": 1},
            "b": {"patients": 0, "slides": 0, "patches": 0},
            "c": {"patients": 0, "slides": 0, "patches": 0},
        },
    }


def test_repr_is_short_and_equality_pickling_and_freezing_work(tmp_path: Path) -> None:
    cohort, same = cohort_of(ROWS, tmp_path), cohort_of(ROWS, tmp_path)
    assert len(cohort) == 5 and len(repr(cohort)) < 300 and "patients=3" in str(cohort)
    assert cohort.label is cohort.label
    assert cohort == same and same.slide is not None and cohort == same and hash(cohort) == hash(same)
    assert pickle.loads(pickle.dumps(cohort)) == cohort
    assert cohort != cohort_of(ROWS[:4], tmp_path) and cohort != "cohort"
    with pytest.raises(ValidationError, match="frozen"):
        cohort.kind = "rgb"


UNSAFE = (
    r"../x.tif a/../../x.tif a/.. .. /etc/x.tif C:/x.tif c:x.tif a\x.tif \\host\x.tif . ./x.tif a//x.tif a/x.tif/ a/./x"
)


@pytest.mark.parametrize("path", [*UNSAFE.split(), "", "a\0.tif"])
def test_paths_that_may_leave_the_root_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"record 1: path .* is refused: ") as caught:
        cohort_of([ROWS[0], ROWS[1]._replace(path=path)], tmp_path)
    assert repr(path) in str(caught.value) and not isinstance(caught.value, ValidationError)


@pytest.mark.parametrize(
    "path", ["x.tif", "a b/..x.tif", "...", "a/.hidden/x..tif", "ä/日本.tif", "ab:c/x.tif", "a/c:x.tif"]
)
def test_unusual_but_safe_paths_are_taken(tmp_path: Path, path: str) -> None:
    assert cohort_of([ROWS[0]._replace(path=path)], tmp_path).path(0) == tmp_path / path


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="./\\aC:\0 ", max_size=9))
def test_accepted_paths_stay_inside_any_root(path: str) -> None:
    try:
        cohort = cohort_of([ROWS[0]._replace(path=path)], Path("/"))
    except ValueError:
        safe = path and not any(part in ("", ".", "..") for part in path.split("/")) and not set(path) & {"\\", "\0"}
        assert not safe or path[1:2] == ":"
    else:
        assert os.path.normpath(os.path.join("/data/root", path)) == f"/data/root/{path}"
        assert str(cohort.path(0)) == f"//{path}" or str(cohort.path(0)) == f"/{path}"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": ROWS[0].path}, ValueError, "path 'b/p2/s1/1.tif' is listed twice: record 0 and record 4"),
        ({"patient": "p1"}, ValueError, r"'p1' is in two splits, 'train' \(record 1\) and 'val' \(record 4\)"),
        ({"class_name": "c"}, ValueError, r"record 4: unknown class 'c'; class_names are \('a', 'b'\)"),
        ({"slide": ""}, ValueError, "record 4: slide is empty"),
        ({"patient": ""}, ValueError, "record 4: patient is empty"),
        ({"class_name": ""}, ValueError, "record 4: class_name is empty"),
        ({"patient": "p3 "}, ValueError, "record 4: patient 'p3 ' has white space around it"),
        ({"slide": 3}, TypeError, r"record 4: slide must be a string, got 3 \(int\)"),
        ({"path": Path("x")}, TypeError, "record 4: path must be a string"),
    ],
)
def test_each_broken_rule_names_the_culprit(tmp_path: Path, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cohort_of([*ROWS[:4], ROWS[4]._replace(**change)], tmp_path)


def test_the_same_slide_name_under_two_patients_is_two_slides(tmp_path: Path) -> None:
    assert len(cohort_of(ROWS, tmp_path).slide_names) == 4


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one patch"):
        cohort_of([], tmp_path)
    with pytest.raises(TypeError, match=r"record 0 must be a PatchRecord, got \('x',\)"):
        cohort_of([("x",)], tmp_path)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="class 'a' stands twice in class_names"):
        cohort_of(ROWS, tmp_path, ("a", "b", "a"))
    with pytest.raises(TypeError, match="class_names must be a sequence of non-empty strings, got 'ab'"):
        cohort_of(ROWS, tmp_path, "ab")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind must be 'srh' .* got 'grey'"):
        Cohort(root=tmp_path, records=ROWS, class_names=("a", "b"), kind="grey")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rooot"):
        Cohort(rooot=tmp_path, records=ROWS, class_names=("a", "b"), kind="srh")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="layout must be one of 'opensrh', 'folders', 'classes', 'csv'; got 'zip'"):
        read_cohort(tmp_path, "zip")  # type: ignore[arg-type]


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cohort root .*none does not exist"):
        cohort_of(ROWS, tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cohort root .*file is not a folder"):
        cohort_of(ROWS, tmp_path / "file")


def test_path_is_absolute_and_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root, outside = write_files(tmp_path / "root"), tmp_path / "root-other"
    outside.mkdir()
    (outside / "x.tif").write_bytes(b"x")
    (root / "in").symlink_to(root / "b")
    (root / "out").symlink_to(outside)
    (root / "out.tif").symlink_to(outside / "x.tif")
    (tmp_path / "link").symlink_to(root)
    rows = [ROWS[0]._replace(path=path) for path in ("in/p2/s1/1.tif", "out/x.tif", "out.tif")]
    for base in (root, tmp_path / "link"):
        cohort = cohort_of(rows, base)
        assert cohort.path(0) == base / "in/p2/s1/1.tif" and cohort.path(0).read_bytes() == b"\0"
        for i in (1, 2):
            with pytest.raises(ValueError, match=r"leads out of the cohort's root .* through a link, to .*root-other"):
                cohort.path(i)
    with pytest.raises(IndexError, match="row 3 is outside this cohort of 3 patches"):
        cohort.path(3)
    with pytest.raises(IndexError, match="row -1"):
        cohort.path(-1)


def test_file_sizes_names_missing_empty_and_odd_files(tmp_path: Path) -> None:
    cohort = cohort_of(ROWS, write_files(tmp_path))
    cohort.file_sizes()
    file = tmp_path / ROWS[2].path
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty files in the cohort at .*: 'b/p2/s2/1\.tif'; hsat check .* lists all"):
        cohort.file_sizes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"files missing from the cohort at .*: 'b/p2/s2/1\.tif'$"):
        cohort.file_sizes()
    file.mkdir()
    with pytest.raises(ValueError, match=r"'b/p2/s2/1\.tif' .* is not a regular file"):
        cohort.file_sizes()
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    many = [ROWS[0]._replace(path=f"{i}.tif") for i in range(9)]
    with pytest.raises(FileNotFoundError, match=r"'4\.tif', \.\.\. \(9 in all\)$"):
        cohort_of(many, tmp_path).file_sizes()


def test_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    cohort = cohort_of(ROWS, write_files(tmp_path / "one"))
    moved = cohort_of(ROWS, write_files(tmp_path / "two"))
    assert cohort.fingerprint() == moved.fingerprint() and len(cohort.fingerprint()) == 64
    assert cohort.fingerprint(verify=True) == moved.fingerprint(verify=True) != cohort.fingerprint()
    (tmp_path / "two" / ROWS[3].path).write_bytes(b"\1" * 4)
    assert cohort.fingerprint() == moved.fingerprint()
    assert cohort.fingerprint(verify=True) != moved.fingerprint(verify=True)
    (tmp_path / "two" / ROWS[3].path).write_bytes(bytes(99))
    assert cohort.fingerprint() != moved.fingerprint()


def test_fingerprint_sees_every_column_the_order_and_the_classes(tmp_path: Path) -> None:
    root = write_files(tmp_path)
    write_files(root, [ROWS[4]._replace(path="a/p3/s1/9.tif")])
    (root / "a/p3/s1/9.tif").write_bytes(bytes(5))
    last = ROWS[4]
    variants = [
        cohort_of(ROWS, root),
        cohort_of(ROWS, root, ("b", "a")),
        cohort_of(ROWS, root, ("a", "b", "c")),
        cohort_of(ROWS[::-1], root),
        cohort_of(ROWS[:4], root),
        Cohort(root=root, records=ROWS, class_names=("a", "b"), kind="rgb"),
    ]
    for change in (
        {"class_name": "b"},
        {"patient": "p4"},
        {"slide": "s9"},
        {"split": "test"},
        {"path": "a/p3/s1/9.tif"},
    ):
        variants.append(cohort_of([*ROWS[:4], last._replace(**change)], root))
    assert len({cohort.fingerprint() for cohort in variants}) == len(variants)
    with pytest.raises(FileNotFoundError):
        cohort_of([last._replace(path="none.tif")], root).fingerprint()


def _patients(counts: list[int]) -> list[PatchRecord]:
    return [
        PatchRecord(f"{c}/{c}{i}/{s}.tif", f"class{c}", f"{c}-{i}", f"s{s}", "old")
        for c, count in enumerate(counts)
        for i in range(count)
        for s in range(2)
    ]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_split_is_patient_disjoint_stratified_and_seeded(counts: list[int], fraction: float, seed: int) -> None:
    rows = _patients(counts)
    names = tuple(f"class{c}" for c in range(len(counts)))
    cohort = cohort_of(rows, Path("/"), names)
    split = cohort.with_split(val_fraction=fraction, seed=seed)
    assert [row._replace(split="old") for row in split.records] == rows
    assert set(split.splits) == {"train", "val"}
    train, val = (set(split.patient[split.rows(name)].tolist()) for name in ("train", "val"))
    assert not train & val and len(train | val) == sum(counts)
    for c, count in enumerate(counts):
        held_out = split.summary()["val"][f"class{c}"]["patients"]
        assert held_out == min(max(round(fraction * count), 1), count - 1)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = cohort_of([rows[i] for i in order], Path("/"), names).with_split(val_fraction=fraction, seed=seed)
    assert set(shuffled.records) == set(split.records)


def test_another_seed_is_another_split_and_other_classes_play_no_part() -> None:
    names = ("class0", "class1")
    cohort = cohort_of(_patients([8, 8]), Path("/"), names)
    splits = {cohort.with_split(seed=seed).records for seed in range(10)}
    assert len(splits) > 5
    alone = cohort_of(_patients([8]), Path("/"), names).with_split(seed=3)
    both = cohort.with_split(seed=3, names=("train", "val"))
    assert alone.records == tuple(row for row in both.records if row.class_name == "class0")
    assert cohort.with_split(names=("fit", "held")).splits in {("fit", "held"), ("held", "fit")}


def test_split_of_a_class_with_one_patient_warns() -> None:
    cohort = cohort_of(_patients([1, 4]), Path("/"), ("class0", "class1"))
    with pytest.warns(UserWarning, match="class 'class0' has a single patient, which stays in 'train'"):
        split = cohort.with_split()
    assert split.summary()["val"]["class0"]["patients"] == 0


def test_split_options_are_checked() -> None:
    cohort = cohort_of(_patients([3]), Path("/"), ("class0",))
    for fraction in (0.0, 1.0, 30, float("nan")):
        with pytest.raises(ValueError, match=r"val_fraction must lie in \(0, 1\)"):
            cohort.with_split(val_fraction=fraction)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        cohort.with_split(seed=-1)
    with pytest.raises(ValueError, match="names must be two different"):
        cohort.with_split(names=("train", "train"))
    with pytest.raises(
        ValueError, match=r"no class has two patients, so 'val' would be empty.*more patients.*'class0'"
    ):
        cohort_of(_patients([1]), Path("/"), ("class0",)).with_split()


def test_a_cohort_read_from_disk_has_a_fingerprint_that_survives_a_copy(
    tmp_path: Path, write_opensrh: Callable[..., Path]
) -> None:
    root = write_opensrh(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    assert read_opensrh(root).fingerprint() == read_opensrh(tmp_path / "two").fingerprint()
    index = json.loads((tmp_path / "two/meta/opensrh.json").read_text())
    index["NIO_002"]["class"] = "mening"
    (tmp_path / "two/meta/opensrh.json").write_text(json.dumps(index))
    assert read_opensrh(root).fingerprint() != read_opensrh(tmp_path / "two").fingerprint()


@pytest.mark.slow
def test_a_hundred_thousand_patches_take_seconds() -> None:
    rows = [
        PatchRecord(f"c/p{i // 100}/s{i // 10}/{i}.tif", "c", f"p{i // 100}", f"s{i // 10}") for i in range(100_000)
    ]
    split = cohort_of(rows, Path("/"), ("c",)).with_split()
    assert len(split.rows("val")) == 30_000 and split.slide[-1] == 9_999


def test_reading_a_cohort_loads_no_torchvision() -> None:
    heavy = "{'torchvision', 'timm', 'faiss'}"
    code = f"import sys; from hsat.data import Cohort, read_patch; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plain_rows_become_records_and_json_comes_back(tmp_path: Path) -> None:
    options = dict(root=tmp_path, class_names=("a", "b"), kind="rgb")
    rows = [("a/p0/s/1.png", "a", "p0", "s"), ["b/p2/s/1.png", "b", "p2", "s", "val"]]
    cohort = Cohort(records=rows, **options)
    assert cohort.records == (PatchRecord(*rows[0]), PatchRecord(*rows[1])) and cohort.splits == ("val",)
    assert {type(row) for row in cohort.records} == {PatchRecord}
    assert Cohort.model_validate_json(cohort.model_dump_json()) == cohort
    for wrong in (("a", "b"), "abcde", {"path": "x"}):
        with pytest.raises(TypeError, match="record 0 must be a PatchRecord"):
            Cohort(records=[wrong], **options)


def test_a_part_of_one_split_does_not_join_another(tmp_path: Path) -> None:
    cohort = cohort_of(_patients([2, 2]), tmp_path, ("class0", "class1")).with_split(val_fraction=0.5)
    with pytest.raises(
        ValueError, match=r"split 'val' has patients already; name another, as in names=\('train', 'tune'\)"
    ):
        cohort.with_split(of="train")
