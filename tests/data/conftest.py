"""Small real cohorts on disk: OpenSRH folders of 16-bit TIFFs, and class/patient/slide folders of PNGs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

Patients = Mapping[str, tuple[str, str, Mapping[str, int]]]

TWO_SPLITS: Patients = {
    "NIO_001": ("hgg", "train", {"1": 3, "2": 2}),
    "NIO_002": ("lgg", "train", {"1": 2}),
    "NIO_003": ("normal", "train", {"1": 2, "2": 1}),
    "NIO_004": ("lgg", "val", {"1": 2, "3": 2}),
    "NIO_005": ("normal", "val", {"1": 2}),
}


def _write_opensrh(root: Path, patients: Patients = TWO_SPLITS, *, size: int = 16, seed: int = 0) -> Path:
    """patients: name -> (class, split, slide -> number of patches); split "" leaves the patient out of the splits."""
    rng = np.random.default_rng(seed)
    index: dict[str, dict] = {}
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for patient, (class_name, split, slides) in patients.items():
        entry: dict = {"patient_id": patient, "class": class_name, "slides": {}}
        for slide, count in slides.items():
            folder = f"studies/{patient}/{slide}/patches"
            (root / folder).mkdir(parents=True, exist_ok=True)
            paths = [f"{folder}/{patient}-{slide}-{300 * i}_{300 * i + 300}_0_300.tif" for i in range(count)]
            for path in paths:
                tifffile.imwrite(root / path, rng.integers(0, 30000, (2, size, size), dtype=np.uint16))
            wanted = "normal_patches" if class_name == "normal" else "tumor_patches"
            listed = {"tumor_patches": [], "normal_patches": [], "nondiagnostic_patches": []}
            entry["slides"][slide] = {"slide_id": f"{patient}-{slide}", **listed, wanted: paths}
        index[patient] = entry
        if split:
            splits.setdefault(split, []).append(patient)
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/opensrh.json").write_text(json.dumps(index))
    (root / "meta/train_val_split.json").write_text(json.dumps(splits))
    return root


def _write_png(path: Path, *, size: int = 8, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def write_opensrh() -> Callable[..., Path]:
    """write_opensrh(root, patients=..., size=..., seed=...) writes an OpenSRH folder and returns its root."""
    return _write_opensrh


@pytest.fixture
def opensrh_root(tmp_path: Path) -> Path:
    """An OpenSRH folder: five patients, three classes (no hgg in val), splits train and val."""
    return _write_opensrh(tmp_path / "opensrh")


@pytest.fixture
def write_png() -> Callable[..., Path]:
    """write_png(path, size=..., seed=...) writes an RGB PNG, making its folders."""
    return _write_png


@pytest.fixture
def folders_root(tmp_path: Path) -> Path:
    """Folders class/patient/slide/patch.png: adenoma with patients a1 and a2, polyp with p1."""
    root = tmp_path / "folders"
    names = (
        "adenoma/a1/s1/1.png",
        "adenoma/a1/s1/2.png",
        "adenoma/a1/s2/1.png",
        "adenoma/a2/s1/1.png",
        "polyp/p1/s1/1.png",
    )
    for seed, name in enumerate(names):
        _write_png(root / name, seed=seed)
    return root


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("a/1.png", "b/2.png", ...) writes these RGB PNGs below one root and returns it."""

    def make(*names: str) -> Path:
        for seed, name in enumerate(names):
            _write_png(tmp_path / "root" / name, seed=seed)
        return tmp_path / "root"

    return make
