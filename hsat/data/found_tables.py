"""Tables beside folders of patches: which column is what, where that is beyond doubt, and what to type else."""

from __future__ import annotations

import csv
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
            with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
                lines = list(csv.reader(file))
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

    def call(self, example: str = "") -> str:
        """The call to write for this table, with blanks where nobody can know.

        Args:
            example: Path of a patch below the table's folder, for the template of paths.
        """
        columns = {role: names[0] for role in ("path", "class", "patient", "slide") if (names := self.named(role))}
        if "class" not in columns:
            guess = next((name for name in self.header if name.casefold() in _CLASS_WORDS), "COLUMN")
            columns = {"class": guess, **columns}
        path = self.path
        text = f"read_csv({str(path.parent)!r}, {path.name!r}, columns={columns!r}"
        if columns.get("path") is None:
            text += f", path_template={self._template(example)!r}"
        return text + ")"

    def describe(self) -> str:
        """Its name and its columns, in words."""
        shown = ", ".join(self.header[:_SHOWN]) + (", ..." if len(self.header) > _SHOWN else "")
        return f"the table {self.path.name} with the columns {shown or '(none)'}"

    def _is_image(self, cell: str) -> bool:
        return cell.lower().endswith(IMAGE_SUFFIXES) and (self.path.parent / cell).is_file()

    def _template(self, example: str) -> str:
        """Where the folder of a patch is called as a cell, all patches of that folder; else blanks."""
        parts = example.split("/")
        for place in range(len(parts) - 2, -1, -1):
            for column in self.header:
                if parts[place] in self.column(column):
                    inner = "" if place == len(parts) - 2 else "/".join(parts[place + 1 : -1]) + "/"
                    return "/".join([*parts[:place], f"{{{column}}}/{inner}*{Path(example).suffix}"])
        return "/".join([*parts[:-1][:1], f"...{{COLUMN}}...{Path(example).suffix or '.png'}"])


def find_tables(folder: Path) -> list[FoundTable]:
    """The CSV files directly in a folder that have a header and rows.

    Args:
        folder: The folder of a cohort.

    Returns:
        In order of name.
    """
    found = [FoundTable.read(path) for path in sorted(folder.glob("*.csv")) if not path.name.startswith(".")]
    return [table for table in found if len(table.header) > 1 and table.rows]
