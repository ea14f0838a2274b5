"""A cohort from a folder whose layout is found by looking at it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hsat.data.assembly import TILE_FIRST, Rows
from hsat.data.cohort import Cohort
from hsat.data.folder_names import (
    ID,
    NUMBERED,
    are_class_names,
    case_of,
    is_generic,
    is_person,
    is_split_like,
    person_pattern,
)
from hsat.data.folder_shape import GIVE, PATIENT_BELOW_SPLIT, PATIENT_FIRST, PATIENT_FOLDER, FolderShape
from hsat.data.folders import NO_PATIENTS, mask_notes
from hsat.data.found_tables import MANIFEST, TABLE_SUFFIXES, FoundTable, find_tables, read_manifest
from hsat.data.layouts import Layout, ReadOptions, read_cohort
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord
from hsat.data.split_names import split_role
from hsat.data.survey import holds_images, is_image, layout_hint, list_folders, list_images, survey_folder
from hsat.types.batch import UNLABELLED

_DEFAULTS = ReadOptions()


def find_cohort(root: str | os.PathLike[str], *, options: ReadOptions = _DEFAULTS) -> Cohort:
    """A Cohort from a folder in any of the layouts, or from a CSV file; its first note says how it was read.

    In this order: an OpenSRH folder; a CSV file that was given, or manifest.csv with the columns path, class, patient
    and slide (one that is no table, or has two of them and other folders beside it, is an error); a table beside a
    single folder of patches, whose columns of paths and classes have plain names; folders of images by their depth,
    class/patient/slide/patch, class/patient/patch or class/patch, each also below folders named after splits (train,
    Val, Testing, NCT-CRC-HE-100K); images alone, which have no labels then.  What could be meant otherwise is refused:
    folders that are no splits by name and hold folders of the same names, patients without a number in any name, a
    table whose columns nobody can match.

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
    if path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{path} {_describe_file(path)}")
    if path.is_file():
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
        return _noted(_read(folder, "opensrh", replace(options, keep_splits=True)), "read as an OpenSRH folder")
    manifest = read_manifest(folder, allow_links=options.allow_links)
    if manifest and (manifest.is_manifest or not manifest.rows):
        return _of_table(manifest, options)
    return _of_folders(folder, options)


def _describe_file(path: Path) -> str:
    """What to do with a file that is neither a folder nor a table."""
    suffix = path.suffix.lower()
    if suffix in (".h5", ".hdf5", ".npy", ".npz"):
        return (
            "holds arrays: of embeddings make a table with hsat.EmbeddingTable.from_h5 or from_arrays and measure it"
            " with hsat.eval.score_levels; of images give loaders, a pair (bank, queries)"
        )
    if suffix in (".xlsx", ".xls", ".ods"):
        return "is a spreadsheet; save it as CSV in UTF-8, and give that file"
    if suffix in (".json", ".jsonl", ".parquet"):
        return (
            "is no folder and no CSV file; read it as a data frame and give the Cohort of hsat.from_frame(frame, root,"
            " columns={...})"
        )
    return "is a file; give the folder that holds the patches, or a table (.csv, .tsv)"


def _of_table(table: FoundTable, options: ReadOptions) -> Cohort:
    """The cohort of a table that was named, or that is beyond doubt."""
    folder, name = table.path.parent, table.path.name
    columns = None if table.is_manifest else table.match()
    if columns is None and not table.is_manifest:
        raise _in_doubt(table)
    said = "" if columns is None else f", {', '.join(f'{role} from column {one}' for role, one in columns.items())}"
    chosen = replace(options, manifest=name, columns=columns, split_folders=False, on_empty="error")
    cohort = _read(folder, "csv", chosen)
    return _noted(cohort, f"read as the table {name}{said}")


def _in_doubt(table: FoundTable) -> ValueError:
    """The error for a table that is meant, and whose columns are not known."""
    return ValueError(f"{table.path.parent}: {table.describe()}: say which one is what: call {table.call()} {GIVE}")


def _of_folders(folder: Path, options: ReadOptions) -> Cohort:
    """The cohort of a folder of images, and perhaps of a table beside them; says which tables were not read."""
    tables, unread = find_tables(folder, allow_links=options.allow_links)
    try:
        cohort = _of_images(folder, tables, options)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *unread])) from error
    return _with_notes(cohort, (*cohort.notes, *unread)) if unread else cohort


