"""The table of contents of a safetensors file, checked before its tensors are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from hsat.untrusted import shown, strict_json

MOST_HEADER = 16 << 20  # bytes
MOST_TENSORS = 20_000
LONGEST_NAME, MOST_PARTS = 256, 32
MOST_AXES = 16
METADATA = "__metadata__"
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip


def check_header(path: Path, file: IO[bytes], size: int) -> dict[str, str]:
    """The texts of a safetensors file's metadata, where its header agrees with the file's size.

    The tensors must follow one another from the end of the header to the end of the file, without gap or overlap, each
    as long as its shape and dtype say.  Raises ValueError naming the file, and the tensor or key that is not so.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors file: its header ends behind its end")
    if length > MOST_HEADER:
        raise ValueError(f"{path} has a header of {length} bytes; at most {MOST_HEADER} are read")
    where = f"{path} is truncated or damaged, or no safetensors file: its header"
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8") from None
    header = strict_json(text, where=where, depth=3, containers=4 * MOST_TENSORS)
    if not isinstance(header, dict):
        raise ValueError(f"{where} is no JSON object")
    texts = header.pop(METADATA, {})
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise ValueError(f"{path}: {METADATA} must hold texts")
    check_names(path, header)
    end = 0
    for name, (begin, stop) in sorted(
        ((name, _place(path, name, about)) for name, about in header.items()), key=_where
    ):
        if begin != end:
            raise ValueError(f"{path}: {name} begins at byte {begin} of the values, where {end} was due")
        end = stop
    if end != size - 8 - length:
        raise ValueError(
            f"{path} is truncated or damaged: its tensors take {end} bytes, and it has {size - 8 - length} for them"
        )
    return texts


def check_names(path: Path, names: Iterable[object]) -> None:
    """Raise ValueError for more tensors, or longer names, than any encoder has."""
    listed = list(names)
    if len(listed) > MOST_TENSORS:
        raise ValueError(f"{path} holds {len(listed)} tensors; at most {MOST_TENSORS} are read")
    for name in listed:
        if not isinstance(name, str) or len(name) > LONGEST_NAME or name.count(".") >= MOST_PARTS:
            raise ValueError(f"{path} holds a tensor called {shown(name)}; names of tensors are shorter")


def _where(item: tuple[str, tuple[int, int]]) -> tuple[int, int]:
    return item[1]


def _place(path: Path, name: str, about: Any) -> tuple[int, int]:
    """Where a tensor's values begin and end."""
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{path}: {name} has dtype {shown(dtype)}; known are {', '.join(BYTES)}")
    if not _are_counts(shape) or len(shape) > MOST_AXES:
        raise ValueError(f"{path}: {name} has shape {shown(shape)}; a list of at most {MOST_AXES} sides was wanted")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has data_offsets {shown(offsets)}; begin and end were wanted")
    wanted = math.prod(shape) * BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{path}: {name} has {offsets[1] - offsets[0]} bytes, and {dtype} of shape {tuple(shape)} takes {wanted}"
        )
    return offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
