"""Cohorts from class/patient/slide folders and from CSV manifests, and from any layout by its name."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from hsat.data.cohort import Cohort, PatchKind
from hsat.data.opensrh import read_opensrh
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord, check_records, sorted_classes

Layout = Literal["opensrh", "folders", "csv"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_LEVELS = ("class", "patient", "slide")
_TIFF = frozenset({".tif", ".tiff"})
_COLUMNS = ("path", "class", "patient", "slide")


def read_cohort(
    root: str | os.PathLike[str],
    layout: Layout = "opensrh",
    *,
    manifest: str | os.PathLike[str] = "manifest.csv",
    class_names: Sequence[str] | None = None,
    allow_links: bool = False,
) -> Cohort:
    """A Cohort in a layout that is named by a text: for commands; in Python call the layout's own function.

    Args:
        root: The folder of the cohort.
        layout: "opensrh" (`read_opensrh`), "folders" (`read_folders`) or "csv" (`read_csv`).
        manifest: The CSV file; other layouts have none.
        class_names: None takes all classes that occur, in alphabetical order.
        allow_links: See `Cohort`.

    Raises:
        ValueError: Another layout, and whatever the layout's function refuses.
    """
    if layout == "opensrh":
        return read_opensrh(root, class_names=class_names, allow_links=allow_links)
    if layout == "folders":
        return read_folders(root, class_names=class_names, allow_links=allow_links)
    if layout == "csv":
        return read_csv(root, manifest, class_names=class_names, allow_links=allow_links)
    raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(Layout)))}; got {layout!r}")


def read_folders(
    root: str | os.PathLike[str],
    *,
    kind: PatchKind | None = None,
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

    Args:
        root: The folder of the classes, or of the splits.
        kind: None takes "rgb" for PNG and JPEG, "srh" for TIFF; RGB TIFFs need kind="rgb".
        split_folders: The first level is the split.
        class_names: None takes all classes that occur, in alphabetical order.
        mixed: A patient with folders under two classes is an error; "drop_minority" keeps the patches of the class with
            most (of equals, the first by name) and warns.
        on_empty: An empty class, patient or slide folder is an error, or "skip" with a warning.
        allow_links: See `Cohort`.

    Raises:
        FileNotFoundError: The root does not exist.
        NotADirectoryError: The root is a file.
        ValueError: Images at a wrong depth, links in a circle, files that are not regular (the culprit is named), and
            whatever `Cohort` refuses.
        PermissionError: A folder may not be read.
    """
    folder = resolve_root(root)
    if on_empty not in ("error", "skip"):
        raise ValueError(f"on_empty must be 'error' or 'skip', got {on_empty!r}")
    listing = _list_folders(folder, split_folders=split_folders)
    if not listing.records and not listing.empty:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) in {listing.levels} folders")
    notes = listing.notes()
    if listing.empty:
        message = f"folders of {folder} without a patch: {shorten_names(listing.empty)}"
        if on_empty == "error" or not listing.records:
            raise ValueError(f"{message}; remove them, or pass on_empty='skip'")
        notes.append(f"left out: {message}")
        warnings.warn(f"{message}; they are left out", stacklevel=2)
    if listing.unread:
        warnings.warn(
            f"slide folders of {folder} hold files that are not read: {listing.unexpected_names()}", stacklevel=2
        )
    kept = _settle_mixed(listing.records, mixed, notes, places=[row.path for row in listing.records])
    records = [listing.records[i] for i in kept]
    places = [row.path for row in records]
    return _cohort(folder, records, class_names, kind, notes, places=places, allow_links=allow_links)


