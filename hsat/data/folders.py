"""Cohorts from folders: class/patient/slide/patch.png, and class/patch.png, each also below folders of splits."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hsat.data.assembly import IMAGE_SUFFIXES, SLIDE_SUFFIXES, TILE_FIRST, Mixed, Rows
from hsat.data.cohort import Cohort, PatchKind
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord

_LEVELS = ("class", "patient", "slide")
_JUNK = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini", "lost+found"})
_MASK = re.compile(r"(.+?)[-_. ](?:mask|masks|label|labels|seg|segmentation|annotation|gt)", re.IGNORECASE)
_SURVEYED = 20_000  # entries that are looked at for a hint
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
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from folders class/patient/slide/patch.png, or split/class/patient/slide/patch.png.

    Rows are in order of name at each level.  Images are files ending in .png, .jpg, .jpeg, .tif or .tiff, in either
    case.  Hidden files and folders are passed over, and so is what computers add (`__MACOSX`, `@eaDir`, `._*`,
    `Thumbs.db`), which the cohort's notes count; other files are passed over too and counted, with a warning when they
    lie in a slide's folder.

    Args:
        root: The folder of the classes, or of the splits.
        kind: None looks into the first TIFF files (two 16-bit planes are "srh"); PNG and JPEG are "rgb".
        split_folders: The first level is the split.
        class_names: None takes all classes that occur, in alphabetical order.
        mixed: What to do with patients who have folders under several classes.  "keep": labels belong to patches; a
            warning names them, for numbers that start anew in each class mean other patients.  "error" refuses them.
            "drop_minority" keeps the patches of the class with most (of equals, the first by name) and warns.
        on_empty: An empty class, patient or slide folder is an error, or "skip" with a warning.
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
    levels = ("split", *_LEVELS) if split_folders else _LEVELS
    listing = _list_images(folder, levels, on_empty)
    records = [
        PatchRecord(path, class_name, patient, slide, path.split("/")[0] if split_folders else "")
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
    allow_links: bool = False,
) -> Cohort:
    r"""A Cohort from folders class/patch.tif (NCT-CRC-HE-100K, BACH, LC25000) or split/class/patch.tif.

    Such data sets do not say which patient a patch is of.  Every patch then counts as a patient of its own, with a
    warning: the three levels coincide, and intervals are too narrow.  Where file names hold the patient, as BreakHis's
    do, a regular expression takes it from there; patches may then lie in folders of any depth below their class.

    Args:
        root: The folder of the classes, or of the splits.
        patient: A regular expression that is searched in each patch's path below the root; its first group (or the
            whole match) is the patient.
        slide: Likewise for the slide; by default a patient has one slide.  Without `patient` it is the patient, too.
        kind: See `read_folders`.
        split_folders: The first level is the split.
        class_names: None takes all classes that occur, in alphabetical order.
        on_empty: See `read_folders`.
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
    patterns = {name: _compile(name, text) for name, text in (("patient", patient), ("slide", slide)) if text}
    listing = _list_images(folder, levels, on_empty, deeper=bool(patterns))
    found = {name: _search(name, pattern, listing.images) for name, pattern in patterns.items()}
    patients = found.get("patient", found.get("slide", listing.images))
    slides = found.get("slide", patients)
    if not patterns:
        listing.notes.append(NO_PATIENTS)
        warnings.warn(
            f"{folder}: {NO_PATIENTS}; give patient='...', a regular expression, if file names hold it", stacklevel=2
        )
    records = []
    for path, person, glass in zip(listing.images, patients, slides, strict=True):
        names = path.split("/")
        records.append(PatchRecord(path, names[len(levels) - 1], person, glass, names[0] if split_folders else ""))
    rows = Rows(records, list(listing.images), listing.notes)
    return rows.cohort(folder, kind=kind, class_names=class_names, mixed="keep", allow_links=allow_links)


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error


def _search(name: str, pattern: re.Pattern[str], paths: Sequence[str]) -> list[str]:
    """What the expression finds in each path."""
    values, without = [], []
    for path in paths:
        match = pattern.search(path)
        value = match and (match[1] if pattern.groups else match[0])
        if value:
            values.append(value)
        else:
            without.append(path)
    if without:
        raise ValueError(f"{name}={pattern.pattern!r} finds nothing in {len(without)} paths: {shorten_names(without)}")
    return values


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
    _note_masks(listing)
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


