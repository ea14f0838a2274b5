"""Embeddings kept on the disk, and used again only for the very encoder, images and settings they came from."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsat.eval.engine.identity import key_of
from hsat.files import CorruptFileError, read_arrays, write_arrays
from hsat.types import EmbeddingTable

_IDS = ("label", "patch", "slide", "patient")


class EmbeddingCache:
    """A folder of embeddings, one file for each key; the file's name is the SHA-256 of the key.

    A key is whatever decides the numbers, as texts, numbers, lists and mappings: encoder, layer, patches, their files'
    times, image size, batch size.  Another checkpoint or cohort has another key, so that nothing out of date is found.
    A file is checked against its key and its checksum whenever it is read; one that fails is made anew, with a
    UserWarning.  Files appear whole or not at all, so that processes may share a folder; two that need the same
    embeddings at the same time both compute them, and the later one's file stays.  Files are never removed by the
    cache; a folder may be deleted at any time.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the cache must be a folder, and {self.folder} is a file")
        self.hits = self.misses = 0

    def table(self, key: Mapping[str, Any], make: Callable[[], EmbeddingTable]) -> EmbeddingTable:
        """The table of this key: read, or made and kept."""
        found = self.find_table(key)
        if found is None:
            found = make()
            self.keep_table(key, found)
        return found

    def find_table(self, key: Mapping[str, Any]) -> EmbeddingTable | None:
        """The table that was kept under a key, or None; counts hits and misses."""
        kept = self.arrays(key)
        if kept is None:
            return None
        about, arrays = kept
        names = tuple(about.pop("class_names"))
        return EmbeddingTable(**arrays, **about, class_names=names)  # type: ignore[arg-type]

    def keep_table(self, key: Mapping[str, Any], table: EmbeddingTable) -> None:
        """Keep a table under a key; see `keep`."""
        about = {"class_names": list(table.class_names), "cohort": table.cohort, "split": table.split}
        self.keep(key, {name: getattr(table, name) for name in ("z", *_IDS)}, about | {"encoder": table.encoder})

    def arrays(self, key: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """(texts, arrays) kept under a key, or None; counts hits and misses."""
        path = self._path(key)
        try:
            about, arrays = read_arrays(path)
            if about.get("key") != _plain(key):
                raise CorruptFileError(f"{path} holds embeddings of something else than its name says")
        except FileNotFoundError:
            self.misses += 1
            return None
        except (CorruptFileError, OSError) as error:
            warnings.warn(f"{error}; embedding anew", stacklevel=3)
            self.misses += 1
            return None
        self.hits += 1
        return {name: value for name, value in about.items() if name != "key"}, arrays

    def keep(self, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep arrays under a key.  A disk that is full or may not be written is a UserWarning, not an error."""
        try:
            write_arrays(self._path(key), {**about, "key": _plain(key)}, arrays)
        except OSError as error:
            warnings.warn(f"embeddings could not be kept in {self.folder}: {error}", stacklevel=3)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(key)}.arrays"


def _plain(key: Mapping[str, Any]) -> Any:
    """The key as JSON gives it back."""
    return json.loads(json.dumps(key))
