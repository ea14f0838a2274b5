"""Reading files of weights without running what is in them, and saying what is wrong with those that are none."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from hsat.models.file_tables import check_header, check_names
from hsat.models.metadata import parse_metadata
from hsat.torch_files import UNREADABLE, check_archive, reason_of
from hsat.untrusted import open_regular

KIND = "file of weights"
MOST_BYTES = 64 << 30
MOST_PLAIN, DEEPEST_PLAIN, LONGEST_PLAIN = 10_000, 32, 64
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


class WeightFile(NamedTuple):
    """What is in a file of weights: named tensors, and what else it says in plain values.

    own: hsat wrote it, so that its "encoder" is meant for hsat and not the settings of another program.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    own: bool


def checkpoint_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's bytes, as lower-case hex."""
    with open_regular(path, kind=KIND) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | os.PathLike[str]) -> WeightFile:
    """Named tensors of a safetensors or torch file, on the CPU, and its plain metadata; nothing is unpickled blindly.

    A torch file is either a flat dict of tensors or holds one under "model", "state_dict" and the like.  What is
    allocated is bounded by the file: its tables of contents must agree with its size, torch archives must hold their
    tensors uncompressed (as torch.save writes them), and no tensor may be larger than what is stored for it.
    Raises FileNotFoundError, or ValueError naming the file and what it is: a folder, a pipe or a device, empty, an HTML
    page, a Git LFS pointer, something else, truncated, a pickle with code in it, or one without tensors.  No error
    shows what is in a file that is none of weights.
    """
    path = Path(path)
    with open_regular(path, kind=KIND) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        _check_is_weights(path, size, start)
        if size > MOST_BYTES:
            raise ValueError(f"{path} has {size} bytes; files of weights of at most {MOST_BYTES} are read")
        file.seek(0)
        if _is_safetensors(path, start):
            return _read_safetensors(path, file, size)
        if not start.startswith(_TORCH_STARTS):
            raise ValueError(f"{path} is neither a torch nor a safetensors file; it is {_looks_like(start)}")
        return _read_torch(path, file, size)


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


def _looks_like(start: bytes) -> str:
    """What a file seems to be, by its beginning, without showing any of it."""
    if start.lstrip()[:1] in {b"{", b"["}:
        return "a JSON text, such as the answer of a server; open it and see"
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)
    return "some text; open it and see" if is_text else "some other binary file"


def _is_safetensors(path: Path, start: bytes) -> bool:
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith((b"PK", b"\x80")))


def _read_safetensors(path: Path, file: IO[bytes], size: int) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    texts = check_header(path, file, size)
    own = SAFETENSORS_KEY in texts
    metadata: dict[str, Any] = {key: value for key, value in texts.items() if key != SAFETENSORS_KEY}
    if own:
        metadata.update(parse_metadata(texts[SAFETENSORS_KEY], path))
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors file: {error}; fetch it again") from error
    return WeightFile(state, metadata, own)


def _read_torch(path: Path, file: IO[bytes], size: int) -> WeightFile:
    try:
        check_archive(file, size)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise ValueError(f"{path} is no file of weights: its pickle cannot be read") from error
        refused = _REFUSED.search(str(error))
        raise ValueError(
            f"{path} holds Python objects beside its tensors, which loading refuses because they can run code:"
            f" {refused[1] if refused else 'a pickle that torch.save did not write'}."
            f" Where you trust it, save its state dict alone, with torch.save, and load that"
        ) from error
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is truncated or damaged, or no torch file: {reason_of(error)}; fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of named tensors")
    state, metadata = _state_of(path, content)
    _check_tensors(path, state)
    return WeightFile(state, metadata, str(metadata.get("format")).startswith("hsat training"))


def _state_of(path: Path, content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if _is_state(content):
        return dict(content), {}
    for name in STATE_NAMES:
        if name in content and _is_state(content[name]):
            metadata = {str(k): v for k, v in content.items() if k != name and _is_plain(v)}
            return dict(content[name]), metadata
    keys = ", ".join(str(key)[:40] if isinstance(key, str) else type(key).__name__ for key in list(content)[:8])
    raise ValueError(
        f"{path} holds no named tensors, neither flat nor under {', '.join(STATE_NAMES)}; it holds {keys or 'nothing'}"
    )


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for names and tensors that no encoder has, and for values that the file does not hold."""
    check_names(path, state)
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: {key} is no plain tensor on the CPU (sparse, quantised or without values)")
        held = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > held:
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, and the file holds {held} bytes for it")


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _is_plain(value: object) -> bool:
    """Whether a value is made of plain ones, and small: a pickle may hold a list a million times, or in itself."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if seen > MOST_PLAIN or depth > DEEPEST_PLAIN:
            return False
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                return False
            waiting += [(each, depth + 1) for each in item.values()]
        elif isinstance(item, list | tuple):
            if len(item) > LONGEST_PLAIN:
                return False
            waiting += [(each, depth + 1) for each in item]
        elif item is not None and not isinstance(item, str | int | float | bool):
            return False
    return True
