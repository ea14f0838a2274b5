"""A cohort from a folder whose layout is found by looking at it."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

from hsat.data.assembly import IMAGE_SUFFIXES, Rows
from hsat.data.cohort import Cohort
from hsat.data.folders import NO_PATIENTS, layout_hint, survey_folder
from hsat.data.layouts import Layout, ReadOptions, read_cohort
from hsat.data.paths import resolve_root
from hsat.data.records import PatchRecord
from hsat.types.batch import UNLABELLED

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "tune"})
_PATIENT_FOLDER = r"^[^/]+/([^/]+)/"
_COLUMNS = frozenset({"path", "class", "patient", "slide"})


def find_cohort(root: str | os.PathLike[str]) -> Cohort:
    """A Cohort from a folder in any of the layouts, or from a CSV file; its first note says how it was read.

    In this order: an OpenSRH folder; a CSV file that was given, or manifest.csv with the columns path, class, patient
    and slide; folders of images by their depth, class/patient/slide/patch, class/patient/patch or class/patch, each
    also below folders named after splits (train, val, test); images alone, which have no labels then.

    Args:
        root: The folder, or a CSV file in it.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No layout fits, or several; the message says what lies there and which reader to call.
    """
    path = Path(root).expanduser()
    if path.suffix.lower() == ".csv" and path.is_file():
        return _noted(_read(path.parent, "csv", ReadOptions(manifest=path.name)), f"read as the table {path.name}")
    folder = resolve_root(path)
    if (folder / "meta" / "opensrh.json").is_file():
        return _noted(_read(folder, "opensrh", ReadOptions()), "read as an OpenSRH folder")
    if _has_manifest(folder):
        return _noted(_read(folder, "csv", ReadOptions()), "read as the table manifest.csv")
    return _by_depth(folder)


def _by_depth(folder: Path) -> Cohort:
    """The cohort of a folder of images that lie at one depth."""
    depths, _ = survey_folder(folder)
    depth = next(iter(depths)) if len(depths) == 1 else -1
    if depth == 0:
        return _read_images(folder)
    is_split = depth > 1 and _first_folders(folder) <= SPLIT_NAMES
    below = "split/" if is_split else ""
    fits: dict[int, tuple[Layout, ReadOptions, str]] = {
        1: ("classes", ReadOptions(split_folders=is_split, on_empty="skip"), f"{below}class/patch"),
        3: ("folders", ReadOptions(split_folders=is_split, on_empty="skip"), f"{below}class/patient/slide/patch"),
    }
    if not is_split:
        fits[2] = (
            "classes",
            ReadOptions(patient=_PATIENT_FOLDER, on_empty="skip"),
            "class/patient/patch, one slide for each patient",
        )
    if depth - is_split in fits:
        layout, options, words = fits[depth - is_split]
        return _noted(_read(folder, layout, options), f"read as folders {words}")
    hint = layout_hint(folder) or "no image (.png, .jpg, .tif) lies in it or in its folders"
    raise ValueError(f"{folder}: {hint}. Give the Cohort that a reader of hsat.data returns in place of the folder")


def _read(folder: Path, layout: Layout, options: ReadOptions) -> Cohort:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cohort's notes say the same
        return read_cohort(folder, layout, options=options)


def _noted(cohort: Cohort, note: str) -> Cohort:
    options = {name: getattr(cohort, name) for name in type(cohort).model_fields}
    return Cohort(**options | {"notes": (f"{cohort.root}: {note}", *cohort.notes)})


def _has_manifest(folder: Path) -> bool:
    """Whether there is a table with the columns that a reader needs; one with others is not for us."""
    path = folder / "manifest.csv"
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        head = next(csv.reader(file), [])
    return {cell.strip() for cell in head} >= _COLUMNS


def _first_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name.lower() for entry in entries if entry.is_dir() and entry.name[0] not in "._@"}


def _read_images(folder: Path) -> Cohort:
    """Images without classes and patients: one class, and each a patient of its own."""
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".")
    )
    records = [PatchRecord(name, UNLABELLED, name, name, "") for name in names]
    cohort = Rows(records, names, [NO_PATIENTS]).cohort(
        folder, kind=None, class_names=None, mixed="keep", allow_links=False
    )
    return _noted(cohort, "read as images without labels, for no folders of classes hold them")
