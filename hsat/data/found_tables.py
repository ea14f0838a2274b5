"""Tables beside folders of patches: which column is what, where that is beyond doubt, and what to type else."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hsat.data.assembly import IMAGE_SUFFIXES
from hsat.data.paths import check_inside
from hsat.data.separators import find_separator
from hsat.data.split_names import split_role
from hsat.types.names import is_missing
from hsat.untrusted import check_regular, open_regular

ALIASES: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image", "patch_path"),
    "class": ("class", "label", "class_name", "label_name"),
    "patient": ("patient", "patient_id", "patientid", "case_id", "case", "subject_id", "subject"),
    "slide": ("slide", "slide_id", "slideid", "wsi", "wsi_id"),
    "split": ("split", "set", "subset", "partition"),
}
"""What columns are called, by what they are, in small letters."""
_NEEDED = ("path", "class", "patient", "slide")
_CLASS_WORDS = ("tumor", "tumour", "diagnosis", "target", "tumor_patch", "y")  # guesses to type, never read unasked
_SHOWN, _SHOWN_LENGTH = 12, 60
MANIFEST = "manifest.csv"
TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
_SEARCHED = 20_000  # rows in which a patch is looked for
_FEWEST = 3  # characters of a cell that begins a file's name
_LONGEST_LINE = 1 << 20  # characters
_MOST_UNASKED = 64 << 20  # bytes of a table that nobody named


@dataclass(frozen=True)
class FoundTable:
    """A table in the folder of a cohort.

    Attributes:
        path: The file.
        header: Names of its columns.
        rows: Its rows that have a cell for each column.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, path: Path, *, strict: bool = True) -> FoundTable:
        """The table in a CSV file.

        Args:
            path: The file.
            strict: False replaces what is no text in UTF-8, for reading it in earnest comes later.

        Returns:
            The table.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no regular file or no table; the message names it.
        """
        with open_regular(path, kind="table") as raw:
            encoding = "utf-16" if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            errors = "strict" if strict else "replace"
            with io.TextIOWrapper(raw, newline="", encoding=encoding, errors=errors) as file:
                return cls._parse(path, file)

    @classmethod
    def _parse(cls, path: Path, file: TextIO) -> FoundTable:
        reader = None
        try:
            separator = find_separator(file.readline(_LONGEST_LINE))
            file.seek(0)
            reader = csv.reader(_lines(file), delimiter=separator, strict=True)
            header = tuple(cell.strip() for cell in next(reader, []))
            rows = tuple(tuple(row) for row in reader if len(row) == len(header))
        except UnicodeError as error:
            raise ValueError(f"{path} is no table: it is not UTF-8 text ({error}); save it as UTF-8") from error
        except (csv.Error, _LineError) as error:
            line = reader.line_num if reader else 1
            raise ValueError(
                f"{path} cannot be read as a table: {error} (at line {line}); a quotation mark before it may be without"
                " the one that closes it"
            ) from error
        return cls(path, header, rows)

    @property
    def is_manifest(self) -> bool:
        """Whether it has the columns that `read_csv` reads without being told."""
        return set(self.header) >= set(_NEEDED)

    @property
    def is_meant_as_manifest(self) -> bool:
        """Whether its header has two or more of these columns, in any case."""
        return len({name.casefold() for name in self.header} & set(_NEEDED)) > 1

    def column(self, name: str) -> list[str]:
        """The cells of a column, without white space around them."""
        place = self.header.index(name)
        return [row[place].strip() for row in self.rows]

    def named(self, role: str) -> list[str]:
        """The columns whose names say that they are this."""
        return [name for name in self.header if name.casefold().replace(" ", "_") in ALIASES[role]]

    def match(self) -> dict[str, str] | None:
        """Which column is what, for `read_csv`; None where that is in doubt.

        Exactly one column is called as the path and one as the class, at most one as the patient and the slide, and all
        paths lead to files below the table's folder.  A column of splits is taken if it says train, val or test.
        """
        columns = {role: self.named(role) for role in ALIASES}
        if any(len(columns[role]) != 1 for role in ("path", "class")) or not self.rows:
            return None
        if any(len(columns[role]) > 1 for role in ("patient", "slide")):
            return None
        if not all(self._is_image(cell) for cell in self.column(columns["path"][0])):
            return None
        splits = columns.pop("split")
        chosen = {role: names[0] for role, names in columns.items() if names}
        if len(splits) == 1 and all(is_missing(cell) or split_role(cell) for cell in set(self.column(splits[0]))):
            chosen["split"] = splits[0]
        return chosen

    def lists(self, names: Sequence[str]) -> str | None:
        """The column that has each of these (two or more) names in a row of its own, as one of slides has; or None."""
        for column in self.header if len(names) > 1 else ():
            cells = self.column(column)
            if len(set(cells)) == len(cells) and set(names) <= set(cells):
                return column
        return None

    def call(self, example: str = "", others: Sequence[str] = ()) -> str:
        """The call to write for this table, with blanks where nobody can know.

        Args:
            example: Path of a patch below the table's folder, for the template of paths.
            others: Paths of other patches: a folder that differs among them needs a column.
        """
        columns = {role: names[0] for role in ("path", "class", "patient", "slide") if (names := self.named(role))}
        if "path" in columns and example and not any(map(self._is_image, self.column(columns["path"]))):
            del columns["path"]  # its cells lead nowhere from here
        if "class" not in columns:
            guess = next((name for name in self.header if name.casefold() in _CLASS_WORDS), "COLUMN")
            columns = {"class": guess, **columns}
        path = self.path
        text = f"read_csv({str(path.parent)!r}, {path.name!r}, columns={columns!r}"
        if columns.get("path") is None:
            text += f", path_template={self._template(example, others)!r}"
        return text + ")"

    def describe(self) -> str:
        """Its name and its columns, in words."""
        names = [name if len(name) <= _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..." for name in self.header[:_SHOWN]]
        shown = ", ".join(names) + (", ..." if len(self.header) > _SHOWN else "")
        return f"the table {self.path.name} with the columns {shown or '(none)'}"

    def _is_image(self, cell: str) -> bool:
        return cell.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(os.path.join(self.path.parent, cell))

    def fit(self, example: str) -> float:
        """How much of the path of a patch stands in one row; 0 where nothing does."""
        return self._pieces(example)[0]

    def _template(self, example: str, others: Sequence[str]) -> str:
        """The path of a patch with names of columns where a row has its parts; else blanks."""
        fit, pieces = self._pieces(example)
        suffix = Path(example).suffix
        if not fit:
            return "/".join([*example.split("/")[:-1][:1], f"...{{COLUMN}}...{suffix or '.png'}"])
        alike = [
            other.split("/") for other in others if other.count("/") == example.count("/") and self.fit(other) >= fit
        ]
        for place, piece in enumerate(pieces[:-1]):
            if "{" not in piece and any(other[place] != piece for other in alike):
                pieces[place] = "{COLUMN}"
        return "/".join(pieces)

    def _pieces(self, example: str) -> tuple[float, list[str]]:
        """How well the row that fits best fits, and the parts of the template that it makes."""
        *folders, name = example.split("/")
        stem, suffix = Path(name).stem, Path(name).suffix
        starts = [stem[: found.start()] for found in re.finditer(r"[-_ ]", stem)]
        wanted = {*folders, name, stem, *(start for start in starts if len(start) >= _FEWEST)}
        best: tuple[float, list[str]] = (0, [])
        for row in self.rows[:_SEARCHED]:
            cells = {
                cell.strip(): column for cell, column in zip(row, self.header, strict=True) if cell.strip() in wanted
            }
            if not cells:
                continue
            start = max((one for one in starts if one in cells and len(one) >= _FEWEST), key=len, default="")
            parts = [f"{{{cells[part]}}}" if part in cells else part for part in folders]
            matched = sum(part in cells for part in folders)
            if name in cells:
                last, fit = f"{{{cells[name]}}}", 4
            elif stem in cells:
                last, fit = f"{{{cells[stem]}}}{suffix}", 4
            elif folders and folders[-1] in cells:
                last, fit = f"*{suffix}", 2
            elif start:
                last, fit = f"{{{cells[start]}}}{stem[len(start)]}*{suffix}", 2
            else:
                last, fit = f"*{suffix}", matched
            if fit + matched / 10 > best[0]:
                best = (fit + matched / 10, [*parts, last])
        return best


class _LineError(ValueError):
    """A line that no table has."""


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise _LineError(f"a line has more than {_LONGEST_LINE} characters")
        yield line


def read_manifest(folder: Path, *, allow_links: bool = False) -> FoundTable | None:
    """The table manifest.csv of a folder, where it is meant as the manifest of a cohort.

    Args:
        folder: The folder of a cohort.
        allow_links: Whether it may be a link out of the folder.

    Returns:
        The table; None where there is none, or one of other columns.

    Raises:
        FileNotFoundError: It is a link to nothing.
        ValueError: It is no regular file, leads out of the folder, or is no table: it is not passed over, for other
            patients would be read then.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    if not allow_links:
        check_inside(folder, str(path), path.name)
    table = FoundTable.read(path)
    if len(table.header) < 2:
        raise ValueError(
            f"{path} is no table: its first line names fewer than two columns; write {','.join(_NEEDED)} there, or"
            " rename the file if it is no list of patches"
        )
    return table if table.is_meant_as_manifest else None


def find_tables(folder: Path, *, allow_links: bool = False) -> tuple[list[FoundTable], list[str]]:
    """The tables (.csv, .tsv) directly in a folder that have a header and rows; nobody named them.

    Args:
        folder: The folder of a cohort.
        allow_links: Whether links may lead out of the folder.

    Returns:
        Tables in order of name, and notes on files that were not read: pipes, devices, files of more than 64 MiB, links
        out of the folder, and what is no table.
    """
    found, notes = [], []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv")):
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            if not allow_links:
                check_inside(folder, str(path), path.name)
            if (size := check_regular(path, kind="table").st_size) > _MOST_UNASKED:
                raise ValueError(
                    f"{path.name} has {size >> 20} MiB, and a table that nobody names is read up to"
                    f" {_MOST_UNASKED >> 20} MiB; name it if it is the one: manifest={path.name!r}"
                )
            table = FoundTable.read(path, strict=False)
        except (OSError, ValueError) as error:
            notes.append(f"not read: {error}")
            continue
        if len(table.header) > 1 and table.rows:
            found.append(table)
    return found, notes