def read_csv(
    root: str | os.PathLike[str],
    manifest: str | os.PathLike[str] = "manifest.csv",
    *,
    kind: PatchKind | None = None,
    class_names: Sequence[str] | None = None,
    mixed: Literal["error", "drop_minority"] = "error",
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from a CSV file with the columns path, class, patient, slide and, if wanted, split; others are ignored.

    Rows keep their order.  The file is UTF-8 with commas; an empty split means none.

    Args:
        root: The folder that the paths in the file are relative to.
        manifest: The file, relative to the root or absolute.
        kind: As in `read_folders`.
        class_names: As in `read_folders`.
        mixed: As in `read_folders`.
        allow_links: See `Cohort`.

    Raises:
        FileNotFoundError: The root or the manifest is missing.
        ValueError: Missing columns, rows of another length, text that is not UTF-8 CSV (file and line are named), and
            whatever `Cohort` refuses.
    """
    folder = resolve_root(root)
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
        names = [*_COLUMNS, "split"] if "split" in header else list(_COLUMNS)
        twice = [name for name in names if header.count(name) > 1]
        if twice:
            raise ValueError(f"manifest {path} has the column {twice[0]!r} twice")
        columns = [header.index(name) for name in names]
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
        f"{len(records) - len(kept)} patches of {len(several)} patients with several classes: {shorten_names(several)}"
    )
    notes.append(f"left out: {message}")
    warnings.warn(f"left out {message}; the patches of each patient's most frequent class are kept", stacklevel=3)
    return kept


def _cohort(
    folder: Path,
    records: Sequence[PatchRecord],
    class_names: Sequence[str] | None,
    kind: PatchKind | None,
    notes: list[str],
    *,
    places: Sequence[str],
    allow_links: bool,
) -> Cohort:
    names = sorted_classes(records) if class_names is None else tuple(class_names)
    check_records(records, names, where=places.__getitem__)
    return Cohort(
        root=folder,
        records=records,
        class_names=names,
        kind=_kind(records, kind),
        notes=notes,
        allow_links=allow_links,
    )


def _kind(records: Iterable[PatchRecord], kind: PatchKind | None) -> PatchKind:
    if kind is not None:
        return kind
    tiff = {os.path.splitext(row.path)[1].lower() in _TIFF for row in records}
    if len(tiff) == 2:
        raise ValueError(
            "some patches are TIFF and some are not, so their kind is not clear;"
            " pass kind='rgb' if all are 8-bit colour, or keep SRH patches in a cohort of their own"
        )
    return "srh" if tiff == {True} else "rgb"


@dataclass
class _FolderListing:
    """What lies in the folders: records, empty folders, and files that are not images, in slide folders or outside."""

    levels: str
    records: list[PatchRecord] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)

    def unexpected_names(self) -> str:
        """Counts of unread files in slide folders by their suffix."""
        return ", ".join(f"{count} ending in {suffix!r}" for suffix, count in sorted(self.unread.items()))

    def notes(self) -> list[str]:
        """What was passed over, in words."""
        notes = []
        if self.outside:
            notes.append(f"passed over: {len(self.outside)} files outside slide folders, {', '.join(self.outside[:5])}")
        if self.unread:
            notes.append(f"passed over: files in slide folders, {self.unexpected_names()}")
        return notes


def _list_folders(root: Path, *, split_folders: bool) -> _FolderListing:
    """Records of all images in class/patient/slide folders (behind split folders, if so), in order of name."""
    levels = ("split", *_LEVELS) if split_folders else _LEVELS
    listing = _FolderListing(levels="/".join(levels))
    _walk(root, (), levels, listing, (os.path.realpath(root),))
    return listing


def _walk(
    folder: Path, names: tuple[str, ...], levels: tuple[str, ...], listing: _FolderListing, above: tuple[str, ...]
) -> int:
    """Add what lies in one folder; `above` are the resolved folders on the way here.  Returns the number of records."""
    before, empty_before = len(listing.records), len(listing.empty)
    inside_slide, relative = len(names) == len(levels), "/".join(names)
    for entry in _entries(folder):
        path = f"{relative}/{entry.name}" if relative else entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if target in above:
                raise ValueError(f"folder {path!r} of {above[0]} is a link to a folder that it lies in, {target}")
            if inside_slide:
                raise ValueError(f"folder {path!r} lies inside a slide's folder; {_expected_layout(levels)}")
            _walk(Path(entry.path), (*names, entry.name), levels, listing, (*above, target))
        elif suffix not in IMAGE_SUFFIXES:
            if inside_slide:
                listing.unread[suffix] += 1
            else:
                listing.outside.append(path)
        elif not inside_slide:
            raise ValueError(f"image {path!r} lies {len(names)} folders deep; {_expected_layout(levels)}")
        elif not entry.is_file() and not entry.is_symlink():
            raise ValueError(f"{path!r} is not a regular file")
        else:
            split, (class_name, patient, slide) = (names[0] if len(levels) == 4 else ""), names[-3:]
            listing.records.append(PatchRecord(path, class_name, patient, slide, split))
    count = len(listing.records) - before
    if names and not count and len(listing.empty) == empty_before:
        listing.empty.append(relative)
    return count


def _expected_layout(levels: tuple[str, ...]) -> str:
    other = "split_folders=False" if len(levels) == 4 else "split_folders=True"
    first = "the first level is the class" if len(levels) == 4 else "the first level is the split"
    return f"wanted {'/'.join(levels)}/patch; if {first}, pass {other}"


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise type(error)(error.errno, f"folder cannot be read ({error.strerror})", str(folder)) from error
    yield from sorted(listed, key=lambda entry: entry.name)
