"""Writes patch stores: whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hsat.data.cohort import Cohort
from hsat.data.patch_store import DTYPES, FORMAT, HEAD, TABLES, PatchStore
from hsat.data.readers import BadPatch, read_stored
from hsat.files import digest_file, write_file

_CHUNK = 256  # patches that are read ahead of writing


class _StoredPatch(NamedTuple):
    """One patch on its way into a store: its values, and what the tables say of it."""

    values: np.ndarray
    source: tuple[int, int]
    digests: tuple[str, str]
    bad: str | None


def write_patch_store(
    cohort: Cohort,
    folder: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    verify: bool = False,
    on_bad: Literal["raise", "record"] = "raise",
    threads: int = 1,
    wait: bool = False,
) -> PatchStore:
    """The cohort's patches stored in `folder`, which is opened and checked if it is there already.

    The folder appears under its name only when it is whole.  Until then it is called .NAME.packing; what a killed
    process left there is thrown away by the next call.  Room: two bytes per pixel and plane for "srh", one per pixel
    and channel for "rgb".

    Args:
        cohort: The cohort; its splits do not matter.
        folder: The folder of the store.
        rebuild: Replace a store that no longer fits the cohort; one that fits is kept.
        verify: As for `PatchStore.open`.
        on_bad: "record" writes the reason in place of an unreadable file; reading that patch then raises its BadPatch
            as the file would.  "raise" raises it at once.
        threads: Files read at a time.
        wait: Wait where another process is writing, and open what it made.

    Returns:
        The store, opened.

    Raises:
        FileExistsError: The folder exists and is no patch store.
        ValueError: As `PatchStore.open` where rebuild=False; threads below 1, or another on_bad.
        BadPatch: A file cannot be read.
        RuntimeError: Another process is writing there and wait=False.
    """
    if on_bad not in ("raise", "record"):
        raise ValueError(f"on_bad must be 'raise' or 'record', got {on_bad!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    folder = Path(os.path.abspath(folder))
    store = _open_if_present(cohort, folder, rebuild=rebuild, verify=verify)
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = folder.parent / f".{folder.name}.packing"
        with _lock(work, wait=wait):
            store = _open_if_present(cohort, folder, rebuild=rebuild, verify=verify)  # another process was faster
            if store is None:
                shutil.rmtree(work, ignore_errors=True)
                try:
                    _write_folder(cohort, work, record_bad=on_bad == "record", threads=threads)
                    _rename_folder(work, folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                store = PatchStore.open(folder, cohort, verify=verify)
    if on_bad == "raise":
        store.refuse_bad()
    return store


def _open_if_present(cohort: Cohort, folder: Path, *, rebuild: bool, verify: bool) -> PatchStore | None:
    """The store that is there already; None where there is none, or one that no longer fits and may be replaced."""
    if not os.path.lexists(folder):
        return None
    if not (folder / "packed.json").is_file():
        raise FileExistsError(f"{folder} exists and is no patch store; name a folder that does not exist")
    try:
        return PatchStore.open(folder, cohort, verify=verify)
    except ValueError:
        if not rebuild:
            raise
    return None


@contextmanager
def _lock(work: Path, *, wait: bool) -> Iterator[None]:
    """A lock beside the work folder; the system lets go of it when the process ends, however it ends."""
    with open(f"{work}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is packing into {work}; wait for it to end, or pass wait=True"
            ) from error
        yield  # the empty file stays: another process may wait at it, and a new one would be another lock


def _write_folder(cohort: Cohort, work: Path, *, record_bad: bool, threads: int) -> None:
    """All files of a store; packed.json comes last."""
    work.mkdir()
    paths = [record.path for record in cohort.records]
    shapes: list[tuple[int, ...]] = []
    patches: list[_StoredPatch] = []
    with open(work / "images.npy", "wb") as images, ThreadPoolExecutor(threads) as pool:
        images.write(bytes(HEAD))
        for first in range(0, len(cohort), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(cohort)))
            for patch in pool.map(lambda row: _read_source(cohort, row, record_bad=record_bad), rows):
                images.write(patch.values.data)
                shapes.append(patch.values.shape)
                patches.append(patch._replace(values=np.empty(0)))
        sizes = np.array(shapes, dtype=np.int64).prod(axis=1)
        description = {"descr": DTYPES[cohort.kind].str, "fortran_order": False, "shape": (int(sizes.sum()),)}
        images.seek(0)
        np.lib.format.write_array_header_1_0(images, description)
        if images.tell() != HEAD:
            raise RuntimeError(f"numpy wrote a header of {images.tell()} bytes where {HEAD} were expected")
        images.flush()
        os.fsync(images.fileno())
    digests = b"".join(bytes.fromhex(text) for patch in patches for text in patch.digests)
    tables = {
        "index.npy": np.column_stack([np.cumsum(sizes) - sizes, np.array(shapes, dtype=np.int64)]),
        "sources.npy": np.array([patch.source for patch in patches], dtype=np.int64),
        "checksums.npy": np.frombuffer(digests, dtype=np.uint8).reshape(-1, 2, 32),
    }
    for name in TABLES:
        np.save(work / name, tables[name], allow_pickle=False)
    header = {"format": FORMAT, "kind": cohort.kind, "paths": paths}
    bad = {path: patch.bad for path, patch in zip(paths, patches, strict=True) if patch.bad}
    checksums = {name: digest_file(work / name) for name in TABLES}
    write_file(work / "packed.json", json.dumps(header | {"bad": bad, "tables": checksums}))


def _read_source(cohort: Cohort, row: int, *, record_bad: bool) -> _StoredPatch:
    """One patch from its file; BadPatch where the file changes meanwhile, or cannot be read."""
    path, dtype = cohort.path(row), DTYPES[cohort.kind]
    before = os.stat(path)
    bad = None
    try:
        values = read_stored(path, kind=cohort.kind).astype(dtype, copy=False)
    except BadPatch as error:
        if not record_bad:
            raise
        bad, values = error.reason, np.empty((0, 0, 0), dtype)
    digest = digest_file(path)
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadPatch(path, "it changed while it was stored")
    digests = hashlib.sha256(values.data).hexdigest(), digest
    return _StoredPatch(values, (after.st_size, after.st_mtime_ns), digests, bad)


def _rename_folder(work: Path, folder: Path) -> None:
    """Give the finished work folder its name; an older store is replaced."""
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
