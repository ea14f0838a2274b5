"""Cohorts from folders: class/patient/slide/patch.png, and class/patch.png, each also below folders of splits."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hsat.data.assembly import IMAGE_SUFFIXES, Mixed, Rows
from hsat.data.cohort import Cohort, PatchKind
from hsat.data.folder_names import JUNK, name_masks
from hsat.data.path_patterns import search_paths
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord
from hsat.data.survey import DEEPEST, LEVELS, expected_layout, layout_hint

MASKS_READ = "are called as masks or labels of others and were read as patches"
NO_PATIENTS = (
    "no patients are known, so that every patch counts as a slide and a patient of its own: the three levels coincide,"
    " intervals are too narrow, and a split by patient may put patches of one person on both sides"
)


def read_folders(
    root: str | os.PathLike[str],
    *,
    kind: PatchKind | None = None,
    split_folders: bool = False,
    class_names: Sequence[str] | None = None,
    mixed: Mixed = "keep",
    on_empty: Literal["error", "skip"] = "error",
    keep_splits: bool = True,
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from folders class/patient/slide/patch.png, or split/class/patient/slide/patch.png.

    Rows are in order of name at each level.  Images are files ending in .png, .jpg, .jpeg, .tif, .tiff or .bmp, in
    either case.  Hidden files and folders are passed over, and so is what computers add (`__MACOSX`, `@eaDir`, `._*`,
    `Thumbs.db`), which the cohort's notes count; other files are passed over too and counted, with a warning when they
    lie in a slide's folder.

    Args:
        root: The folder of the classes, or of the splits.
        kind: None looks into the first TIFF files (two 16-bit planes are "srh"); others are "rgb".
        split_folders: The first level is the split.
        class_names: None takes all classes that occur, in alphabetical order.
        mixed: What to do with patients who have folders under several classes.  "keep": labels belong to patches; a
            warning names them, for numbers that start anew in each class mean other patients.  "error" refuses them.
            "drop_minority" keeps the patches of the class with most (of equals, the first by name) and warns.
        on_empty: An empty class, patient or slide folder is an error, or "skip" with a warning.
        keep_splits: False forgets which split a patch lay in, for patients who are in several.
        allow_links: See `Cohort`.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: The root does not exist.
        NotADirectoryError: The root is a file.
        ValueError: Images at a wrong depth (the message names the reader that fits), links in a circle, files that are
            not regular (the culprit is named), and whatever `Cohort` refuses.
        PermissionError: A folder may not be read.
    """
    folder = resolve_root(root)
    levels = ("split", *LEVELS) if split_folders else LEVELS
    listing = _list_images(folder, levels, on_empty)
    records = [
        PatchRecord(path, class_name, patient, slide, path.split("/")[0] if split_folders and keep_splits else "")
        for path in listing.images
        for class_name, patient, slide in [path.split("/")[-4:-1]]
    ]
    rows = Rows(records, list(listing.images), listing.notes)
    if mixed == "keep":
        listing.notes += _warn_of_reused_names(records)
    return rows.cohort(folder, kind=kind, class_names=class_names, mixed=mixed, allow_links=allow_links)


