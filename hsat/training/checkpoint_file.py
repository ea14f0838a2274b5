"""One file of tensors and plain values: replaced in one stroke, read without running what is in it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from hsat.tensor_files import UNREADABLE, check_archive, reason_of
from hsat.untrusted import open_regular


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a file of `content`, which appears whole or not at all, also after a loss of power.

    Raises TypeError, before anything is written, naming the entry that is neither a tensor nor a plain value.
    """
    values = _plain(content, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a file that torch.save wrote, on the CPU; raises ValueError saying what the file is instead.

    The checksums in the file are compared with its contents, which torch itself does not do.
    """
    with open_regular(path, kind="checkpoint") as file:
        size = os.fstat(file.fileno()).st_size
        _refuse_text(path, size, file.read(256))
        content = _loaded(path, file, size)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and a checkpoint is a dict")
    return content


def _loaded(path: Path, file: IO[bytes], size: int) -> Any:
    try:
        check_archive(file, size)
        _compare_checksums(file)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged{_refused(error)}") from error
    except UNREADABLE as error:
        raise ValueError(f"{path} ({size} bytes) is truncated, damaged or no checkpoint: {reason_of(error)}") from error


def _compare_checksums(file: IO[bytes]) -> None:
    """Raise BadZipFile or ValueError where a file of today's format was damaged; older formats have no checksums."""
    if is_zipfile(file):
        with ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} in it is another")


def _refuse_text(path: Path, size: int, start: bytes) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path} is an HTML page and no checkpoint; the download was answered with a web page")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and no checkpoint; run `git lfs pull` beside it")


def _plain(value: Any, where: str) -> Any:
    """The value as tensors and plain python, or TypeError naming where something else was found."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"{where or 'the checkpoint'} has the key {key!r}; keys must be strings or integers")
        return {key: _plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value.copy())
    elif isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, Tensor) or type(value) in {bool, int, float, str, bytes}:
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only, so that reading it"
        " runs no code. Save what it is made of"
    )


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # not possible everywhere; the file itself is on the disk
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(error: Exception) -> str:
    """What would have run; nothing else of the file is shown."""
    match = re.search(r"GLOBAL (\w+(?:\.\w+)*)", str(error))
    return f": {match[1]}" if match else ""
