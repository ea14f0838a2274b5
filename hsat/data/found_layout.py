"""A cohort from a folder whose layout is found by looking at it."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from hsat.data.assembly import IMAGE_SUFFIXES, TILE_FIRST, Rows
from hsat.data.cohort import Cohort
from hsat.data.folders import NO_PATIENTS, layout_hint, list_folders, survey_folder
from hsat.data.found_tables import FoundTable, find_tables
from hsat.data.layouts import Layout, ReadOptions, read_cohort
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord
from hsat.data.split_names import split_role
from hsat.types.batch import UNLABELLED

GENERIC = frozenset(
    "patches patch images image imgs img tiles tile data dataset files png jpg jpeg tif tiff all_patches".split()
)
"""Names of folders that are no class, in small letters, where no other folder stands beside them."""
PATIENT_FOLDER = r"^[^/]+/([^/]+)/"
_PATIENT_BELOW_SPLIT = r"^[^/]+/[^/]+/([^/]+)/"
_ID = re.compile(r"\d\d")  # "004", "TCGA-A1-0021", "patient_12": of a patient or slide rather than of a class
_NUMBERED = re.compile(r"(?=.*\d).{3}")  # "s_1" may be a slide, "0" a class
_LONG_ID = re.compile(r"\d{3}")
_DEFAULTS = ReadOptions()
_GIVE = "and give the Cohort that it returns"


def find_cohort(root: str | os.PathLike[str], *, options: ReadOptions = _DEFAULTS) -> Cohort:
    """A Cohort from a folder in any of the layouts, or from a CSV file; its first note says how it was read.

    In this order: an OpenSRH folder; a CSV file that was given, or manifest.csv with the columns path, class, patient
    and slide; a table beside a single folder of patches, whose columns of paths and classes have plain names; folders
    of images by their depth, class/patient/slide/patch, class/patient/patch or class/patch, each also below folders
    named after splits (train, Val, Testing, NCT-CRC-HE-100K); images alone, which have no labels then.  What could be
    meant otherwise is refused: folders that are no splits by name and hold folders of the same names, patients without
    a number in any name, a table whose columns nobody can match.

    Args:
        root: The folder, or a CSV file in it.
        options: Of the readers.  Those of a table or of class folders alone say that the folder is one; folders without
            a patch are left out in any case.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No layout fits, or several; the message says what lies there and which reader to call.
    """
    path = Path(root).expanduser()
    if path.suffix.lower() == ".csv" and path.is_file():
        options = replace(options, manifest=path.name)
        if options.columns is None and options.path_template is None:
            return _of_table(FoundTable.read(path), options)
        path = path.parent
    folder = resolve_root(path)
    if any(getattr(options, name) != getattr(_DEFAULTS, name) for name in ("columns", "path_template", "manifest")):
        return _noted(_read(folder, "csv", options), f"read as the table {options.manifest}")
    if options.patient or options.slide:
        return _noted(_read(folder, "classes", options), "read as folders of classes")
    if (folder / "meta" / "opensrh.json").is_file():
        return _noted(_read(folder, "opensrh", options), "read as an OpenSRH folder")
    if (folder / "manifest.csv").is_file() and FoundTable.read(folder / "manifest.csv").is_manifest:
        return _of_table(FoundTable.read(folder / "manifest.csv"), options)
    return _of_folders(folder, options)


def _of_table(table: FoundTable, options: ReadOptions) -> Cohort:
    """The cohort of a table that was named, or that is beyond doubt."""
    folder, name = table.path.parent, table.path.name
    columns = None if table.is_manifest else table.match()
    if columns is None and not table.is_manifest:
        raise ValueError(f"{folder}: {table.describe()}: say which one is what: call {table.call()} {_GIVE}")
    said = "" if columns is None else f", {', '.join(f'{role} from column {one}' for role, one in columns.items())}"
    cohort = _read(folder, "csv", replace(options, manifest=name, columns=columns))
    return _noted(cohort, f"read as the table {name}{said}")


def _of_folders(folder: Path, options: ReadOptions) -> Cohort:
    """The cohort of a folder of images that lie at one depth, and perhaps of a table beside them."""
    depths, _ = survey_folder(folder)
    depth = next(iter(depths)) if len(depths) == 1 else -1
    first, tables = list_folders(folder), find_tables(folder)
    alone = depth == 0 or (depth > 0 and len(first) == 1 and first[0].lower() in GENERIC)
    for table in tables if depth >= 0 else []:
        if alone or (depth == 1 and all(map(_NUMBERED.search, first)) and table.lists(first)):
            return _of_table_beside(table, first)
    if depth == 0:
        return _read_images(folder, options)
    if alone:
        return _of_only_folder(folder, first[0], options)
    shape = _Shape.of(folder, first, depth, is_split=options.split_folders)
    if problem := shape.problem():
        raise ValueError(f"{folder}: {problem}")
    if shape.below in _FITS:
        layout, pattern, words = _FITS[shape.below]
        chosen = replace(options, split_folders=shape.is_split, on_empty="skip")
        if pattern:
            chosen = replace(chosen, patient=_PATIENT_BELOW_SPLIT if shape.is_split else PATIENT_FOLDER)
        cohort = _noted(_read(folder, layout, chosen), f"read as folders {'split/' * shape.is_split}{words}")
        unread = [f"not read: {table.describe()}" for table in tables]
        return _with_notes(cohort, (*cohort.notes, *unread))
    hint = layout_hint(folder) or "no image (.png, .jpg, .tif) lies in it or in its folders"
    if "studies" in first:
        hint = f"it has the folder studies of an OpenSRH folder, and meta/opensrh.json is missing; else {hint}"
    give = "" if TILE_FIRST in hint else ". Give the Cohort that a reader of hsat.data returns in place of the folder"
    raise ValueError(f"{folder}: {hint}{give}")


_FITS: dict[int, tuple[Layout, bool, str]] = {
    1: ("classes", False, "class/patch"),
    2: ("classes", True, "class/patient/patch, one slide for each patient"),
    3: ("folders", False, "class/patient/slide/patch"),
}
"""By the depth of patches below the splits: the layout, whether the second folder is the patient, and words."""


@dataclass(frozen=True)
class _Shape:
    """The folders of the first two levels, and how deep patches lie."""

    folder: Path
    first: tuple[str, ...]
    second: tuple[tuple[str, ...], ...]
    depth: int
    is_split: bool

    @classmethod
    def of(cls, folder: Path, first: list[str], depth: int, *, is_split: bool) -> _Shape:
        is_split = is_split or (depth > 1 and all(map(split_role, first)))
        second = [tuple(list_folders(folder / name)) for name in first] if depth > 1 else []
        return cls(folder, tuple(first), tuple(second), depth, is_split)

    @property
    def below(self) -> int:
        """How many folders lead from the splits to a patch."""
        return self.depth - self.is_split

    def problem(self) -> str:
        """Why the folders may mean something else than class and patient, and what to call; "" where they do not."""
        if self.below == 1 and not self.is_split:
            return self._ids_as_classes()
        if self.below not in (2, 3) or self.is_split:
            return ""
        counts = Counter(name for names in self.second for name in set(names))
        shared = sorted(name for name, count in counts.items() if count > 1)
        listed = f"{shorten_names(self.first)} hold the folders {shorten_names(sorted(counts))}"
        if shared and not all(_ID.search(name) for name in shared):
            return f"{listed}, some of them in several, so that the first level may be splits. {self._choices()}"
        if counts and not any(re.search(r"\d", name) for name in counts):
            no_number = "none of which has a number as patients have, so that these may be classes"
            return f"{listed}, {no_number}. {self._choices()}"
        return ""

    def _choices(self) -> str:
        root = str(self.folder)
        if self.below == 2:
            splits = f"read_class_folders({root!r}, split_folders=True)"
            patients = f"read_class_folders({root!r}, patient={PATIENT_FOLDER!r})"
            order = "collection/class/patch"
        else:
            splits = f"read_class_folders({root!r}, split_folders=True, patient={_PATIENT_BELOW_SPLIT!r})"
            patients, order = f"read_folders({root!r})", "collection/class/patient/patch"
        return (
            f"If they are {order}, call {splits} {_GIVE}, after .with_split(), or rename the first folders to train and"
            f" val; if they are class and patient, call {patients} {_GIVE}"
        )

    def _ids_as_classes(self) -> str:
        if len(self.first) < 2 or not all(_LONG_ID.search(name) for name in self.first):
            return ""
        return (
            f"the folders {shorten_names(self.first)} of patches are named as patients or slides are, not as classes:"
            " write a table with a row for each of them and call"
            f" read_csv({str(self.folder)!r}, 'TABLE.csv', columns={{'class': 'label', 'slide': 'slide_id'}},"
            f" path_template='{{slide}}/*.png') {_GIVE}; if they are classes, call"
            f" read_class_folders({str(self.folder)!r}) {_GIVE}"
        )


def _of_table_beside(table: FoundTable, first: list[str]) -> Cohort:
    """The cohort of a table beside patches or folders that are no classes; ValueError where nobody can match it."""
    if columns := table.match():
        return _of_table(table, ReadOptions(columns=columns))
    folder, column, example = table.path.parent, table.lists(first), _first_image(table.path.parent)
    beside = f"the folder {first[0]!r}, which is no class" if first else "patches without folders of classes"
    if column is not None:
        beside = f"the folders {shorten_names(first)}, which its column {column} lists, so that they are no classes"
    raise ValueError(
        f"{folder}: {table.describe()} lies beside {beside}. Say which column is what: call {table.call(example)}"
        f" {_GIVE}; the first patch is {example}"
    )


def _first_image(folder: Path) -> str:
    """The path of the first image below a folder."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] not in "._@")
        for name in sorted(files):
            if _is_image(Path(path, name)):
                return os.path.relpath(os.path.join(path, name), folder)
    return ""


