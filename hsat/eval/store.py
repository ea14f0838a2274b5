"""Finished results of an evaluation, in memory or in a folder that a later process goes on from; and a cache."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.distributed import World, shared_world
from hsat.embedding import IDS
from hsat.eval.options import RunOptions
from hsat.eval.store_folder import SCRATCH, open_folder
from hsat.files import (
    Arrays,
    CorruptFileError,
    PathLike,
    read_arrays,
    write_arrays,
)
from hsat.fingerprints import fingerprint_batch, fingerprint_settings
from hsat.types import GROUP_LABELS, EmbeddingTable, HierarchicalBatch

Settings = Mapping[str, Any]
_FORMAT = 3  # of what the files hold
_ENDING = ".arrays"


@dataclass(frozen=True, eq=False)
class StoredResult:
    """One finished piece of work: texts and numbers, and arrays."""

    header: dict[str, Any]
    arrays: Arrays


class ResultStore:
    """Finished results by key; a key is one or several texts.

    Several processes may write into one folder, each its own results.  Files appear whole or not at all, so that a
    process may be killed at any moment; a damaged file is a warning, and its result is computed anew.

    Args:
        folder: Where results are kept; None keeps them in memory.
        settings: All that decides the results, by name.  A folder of other settings is refused.
        growing: Beginnings of names of settings that later runs may add or leave out, but not change.
        is_main: Whether this process opens the folder; the others open it after that one has.

    Raises:
        ValueError: For a folder that was begun under other settings, naming each that differs, and for one that holds
            something else.
    """

    def __init__(
        self, folder: PathLike | None, settings: Settings, *, growing: Sequence[str] = (), is_main: bool = True
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._results: dict[str, StoredResult] = {}
        if self.folder is not None and is_main:
            open_folder(self.folder, json.loads(json.dumps({**settings, "format": _FORMAT})), tuple(growing))

    def get(self, *key: str) -> StoredResult | None:
        """The result of a key; None where there is none, or with a warning where its file is damaged."""
        name = _file_name(key)
        if self.folder is None:
            return self._results.get(name)
        try:
            header, arrays = read_arrays(self.folder / name)
        except FileNotFoundError:
            return None
        except CorruptFileError as error:
            warnings.warn(f"{error}; computing it anew", stacklevel=2)
            return None
        return StoredResult(header, arrays)

    def put(self, result: StoredResult, *key: str) -> None:
        """Keep a result, in place of one that is there."""
        if self.folder is None:
            self._results[_file_name(key)] = result
        else:
            write_arrays(self.folder / _file_name(key), result.header, result.arrays)

    def names(self) -> frozenset[str]:
        """The file names of all results; compare with `file_name`."""
        if self.folder is None:
            return frozenset(self._results)
        return frozenset(path.name for path in self.folder.glob(f"[!.]*{_ENDING}"))

    @property
    def scratch(self) -> Path:
        """A folder for work in progress; whatever a killed process left there is removed when the store is opened."""
        if self.folder is None:
            raise ValueError("a store in memory has no folder for work in progress; give RunOptions(resume_dir=...)")
        scratch = self.folder / SCRATCH
        scratch.mkdir(exist_ok=True)
        return scratch

    @staticmethod
    def file_name(*key: str) -> str:
        """The file name of a key: readable, and unlike that of any other key, whatever the key holds."""
        return _file_name(key)


def open_store(
    folder: PathLike | None,
    settings: Settings,
    world: World,
    *,
    growing: Sequence[str] = (),
    local: Collection[str] = (),
) -> tuple[ResultStore, frozenset[str]]:
    """Open the store of an evaluation on all ranks.

    Args:
        folder: See `ResultStore`.
        settings: See `ResultStore`; all ranks must have the same.
        world: The processes that share the evaluation.
        growing: See `ResultStore`.
        local: Names of settings that may differ between ranks, such as the times of files on their own disks.

    Returns:
        The store, and the file names of the results that the first rank found in it: all ranks have to know the same
        of what is finished, or they would wait for each other in vain.

    Raises:
        ValueError: For ranks that were called with different settings, and as `ResultStore` does.
    """
    shared = {name: value for name, value in settings.items() if name not in local}
    world.assert_same(shared | {"resume_dir": None if folder is None else str(folder)})
    store = ResultStore(folder, settings, growing=growing) if world.is_main else None
    finished = world.gather(frozenset() if store is None else store.names())[0]
    return store or ResultStore(folder, settings, growing=growing, is_main=False), finished


class EmbeddingCache:
    """A folder of embeddings that are used again only for the very encoder, images and settings they came from.

    A key is whatever decides the numbers, as texts, numbers, lists and mappings: encoder, layer, patches, their files'
    times, image size, batch size.  The file's name is the fingerprint of the key, so that another checkpoint or cohort
    finds nothing out of date.  A file is checked against its key and its checksum whenever it is read; one that fails
    is made anew, with a UserWarning.  Processes may share a folder.  Files are never removed by the cache; a folder may
    be deleted at any time.

    Attributes:
        hits: How often something was found.
        misses: How often nothing was found.

    Raises:
        ValueError: If `folder` is a file.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the cache must be a folder, and {self.folder} is a file")
        self.hits = self.misses = 0

    def get(self, key: Settings) -> StoredResult | None:
        """What was kept under a key; a damaged file is a UserWarning.

        Args:
            key: All that decides the result.

        Returns:
            The result, or None.
        """
        path = self._path(key)
        try:
            header, arrays = read_arrays(path)
            if header.pop("key", None) != json.loads(json.dumps(key)):
                raise CorruptFileError(f"{path} holds embeddings of something else than its name says")
        except FileNotFoundError:
            self.misses += 1
            return None
        except (CorruptFileError, OSError) as error:
            warnings.warn(f"{error}; embedding anew", stacklevel=3)
            self.misses += 1
            return None
        self.hits += 1
        return StoredResult(header, arrays)

    def put(self, key: Settings, result: StoredResult) -> None:
        """Keep a result under a key.  A disk that is full or may not be written is a UserWarning, not an error.

        Args:
            key: All that decides the result.
            result: What `get` shall give.
        """
        try:
            write_arrays(self._path(key), {**result.header, "key": dict(key)}, result.arrays)
        except OSError as error:
            warnings.warn(f"embeddings could not be kept in {self.folder}: {error}", stacklevel=3)

    def get_table(self, key: Settings) -> EmbeddingTable | None:
        """As `get`, for a table.

        Args:
            key: All that decides the table.

        Returns:
            The table, or None.
        """
        stored = self.get(key)
        try:
            return None if stored is None else table_of(stored)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.hits, self.misses = self.hits - 1, self.misses + 1
            self.warn(key, error)
            return None

    def warn(self, key: Settings, error: Exception) -> None:
        """Say that what is kept under a key cannot be used.

        Args:
            key: All that decides the result.
            error: Why.
        """
        message = f"{self._path(key)} cannot be used ({type(error).__name__}: {error}); embedding anew"
        warnings.warn(message, stacklevel=4)

    def put_table(self, key: Settings, table: EmbeddingTable) -> None:
        """As `put`, for a table.

        Args:
            key: All that decides the table.
            table: What `get_table` shall give.
        """
        self.put(key, result_of(table))

    def _path(self, key: Settings) -> Path:
        return self.folder / f"{fingerprint_settings(key)}{_ENDING}"


