"""Names of splits: which is the bank, which are the queries, and new names."""

from __future__ import annotations

import pytest

from hsat.data import Cohort, PatchRecord, find_splits, rename_splits
from hsat.data.split_names import describe_unused, split_role


def cohort_of(tmp_path, *splits):
    rows = [PatchRecord(f"{i}.png", "ab"[i % 2], f"p{i}", "s", split) for i, split in enumerate(splits)]
    return Cohort(root=tmp_path, records=rows, class_names=("a", "b"), kind="rgb")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train", "val"), ("train", "val")),
        (("Val", "Train"), ("Train", "Val")),
        (("Training", "Testing"), ("Training", "Testing")),
        (("test", "val", "train"), ("train", "val")),
        (("train", "validation", "val"), ("train", "val")),
        (("CRC-VAL-HE-7K", "NCT-CRC-HE-100K"), ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K")),
        (("train", "tune"), ("train", "tune")),
        (("train", "fold1"), ("train", "")),
        (("0", "1"), ("", "")),
        ((), ("", "")),
    ],
)
def test_bank_and_queries_by_their_names(names, found):
    assert find_splits(names) == found


def test_two_splits_of_one_role_are_refused():
    with pytest.raises(ValueError, match=r"'NCT-CRC-HE-100K', 'nct-crc-he-100k-nonorm' are all a train split"):
        find_splits(["NCT-CRC-HE-100K", "nct-crc-he-100k-nonorm", "val"])
    assert split_role(" Tune ") == "tune" and split_role("trainer") == ""


def test_new_names(tmp_path):
    cohort = cohort_of(tmp_path, "0", "1", "0", "")
    named = rename_splits(cohort, {"train": "0", "val": "1"})
    assert [row.split for row in named.records] == ["train", "val", "train", ""]
    assert named.notes == ("splits taken: '0' as 'train', '1' as 'val'",)
    assert rename_splits(named, {"train": "train", "val": "val"}) == named
    swapped = rename_splits(named, {"train": "val", "val": "train"})
    assert [row.split for row in swapped.records] == ["val", "train", "val", ""]
    with pytest.raises(ValueError, match="no split 'fold'; it has '0', '1'"):
        rename_splits(cohort, {"train": "fold"})
    with pytest.raises(ValueError, match="one split is given two names"):
        rename_splits(cohort, {"train": "0", "val": "0"})


def test_a_split_whose_name_another_one_takes_is_in_none(tmp_path):
    named = rename_splits(cohort_of(tmp_path, "train", "val", "test"), {"val": "test"})
    assert [row.split for row in named.records] == ["train", "", "val"]
    assert named.notes[-1].endswith("patches of split 'val'")


def test_what_is_left_out_is_counted(tmp_path):
    cohort = cohort_of(tmp_path, "train", "val", "test", "test", "")
    assert describe_unused(cohort, ("train", "val")) == [
        "left alone, neither in the bank nor attacked: split 'test' (2 patches)",
        "left out: 1 of 5 patches, which are in no split",
    ]
    assert describe_unused(cohort_of(tmp_path, "train", "val"), ("train", "val")) == []
