"""Tables beside folders of patches: which column is what, where that is beyond doubt, and what to type else."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsat.data.assembly import IMAGE_SUFFIXES
from hsat.data.split_names import split_role
from hsat.types.names import is_missing

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
_SHOWN = 12
TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
_SEPARATORS = ";\t|"
_SEARCHED = 20_000  # rows in which a patch is looked for
_FEWEST = 3  # characters of a cell that begins a file's name


def find_separator(header: str) -> str:
    """What separates the columns of a table: commas, or what else stands in a header without any.

    Args:
        header: The first line.

    Returns:
        One character.

    Example:
        >>> find_separator("path,class"), find_separator("path;class")
        (',', ';')
    """
    counts = {one: header.count(one) for one in _SEPARATORS}
    best = max(counts, key=lambda one: counts[one])
    return best if counts[best] and "," not in header else ","


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
    def read(cls, path: Path) -> FoundTable:
        """The table in a CSV file.

        Args:
            path: The file; what is no text in UTF-8 is replaced, for reading it in earnest comes later.

        Returns:
            The table; without columns where the file is none.
        """
        try:
            with path.open("rb") as raw:
                encoding = "utf-16" if raw.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            with path.open(newline="", encoding=encoding, errors="replace") as file:
                separator = find_separator(file.readline())
                file.seek(0)
                lines = list(csv.reader(file, delimiter=separator))
        except (OSError, csv.Error):
            lines = []
        header = tuple(cell.strip() for cell in lines[0]) if lines else ()
        return cls(path, header, tuple(tuple(row) for row in lines[1:] if len(row) == len(header)))

    @property
    def is_manifest(self) -> bool:
        """Whether it has the columns that `read_csv` reads without being told."""
        return set(self.header) >= set(_NEEDED)

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
        shown = ", ".join(self.header[:_SHOWN]) + (", ..." if len(self.header) > _SHOWN else "")
        return f"the table {self.path.name} with the columns {shown or '(none)'}"

    def _is_image(self, cell: str) -> bool:
        return cell.lower().endswith(IMAGE_SUFFIXES) and (self.path.parent / cell).is_file()

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


def find_tables(folder: Path) -> list[FoundTable]:
    """The tables (.csv, .tsv) directly in a folder that have a header and rows.

    Args:
        folder: The folder of a cohort.

    Returns:
        In order of name.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv") and path.is_file())
    found = [FoundTable.read(path) for path in paths if not path.name.startswith(".")]
    return [table for table in found if len(table.header) > 1 and table.rows]