class CleanEmbeddings:
    """What the scored layer says of the clean queries, batch by batch and bit by bit as it was computed.

    Args:
        cache: Where they are kept; None for nowhere.
        key: What decides them; None where encoder or loader cannot say.
    """

    def __init__(self, cache: EmbeddingCache | None, key: Mapping[str, Any] | None) -> None:
        self._cache = cache if key is not None else None
        self._key = key or {}
        stored = None if self._cache is None else self._cache.get(self._key)
        self._digests: list[str] = []
        self._known: Arrays = {}
        if stored is not None and self._cache is not None:
            try:
                self._digests, self._known = _batches_of(stored), stored.arrays
            except (KeyError, TypeError, ValueError) as error:
                self._cache.warn(self._key, error)
        self._new: dict[int, tuple[str, np.ndarray]] = {}

    def get(self, number: int, batch: HierarchicalBatch, device: torch.device) -> Tensor | None:
        """The embeddings of a batch (n, d) on a device; None where they, or those of this very batch, are unknown."""
        if number >= len(self._digests) or self._digests[number] != fingerprint_batch(batch):
            return None
        z = self._known[f"z{number}"]
        return torch.from_numpy(z).to(device) if len(z) == len(batch) else None

    def put(self, number: int, batch: HierarchicalBatch, z: Tensor) -> None:
        """Take in embeddings that were computed."""
        if self._cache is not None and z.dtype in (torch.float32, torch.float64):
            self._new[number] = (fingerprint_batch(batch), z.detach().cpu().numpy())

    def close(self, batches: int, world: World) -> None:
        """Keep what all ranks took in, if that is all of the batches; the first rank writes it."""
        if self._cache is None:
            return
        new = world.gather_by_index(self._new)
        if not new or len(new) < batches or not world.is_main:
            return
        arrays = {f"z{number}": z for number, (_, z) in enumerate(new)}
        self._cache.put(self._key, StoredResult({"batches": [digest for digest, _ in new]}, arrays))


