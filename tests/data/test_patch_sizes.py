"""Sizes of patches."""

from __future__ import annotations

import warnings

from PIL import Image

from hsat.data import find_cohort
from hsat.data.patch_sizes import count_sizes


def test_sizes_are_counted_and_unreadable_files_left_out(tmp_path):
    for i, size in enumerate([(8, 6)] * 3 + [(10, 10)] * 3):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cohort = find_cohort(tmp_path)
    assert count_sizes(cohort) == {(6, 8): 3, (10, 10): 3}
    assert count_sizes(cohort, most=3) == {(6, 8): 1, (10, 10): 1}, "the first, the middle and the last file"
