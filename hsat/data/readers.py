"""From one file to one tensor; a file that cannot be read is a BadPatch, whatever is wrong with it."""

from __future__ import annotations

import ast
import math
import os
import re
import stat
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hsat.data.paths import check_inside
from hsat.data.srh import RAW_RANGE, srh_to_rgb

MAX_PIXELS = 4096 * 4096
"""Larger images are refused before their pixels are read: a patch is small, a decompression bomb is not."""

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_OF_SEVERAL_FILES = ("ome", "mmstack", "ndtiff")  # kinds of TIFF for which tifffile opens the files that they name
_DEFLATE = (8, 32946)
_CODECS = (1, 5, *_DEFLATE, 32773)  # none, LZW, deflate, PackBits; LZW and PackBits are bounded by imagecodecs
_OS2_HEADER = 12  # bytes of the header of the oldest BMP files
_TO_8_BITS = (
    "divide values of 16 bits by 257 (65535 becomes 255) and store them as 8 bits, as in"
    " PIL.Image.fromarray((pixels // 257).astype('uint8')).convert('RGB')"
)
_IN_MESSAGE = re.compile(
    r"cannot read patch (?P<path>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"): (?P<reason>.*)\Z", re.DOTALL
)


class BadPatch(Exception):
    """A patch that cannot be read.

    It survives pickling, and a DataLoader's worker: there torch rebuilds an exception from one string (the worker's
    traceback), from which path and reason are recovered; the traceback is kept as a note.

    Attributes:
        path: The file.
        reason: What it holds, and what it should hold.
    """

    path: str
    reason: str

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        self.path, self.reason = os.fspath(path), "" if reason is None else reason
        if reason is None and (match := _IN_MESSAGE.search(self.path.rstrip())):
            self.add_note(self.path)
            self.path, self.reason = ast.literal_eval(match["path"]), match["reason"]
        super().__init__(self.path, self.reason)

    def __str__(self) -> str:
        return f"cannot read patch {self.path!r}: {self.reason}"


def read_patch(path: str | os.PathLike[str], *, kind: Literal["srh", "rgb"]) -> Tensor:
    """One patch as (3, h, w) float32 in [0, 1].

    Args:
        path: The file.
        kind: "srh": a TIFF of two 16-bit planes, through `read_raw` and `srh_to_rgb`.  "rgb": PNG, JPEG, TIFF or BMP
            with three 8-bit channels, divided by 255, by one rule for all formats.  Transparency: a fourth, alpha
            channel is dropped when it is opaque throughout, and a transparent colour passed over when no pixel has it;
            else the file is refused.  Orientation (EXIF and TIFF tag): applied.  Colour modes (grey, palette, CMYK,
            YCbCr) and depths other than 8 bits: refused, not converted, for what their values mean is the owner's to
            say.  Several pages or frames: refused.  Colour profiles: not applied.

    Returns:
        (3, h, w) float32 in [0, 1].

    Raises:
        BadPatch: The file cannot be read as that.
        ValueError: Another kind.
    """
    return as_image(torch.from_numpy(read_stored(path, kind=kind)), kind=kind)


def probe_kind(root: Path, name: str, *, allow_links: bool = False) -> Literal["srh", "rgb"] | None:
    """What a TIFF file holds, from its header: two 16-bit planes are "srh", anything else that opens is "rgb".

    Args:
        root: A folder.
        name: The file, relative to it.
        allow_links: Look at a file outside of the root, too.

    Returns:
        The kind; None for a file that is not there, is no TIFF or lies outside of the root.
    """
    try:
        if not allow_links:
            check_inside(root, f"{root}/{name}", name)
        _check_file(root / name)
        with _open_tiff(root / name) as file:
            image = file.series[0]
            shape, values = tuple(image.shape), np.dtype(image.dtype)
    except Exception:  # the parser of a damaged file raises anything; reading the patch says what is wrong
        return None
    return "srh" if len(shape) == 3 and 2 in (shape[0], shape[2]) and values.itemsize == 2 else "rgb"


