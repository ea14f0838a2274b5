"""Walking through class/patient/slide folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hsat.data.records import PatchRecord

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_LEVELS = ("class", "patient", "slide")


@dataclass
class FoundFolders:
    """What a walk found: records, empty folders, and files that are not images, inside slide folders or elsewhere."""

    levels: str
    records: list[PatchRecord] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    strange: Counter[str] = field(default_factory=Counter)
    elsewhere: list[str] = field(default_factory=list)

    def strange_words(self) -> str:
        """Counts of unread files in slide folders by their suffix."""
        return ", ".join(f"{count} ending in {suffix!r}" for suffix, count in sorted(self.strange.items()))

    def notes(self) -> list[str]:
        """What was passed over, in words."""
        notes = []
        if self.elsewhere:
            notes.append(
                f"passed over: {len(self.elsewhere)} files outside slide folders, {', '.join(self.elsewhere[:5])}"
            )
        if self.strange:
            notes.append(f"passed over: files in slide folders, {self.strange_words()}")
        return notes


def walk_folders(root: Path, *, split_folders: bool) -> FoundFolders:
    """Records of all images in class/patient/slide folders (behind split folders, if so), in order of name."""
    levels = ("split", *_LEVELS) if split_folders else _LEVELS
    found = FoundFolders(levels="/".join(levels))
    _walk(root, (), levels, found, (os.path.realpath(root),))
    return found


def _walk(
    folder: Path, names: tuple[str, ...], levels: tuple[str, ...], found: FoundFolders, above: tuple[str, ...]
) -> int:
    """Add what lies in one folder; `above` are the resolved folders on the way here.  Returns the number of records."""
    before, empty_before = len(found.records), len(found.empty)
    inside_slide, relative = len(names) == len(levels), "/".join(names)
    for entry in _entries(folder):
        path = f"{relative}/{entry.name}" if relative else entry.name
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            target = os.path.realpath(entry.path)
            if target in above:
                raise ValueError(f"folder {path!r} of {above[0]} is a link to a folder that it lies in, {target}")
            if inside_slide:
                raise ValueError(f"folder {path!r} lies inside a slide's folder; {_wanted(levels)}")
            _walk(Path(entry.path), (*names, entry.name), levels, found, (*above, target))
        elif suffix not in IMAGE_SUFFIXES:
            if inside_slide:
                found.strange[suffix] += 1
            else:
                found.elsewhere.append(path)
        elif not inside_slide:
            raise ValueError(f"image {path!r} lies {len(names)} folders deep; {_wanted(levels)}")
        elif not entry.is_file() and not entry.is_symlink():
            raise ValueError(f"{path!r} is not a regular file")
        else:
            split, (class_name, patient, slide) = (names[0] if len(levels) == 4 else ""), names[-3:]
            found.records.append(PatchRecord(path, class_name, patient, slide, split))
    count = len(found.records) - before
    if names and not count and len(found.empty) == empty_before:
        found.empty.append(relative)
    return count


def _wanted(levels: tuple[str, ...]) -> str:
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