def _of_images(folder: Path, tables: Sequence[FoundTable], options: ReadOptions) -> Cohort:
    """The cohort of images that lie at one depth, or of a table beside them."""
    depths, _ = survey_folder(folder, follow_links=options.allow_links)
    depth = next(iter(depths)) if len(depths) == 1 else -1
    first = [name for name in list_folders(folder) if holds_images(folder / name)]
    if len(manifests := [table for table in tables if table.is_manifest]) == 1:
        return _of_table(manifests[0], options)
    alone = depth == 0 or (
        depth > 0 and len(first) == 1 and (is_generic(first[0]) or (depth == 1 and is_split_like(*first)))
    )
    splits_only = depth == 1 and all(map(is_split_like, first))
    for table in tables if depth >= 0 else []:
        listed = depth == 1 and all(map(NUMBERED.search, first)) and table.lists(first)
        if alone or splits_only or listed:
            return _of_table_beside(tables, first, options)
    if meant := next((one for one in tables if one.path.name == MANIFEST and one.is_meant_as_manifest), None):
        raise ValueError(f"{_in_doubt(meant)}; or rename it, and the folders are read")  # which may say other patients
    if depth == 0:
        return _read_images(folder, options)
    if alone or (depth > 1 and len(first) == 1 and _is_wrapper(folder / first[0])):
        return _of_only_folder(folder, first[0], options)
    if splits_only:
        raise ValueError(f"{folder}: {_describe_splits(folder, first)}")
    if depth > 0:
        return _of_shape(FolderShape.of(folder, first, depth=depth, is_split=options.split_folders), tables, options)
    raise ValueError(f"{folder}: {_why_nothing_fits(folder, list_folders(folder), options)}")


def _fit(pair: tuple[FoundTable, str]) -> tuple[bool, float]:
    """How well a table fits a patch; one of patches to train on goes before one of patches to submit."""
    table, path = pair
    fit = table.fit(path)
    return fit > 0 and split_role(path.split("/")[0]) in ("", "train"), fit


def _is_wrapper(folder: Path) -> bool:
    """Whether the only folder of a folder is no class but lies around the classes: data sets are unpacked so."""
    inner = [name for name in list_folders(folder) if holds_images(folder / name)]
    alone = len(inner) == 1 and not is_person(inner[0])
    return not split_role(folder.name) and (alone or are_class_names(inner))


def _of_shape(shape: FolderShape, tables: Sequence[FoundTable], options: ReadOptions) -> Cohort:
    """The cohort of folders whose images lie at one depth."""
    folder = shape.folder
    if tables and shape.starts_with_people and not shape.has_classes_of_people:
        return _of_table_beside(tables, shape.names(0), options)
    if problem := shape.problem():
        raise ValueError(f"{folder}: {problem}")
    if shape.below not in _FITS:
        raise ValueError(f"{folder}: {_why_nothing_fits(folder, shape.names(0), options)}")
    layout, pattern, words = _FITS[shape.below]
    chosen = replace(options, split_folders=shape.is_split, on_empty="skip")
    if pattern:
        chosen = replace(chosen, patient=PATIENT_BELOW_SPLIT if shape.is_split else PATIENT_FOLDER)
    if shape.has_classes_of_people:
        words = "patient/class/patch, one slide for each patient"
        chosen = replace(chosen, split_folders=True, keep_splits=False, patient=PATIENT_FIRST)
    cohort = _noted(_read(folder, layout, chosen), f"read as folders {'split/' * shape.is_split}{words}")
    unread = [f"not read: {table.describe()}" for table in tables]
    return _with_notes(cohort, (*cohort.notes, *unread, *_case_notes(cohort)))


def _case_notes(cohort: Cohort) -> list[str]:
    """What to give where no patients are known and the files' names hold barcodes of people."""
    if not any(NO_PATIENTS in note for note in cohort.notes):
        return []
    cases = {case_of(record.path) for record in cohort.records}
    if "" in cases or len(cases) == len(cohort):
        return []
    pattern = person_pattern([cohort.records[0].path])
    return [f"the files' names hold {len(cases)} people, such as {min(cases)}: pass patient={pattern!r} to read them"]