def read_stored(path: str | os.PathLike[str], *, kind: Literal["srh", "rgb"]) -> np.ndarray:
    """The integers of one patch, planes first: (2, h, w) uint16 for "srh", (3, h, w) uint8 for "rgb".

    What is accepted and raised is as for `read_patch`, which is `as_image` of this.
    """
    if kind == "srh":
        return _raw_counts(path)
    if kind != "rgb":
        raise ValueError(f"kind must be 'srh' (two-plane 16-bit TIFF) or 'rgb' (8-bit colour), got {kind!r}")
    _check_file(path)
    # Decoders raise whatever they like on hostile files (struct.error, SyntaxError, MemoryError, ...).
    try:
        pixels = _colour_pixels(path)
    except BadPatch:
        raise
    except Exception as error:
        raise BadPatch(path, _why_unreadable(path, "PNG, JPEG, TIFF or BMP", error)) from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def as_image(stored: Tensor, *, kind: Literal["srh", "rgb"]) -> Tensor:
    """The image (3, h, w), float32 in [0, 1], of the integers of a patch, on their device; see `read_patch`."""
    if kind == "srh":
        return srh_to_rgb(stored.to(torch.float32) / RAW_RANGE)
    return stored.to(torch.float32) / 255


def read_raw(path: str | os.PathLike[str]) -> Tensor:
    """The two raw channels (CH2, CH3) of an SRH patch as (2, h, w) float32 in [0, 1): counts / 65536.

    Raises BadPatch unless the file is a complete TIFF of shape (2, h, w), 16-bit unsigned, of at most MAX_PIXELS
    pixels per plane.
    """
    return torch.from_numpy(_raw_counts(path)).to(torch.float32) / RAW_RANGE


def _raw_counts(path: str | os.PathLike[str]) -> np.ndarray:
    _check_file(path)
    # As above: the parser of a damaged TIFF may raise anything.
    try:
        counts = _planes(path)
    except BadPatch:
        raise
    except Exception as error:
        raise BadPatch(path, _why_unreadable(path, "TIFF", error)) from error
    return np.ascontiguousarray(counts, dtype=np.uint16)


