"""Cohorts from class/patient/slide folders and from CSV manifests."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from hsat.data.cohort import Cohort
from hsat.data.files import existing_root, shortened
from hsat.data.folders import IMAGE_SUFFIXES, walk_folders
from hsat.data.records import PatchRecord, check_records, ordered_classes

Kind = Literal["srh", "rgb"]
_TIFF = frozenset({".tif", ".tiff"})
_COLUMNS = ("path", "class", "patient", "slide")


def read_folders(
    root: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    split_folders: bool = False,
    class_names: Sequence[str] | None = None,
    mixed: Literal["error", "drop_minority"] = "error",
    on_empty: Literal["error", "skip"] = "error",
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from folders class/patient/slide/patch.png, or split/class/patient/slide/patch.png.

    Rows are in order of name at each level.  Images are files ending in .png, .jpg, .jpeg, .tif or .tiff, in either
    case.  Hidden files and folders are passed over; other files are passed over too and counted in the cohort's
    notes, with a warning when they lie in a slide's folder.
    kind: None takes "rgb" for PNG and JPEG, "srh" for TIFF; RGB TIFFs need kind="rgb".  split_folders: the first
    level is the split.  class_names: None takes all classes that occur, in alphabetical order.
    mixed: a patient with folders under two classes is an error; "drop_minority" keeps the patches of the class with
    most (of equals, the first by name) and warns.  on_empty: an empty class, patient or slide folder is an error, or
    "skip" with a warning.  allow_links: see `Cohort`.
    Raises FileNotFoundError or NotADirectoryError for the root; ValueError naming the culprit for images at a wrong
    depth, links in a circle, files that are not regular, and whatever `Cohort` refuses; PermissionError for folders
    that may not be read.
    """
    folder = existing_root(root)
    if on_empty not in ("error", "skip"):
        raise ValueError(f"on_empty must be 'error' or 'skip', got {on_empty!r}")
    found = walk_folders(folder, split_folders=split_folders)
    if not found.records and not found.empty:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) in {found.levels} folders")
    notes = found.notes()
    if found.empty:
        message = f"folders of {folder} without a patch: {shortened(found.empty)}"
        if on_empty == "error" or not found.records:
            raise ValueError(f"{message}; remove them, or pass on_empty='skip'")
        notes.append(f"left out: {message}")
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    if found.strange:
        warnings.warn(f"slide folders of {folder} hold files that are not read: {found.strange_words()}", stacklevel=3)
    kept = _settle_mixed(found.records, mixed, notes, places=[row.path for row in found.records])
    records = [found.records[i] for i in kept]
    places = [row.path for row in records]
    return _cohort(folder, records, class_names, kind, notes, places=places, allow_links=allow_links)


def read_csv(
    root: str | os.PathLike[str],
    manifest: str | os.PathLike[str] = "manifest.csv",
    *,
    kind: Kind | None = None,
    class_names: Sequence[str] | None = None,
    mixed: Literal["error", "drop_minority"] = "error",
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from a CSV file with the columns path, class, patient, slide and, if wanted, split; others are ignored.

    manifest: relative to the root, or absolute.  Paths in it are relative to the root.  Rows keep their order.  UTF-8,
    commas; an empty split means none.  kind, class_names, mixed and allow_links as in `read_folders`.
    Raises FileNotFoundError for a missing root or manifest; ValueError naming file and line for missing columns, rows
    of another length, text that is not UTF-8 CSV, and whatever `Cohort` refuses.
    """
    folder = existing_root(root)
    path = folder / os.path.expanduser(manifest)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} is missing; it is a CSV file with the columns {', '.join(_COLUMNS)}")
    try:
        records, lines = _manifest_records(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest {path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"manifest {path} is not readable as CSV: {error}") from error
    if not records:
        raise ValueError(f"manifest {path} has a header and no rows")
    notes: list[str] = []
    places = [f"{path.name}, line {line}" for line in lines]
    kept = _settle_mixed(records, mixed, notes, places=places)
    records, places = [records[i] for i in kept], [places[i] for i in kept]
    return _cohort(folder, records, class_names, kind, notes, places=places, allow_links=allow_links)


def _manifest_records(path: Path) -> tuple[list[PatchRecord], list[int]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            have = ", ".join(map(repr, header)) or "nothing"
            hint = "; separate columns with commas" if len(header) == 1 and set(header[0]) & set(";\t|") else ""
            raise ValueError(f"manifest {path} has no column {', '.join(map(repr, missing))}; it has {have}{hint}")
        wanted = [*_COLUMNS, "split"] if "split" in header else list(_COLUMNS)
        twice = [name for name in wanted if header.count(name) > 1]
        if twice:
            raise ValueError(f"manifest {path} has the column {twice[0]!r} twice")
        columns = [header.index(name) for name in wanted]
        records: list[PatchRecord] = []
        lines: list[int] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"manifest {path}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)};"
                    " quote fields that hold commas"
                )
            records.append(PatchRecord(*(row[column] for column in columns)))
            lines.append(reader.line_num)
    return records, lines


def _settle_mixed(records: Sequence[PatchRecord], mixed: str, notes: list[str], *, places: Sequence[str]) -> list[int]:
    """The rows to keep, so that each patient has one class; see `read_folders`."""
    if mixed not in ("error", "drop_minority"):
        raise ValueError(f"mixed must be 'error' or 'drop_minority', got {mixed!r}")
    counts: dict[str, Counter[str]] = {}
    for row in records:
        counts.setdefault(row.patient, Counter())[row.class_name] += 1
    several = [patient for patient, classes in counts.items() if len(classes) > 1]
    if not several:
        return list(range(len(records)))
    if mixed == "error":
        first: dict[str, str] = {}
        for row, place in zip(records, places, strict=True):
            if row.patient == several[0]:
                first.setdefault(row.class_name, place)
        named = " and ".join(f"{name!r} ({place})" for name, place in first.items())
        raise ValueError(
            f"patient {several[0]!r} is in several classes, {named}; {len(several)} patients are."
            " A patient has one class: rename if they are different patients, or pass mixed='drop_minority'"
        )
    main = {patient: min(counts[patient], key=lambda name: (-counts[patient][name], name)) for patient in several}
    kept = [i for i, row in enumerate(records) if main.get(row.patient, row.class_name) == row.class_name]
    message = (
        f"{len(records) - len(kept)} patches of {len(several)} patients with several classes: {shortened(several)}"
    )
    notes.append(f"left out: {message}")
    warnings.warn(f"left out {message}; the patches of each patient's most frequent class are kept", stacklevel=4)
    return kept


def _cohort(
    folder: Path,
    records: Sequence[PatchRecord],
    class_names: Sequence[str] | None,
    kind: Kind | None,
    notes: list[str],
    *,
    places: Sequence[str],
    allow_links: bool,
) -> Cohort:
    names = ordered_classes(records) if class_names is None else tuple(class_names)
    check_records(records, names, where=places.__getitem__)
    return Cohort(
        root=folder,
        records=records,
        class_names=names,
        kind=_kind(records, kind),
        notes=notes,
        allow_links=allow_links,
    )


def _kind(records: Iterable[PatchRecord], kind: Kind | None) -> Kind:
    if kind is not None:
        return kind
    tiff = {os.path.splitext(row.path)[1].lower() in _TIFF for row in records}
    if len(tiff) == 2:
        raise ValueError(
            "some patches are TIFF and some are not, so their kind is not clear;"
            " pass kind='rgb' if all are 8-bit colour, or keep SRH patches in a cohort of their own"
        )
    return "srh" if tiff == {True} else "rgb"
