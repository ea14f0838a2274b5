"""What is checked of a file of tensors (torch.save or safetensors) before its values are read, wherever one is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

from hsat.tensor_pickles import check_legacy, check_pickle
from hsat.untrusted import shown, strict_json

MOST_ENTRIES = 200_000
MOST_PICKLE = 16 << 20  # bytes of data.pkl: names and plain values, each of which takes some 60 bytes when it is read

UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    BadZipFile,
    MemoryError,
    NotImplementedError,
)
MOST_HEADER = 16 << 20  # bytes
MOST_TENSORS = 20_000
LONGEST_NAME, MOST_PARTS = 256, 32
MOST_AXES = 16
METADATA = "__metadata__"
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
_REFUSED = re.compile(r"GLOBAL (\w+(?:\.\w+)*)")


def refuse_text(path: Path, size: int, start: bytes, *, kind: str) -> None:
    """Raise ValueError for what downloads often leave in place of a file: nothing, a web page, a Git LFS pointer.

    Args:
        path: The file, for the message.
        size: Its length in bytes.
        start: Its first bytes.
        kind: What it should be, for the message ("checkpoint").
    """
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); fetch it again")
    if text.startswith((b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is an HTML page, not a {kind}: the server answered the download with a web page"
            f" (a login, a warning or an error); open it in a browser and fetch the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer of {size} bytes, not a {kind}; run `git lfs pull` beside it")


def refused_object(error: Exception) -> str | None:
    """The name of the object for which torch refused a pickle, where it says so; nothing else of the file is shown."""
    match = _REFUSED.search(str(error))
    return match[1] if match else None


def check_archive(file: IO[bytes], size: int) -> None:
    """Raise ValueError where reading an archive would take much more memory than the file has bytes.

    torch.save writes entries as they are; one that is compressed can be a thousand times as large as the file, and
    entries that share bytes can be as many.  Its pickle may call what state dicts need, see `hsat.tensor_pickles`; else
    pickle.UnpicklingError names the object.  Files of before torch 1.6 are no archives: their pickles are checked
    likewise, and what they say of their tensors against the size of the file, from which these are read.
    """
    file.seek(0)
    start = file.read(2)
    if not is_zipfile(file):
        if start == b"PK":
            raise ValueError("it has no table of contents at its end")
        if not start.startswith(b"\x80"):
            raise ValueError("it is neither an archive nor a pickle")
        file.seek(0)
        check_legacy(file, size=size, most=MOST_PICKLE)
        return
    with ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise ValueError(f"it has {len(entries)} entries; at most {MOST_ENTRIES} are read")
    for entry in entries:
        if entry.compress_type != ZIP_STORED:
            raise ValueError(f"its entry {_entry_name(entry)} is compressed, which torch.save does not do")
        if _is_pickle(entry) and entry.file_size > MOST_PICKLE:
            raise ValueError(f"its data.pkl has {entry.file_size} bytes; at most {MOST_PICKLE} are read")
        if entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {_entry_name(entry)} is stored in another length than its own")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries are longer together than the file")
    if min((entry.header_offset for entry in entries), default=0) > 0:  # torch and zipfile then read different entries
        raise ValueError("something stands before its first entry")
    with ZipFile(file) as archive:
        for entry in filter(_is_pickle, entries):
            try:
                content = archive.read(entry)
            except BadZipFile as error:
                raise ValueError(f"the checksum of {_entry_name(entry)} in it is another") from error
            check_pickle(BytesIO(content), most=MOST_PICKLE)


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, without anything that is in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError | EOFError | ValueError | BadZipFile | MemoryError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return type(error).__name__


def check_safetensors_header(path: Path, file: IO[bytes], size: int) -> dict[str, str]:
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
    check_tensor_names(path, header)
    spans = [(name, _tensor_span(path, name, entry)) for name, entry in header.items()]
    end = 0
    for name, (begin, stop) in sorted(spans, key=lambda item: item[1]):
        if begin != end:
            raise ValueError(f"{path}: {name} begins at byte {begin} of the values, where {end} was due")
        end = stop
    if end != size - 8 - length:
        raise ValueError(
            f"{path} is truncated or damaged: its tensors take {end} bytes, and it has {size - 8 - length} for them"
        )
    return texts


def check_tensor_names(path: Path, names: Iterable[object]) -> None:
    """Raise ValueError for more tensors, or longer names, than any encoder has."""
    listed = list(names)
    if len(listed) > MOST_TENSORS:
        raise ValueError(f"{path} holds {len(listed)} tensors; at most {MOST_TENSORS} are read")
    for name in listed:
        if not isinstance(name, str) or len(name) > LONGEST_NAME or name.count(".") >= MOST_PARTS:
            raise ValueError(f"{path} holds a tensor called {shown(name)}; names of tensors are shorter")


def _tensor_span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's values begin and end."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{path}: {name} has dtype {shown(dtype)}; known are {', '.join(BYTES)}")
    if not _are_counts(shape) or len(shape) > MOST_AXES:
        raise ValueError(f"{path}: {name} has shape {shown(shape)}; a list of at most {MOST_AXES} sides was wanted")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has data_offsets {shown(offsets)}; begin and end were wanted")
    size = math.prod(shape) * BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{path}: {name} has {offsets[1] - offsets[0]} bytes, and {dtype} of shape {tuple(shape)} takes {size}"
        )
    return offsets[0], offsets[1]


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _is_pickle(entry: ZipInfo) -> bool:
    return entry.filename.lower().endswith("data.pkl")  # torch finds entries in capitals, too


def _entry_name(entry: ZipInfo) -> str:
    return repr(os.path.basename(entry.filename)[:40])
