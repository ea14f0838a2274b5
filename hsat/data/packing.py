"""Packing a cohort: one pass over its files, in chunks, that a killed process loses at most one of."""

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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hsat.data.packed import DTYPES, FORMAT, HEAD, TABLES, PackedPatches, file_digest
from hsat.data.readers import BadPatch, read_stored

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort


class _Patch(NamedTuple):
    """One packed patch: its values, and what the tables say of it."""

    values: np.ndarray
    source: tuple[int, int]
    digests: tuple[str, str]
    bad: str | None


def pack_cohort(
    cohort: Cohort,
    folder: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    verify: bool = False,
    on_bad: Literal["raise", "record"] = "raise",
    chunk: int = 256,
    threads: int = 1,
    wait: bool = False,
) -> PackedPatches:
    """The cohort's patches packed into `folder`, which is opened and checked if it is there already.

    The folder appears under its name only when it is whole.  Until then the chunks that are done (of `chunk` patches)
    lie beside it in .NAME.packing with a journal; a later call, also after kill -9, goes on from there, if the list
    of files and those packed so far are unchanged, and starts again otherwise.  threads: files read at a time.
    Room: two bytes per pixel and plane for "srh", one per pixel and channel for "rgb".

    rebuild=True replaces a packed folder that no longer fits the cohort; one that fits is kept.  verify: as for
    `PackedPatches.open`.  on_bad="record" writes the reason in place of an unreadable file; reading that patch then
    raises its BadPatch as the file would.  on_bad="raise" raises it at once, and what is done stays for the next call.
    wait=True waits where another process is packing, and opens what it made.

    Raises FileExistsError for a folder that is no packed cohort, ValueError as `PackedPatches.open` where
    rebuild=False, for chunk or threads below 1 or another on_bad, RuntimeError where another process is packing there
    and wait=False.
    """
    if on_bad not in ("raise", "record"):
        raise ValueError(f"on_bad must be 'raise' or 'record', got {on_bad!r}")
    if min(chunk, threads) < 1:
        raise ValueError(f"chunk and threads must be at least 1, got {chunk} and {threads}")
    folder = Path(os.path.abspath(folder))
    packed = _opened(cohort, folder, rebuild=rebuild, verify=verify)
    if packed is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = folder.parent / f".{folder.name}.packing"
        with _alone(work, wait=wait):
            packed = _opened(cohort, folder, rebuild=rebuild, verify=verify)  # another process may have been faster
            if packed is None:
                _Packing(cohort, work, on_bad).run(chunk, threads)
                _put(work, folder)
                packed = PackedPatches.open(folder, cohort, verify=verify)
    if on_bad == "raise":
        packed.refuse_bad()
    return packed


def _opened(cohort: Cohort, folder: Path, *, rebuild: bool, verify: bool) -> PackedPatches | None:
    """What is there already; None where nothing is, or what no longer fits and may be replaced."""
    if not os.path.lexists(folder):
        return None
    if not (folder / "packed.json").is_file():
        raise FileExistsError(f"{folder} exists and is no packed cohort; name a folder that does not exist")
    try:
        return PackedPatches.open(folder, cohort, verify=verify)
    except ValueError:
        if not rebuild:
            raise
    return None


@contextmanager
def _alone(work: Path, *, wait: bool) -> Iterator[None]:
    """A lock beside the work folder; the system lets go of it when the process ends, however it ends."""
    with open(f"{work}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is packing into {work}; wait for it to end") from error
        yield  # the empty file stays: another process may wait at it, and a new one would be another lock


