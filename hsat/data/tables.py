"""Cohorts from tables: CSV files and data frames, with any names of columns, and paths by a template."""

from __future__ import annotations

import csv
import fnmatch
import glob
import io
import math
import os
import string
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsat.data.assembly import IMAGE_SUFFIXES, SLIDE_SUFFIXES, TILE_FIRST, Mixed, Rows
from hsat.data.cohort import Cohort, PatchKind
from hsat.data.folders import NO_PATIENTS, mask_notes
from hsat.data.paths import check_inside, resolve_root
from hsat.data.records import PatchRecord, path_error
from hsat.data.separators import find_separator
from hsat.types.names import check_cells, is_missing
from hsat.untrusted import open_regular

ROLES = ("path", "class", "patient", "slide", "split", "slide_label", "patient_label")
"""What a column of a table can be."""
_NEEDED = ("path", "class", "patient", "slide")
_SEPARATOR_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_csv(
    root: str | os.PathLike[str],
    manifest: str | os.PathLike[str] = "manifest.csv",
    *,
    columns: Mapping[str, str] | None = None,
    path_template: str | None = None,
    kind: PatchKind | None = None,
    class_names: Sequence[str] | None = None,
    mixed: Mixed = "keep",
    keep_splits: bool = True,
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from a CSV file with a row per patch, or per slide with a template of its patches' paths.

    Rows keep their order.  The file is UTF-8 with commas (or, where its header has none, with semicolons or tabs, as
    spreadsheets write it in some languages), and every cell is text: '004' stays '004'.  A missing value
    in whatever spelling ("", "nan", "NA", "NULL", "None", "#N/A", "-"), and a formula, are refused with file and line;
    an empty split means none.  Rows of nothing but commas are left out and counted.

    Args:
        root: The folder that the paths in the file are relative to.
        manifest: The file, relative to the root or absolute; below the root it may not be a link out of it.
        columns: Which column is what: {"path": "file", "class": "label", "patient": "case_id", "slide": "slide_id"};
            also "split", "slide_label" and "patient_label".  Only these columns are read.  Without "patient" the slide
            is the patient, and without both every patch is, which the notes say; without "slide" a patient has one.
            None: columns of these very names, of which path, class, patient and slide are needed.
        path_template: Makes paths out of cells where no column has them, with {patient} and the like for what
            `columns` names and {x_coord} for any other column: "patches/patient_{patient}_node_{node}/{file}".  Where
            its last part holds a *, the row stands for all images there: "patches/{slide}/*.png".
        kind: As in `read_folders`.
        class_names: As in `read_folders`.
        mixed: As in `read_folders`, without a warning for "keep".
        keep_splits: False leaves the column of splits out, for patients who are in several.
        allow_links: See `Cohort`.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: The root or the manifest is missing.
        ValueError: Missing columns or values, rows of another length, text that is not UTF-8 CSV (file and line are
            named), and whatever `Cohort` refuses.

    Example:
        >>> read_csv(  # CAMELYON17-WILDS
        ...     "camelyon17_v1.0", "metadata.csv", columns={"class": "tumor", "patient": "patient", "slide": "slide"},
        ...     path_template="patches/patient_{patient}_node_{node}/"
        ...     "patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png",
        ... )  # doctest: +SKIP
    """
    folder = resolve_root(root)
    path = folder / os.path.expanduser(manifest)
    if not os.path.lexists(path):
        tables = sorted(entry.name for entry in folder.glob("*.csv"))
        there = f"; there is {', '.join(map(repr, tables[:5]))}" if tables else ""
        raise FileNotFoundError(
            f"manifest {path} is missing; it is a CSV file with the columns {', '.join(_NEEDED)}{there}"
        )
    if not allow_links and path.is_relative_to(folder) and ".." not in path.parts:
        check_inside(folder, str(path), os.path.relpath(path, folder))
    try:
        table = _read_table(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"manifest {path} is not UTF-8 text: {error}; save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"manifest {path} is not readable as CSV: {error}") from error
    source = _Source(folder, f"manifest {path}", columns, path_template, allow_links, keep_splits)
    return source.rows(table).cohort(folder, kind=kind, class_names=class_names, mixed=mixed, allow_links=allow_links)


def from_frame(
    frame: Any,
    root: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    path_template: str | None = None,
    kind: PatchKind | None = None,
    class_names: Sequence[str] | None = None,
    mixed: Mixed = "keep",
    allow_links: bool = False,
) -> Cohort:
    """A Cohort from a pandas data frame, or any mapping from names of columns to equally long columns.

    Cells become text: whole numbers without a decimal point (4.0 is '4', for pandas turns whole numbers into decimals
    where one is missing), None, NaN, NaT and NA are missing values.  Read files with dtype=str, so that '004' stays
    '004'.  A column that the frame has as its index does not count.

    Args:
        frame: The columns.
        root: The folder that the paths are relative to; absolute paths have to lie in it.
        columns, path_template, kind, class_names, mixed, allow_links: See `read_csv`.

    Returns:
        The cohort.

    Raises:
        TypeError: The frame is no mapping of columns.
        ValueError: As in `read_csv`, with the number of the row, counted from 0.

    Example:
        >>> frame = {"file": ["a.png", "b.png"], "label": ["tumour", "normal"], "case_id": ["004", "004"]}
        >>> cohort = from_frame(frame, ".", columns={"path": "file", "class": "label", "patient": "case_id"})
        >>> cohort.patient_names, cohort.class_names
        (('004',), ('normal', 'tumour'))
    """
    folder = resolve_root(root)
    try:
        cells = {str(name): [_as_text(value) for value in frame[name]] for name in frame}
    except (TypeError, KeyError) as error:
        raise TypeError(
            f"a frame maps names to columns, as a pandas DataFrame or a dict does; got {frame!r:.80}"
        ) from error
    lengths = {name: len(column) for name, column in cells.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of the frame have different lengths: {lengths}")
    count = next(iter(lengths.values()), 0)
    table = _Table(
        list(cells), [list(row) for row in zip(*cells.values(), strict=True)], [f"row {i}" for i in range(count)]
    )
    source = _Source(folder, "the frame", columns, path_template, allow_links)
    return source.rows(table).cohort(folder, kind=kind, class_names=class_names, mixed=mixed, allow_links=allow_links)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


@dataclass
class _Table:
    """Cells as text: the header, the rows, and the place of each row in words."""

    header: list[str]
    rows: list[list[str]]
    places: list[str]
    notes: list[str] = field(default_factory=list)


def _read_table(path: Path) -> _Table:
    with (
        open_regular(path, kind="manifest") as raw,
        io.TextIOWrapper(raw, newline="", encoding="utf-8-sig") as file,
    ):
        separator = find_separator(file.readline())
        file.seek(0)
        reader = csv.reader(file, strict=True, delimiter=separator)
        table = _Table(next(reader, []), [], [])
        blank = 0
        for row in reader:
            if not any(cell.strip() for cell in row):
                blank += bool(row)
                continue
            if len(row) != len(table.header):
                raise ValueError(
                    f"manifest {path}, line {reader.line_num}: {len(row)} fields, but the header has"
                    f" {len(table.header)}; quote fields that hold {_SEPARATOR_NAMES.get(separator, repr(separator))}"
                )
            table.rows.append(row)
            table.places.append(f"{path.name}, line {reader.line_num}")
    if blank:
        table.notes.append(f"left out: {blank} rows of {path.name} in which every cell is empty")
    return table


@dataclass(frozen=True)
class _Source:
    """How a table becomes rows of a cohort."""

    root: Path
    name: str
    columns: Mapping[str, str] | None
    path_template: str | None
    allow_links: bool
    keep_splits: bool = True

    def rows(self, table: _Table) -> Rows:
        """The rows; ValueError naming the table and the row for what cannot be used."""
        roles = self._roles(table.header)
        if not table.rows:
            raise ValueError(f"{self.name} has a header and no rows")
        where = table.places.__getitem__
        cells = {role: [row[place] for row in table.rows] for role, place in roles.items()}
        for role in ("path", "class", "patient", "slide"):
            if role in cells:
                check_cells(role, cells[role], where)
        notes = list(table.notes)
        paths, chosen = self._paths(table, cells, roles)
        if self.path_template and "*" in self.path_template:
            notes += mask_notes(paths)
        column: Callable[[str, Sequence[str]], list[str]] = lambda role, default: (  # noqa: E731
            [cells[role][i] for i in chosen] if role in cells else list(default)
        )
        slides = column("slide", [])
        patients = column("patient", slides or paths)
        slides = slides or patients
        if "patient" not in roles:
            note = NO_PATIENTS if "slide" not in roles else "no column is the patient: every slide counts as one"
            notes.append(note)
            warnings.warn(f"{self.name}: {note}; name the column, as in columns={{'patient': 'case_id'}}", stacklevel=4)
        splits = [""] * len(chosen)
        if self.keep_splits:
            splits = ["" if is_missing(split) else split for split in column("split", splits)]
        records = [PatchRecord(*row) for row in zip(paths, column("class", []), patients, slides, splits, strict=True)]
        places = [table.places[i] for i in chosen]
        return Rows(
            records,
            places,
            notes,
            slide_labels=_group_labels(
                "slide", list(zip(patients, slides, strict=True)), column("slide_label", []), places
            ),
            patient_labels=_group_labels("patient", patients, column("patient_label", []), places),
        )

    def _roles(self, header: list[str]) -> dict[str, int]:
        """The place of the column of each role."""
        if self.columns is None:
            names = {role: role for role in ROLES if role in header}
            needed = [role for role in _NEEDED if role != "path" or self.path_template is None]
        else:
            names = dict(self.columns)
            needed = ["class"] + ["path"] * (self.path_template is None)
            if unknown := [role for role in names if role not in ROLES]:
                raise ValueError(
                    f"columns names {', '.join(map(repr, unknown))}; what a column can be is {', '.join(ROLES)}, as in"
                    " columns={'path': 'file', 'class': 'label'}"
                )
        have = ", ".join(map(repr, header)) or "nothing"
        hint = ""
        if self.columns is not None and (lacking := [role for role in needed if role not in names]):
            raise ValueError(
                f"columns does not say which column is the {' and the '.join(lacking)} of a patch;"
                f" {self.name} has {have}" + ("; or give path_template" if "path" in lacking else "")
            )
        missing = [
            names.get(role, role) for role in {**dict.fromkeys(needed), **names} if names.get(role, role) not in header
        ]
        if missing:
            if not hint:
                hint = (
                    "; say which column is what, as in columns={'path': 'file', 'class': 'label', 'patient': 'case_id'}"
                )
            raise ValueError(f"{self.name} has no column {', '.join(map(repr, missing))}; it has {have}{hint}")
        twice = [name for name in names.values() if header.count(name) > 1]
        if twice:
            raise ValueError(f"{self.name} has the column {twice[0]!r} twice")
        return {role: header.index(name) for role, name in names.items()}

    def _paths(
        self, table: _Table, cells: Mapping[str, list[str]], roles: Mapping[str, int]
    ) -> tuple[list[str], list[int]]:
        """Relative paths, and the row of the table that each comes from."""
        if self.path_template is None:
            paths = [self._relative(path) for path in cells["path"]]
            slides = [path for path in paths if os.path.splitext(path)[1].lower() in SLIDE_SUFFIXES]
            if slides:
                raise ValueError(f"{self.name} lists {slides[0]!r}, a whole slide; {TILE_FIRST}")
            return paths, list(range(len(paths)))
        places = {name: i for i, name in enumerate(table.header)} | dict(roles)
        pieces = _parse_template(self.path_template, places, self.name)
        paths, chosen, listed = [], [], dict[str, list[str]]()
        for i, row in enumerate(table.rows):
            filled = [(text, row[places[name]] if name else "") for text, name in pieces]
            path = self._relative("".join(text + cell for text, cell in filled))
            if "*" not in self.path_template:
                paths.append(path)
                chosen.append(i)
                continue
            folder = path.rpartition("/")[0]
            if problem := path_error(path):
                raise ValueError(f"{table.places[i]}: path {path!r} is refused: {problem}")
            if folder not in listed:
                listed[folder] = self._files(folder, table.places[i])
            literal = "".join(text + glob.escape(cell) for text, cell in filled).rpartition("/")[2]
            names = [name for name in listed[folder] if fnmatch.fnmatchcase(name, literal)]
            if not names:
                raise ValueError(f"{table.places[i]}: no image {path!r} in {self.root}")
            self._check_numbers(path.rpartition("/")[2], names, table.places[i])
            paths += [f"{folder}/{name}" if folder else name for name in names]
            chosen += [i] * len(names)
        return paths, chosen

    def _check_numbers(self, pattern: str, names: Sequence[str], place: str) -> None:
        """ValueError where * goes on with the number of a cell, so that case1 takes the images of case10."""
        before = pattern.partition("*")[0]
        longer = [name for name in names if before[-1:].isdigit() and name[len(before) : len(before) + 1].isdigit()]
        if longer:
            raise ValueError(
                f"{place}: path_template {self.path_template!r} takes {longer[0]!r} for {before!r}, whose number goes"
                " on there; put what stands between them before the *, as in {case}_*.png"
            )

    def _files(self, folder: str, place: str) -> list[str]:
        """Names of the images in a folder below the root, in order."""
        full = f"{self.root}/{folder}"
        if not self.allow_links:
            check_inside(self.root, full, folder)
        try:
            names = os.listdir(full)
        except OSError as error:
            raise ValueError(f"{place}: folder {folder!r} of {self.root} cannot be read ({error.strerror})") from error
        images = (name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
        return sorted(name for name in images if not name.startswith("."))

    def _relative(self, path: str) -> str:
        """An absolute path that lies in the root, from there; any other path as it is, for the cohort to judge."""
        base = str(self.root).rstrip("/") + "/"
        return path[len(base) :] if path.startswith(base) else path


def _parse_template(template: str, places: Mapping[str, int], table: str) -> list[tuple[str, str | None]]:
    """(text, name of a column) pieces; ValueError for a name that the table lacks and for any other format."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"path_template {template!r} is not readable: {error}") from error
    for _, name, spec, conversion in parts:
        if name is not None and (name not in places or spec or conversion):
            raise ValueError(
                f"path_template {template!r} asks for {{{name}{':' * bool(spec)}{spec}}}; {table} has"
                f" {', '.join(f'{{{known}}}' for known in places)}, and cells are put in as they are"
            )
    if "*" in "".join(text for text, *_ in parts).rpartition("/")[0]:
        raise ValueError(f"path_template {template!r} has a * in a folder; it may stand in the file's name only")
    return [(text, name) for text, name, _, _ in parts]


def _group_labels(level: str, groups: Sequence[Any], labels: Sequence[str], places: Sequence[str]) -> dict[Any, str]:
    """The label of each slide or patient; missing ones are left out, ValueError where rows disagree."""
    stated: dict[Any, str] = {}
    for group, label, place in zip(groups, labels, places, strict=True) if labels else ():
        if is_missing(label):
            continue
        if stated.setdefault(group, label) != label:
            raise ValueError(
                f"{place}: {level}_label of {level} {group!r} is {label!r} here and {stated[group]!r} above"
            )
    return stated