def _of_only_folder(folder: Path, name: str, options: ReadOptions) -> Cohort:
    """The cohort of the only folder of a folder, which is called as no class is."""
    inner = list_folders(folder / name)
    depths, _ = survey_folder(folder / name)
    if set(depths) == {1} and any(re.search(r"\d", one) for one in inner) and not _plain_classes(inner):
        raise ValueError(
            f"{folder}: its only folder {name!r} is no class, and {shorten_names(inner)} in it are named as patients or"
            " slides are, of which no table says the class. If they are classes, call"
            f" read_class_folders({str(folder / name)!r}) {_GIVE}; else write a table and call"
            f" read_csv({str(folder)!r}, 'TABLE.csv', columns={{'class': 'label', 'slide': 'slide_id'}},"
            f" path_template='{name}/{{slide}}/*.png') {_GIVE}"
        )
    return _noted(_of_folders(folder / name, options), f"its only folder {name!r} is no class and was read instead")


def _plain_classes(names: list[str]) -> bool:
    """Whether folders with numbers may be classes: 0, 1, grade2."""
    return len(names) < 20 and not any(_ID.search(name) for name in names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")


def _read(folder: Path, layout: Layout, options: ReadOptions) -> Cohort:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cohort's notes say the same
        return read_cohort(folder, layout, options=options)


def _noted(cohort: Cohort, note: str) -> Cohort:
    return _with_notes(cohort, (f"{cohort.root}: {note}", *cohort.notes))


def _with_notes(cohort: Cohort, notes: tuple[str, ...]) -> Cohort:
    options = {name: getattr(cohort, name) for name in type(cohort).model_fields}
    return Cohort(**options | {"notes": notes})


def _read_images(folder: Path, options: ReadOptions) -> Cohort:
    """Images without classes and patients: one class, and each a patient of its own."""
    names = sorted(entry.name for entry in folder.iterdir() if _is_image(entry))
    records = [PatchRecord(name, UNLABELLED, name, name, "") for name in names]
    cohort = Rows(records, names, [NO_PATIENTS]).cohort(
        folder, kind=options.kind, class_names=None, mixed="keep", allow_links=options.allow_links
    )
    return _noted(cohort, "read as images without labels, for no folders of classes hold them")