class SeenBatches:
    """Fingerprints of the batches of the first reading of a loader, with which later readings are compared."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}
        self._count: int | None = None

    def check(self, number: int, digest: str) -> None:
        """Raise ValueError if the batch of this number is another one than at the first reading."""
        if self._digests.setdefault(number, digest) != digest:
            raise ValueError(
                f"batch {number} of the queries is not what it was at the first reading; give a loader that gives the"
                " same batches each time: no shuffling, no augmentation"
            )

    def check_count(self, count: int) -> None:
        """Raise ValueError if the loader had another number of batches at the first reading."""
        self._count = count if self._count is None else self._count
        if count != self._count:
            raise ValueError(f"the queries had {self._count} batches at the first reading and have {count} now")


@dataclass(frozen=True)
class Session:
    """What one evaluation works with: its processes, its finished results, its cache of clean embeddings.

    Attributes:
        world: The processes that share it.
        store: Where finished batches are kept.
        finished: File names of the results that were there when the store was opened, the same on all ranks.
        cache: Clean embeddings of earlier evaluations; None for no cache.
        progress: Show progress bars.
        seen: The batches of the queries at their first reading.
    """

    world: World
    store: ResultStore
    finished: frozenset[str]
    cache: EmbeddingCache | None
    progress: bool
    seen: SeenBatches = field(default_factory=SeenBatches)

    @property
    def shows(self) -> bool:
        """Whether this process shows progress bars."""
        return self.progress and self.world.is_main


@contextmanager
def open_world(run: RunOptions) -> Iterator[tuple[World, EmbeddingCache | None]]:
    """The processes of an evaluation, and its cache."""
    with shared_world() as world:
        yield world, None if run.cache_dir is None else EmbeddingCache(run.cache_dir)


def open_session(
    run: RunOptions,
    settings: Mapping[str, Any],
    world: World,
    cache: EmbeddingCache | None,
    *,
    growing: Sequence[str] = (),
) -> Session:
    """The session of an evaluation with these settings; see `open_store` for what is refused."""
    store, finished = open_store(run.resume_dir, settings, world, growing=growing, local=("queries.files",))
    return Session(world, store, finished, cache, run.progress)


def result_of(table: EmbeddingTable) -> StoredResult:
    """A table as a result that can be stored."""
    header = {"class_names": list(table.class_names), "cohort": table.cohort, "split": table.split}
    arrays = {name: np.asarray(getattr(table, name)) for name in ("z", *IDS)}
    for name in ("norm", *GROUP_LABELS):
        if getattr(table, name) is not None:
            arrays[name] = getattr(table, name)
    return StoredResult(header | {"encoder": table.encoder}, arrays)


def table_of(stored: StoredResult) -> EmbeddingTable:
    """The table that `result_of` took in."""
    text = {name: stored.header[name] for name in ("cohort", "split", "encoder")}
    columns: dict[str, Any] = dict(stored.arrays)
    return EmbeddingTable(**columns, **text, class_names=tuple(stored.header["class_names"]))


def _batches_of(stored: StoredResult) -> list[str]:
    """The fingerprints of batches whose embeddings a result holds; ValueError unless they are finite rows."""
    digests = list(stored.header["batches"])
    for number in range(len(digests)):
        z = stored.arrays[f"z{number}"]
        if z.ndim < 1 or z.dtype not in (np.float32, np.float64) or not np.isfinite(z).all():
            raise ValueError(f"z{number} is {z.dtype} of shape {z.shape}, and finite rows were wanted")
    return digests


def _file_name(key: Sequence[str]) -> str:
    digest = hashlib.blake2b(json.dumps(list(key)).encode(), digest_size=6).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(key))[:80].lstrip(".")
    return f"{readable}-{digest}{_ENDING}"