def _why_unreadable(path: str | os.PathLike[str], formats: str, error: Exception) -> str:
    """What a decoder says, or what downloads often leave in place of an image."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not an image; run `git lfs pull` beside it"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, not an image: the server answered the download with it; fetch the file itself"
    return f"not a readable {formats} ({type(error).__name__}: {error})"


def _check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a regular file with something in it; opening a FIFO would wait for ever."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise BadPatch(path, "there is no such file") from error
    except (OSError, ValueError) as error:
        raise BadPatch(path, f"it cannot be looked at ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise BadPatch(path, f"it is {what}, not a regular file")
    if not status.st_size:
        raise BadPatch(path, "the file is empty")


def _check_size(path: str | os.PathLike[str], height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadPatch(path, f"it declares {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise BadPatch(
            path, f"it declares {height} x {width} pixels; at most {MAX_PIXELS} are read, cut it into patches"
        )


def _open_tiff(path: str | os.PathLike[str]) -> Any:
    """The file as tifffile sees it by its own pages, in their order.

    Descriptions such as OME-XML may name other files, which tifffile would open: those are not looked at.
    """
    import tifffile

    return tifffile.TiffFile(Path(path), **{f"is_{kind}": False for kind in _OF_SEVERAL_FILES})


def _planes(path: str | os.PathLike[str]) -> np.ndarray:
    with _open_tiff(path) as file:
        if len(file.series) != 1:
            raise BadPatch(path, f"it holds {len(file.series)} images; wanted one of shape (2, h, w)")
        image = file.series[0]
        shape, dtype = tuple(image.shape), np.dtype(image.dtype)
        if len(shape) != 3 or shape[0] != 2:
            raise BadPatch(path, f"its shape is {shape}; wanted (2, h, w), planes CH2 and CH3{_hint(shape)}")
        if dtype.kind != "u" or dtype.itemsize != 2:
            raise BadPatch(path, f"its values are {dtype.name}; wanted uint16")
        _check_size(path, shape[1], shape[2])
        _check_complete(path, image)
        _check_unpacked(path, image)
        counts = np.asarray(image.asarray())
    if counts.shape != shape or counts.dtype.newbyteorder("=") != np.uint16:
        raise BadPatch(path, f"it declares {shape} uint16 and decodes to {counts.shape} {counts.dtype.name}")
    return counts


def _hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[2] == 2:
        return "; the planes come last, store np.moveaxis(image, -1, 0)"
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        return "; three channels look like kind='rgb'"
    return ""


def _check_complete(path: str | os.PathLike[str], image: Any) -> None:
    """Refuse pixels that the file does not hold; the decoder fills in zeros for strips and tiles of size or place 0."""
    size = os.stat(path).st_size
    for page in image.pages:
        if page is None or not page.databytecounts or not all(page.databytecounts) or not all(page.dataoffsets):
            raise BadPatch(path, "a part of its pixels is missing")
        end = max(offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True))
        if end > size:
            raise BadPatch(path, f"the file is truncated: it has {size} bytes and its pixels end at byte {end}")


def _check_unpacked(path: str | os.PathLike[str], image: Any) -> None:
    """Refuse strips and tiles that unpack to more than they declare: the decoder would allocate it all."""
    with open(path, "rb") as file:
        for page in image.pages:
            codec, most = int(page.compression), 2 * math.prod(page.chunks)
            if codec not in _CODECS:
                name = str(getattr(page.compression, "name", codec))
                raise BadPatch(path, f"its compression is {name}; wanted none or deflate, as tifffile's 'zlib'")
            if most > 4 * MAX_PIXELS or len(page.databytecounts) > math.prod(page.chunked):
                raise BadPatch(path, "its strips or tiles are more, or larger, than its pixels need")
            if codec not in _DEFLATE:
                continue
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                file.seek(offset)
                if len(zlib.decompressobj().decompress(file.read(count), most + 1)) > most:
                    raise BadPatch(
                        path, f"a strip or tile of {count} bytes unpacks to more than the {most} it declares"
                    )


def _colour_pixels(path: str | os.PathLike[str]) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as image:
        _check_size(path, image.height, image.width)
        if _has_second(image):
            raise BadPatch(path, "it holds several images; wanted one")
        _check_colour(path, image)
        transparent = image.info.get("transparency")
        ImageOps.exif_transpose(image, in_place=True)  # Pillow has done so for TIFF only, and removed the tag
        pixels = np.array(image)
    if transparent is not None and pixels.shape[2] == 3 and (pixels == np.array(transparent)).all(2).any():
        raise BadPatch(path, f"its colour {transparent} is transparent; flatten it onto a background first")
    if pixels.shape[2] == 4:
        if pixels[..., 3].min() != 255:
            raise BadPatch(path, "its alpha channel is not opaque; flatten it onto a background first")
        pixels = np.ascontiguousarray(pixels[..., :3])
    return pixels


def _has_second(image: Any) -> bool:
    """Whether there is another frame; to count all takes seconds where a file has thousands."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _check_colour(path: str | os.PathLike[str], image: Any) -> None:
    if image.mode not in ("RGB", "RGBA"):
        if image.mode.startswith(("I", "F")):
            cure = f", and image.convert('RGB') would make most of its values white: {_TO_8_BITS}"
        else:
            cure = ", so store image.convert('RGB') if that is right"
        raise BadPatch(path, f"its mode is {image.mode}; wanted three 8-bit channels{cure}")
    bits = {8}
    if image.format == "PNG":
        # Pillow reads 16-bit colour PNGs as 8-bit ones without a word; the depth stands in byte 24 of the header.
        with open(path, "rb") as file:
            bits = {file.read(25)[24]}
    elif image.format == "TIFF":
        bits = set(image.tag_v2.get(258, (1,)))
    elif image.format == "BMP":
        # Pillow widens 15 and 16 bits a pixel to 24 without a word; the place of the depth stands in the header's size.
        with open(path, "rb") as file:
            header = file.read(30)
        depth = int.from_bytes(header[24:26] if header[14] == _OS2_HEADER else header[28:30], "little")
        bits = {8} if depth in (24, 32) else {depth // 3}
    if bits != {8}:
        raise BadPatch(path, f"its channels have {sorted(bits)} bits; wanted 8: {_TO_8_BITS}")