def read_class_folders(
    root: str | os.PathLike[str],
    *,
    patient: str | None = None,
    slide: str | None = None,
    kind: PatchKind | None = None,
    split_folders: bool = False,
    class_names: Sequence[str] | None = None,
    on_empty: Literal["error", "skip"] = "error",
    keep_splits: bool = True,
    allow_links: bool = False,
) -> Cohort:
    r"""A Cohort from folders class/patch.tif (NCT-CRC-HE-100K, BACH, LC25000) or split/class/patch.tif.

    Such data sets do not say which patient a patch is of.  Every patch then counts as a patient of its own, with a
    warning: the three levels coincide, and intervals are too narrow.  Where file names hold the patient, as BreakHis's
    do, a regular expression takes it from there; patches may then lie in folders of any depth below their class.

    Args:
        root: The folder of the classes, or of the splits.
        patient: A regular expression that is searched in each patch's path below the root; its first group (or the
            whole match) is the patient.  At most 1000 characters; one that has not come to an end after a minute, as
            repetitions inside each other may, is an error.
        slide: Likewise for the slide; by default a patient has one slide.  Without `patient` it is the patient, too.
        kind: See `read_folders`.
        split_folders: The first level is the split.
        class_names: None takes all classes that occur, in alphabetical order.
        on_empty, keep_splits: See `read_folders`.
        allow_links: See `Cohort`.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: The root does not exist.
        ValueError: No image in class folders, images at another depth (the message names the reader that fits), a path
            in which an expression finds nothing, and whatever `Cohort` refuses.

    Example:
        >>> read_class_folders("BreaKHis_v1/breast", patient=r"SOB_[BM]_[A-Z]+-(\d+-\w+)-")  # doctest: +SKIP
    """
    folder = resolve_root(root)
    levels = ("split", "class") if split_folders else ("class",)
    patterns = {name: text for name, text in (("patient", patient), ("slide", slide)) if text}
    listing = _list_images(folder, levels, on_empty, deeper=bool(patterns))
    found = {name: _search(name, pattern, listing.images) for name, pattern in patterns.items()}
    patients = found.get("patient", found.get("slide", listing.images))
    slides = found.get("slide", patients)
    if not patterns:
        listing.notes.append(NO_PATIENTS)
        warnings.warn(
            f"{folder}: {NO_PATIENTS}; give patient='...', a regular expression, if file names hold it", stacklevel=2
        )
    records, kept = [], split_folders and keep_splits
    for path, person, glass in zip(listing.images, patients, slides, strict=True):
        names = path.split("/")
        records.append(PatchRecord(path, names[len(levels) - 1], person, glass, names[0] if kept else ""))
    listing.notes += _warn_of_one_class(folder, records, len(levels))
    rows = Rows(records, list(listing.images), listing.notes)
    return rows.cohort(folder, kind=kind, class_names=class_names, mixed="keep", allow_links=allow_links)


def _warn_of_one_class(root: Path, records: Sequence[PatchRecord], depth: int) -> list[str]:
    """What to do where the only class may be a folder around those of the classes."""
    common = os.path.commonpath([os.path.dirname(record.path) for record in records])
    below = [record.path[len(common) + 1 :].split("/") for record in records]
    inner = sorted({parts[0] for parts in below if len(parts) > 1})
    if len({record.class_name for record in records}) > 1 or len(inner) < 2:
        return []
    note = f"all patches are of the class {records[0].class_name!r}, and lie in the folders {shorten_names(inner)}"
    note += f"; if those are the classes, give {root / common} in place of {root}" if depth == 1 else ""
    warnings.warn(note, stacklevel=3)
    return [note]


def _search(name: str, pattern: str, paths: Sequence[str]) -> list[str]:
    """What the expression finds in each path."""
    found = search_paths(name, pattern, paths)
    if without := [path for path, value in zip(paths, found, strict=True) if not value]:
        raise ValueError(f"{name}={pattern!r} finds nothing in {len(without)} paths: {shorten_names(without)}")
    return [value for value in found if value]


def _warn_of_reused_names(records: Sequence[PatchRecord]) -> list[str]:
    classes: dict[str, set[str]] = {}
    for row in records:
        classes.setdefault(row.patient, set()).add(row.class_name)
    several = [patient for patient, names in classes.items() if len(names) > 1]
    if not several:
        return []
    note = (
        f"{len(several)} of {len(classes)} patients have folders under several classes: {shorten_names(several)};"
        " each counts as one person with patches of these classes. If numbers start anew in each class, rename the"
        " folders; if not all patches of such a patient should be kept, pass mixed='drop_minority'"
    )
    warnings.warn(note, stacklevel=3)
    return [note]


@dataclass
class _Listing:
    """Images below a folder, and what else lies there."""

    images: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)
    junk: int = 0
    notes: list[str] = field(default_factory=list)

    def unexpected_names(self) -> str:
        """Counts of unread files beside patches by their suffix."""
        return ", ".join(f"{count} ending in {suffix!r}" for suffix, count in sorted(self.unread.items()))


