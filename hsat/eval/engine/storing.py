"""Arrays in one file that says what they are and notices when it was damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsat.types.array_files import load_arrays

_HEAD = 1 << 24  # no first line of ours is longer


class DamagedFileError(ValueError):
    """A file that is not what `write_arrays` wrote."""


def write_arrays(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a line of JSON (about, and the SHA-256 of the rest), then the arrays in numpy's own format.

    about: texts, numbers and lists.  The file appears whole or not at all, under a temporary name of its own until
    then, so that two processes may write the same one.
    """
    body = io.BytesIO()
    np.savez(body, allow_pickle=False, **arrays)
    content = body.getvalue()
    head = json.dumps({"about": dict(about), "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True)
    write_whole(path, head.encode() + b"\n" + content)


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_arrays` wrote.  Raises DamagedFileError where a single bit differs, FileNotFoundError, OSError."""
    with path.open("rb") as file:
        line, content = file.readline(_HEAD), file.read()
    try:
        head = json.loads(line)
        about, digest = head["about"], head["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} does not begin with a description of its arrays") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DamagedFileError(f"{path} was changed or cut off: its checksum is not that of its arrays")
    try:
        return about, load_arrays(io.BytesIO(content))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DamagedFileError(f"{path} holds no arrays ({error})") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, working = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(working).chmod(0o644)  # mkstemp makes files that only their owner can read
        Path(working).replace(path)
    except BaseException:
        Path(working).unlink(missing_ok=True)
        raise