def expected_layout(root: Path, levels: Sequence[str]) -> str:
    """What a reader wanted, and which reader fits the folder."""
    hint = layout_hint(root, levels)
    return f"wanted {'/'.join(levels)}/patch" + (f"; {hint}" if hint else "")


def layout_hint(root: Path, asked: Sequence[str] = ()) -> str:
    """Which reader fits a folder, from the depths at which its images lie and the files beside them.

    Args:
        root: The folder.
        asked: The levels of the reader that was called, which is not named.

    Returns:
        A sentence; "" where nothing fits.
    """
    depths, others = survey_folder(root)
    if (root / "meta" / "opensrh.json").is_file() and tuple(asked) != ("opensrh",):
        return "it is an OpenSRH folder; call read_opensrh (layout='opensrh')"
    slides = sum(others[suffix] for suffix in SLIDE_SUFFIXES)
    if slides and not depths:
        return f"it holds {slides} whole slides; {TILE_FIRST}"
    fits = {
        ("class",): "images lie in class/patch folders; call read_class_folders (layout='classes')",
        _LEVELS: "images lie in class/patient/slide/patch folders; call read_folders (layout='folders')",
        ("split", "class"): "if they are split/class/patch, call read_class_folders with split_folders=True"
        " (layout='classes'); if class/patient/patch, put one slide folder in each patient's",
        ("split", *_LEVELS): "images lie four folders deep; if they are split/class/patient/slide/patch, call"
        " read_folders with split_folders=True (layout='folders')",
    }
    if tuple(asked[:1]) == ("split",):  # the same reader fits, without its option
        fits[("class",)] += " without split_folders"
        fits[_LEVELS] += " without split_folders"
    by_depth = {len(levels): text for levels, text in fits.items() if tuple(levels) != tuple(asked)}
    if others[".csv"]:
        table = "or, with the table that lies there, read_csv with columns={...} (layout='csv')"
    else:
        table = "for another order of folders write a table of paths and call read_csv (layout='csv')"
    if len(depths) == 1 and (depth := next(iter(depths))) in by_depth:
        return f"{by_depth[depth]}; {table}"
    if not depths:
        arrays = sum(others[suffix] for suffix in (".h5", ".hdf5", ".npy", ".pt", ".npz"))
        return f"it holds {arrays} files of arrays, which are no images; write patches as PNG" if arrays else ""
    counts = ", ".join(f"{count} images {depth} folders deep" for depth, count in sorted(depths.items()))
    deeper = "call read_class_folders with patient='...', a regular expression, which takes images of any depth"
    return (
        f"there are {counts}, so that no layout of folders fits all; if their paths hold the patient, {deeper}"
        f" (layout='classes'); {table}"
    )


def survey_folder(root: Path) -> tuple[Counter[int], Counter[str]]:
    """Images by depth, and other files by suffix, among the first entries below a folder; links are not followed."""
    depths, others, seen = Counter[int](), Counter[str](), 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name.lower() not in _JUNK and not name.startswith("."))
        depth = 0 if folder == str(root) else os.path.relpath(folder, root).count(os.sep) + 1
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or name.lower() in _JUNK:
                continue
            if suffix in IMAGE_SUFFIXES:
                depths[depth] += 1
            else:
                others[suffix] += 1
        seen += len(files) + len(folders)
        if seen > _SURVEYED:
            break
    return depths, others


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order, without hidden ones and what computers add.

    Args:
        folder: The folder.

    Returns:
        The names.
    """
    with os.scandir(folder) as entries:
        return sorted(
            one.name for one in entries if one.is_dir() and one.name[0] != "." and one.name.lower() not in _JUNK
        )


def _note_masks(listing: _Listing) -> None:
    """Count images that are masks or labels of another one by their names; they are read as patches."""
    stems = {os.path.splitext(path)[0] for path in listing.images}
    masks = [
        path for path in listing.images if (match := _MASK.fullmatch(os.path.splitext(path)[0])) and match[1] in stems
    ]
    if masks:
        note = (
            f"{len(masks)} images are called as masks or labels of others and were read as patches:"
            f" {shorten_names(masks)}; move them out of the folder"
        )
        listing.notes.append(note)
        warnings.warn(note, stacklevel=4)


def _entries(folder: Path, listing: _Listing) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, in order of name, without hidden files and what computers add, which is counted."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(error.errno, f"folder cannot be read ({error.strerror})", str(folder)) from error
    for entry in listed:
        if entry.name.lower() in _JUNK or entry.name.startswith("._"):
            listing.junk += 1
        elif not entry.name.startswith("."):
            yield entry
