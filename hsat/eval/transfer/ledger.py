"""What a transfer evaluation has finished, in memory or in a folder that a later process can go on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsat.eval.tally import Tally
from hsat.types import EmbeddingTable
from hsat.types.array_files import load_arrays

GROWING = ("attack.", "bank.", "encoder.")  # settings that later runs may add to, and leave out, but not change
Scores = dict[str, dict[int, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known of one condition: class scores (n, classes) by target and k, and the counts of the attack."""

    scores: Scores
    tally: Tally = field(default_factory=Tally)


class Ledger:
    """Finished entries by key, a few tables, and the settings they were made under.

    folder: None keeps everything in memory.  A folder is made when it is not there; what is written into it appears
    whole or not at all, so that a process may be killed at any moment.  settings: texts and numbers by name; a folder
    that was begun under others is refused with a ValueError that names each difference, and so is a folder that holds
    something else.  Names that begin with "encoder.", "bank." or "attack." may be added later.

    Of several ranks the first opens the folder and writes; then the others, with writes=False, read it.  They have
    entries and notes that they put themselves, and tables as soon as the first rank has written them.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], *, writes: bool = True
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._entries: dict[tuple[str, ...], Entry] = {}
        self._tables: dict[str, EmbeddingTable] = {}
        self._notes: dict[str, Any] = {}
        self._writes = writes and self.folder is not None
        if self.folder is not None and writes:
            self._open(self.folder, json.loads(json.dumps(settings)))
        if self.folder is not None and (notes := self.folder / "notes.json").exists():
            self._notes = _read_json(notes)

    @property
    def scratch(self) -> Path:
        """Where images may wait on the disk; what is left there is removed when the folder is opened again."""
        if self.folder is None:
            raise ValueError("a ledger without a folder has no place on the disk")
        return self.folder / "adversarial"

    def listing(self) -> list[str]:
        """The names of the entries and tables in the folder, in order."""
        if self.folder is None:
            return []
        kinds = ("entries", "tables")
        return sorted(path.name for kind in kinds for path in (self.folder / kind).glob("[!.]*"))

    def get(self, *key: str) -> Entry | None:
        """The entry of a key, or None."""
        if key not in self._entries and self.folder is not None and (path := self._path("entries", key)).exists():
            self._entries[key] = _read_entry(path)
        return self._entries.get(key)

    def put(self, entry: Entry, *key: str) -> None:
        """Keep an entry, in place of one that is there."""
        self._entries[key] = entry
        if self._writes:
            _write_entry(self._path("entries", key), entry)

    def table(self, name: str) -> EmbeddingTable | None:
        """A table that was kept, or None; from a folder its embeddings are memory-mapped."""
        if self.folder is None:
            return self._tables.get(name)
        path = self._path("tables", (name,))
        return EmbeddingTable.load(path, memory_map=True) if path.exists() else None

    def put_table(self, name: str, table: EmbeddingTable) -> None:
        """Keep a table."""
        if self.folder is None:
            self._tables[name] = table
        elif self._writes:
            table.save(self._path("tables", (name,)))

    def note(self, name: str) -> Any:
        """A plain value that was noted, or None."""
        return self._notes.get(name)

    def put_note(self, name: str, value: Any) -> None:
        """Note a plain value."""
        self._notes[name] = value
        if self.folder is not None and self._writes:
            _write(self.folder / "notes.json", json.dumps(self._notes).encode())

    def _path(self, kind: str, key: Sequence[str]) -> Path:
        """A file or folder name that is readable and unlike that of any other key, whatever the key holds."""
        assert self.folder is not None
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=6).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(key))[:80].lstrip(".")
        return self.folder / kind / f"{readable}-{digest}"

    def _open(self, folder: Path, settings: dict[str, Any]) -> None:
        path = folder / "settings.json"
        if path.exists():
            before = _read_json(path)
            _check_same(folder, before, settings)
            settings = before | settings
        elif folder.exists() and (not folder.is_dir() or any(_without_partials(folder))):
            raise ValueError(f"{folder} holds something else than a transfer evaluation; give a new folder")
        (folder / "entries").mkdir(parents=True, exist_ok=True)
        (folder / "tables").mkdir(exist_ok=True)
        for left_over in (self.scratch, *(folder / "tables").glob(".*")):  # by a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        _write(path, json.dumps(settings, indent=1, sort_keys=True).encode())


def _without_partials(folder: Path) -> list[Path]:
    """What lies in a folder besides what a process that was killed at its very beginning leaves."""
    ours = {"entries", "tables", ".settings.json.partial"}
    return [path for path in folder.iterdir() if path.name not in ours]


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = []
    for name in sorted(before.keys() | now.keys()):
        if name.startswith(GROWING) and not (name in before and name in now):
            continue
        if before.get(name) != now.get(name):
            differing.append(f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}")
    if differing:
        raise ValueError(
            f"{folder} was begun under other settings: {'; '.join(differing)}. Go on with those, or give a new folder"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text  # a hash is told apart by its beginning


def _write_entry(path: Path, entry: Entry) -> None:
    """One .npz file: the scores in order, and a JSON text that says whose they are."""
    columns = [(target, k) for target, by_k in entry.scores.items() for k in by_k]
    about = {"columns": columns, "counts": _counts(entry.tally)}
    arrays: dict[str, Any] = {f"scores{i}": entry.scores[target][k] for i, (target, k) in enumerate(columns)}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)  # texts and numbers: nothing is pickled
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_entry(path: Path) -> Entry:
    try:
        with path.open("rb") as file:
            arrays = load_arrays(file)
        about = json.loads(str(arrays["about"]))
        scores: Scores = {}
        for i, (target, k) in enumerate(about["columns"]):
            scores.setdefault(target, {})[int(k)] = arrays[f"scores{i}"]
        return Entry(scores, Tally(**about["counts"]))
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it will be made anew") from error


def _counts(tally: Tally) -> dict[str, int]:
    found = {each.name: getattr(tally, each.name) for each in dataclasses.fields(Tally)}
    return {name: int(value) for name, value in found.items() if isinstance(value, int | np.integer)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give a new folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object; give a new folder")
    return content


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
