"""The table of renamed things: what a checkout calls the commands, and its results under the first edition's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from commands import Command

TABLE = Path(__file__).parent / "renames.yaml"
Entry = Mapping[str, Any]
RULES = ("texts", "files", "fields", "values", "added")
KEYS = {
    "texts": {"old", "new", "files"},
    "files": {"old", "new"},
    "fields": {"old", "new", "files"},
    "values": {"old", "new", "files", "field"},
    "added": {"field", "files", "why"},
    "options": {"old", "new"},
    "option values": {"option", "old", "new"},
    "program": {"words"},
    "ignored": {"files", "field", "why", "within"},
}


@dataclass(frozen=True)
class Edition:
    """The entries of the table that hold for one checkout."""

    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[Entry, ...] = ()
    option_values: tuple[Entry, ...] = ()
    outputs: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)

    def words(self, command: Command, places: Mapping[str, str]) -> list[str]:
        """The program as Python is to start it, without options.  places: what {checkout} and {here} stand for."""
        return [word.format(**places) for word in self.programs[command.program]]

    def spelled(self, options: Mapping[str, str]) -> list[str]:
        """Options as this edition wants them on the command line."""
        words: list[str] = []
        for option, text in options.items():
            parts = text.split(",")
            for entry in self.option_values:
                if entry["option"] == option:
                    parts = [entry["new"] if part == entry["old"] else part for part in parts]
            name = next((entry["new"] for entry in self.options if entry["old"] == option), option)
            words += [] if name is None else [f"--{name}", ",".join(parts)]
        return words

    def old_file(self, path: str) -> str:
        """The first edition's name of a file of results."""
        path = self._old_text(path, "")
        return next((entry["old"] for entry in self._rules("files") if entry["new"] == path), path)

    def old_field(self, name: str, file: str) -> str:
        """The first edition's name of a field.  file: of the first edition."""
        name = self._old_text(name, file)
        for entry in self._rules("fields", file):
            if name == entry["new"]:
                return str(entry["old"])
            name = ".".join(entry["old"] if part == entry["new"] else part for part in name.split("."))
        return name

    def old_value(self, value: Any, name: str, file: str) -> Any:
        """The first edition's value of a field; what is not text stays.  name, file: of the first edition."""
        if not isinstance(value, str):
            return value
        value = self._old_text(value, file)
        for entry in self._rules("values", file):
            if value == entry["new"] and fits(name, entry.get("field", "*")):
                return entry["old"]
        return value

    def is_added(self, name: str, file: str) -> bool:
        """Whether the table says that this field (or, with name "", this file) is new in this edition."""
        wanted = [entry for entry in self._rules("added", file) if ("field" in entry) == bool(name)]
        return any(not name or fits(name, entry["field"]) for entry in wanted)

    def _rules(self, kind: str, file: str | None = None) -> list[Entry]:
        entries = self.outputs.get(kind, ())
        return [entry for entry in entries if file is None or fnmatchcase(file, entry.get("files", "*"))]

    def _old_text(self, text: str, file: str) -> str:
        for entry in self._rules("texts"):
            if "files" not in entry or fnmatchcase(file, entry["files"]):
                text = text.replace(entry["new"], entry["old"])
        return text


@dataclass(frozen=True)
class Ignored:
    """Files and fields that rightly differ, in the first edition's names."""

    entries: tuple[Entry, ...] = ()

    def file(self, path: str) -> bool:
        """Whether a whole file is left out; a pattern without a slash fits the file's name in any folder."""
        name = path.rpartition("/")[2]
        return any(
            "field" not in entry and fnmatchcase(path if "/" in entry["files"] else name, entry["files"])
            for entry in self.entries
        )

    def field(self, name: str, file: str) -> bool:
        """Whether a field of a file is left out."""
        return any(
            "field" in entry
            and "within" not in entry
            and fnmatchcase(file, entry["files"])
            and fits(name, entry["field"])
            for entry in self.entries
        )

    def distance(self, name: str, file: str) -> float:
        """How far the numbers of a field may lie apart, relative to the larger one or to 1e-3; 0 where bits count."""
        return max(
            (
                float(entry["within"])
                for entry in self.entries
                if "within" in entry and fnmatchcase(file, entry["files"]) and fits(name, entry["field"])
            ),
            default=0.0,
        )


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a whole dotted name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table.  ValueError for an unknown section, key or edition, naming it."""
    table = yaml.safe_load(path.read_text())
    known = {"editions", "programs", "options", "values", "outputs", "ignored"}
    if unknown := set(table) - known:
        raise ValueError(f"{path}: unknown sections {sorted(unknown)}; there are {sorted(known)}")
    sections = {f"outputs.{kind}": (kind, table["outputs"].get(kind, [])) for kind in table["outputs"]}
    if unknown := set(table["outputs"]) - set(RULES):
        raise ValueError(f"{path}: unknown sections {sorted(unknown)} of outputs; there are {list(RULES)}")
    sections |= {"options": ("options", table["options"]), "values": ("option values", table["values"])}
    sections |= {f"programs.{name}": ("program", entries) for name, entries in table["programs"].items()}
    sections |= {f"ignored.{kind}": ("ignored", entries) for kind, entries in table["ignored"].items()}
    for title, (kind, entries) in sections.items():
        for entry in entries:
            if unknown := set(entry) - KEYS[kind] - {"since"}:
                raise ValueError(f"{path}, {title}: {dict(entry)} has unknown keys {sorted(unknown)}")
            if "since" in entry and entry["since"] not in table["editions"]:
                raise ValueError(f"{path}, {title}: {entry['since']!r} is none of the editions {[*table['editions']]}")
    return dict(table)


def edition_of(checkout: Path, table: Mapping[str, Any]) -> Edition:
    """The entries of the table that hold for a checkout."""
    shown = {name for name, sign in table["editions"].items() if _shows(checkout, sign)}

    def holding(entries: Iterable[Entry]) -> tuple[Entry, ...]:
        return tuple(entry for entry in entries if entry.get("since") in (None, *shown))

    return Edition(
        programs={name: tuple(holding(entries)[-1]["words"]) for name, entries in table["programs"].items()},
        options=holding(table["options"]),
        option_values=holding(table["values"]),
        outputs={kind: holding(entries) for kind, entries in table["outputs"].items()},
    )


def ignored_of(table: Mapping[str, Any]) -> Ignored:
    """The part of the table about what rightly differs."""
    return Ignored((*table["ignored"].get("files", ()), *table["ignored"].get("fields", ())))


def _shows(checkout: Path, sign: Entry) -> bool:
    path = checkout / sign["path"]
    return path.exists() and ("text" not in sign or sign["text"] in path.read_text())
