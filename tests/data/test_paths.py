"""Links out of the root, when they are allowed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hsat.data import Cohort, PatchDataset, read_csv, read_folders, read_opensrh


@pytest.fixture
def linked_root(tmp_path: Path) -> Path:
    """Two patients of class a and two of b; a/p1 is a linked folder and one patch of b/p3 a linked file."""
    root, store = tmp_path / "root", tmp_path / "store"
    rng = np.random.default_rng(0)
    for place, name in [(root, "a/p0/s"), (store, "p1/s"), (root, "b/p2/s"), (root, "b/p3/s"), (store, "loose")]:
        (place / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / name / "1.png")
    (root / "a/p1").symlink_to(store / "p1")
    (root / "b/p3/s/2.png").symlink_to(store / "loose/1.png")
    return root


def test_links_out_of_the_root_are_followed_on_request_only(linked_root: Path) -> None:
    with pytest.raises(ValueError, match=r"'a/p1/s/1\.png' leads out .* pass allow_links=True"):
        read_folders(linked_root).file_sizes()
    cohort = read_folders(linked_root, allow_links=True)
    cohort.file_sizes()
    split = cohort.with_split(val_fraction=0.5)
    assert split.allow_links and len(split) == 5
    assert [len(PatchDataset(split, name)) for name in ("train", "val")] == [
        len(split.rows("train")),
        len(split.rows("val")),
    ]
    assert sum(PatchDataset(split)[i].images.shape == (1, 3, 8, 8) for i in range(5)) == 5
    assert cohort != read_folders(linked_root)


def test_allowed_links_do_not_open_paths_or_circles(linked_root: Path) -> None:
    for path in ("../store/loose/1.png", "/etc/hostname"):
        with pytest.raises(ValueError, match="is refused"):
            Cohort(
                root=linked_root,
                records=[(path, "a", "p", "s")],
                class_names="a b".split(),
                kind="rgb",
                allow_links=True,
            )
    (linked_root / "a/p0/up").symlink_to(linked_root)
    with pytest.raises(ValueError, match="is a link to a folder that it lies in"):
        read_folders(linked_root, allow_links=True)
    (linked_root / "a/p0/up").unlink()
    (linked_root / "a/p0/s/2.png").symlink_to(linked_root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"files missing .*'a/p0/s/2\.png'"):
        read_folders(linked_root, allow_links=True).file_sizes()


def test_links_in_a_manifest_and_an_opensrh_folder(linked_root: Path, write_opensrh, tmp_path: Path) -> None:
    with open(linked_root / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "class", "patient", "slide"), ("a/p1/s/1.png", "a", "p1", "s")])
    read_csv(linked_root, allow_links=True).file_sizes()
    root = write_opensrh(tmp_path / "srh")
    (root / "studies").rename(tmp_path / "elsewhere")
    (root / "studies").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the cohort's root"):
        read_opensrh(root).file_sizes()
    read_opensrh(root, allow_links=True).file_sizes()