class _Packing:
    """The work folder: images.npy as it grows, and journal.jsonl with a line of table rows per chunk."""

    def __init__(self, cohort: Cohort, work: Path, on_bad: str) -> None:
        self.cohort, self.work, self.on_bad = cohort, work, on_bad
        self.paths = [record.path for record in cohort.records]
        self.rows: list[dict[str, Any]] = []
        self.head = {"format": FORMAT, "kind": cohort.kind, "paths": self.paths}

    def run(self, chunk: int, threads: int) -> None:
        """Pack what is not packed yet, then write the tables."""
        self._resume()
        with (
            open(self.work / "images.npy", "r+b") as images,
            open(self.work / "journal.jsonl", "a") as journal,
            ThreadPoolExecutor(threads) as pool,
        ):
            images.seek(HEAD + self._elements() * DTYPES[self.cohort.kind].itemsize)
            images.truncate()
            for first in range(len(self.rows), len(self.paths), chunk):
                done = []
                for patch in pool.map(self._read, range(first, min(first + chunk, len(self.paths)))):
                    images.write(patch.values.data)
                    shape = patch.values.shape
                    done.append({"shape": shape, "source": patch.source, "digests": patch.digests, "bad": patch.bad})
                _flush(images)
                journal.write(json.dumps(done) + "\n")
                _flush(journal)
                self.rows += done
        self._finish()

    def _elements(self) -> int:
        return sum(int(np.prod(row["shape"])) for row in self.rows)

    def _read(self, row: int) -> _Patch:
        path = self.cohort.path(row)
        before = os.stat(path)
        bad = None
        try:
            values = read_stored(path, kind=self.cohort.kind).astype(DTYPES[self.cohort.kind], copy=False)
        except BadPatch as error:
            if self.on_bad == "raise":
                raise
            bad, values = error.reason, np.empty((0, 0, 0), DTYPES[self.cohort.kind])
        digest = file_digest(path)
        after = os.stat(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise BadPatch(path, "it changed while it was packed")
        digests = hashlib.sha256(values.data).hexdigest(), digest.hex()
        return _Patch(values, (after.st_size, after.st_mtime_ns), digests, bad)

    def _resume(self) -> None:
        """Take over the chunks of an earlier call; anything that does not fit is thrown away."""
        plan = self.work / "plan.json"
        try:
            known = plan.is_file() and json.loads(plan.read_text("utf-8")) == self.head and self._take_over()
        except (ValueError, KeyError, TypeError, FileNotFoundError):  # damaged
            known = False
        if not known:
            self.rows = []
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            (self.work / "images.npy").write_bytes(bytes(HEAD))
            (self.work / "journal.jsonl").touch()
            _write(plan, json.dumps(self.head))

    def _take_over(self) -> bool:
        journal = self.work / "journal.jsonl"
        whole, _, torn = journal.read_text("utf-8").rpartition("\n")
        self.rows = [row for line in whole.splitlines() for row in json.loads(line)]
        if torn:
            _write(journal, whole + "\n" if whole else "")
        needed = HEAD + self._elements() * DTYPES[self.cohort.kind].itemsize
        if os.path.getsize(self.work / "images.npy") < needed:
            return False
        for row, known in enumerate(self.rows):
            found = os.stat(self.cohort.path(row))
            if [found.st_size, found.st_mtime_ns] != known["source"] or (known["bad"] and self.on_bad == "raise"):
                return False
        return True

    def _finish(self) -> None:
        """The tables, the header of images.npy and, last, packed.json."""
        shapes = np.array([row["shape"] for row in self.rows], dtype=np.int64)
        ends = np.cumsum(shapes.prod(axis=1))
        digests = b"".join(bytes.fromhex(text) for row in self.rows for text in row["digests"])
        tables = {
            "index.npy": np.column_stack([ends - shapes.prod(axis=1), shapes]),
            "sources.npy": np.array([row["source"] for row in self.rows], dtype=np.int64),
            "checksums.npy": np.frombuffer(digests, dtype=np.uint8).reshape(-1, 2, 32),
        }
        for name in TABLES:
            np.save(self.work / name, tables[name], allow_pickle=False)
        with open(self.work / "images.npy", "r+b") as images:
            description = {"descr": DTYPES[self.cohort.kind].str, "fortran_order": False, "shape": (int(ends[-1]),)}
            np.lib.format.write_array_header_1_0(images, description)
            if images.tell() != HEAD:
                raise RuntimeError(f"numpy wrote a header of {images.tell()} bytes where {HEAD} were expected")
            _flush(images)
        bad = {path: row["bad"] for path, row in zip(self.paths, self.rows, strict=True) if row["bad"]}
        tables_digests = {name: file_digest(self.work / name).hex() for name in TABLES}
        _write(self.work / "packed.json", json.dumps(self.head | {"bad": bad, "tables": tables_digests}))


def _put(work: Path, folder: Path) -> None:
    """The finished work folder under its name; an older packed folder is replaced."""
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    for name in ("journal.jsonl", "plan.json"):
        (folder / name).unlink()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """A file that appears whole."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        _flush(file)
    partial.rename(path)
