"""Reading files of weights without running what is in them, and saying what is wrong with those that are none."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE_NAMES = ("model", "state_dict", "model_state_dict", "encoder", "network")
SAFETENSORS_KEY = "hsat"
_TORCH_STARTS = (b"PK", b"\x80")  # zip archives, and the pickles that older versions of torch wrote
_REFUSED = re.compile(r"GLOBAL (\w+(?:\.\w+)*)")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a file.

    layout: how its names were read: "hsat", "published", "published zoo", "published dual" or "backbone"; and the
    prefix that was removed from them.
    loaded: number of tensors.  dropped: entries of the file that were left out on purpose (only ever not empty for
    backbone weights).  metadata: what else the file says in plain values, such as epoch and loss.
    """

    path: str
    sha256: str
    layout: str
    loaded: int
    dropped: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Named tensors of a safetensors or torch file, on the CPU, and its plain metadata; nothing is unpickled blindly.

    A torch file is either a flat dict of tensors or holds one under "model", "state_dict" and the like.
    Raises FileNotFoundError, or ValueError naming the file and what it is: a folder, empty, an HTML page, a Git LFS
    pointer, some other text, truncated, a pickle with code in it, or one without tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of weights at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file of weights in it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    _check_is_weights(path, size, start)
    if _is_safetensors(path, start):
        return _read_safetensors(path)
    if not start.startswith(_TORCH_STARTS):
        raise ValueError(f"{path} is neither a torch nor a safetensors file: it begins with {start[:24]!r}")
    return _read_torch(path)


def _check_is_weights(path: Path, size: int, start: bytes) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); fetch it again")
    if text.startswith((b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is an HTML page, not weights: the server answered the download with a web page"
            f" (a login, a warning or an error); open it in a browser and fetch the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` beside it")


def _is_safetensors(path: Path, start: bytes) -> bool:
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            texts: dict[str, str] = file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors file: {error}; fetch it again") from error
    metadata: dict[str, Any] = {key: value for key, value in texts.items() if key != SAFETENSORS_KEY}
    if SAFETENSORS_KEY in texts:
        metadata.update(json.loads(texts[SAFETENSORS_KEY]))
    return state, metadata


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise ValueError(f"{path} is no file of weights: {error}") from error
        refused = _REFUSED.search(str(error))
        raise ValueError(
            f"{path} holds Python objects beside its tensors, which loading refuses because they can run code:"
            f" {refused[1] if refused else 'a pickle that torch.save did not write'}."
            f" Where you trust it, save its state dict alone, with torch.save, and load that"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is truncated or damaged, or no torch file: {_first_line(error)}; fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of named tensors")
    return _state_of(path, content)


def _state_of(path: Path, content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if _is_state(content):
        return dict(content), {}
    for name in STATE_NAMES:
        if name in content and _is_state(content[name]):
            metadata = {str(k): v for k, v in content.items() if k != name and _is_plain(v)}
            return dict(content[name]), metadata
    keys = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise ValueError(f"{path} holds no named tensors, neither flat nor under {', '.join(STATE_NAMES)}; it holds {keys}")


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
