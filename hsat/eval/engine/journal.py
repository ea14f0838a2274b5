"""What an evaluation has finished, batch by batch, in a folder that a later process can go on with."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsat.eval.engine.storing import DamagedFileError, read_arrays, write_arrays, write_whole
from hsat.types import HierarchicalBatch
from hsat.types.tensor_bytes import tensor_bytes

Arrays = dict[str, np.ndarray]
_FORMAT = 2  # of what a batch's file holds; 1 had sums over all batches so far


class Journal:
    """Finished batches by number, and notes by name.

    folder: None keeps nothing.  It is made when it is not there; whatever is written appears whole or not at all, so
    that a process may be killed at any moment.  settings: whatever decides the numbers; a folder that was begun under
    others is refused with a ValueError that names each difference, and so is a folder that holds something else.
    finished: the numbers of the batches that were kept when it was opened, ascending.

    Several processes may write into one folder, each its own batches and notes.  One of them opens it; the others, to
    which it says what is finished, are given that and look no further.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        *,
        finished: Sequence[int] | None = None,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self.finished = tuple(finished or ())
        if self._folder is not None and finished is None:
            self._open(self._folder, json.loads(json.dumps({**settings, "format": _FORMAT})))
            names = (path.name for path in self._folder.glob("batch-*.arrays"))
            self.finished = tuple(sorted(int(name[6:-7]) for name in names if name[6:-7].isdecimal()))

    def read(self, number: int, batch: HierarchicalBatch) -> tuple[dict[str, Any], Arrays] | None:
        """What was kept of a batch; None where nothing was, or with a warning where it is damaged.

        ValueError if the batch is another one than that which was kept under this number.
        """
        if self._folder is None or not (path := self._path(number)).exists():
            return None
        try:
            about, arrays = read_arrays(path)
        except DamagedFileError as error:
            warnings.warn(f"{error}; batch {number} is attacked anew", stacklevel=2)
            return None
        if about["batch"] != batch_digest(batch):
            raise ValueError(
                f"batch {number} of the queries is not the one that {self._folder} knows;"
                " go on with the same patches, or give a new folder"
            )
        return about, arrays

    def write(self, number: int, batch: HierarchicalBatch, about: Mapping[str, Any], arrays: Arrays) -> None:
        """Keep what was found for a batch."""
        if self._folder is not None:
            write_arrays(self._path(number), {**about, "batch": batch_digest(batch)}, arrays)

    def recall(self, name: str) -> dict[str, Any] | None:
        """The note of this name; None where there is none, or with a warning where it is damaged."""
        if self._folder is None or not (path := self._folder / f"note-{name}.arrays").exists():
            return None
        try:
            return read_arrays(path)[0]
        except DamagedFileError as error:
            warnings.warn(f"{error}; found out anew", stacklevel=2)
            return None

    def note(self, name: str, about: Mapping[str, Any]) -> None:
        """Keep a note of texts, numbers and lists; name: part of a file's name, made of all that decides the note."""
        if self._folder is not None:
            write_arrays(self._folder / f"note-{name}.arrays", about, {})

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"batch-{number:06d}.arrays"

    def _open(self, folder: Path, settings: dict[str, Any]) -> None:
        path = folder / "settings.json"
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); delete {folder} and begin anew") from error
            _check_same(folder, before, settings)
        elif folder.exists() and (not folder.is_dir() or any(not _partial(each) for each in folder.iterdir())):
            raise ValueError(f"{folder} holds something else than a state of an evaluation; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in filter(_partial, folder.iterdir()):  # by a process that was killed
            left_over.unlink(missing_ok=True)
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=1, sort_keys=True).encode())


def _partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _check_same(folder: Path, before: Any, now: dict[str, Any]) -> None:
    before = before if isinstance(before, dict) else {}
    differing = [
        f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} was begun under other settings: {'; '.join(differing)}. Go on with those, or give a new folder"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 and " " not in text else text  # a hash is told apart by its beginning


def batch_digest(batch: HierarchicalBatch) -> str:
    """SHA-256 over the images, ids and labels of a batch."""
    digest = hashlib.sha256()
    for name in ("images", "patch", "slide", "patient", "label"):
        column = getattr(batch, name)
        if column is not None:
            digest.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(tensor_bytes(column))
    return digest.hexdigest()