def _why_nothing_fits(folder: Path, first: Sequence[str], options: ReadOptions) -> str:
    """What to do with a folder that no layout fits."""
    links = [name for name in first if (folder / name).is_symlink()]
    if links and not options.allow_links and not survey_folder(folder)[0]:
        listed = shorten_names(links)
        return f"its folders {listed} are links, which may lead anywhere; if they are your own, pass allow_links=True"
    hint = layout_hint(folder) or "no image (.png, .jpg, .tif, .bmp) lies in it or in its folders"
    if "studies" in first:
        hint = f"it has the folder studies of an OpenSRH folder, and meta/opensrh.json is missing; else {hint}"
    give = "" if TILE_FIRST in hint else ". Give the Cohort that a reader of hsat.data returns in place of the folder"
    return f"{hint}{give}"


def _describe_splits(folder: Path, first: Sequence[str]) -> str:
    """Why folders of splits without classes in them cannot be read, and what to do."""
    others = [one.name for one in sorted(folder.iterdir()) if one.suffix.lower() in (".json", ".xlsx", ".txt", ".npz")]
    beside = f" ({shorten_names(others)}, which lie there, are not read)" if others else ""
    return (
        f"the folders {shorten_names(first)} are splits by their names and hold patches without folders of classes, so"
        f" that no label is known{beside}: write a table and call read_csv({str(folder)!r}, 'TABLE.csv',"
        f" columns={{'path': 'file', 'class': 'label', 'patient': 'patient', 'split': 'split'}}) {GIVE}; or give one of"
        " these folders for what needs no labels"
    )


_FITS: dict[int, tuple[Layout, bool, str]] = {
    1: ("classes", False, "class/patch"),
    2: ("classes", True, "class/patient/patch, one slide for each patient"),
    3: ("folders", False, "class/patient/slide/patch"),
}
"""By the depth of patches below the splits: the layout, whether the second folder is the patient, and words."""


def _of_table_beside(tables: Sequence[FoundTable], first: Sequence[str], options: ReadOptions) -> Cohort:
    """The cohort of a table beside patches or folders that are no classes; ValueError where nobody can match it."""
    if len(matched := [table for table in tables if table.match()]) == 1:
        return _of_table(matched[0], options)
    folder = tables[0].path.parent
    examples = list_images(folder)
    table, example = max(((one, path) for path in examples for one in tables), key=_fit)
    beside = f"the folder {first[0]!r}, which is no class" if first else "patches without folders of classes"
    if len(first) > 1:
        column, listed = table.lists(first), shorten_names(first)
        beside = f"the folders {listed}, which are named as patients or slides are, not as classes"
        if column is not None:
            beside = f"the folders {listed}, which its column {column} lists, so that they are no classes"
        elif all(map(is_split_like, first)):
            beside = f"the folders {listed}, which are splits by their names and hold no folders of classes"
    raise ValueError(
        f"{folder}: {table.describe()} lies beside {beside}. Say which column is what: call"
        f" {table.call(example, examples)} {GIVE}; a patch is {example}"
    )


def _of_only_folder(folder: Path, name: str, options: ReadOptions) -> Cohort:
    """The cohort of the only folder of a folder, which is called as no class is, or holds folders of classes."""
    inner = list_folders(folder / name)
    depths, _ = survey_folder(folder / name)
    if set(depths) == {1} and any(re.search(r"\d", one) for one in inner) and not _plain_classes(inner):
        raise ValueError(
            f"{folder}: its only folder {name!r} is no class, and {shorten_names(inner)} in it are named as patients or"
            " slides are, of which no table says the class. If they are classes, call"
            f" read_class_folders({str(folder / name)!r}) {GIVE}; else write a table and call"
            f" read_csv({str(folder)!r}, 'TABLE.csv', columns={{'class': 'label', 'slide': 'slide_id'}},"
            f" path_template='{name}/{{slide}}/*.png') {GIVE}"
        )
    return _noted(_of_folders(folder / name, options), f"its only folder {name!r} is no class and was read instead")


def _plain_classes(names: Sequence[str]) -> bool:
    """Whether folders with numbers may be classes: 0, 1, grade2."""
    return are_class_names(names) or (len(names) < 20 and not any(ID.search(name) for name in names))


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
    names = sorted(entry.name for entry in folder.iterdir() if is_image(entry))
    records = [PatchRecord(name, UNLABELLED, name, name, "") for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cohort's notes say the same
        notes = [NO_PATIENTS, *mask_notes(names)]
    cohort = Rows(records, names, notes).cohort(
        folder, kind=options.kind, class_names=None, mixed="keep", allow_links=options.allow_links
    )
    return _noted(cohort, "read as images without labels, for no folders of classes hold them")
