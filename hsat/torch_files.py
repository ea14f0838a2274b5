"""What is checked of a file of torch.save before torch reads it, wherever one is read."""

from __future__ import annotations

import os
from typing import IO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

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


def check_archive(file: IO[bytes], size: int) -> None:
    """Raise ValueError where reading an archive would take much more memory than the file has bytes.

    torch.save writes entries as they are; one that is compressed can be a thousand times as large as the file, and
    entries that share bytes can be as many.  The pickle in it is bounded by itself.  Files of before torch 1.6 are no
    archives: their tensors are read one after another from the file, so that its size is their bound, and that of their
    pickle times sixty.
    """
    file.seek(0)
    is_archive = file.read(2) == b"PK"
    if not is_zipfile(file):
        if is_archive:
            raise ValueError("it has no table of contents at its end")
        return
    with ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise ValueError(f"it has {len(entries)} entries; at most {MOST_ENTRIES} are read")
    for entry in entries:
        if entry.compress_type != ZIP_STORED:
            raise ValueError(f"its entry {_name(entry)} is compressed, which torch.save does not do")
        if entry.filename.endswith("data.pkl") and entry.file_size > MOST_PICKLE:
            raise ValueError(f"its data.pkl has {entry.file_size} bytes; at most {MOST_PICKLE} are read")
        if entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {_name(entry)} is stored in another length than its own")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries are longer together than the file")


def reason_of(error: BaseException) -> str:
    """Why a file cannot be read, without anything that is in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError | EOFError | ValueError | BadZipFile | MemoryError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return type(error).__name__


def _name(entry: ZipInfo) -> str:
    return repr(os.path.basename(entry.filename)[:40])
