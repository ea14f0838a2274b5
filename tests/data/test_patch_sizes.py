"""Sizes of patches."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

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


def test_bombs_pipes_and_other_formats_are_left_to_those_who_read_them(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{i}.png")
    cohort = find_cohort(tmp_path)
    body = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header)
    (tmp_path / "2.png").unlink()
    os.mkfifo(tmp_path / "2.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "3.png", format="GIF")
    assert count_sizes(cohort) == {(6, 8): 1}
