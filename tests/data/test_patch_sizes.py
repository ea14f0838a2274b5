"""Sizes of patches."""

from __future__ import annotations

import warnings

import pytest
from PIL import Image

from hsat.data import find_cohort, read_patch
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


@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 6), ("png", 8), ("tif", 6), ("jpg", 3)])
def test_sizes_are_those_of_the_patches_as_they_are_read(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (10, 6)).save(tmp_path / f"1.{suffix}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cohort = find_cohort(tmp_path)
    height, width = read_patch(tmp_path / f"1.{suffix}", kind="rgb").shape[1:]
    assert count_sizes(cohort) == {(height, width): 1}
