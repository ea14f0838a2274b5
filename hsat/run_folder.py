"""The folder of a run: its lock, run.json, which says how the run was made, and train.csv, the training log.

The trainer and the evaluations write these files, the report reads them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from hsat.files import PathLike, read_json_object, read_text, write_file
from hsat.untrusted import open_regular

SCHEMA = 1
"""Number of the form of run.json and train.csv; it is raised when a field changes its meaning."""
RUN_FILE = "run.json"
LOG_FILE = "train.csv"
PACKAGES = ("hsat", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "pydantic", "tifffile")
_LOCK_FILE = ".lock"
_LARGEST = 1e300  # what no chart can hold


class OccupiedFolderError(ValueError):
    """Another process writes into the folder."""


@contextmanager
def lock_folder(folder: PathLike, *, patience: float = 6.0) -> Iterator[Path]:
    """Hold a run folder, which is made if need be, so that no other process writes into it meanwhile.

    The operating system frees the lock when the process ends, however it ends.  A folder that is still empty at the end
    of the block, as after a refusal, is removed.  Under torchrun only rank 0, which writes, takes it.

    Args:
        folder: The run folder.
        patience: Seconds to wait for another process; reading processes of a killed run hold the lock for some seconds
            after it.

    Yields:
        The folder.

    Raises:
        OccupiedFolderError: If another process holds the folder all that time.
    """
    folder = Path(folder)
    path = folder / _LOCK_FILE
    lock = FileLock(path)
    while not (lock.is_locked and path.exists()):  # its last holder may have removed the file that we waited for
        lock.release()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise OccupiedFolderError(
                f"another process writes into {folder}; wait until it has ended, or choose another --out"
            ) from None
    try:
        yield folder
    finally:
        with suppress(OSError):  # nothing but results stays behind; a run that was refused leaves no folder
            path.unlink()
            lock.release()
            folder.rmdir()
        lock.release()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers, the platform, and the number of threads."""
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def write_json(path: PathLike, content: object) -> Path:
    """Write a value as JSON with sorted keys, whole or not at all; what JSON has no form for is written as text."""
    return write_file(path, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")


def write_run_file(
    folder: PathLike, settings: Mapping[str, Any], *, cohort: str, command: Sequence[str], **facts: Any
) -> dict[str, Any]:
    """Write run.json: how a run was made.

    Args:
        folder: The run folder.
        settings: The options of the run, nested as they were given.
        cohort: Fingerprint of the cohort.
        command: The words of the command line.
        **facts: Further entries.

    Returns:
        What was written: the above, with the versions of all packages and the number of the file's form.
    """
    content = {
        "schema": SCHEMA,
        "settings": dict(settings),
        "cohort": cohort,
        "versions": installed_versions(),
        "command": list(command),
        **facts,
    }
    write_json(Path(folder) / RUN_FILE, content)
    return content


def read_run_file(folder: PathLike) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        FileNotFoundError: If the folder holds none.
        ValueError: If it is damaged, or was written by a later version of hsat.
    """
    path = Path(folder) / RUN_FILE
    content = read_json_object(path)
    schema = content.get("schema", 0)  # files of the first edition state none
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{path} has form {schema!r}, and this version of hsat reads up to {SCHEMA}; update hsat")
    return content


class TrainingLog:
    """train.csv: one row per training step, each with the column `step`.

    Rows are appended; a row that a killed process left half written is dropped at the next start.
    """

    def __init__(self, folder: PathLike) -> None:
        self.path = Path(folder) / LOG_FILE
        self._columns: list[str] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that are new to the file are added to all its rows."""
        if not row.keys() <= set(self._columns):
            self._rewrite(self._rows(), list(row))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def keep_rows_before(self, step: int) -> None:
        """Drop the rows of this step and later ones, which a resumed run logs again."""
        self._rewrite([row for row in self._rows() if int(row["step"]) < step], [])

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            with io.TextIOWrapper(open_regular(self.path, kind="training log"), "utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
            return [row for row in rows if int(row["step"]) >= 0]
        except (ValueError, KeyError, csv.Error) as error:
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); move it away, and a new one is begun"
            ) from None

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self._columns = list(dict.fromkeys([*(rows[0] if rows else []), *columns]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.path, text.getvalue())


def read_training_log(path: PathLike) -> dict[str, list[float]]:
    """The columns of train.csv; a row that a running process has not finished is left out.

    Returns:
        Numbers by column, NaN for empty cells and for values above 1e300, as of a training that diverged.

    Raises:
        ValueError: If a cell is no number or the column `step` is missing; the message names file and line.
    """
    columns: dict[str, list[float]] = {}
    reader = csv.DictReader(read_text(path).splitlines())
    try:
        for row in reader:
            if None in row or None in row.values():
                continue
            for name, cell in row.items():
                columns.setdefault(name, []).append(_number(cell, path, reader.line_num))
    except csv.Error as error:
        raise ValueError(f"{os.fspath(path)}, line {reader.line_num}: {error}") from error
    if columns and "step" not in columns:
        raise ValueError(
            f"{os.fspath(path)}: no column 'step', which every training log has; there are {list(columns)}"
        )
    return columns


def _number(cell: str, path: PathLike, line: int) -> float:
    try:
        value = float(cell or "nan")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}, line {line}: {cell[:40]!r} is not a number") from error
    return value if abs(value) < _LARGEST else math.nan
