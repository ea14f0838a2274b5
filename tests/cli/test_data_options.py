"""Options that choose patches."""

from __future__ import annotations

import pytest

from hsat.cli.data_options import DataSettings, SourceSettings, split_pairs
from hsat.data import write_synthetic_cohort


def test_pairs():
    assert split_pairs("train=0, val = 1") == {"train": "0", "val": "1"}
    assert split_pairs({"a": "b"}) == {"a": "b"}
    with pytest.raises(ValueError, match=r"train=Training,val=Testing .*; got 'val'"):
        split_pairs("train=0,val")


def test_an_opensrh_folder_is_called_so_in_the_records_of_a_run(tmp_path):
    root = write_synthetic_cohort(tmp_path / "srh", patients_per_class=2, patches=1)
    assert SourceSettings(root=root).layout == SourceSettings(root=str(root)).layout == "opensrh"
    assert DataSettings(root=root, layout="found").layout == "opensrh"
    assert SourceSettings(root=tmp_path).layout == DataSettings().layout == "found"
    assert SourceSettings(root=root, layout="folders").layout == "folders"
