"""Writing adversarial patches as a cohort: lossless files, a manifest, and the tables of the layout."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hsat.distributed import World
from hsat.files import atomic_path

if TYPE_CHECKING:
    from hsat.data import Cohort, PatchRecord

ABOUT_FILE = "adversarial.json"
MANIFEST = "manifest.csv"


class AdversarialFiles:
    """A folder on its way: patches are written next to `root` and the folder gets its name when all are there.

    Left without `publish`, nothing remains, unless the work may be resumed.  Several processes may write into it.

    Args:
        root: Must not exist, and must not lie inside the cohort's own folder.
        cohort: The cohort that is attacked.
        rows: Of the cohort, in the order in which patches come.
        resumable: Keep what was written when the process ends early, in a folder ".NAME.partial" beside the root, and
            go on from there.

    Raises:
        FileExistsError: If the root exists.
        ValueError: If it lies inside the cohort's folder.
    """

    def __init__(
        self, root: str | os.PathLike[str], cohort: Cohort, rows: Sequence[int], *, resumable: bool = False
    ) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        self._refuse_existing()
        base = os.path.realpath(cohort.root)
        if os.path.commonpath((base, os.path.realpath(self.root))) == base:
            raise ValueError(f"{self.root} lies inside the cohort's own folder {base}; write the files elsewhere")
        self.kind = cohort.kind
        self.records = [cohort.records[row] for row in rows]
        self._cohort = cohort
        self.paths = _new_paths([record.path for record in self.records], ".png" if self.kind == "rgb" else ".tif")
        self._place = {int(row): place for place, row in enumerate(rows)}
        self._resumable = resumable
        self._working: Path | None = None

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.root):
            raise FileExistsError(f"{self.root} exists and is left untouched; choose another folder")

    @contextmanager
    def open(self, world: World) -> Iterator[None]:
        """Make the working folder, the same for all ranks; the first rank makes it and removes it afterwards."""
        working = None
        if world.is_main:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            working = self.root.parent / f".{self.root.name}.partial"
            if self._resumable:
                working.mkdir(exist_ok=True)
            else:
                working = Path(tempfile.mkdtemp(prefix=f".{self.root.name}-", dir=self.root.parent))
        self._working = world.gather(working)[0]
        try:
            yield
        finally:
            if working is not None and (not self._resumable or self.root.exists()):
                shutil.rmtree(working, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Where things are written until they are finished."""
        assert self._working is not None  # open has made it
        return self._working / "cohort"  # one level below: mkdtemp makes a private folder

    def has(self, row: int) -> bool:
        """Whether the patch of a row of the cohort is written already."""
        return (self.folder / self.paths[self._place[row]]).is_file()

    def write(self, row: int, counts: Tensor) -> None:
        """One patch of the cohort: counts (3, h, w) up to 255 as a PNG, or (2, h, w) up to 65535 as a TIFF."""
        with atomic_path(self.folder / self.paths[self._place[row]]) as path:
            if self.kind == "rgb":
                from PIL import Image

                Image.fromarray(counts.permute(1, 2, 0).contiguous().numpy().astype(np.uint8)).save(path, format="PNG")
            else:
                import tifffile

                planes = counts.numpy().astype(np.uint16)
                tifffile.imwrite(path, planes, photometric="minisblack", metadata=None, software=False)

    def complete(self, about: dict[str, Any]) -> None:
        """Add the manifest, the meta files and an account of the attack."""
        with open(self.folder / MANIFEST, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            slides, patients = self._cohort.slide_labels, self._cohort.patient_labels
            added = [name for name, labels in (("slide_label", slides), ("patient_label", patients)) if labels]
            writer.writerow(("path", "class", "patient", "slide", "split", *added))
            for path, record in zip(self.paths, self.records, strict=True):
                labels = {
                    "slide_label": slides.get((record.patient, record.slide), ""),
                    "patient_label": patients.get(record.patient, ""),
                }
                writer.writerow((path, *record[1:], *(labels[name] for name in added)))
        one_class = len({record[1:3] for record in self.records}) == len({record.patient for record in self.records})
        if self.kind == "srh" and one_class:  # the tables of OpenSRH hold one class per patient
            for name, content in _opensrh_tables(self.records, self.paths).items():
                (self.folder / name).parent.mkdir(exist_ok=True)
                (self.folder / name).write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / ABOUT_FILE).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")

    def publish(self, world: World) -> None:
        """Give the folder its name, by the first rank.  FileExistsError when something has come there meanwhile."""
        if world.is_main:
            self._refuse_existing()
            self.folder.replace(self.root)
        world.gather("published")


def _new_paths(paths: Sequence[str], suffix: str) -> list[str]:
    """The same paths with a lossless suffix; where two would become one, the old suffix stays before the new."""
    kept = {".png"} if suffix == ".png" else {".tif", ".tiff"}
    taken = {path for path in paths if os.path.splitext(path)[1].lower() in kept}
    records = []
    for path in paths:
        stem, end = os.path.splitext(path)
        new = path if end.lower() in kept else stem + suffix
        if new != path:
            if new in taken:
                new = path + suffix
            while new in taken:
                new += suffix
            taken.add(new)
        records.append(new)
    return records


def _opensrh_tables(records: Sequence[PatchRecord], paths: Sequence[str]) -> dict[str, Any]:
    """meta/opensrh.json and meta/train_val_split.json of these patches; patients without a split are in no list."""
    from hsat.data.opensrh import NORMAL_CLASS, PATIENTS_FILE, SPLITS_FILE

    patients: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for record, path in zip(records, paths, strict=True):
        if record.patient not in patients:
            patients[record.patient] = {"patient_id": record.patient, "class": record.class_name, "slides": {}}
            if record.split:
                splits.setdefault(record.split, []).append(record.patient)
        empty: dict[str, Any] = {"tumor_patches": [], "normal_patches": [], "nondiagnostic_patches": []}
        slides = patients[record.patient]["slides"]
        slide = slides.setdefault(record.slide, {"slide_id": f"{record.patient}-{record.slide}", **empty})
        slide["normal_patches" if record.class_name == NORMAL_CLASS else "tumor_patches"].append(path)
    return {PATIENTS_FILE: patients, SPLITS_FILE: splits}