def _list_images(root: Path, levels: tuple[str, ...], on_empty: str, *, deeper: bool = False) -> _Listing:
    """All images in folders of these levels (or in any folder below), in order of name; settles what is empty."""
    if on_empty not in ("error", "skip"):
        raise ValueError(f"on_empty must be 'error' or 'skip', got {on_empty!r}")
    listing = _Listing()
    _walk(_Folder(root, root, (), (os.path.realpath(root),)), levels, listing, deeper=deeper)
    if not listing.images and (not listing.empty or listing.unread or listing.outside):
        hint = layout_hint(root, levels)
        raise ValueError(
            f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) in {'/'.join(levels)} folders"
            + f"; {hint}" * bool(hint)
        )
    listing.notes += mask_notes(listing.images)
    if listing.outside:
        shown = ", ".join(listing.outside[:5])
        listing.notes.append(f"passed over: {len(listing.outside)} files outside {levels[-1]} folders, {shown}")
    if listing.unread:
        listing.notes.append(f"passed over: files in {levels[-1]} folders, {listing.unexpected_names()}")
        warnings.warn(
            f"{levels[-1]} folders of {root} hold files that are not read: {listing.unexpected_names()}", stacklevel=3
        )
    if listing.junk:
        listing.notes.append(
            f"passed over: {listing.junk} files and folders that computers add (__MACOSX, @eaDir, ._*)"
        )
    if listing.empty:
        message = f"folders of {root} without a patch: {shorten_names(listing.empty)}"
        if on_empty == "error" or not listing.images:
            raise ValueError(f"{message}; remove them, or pass on_empty='skip'")
        listing.notes.append(f"left out: {message}")
        warnings.warn(f"{message}; they are left out", stacklevel=3)
    return listing


@dataclass(frozen=True)
class _Folder:
    """A folder below the root, by the names on the way to it and the resolved folders above."""

    root: Path
    path: Path
    names: tuple[str, ...]
    above: tuple[str, ...]


def _walk(folder: _Folder, levels: tuple[str, ...], listing: _Listing, *, deeper: bool) -> None:
    before, empty_before = len(listing.images), len(listing.empty)
    names, relative = folder.names, "/".join(folder.names)
    innermost = len(names) >= len(levels)
    for entry in _entries(folder.path, listing):
        path = f"{relative}/{entry.name}" if relative else entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if target in folder.above:
                raise ValueError(
                    f"folder {path!r} of {folder.above[0]} is a link to a folder that it lies in, {target}"
                )
            if innermost and not deeper:
                raise ValueError(
                    f"folder {path!r} lies inside a {levels[-1]}'s folder; {expected_layout(folder.root, levels)}"
                )
            if len(names) >= DEEPEST:
                raise ValueError(
                    f"folders of {folder.root} lie more than {DEEPEST} deep in each other, from {names[0]!r} on; give"
                    " the folder that holds the patches"
                )
            inner = _Folder(folder.root, Path(entry.path), (*names, entry.name), (*folder.above, target))
            _walk(inner, levels, listing, deeper=deeper)
        elif suffix not in IMAGE_SUFFIXES:
            if innermost:
                listing.unread[suffix] += 1
            else:
                listing.outside.append(path)
        elif not innermost:
            raise ValueError(f"image {path!r} lies {len(names)} folders deep; {expected_layout(folder.root, levels)}")
        elif not entry.is_file() and not entry.is_symlink():
            raise ValueError(f"{path!r} is not a regular file")
        else:
            listing.images.append(path)
    if names and len(listing.images) == before and len(listing.empty) == empty_before:
        listing.empty.append(relative)


def mask_notes(paths: Sequence[str]) -> list[str]:
    """A note on images that are called as masks or labels of others, which are read as patches; a warning says it too.

    Args:
        paths: Of all images of a cohort.

    Returns:
        One note, or none.
    """
    masks = name_masks(paths)
    if not masks:
        return []
    note = f"{len(masks)} images {MASKS_READ}: {shorten_names(masks)}; move them out of the folder"
    warnings.warn(note, stacklevel=4)
    return [note]


def _entries(folder: Path, listing: _Listing) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, in order of name, without hidden files and what computers add, which is counted."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(error.errno, f"folder cannot be read ({error.strerror})", str(folder)) from error
    for entry in listed:
        if entry.name.lower() in JUNK or entry.name.startswith("._"):
            listing.junk += 1
        elif not entry.name.startswith("."):
            yield entry
