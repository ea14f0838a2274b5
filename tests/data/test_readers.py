from __future__ import annotations

import os
import pickle
import struct
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch.utils.data import DataLoader, Dataset

from hsat.data import BadPatch, read_patch, srh_to_rgb
from hsat.data import readers as readers_module
from hsat.data.readers import read_raw

COUNTS = np.random.default_rng(0).integers(0, 65536, (2, 20, 12), dtype=np.uint16)
COLOURS = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)


@pytest.fixture
def tiff(tmp_path: Path) -> Path:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS)
    return path


def refused(path: Path, kind: str = "srh") -> BadPatch:
    with pytest.raises(BadPatch) as caught:
        read_patch(path, kind=kind)  # type: ignore[arg-type]
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"metadata": None},
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"imagej": True},
        {"rowsperstrip": 8},
        {"tile": (16, 16)},
    ],
    ids=str,
)
def test_every_way_of_writing_the_same_counts_is_read(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS, **options)
    raw = read_raw(path)
    assert raw.dtype == torch.float32
    assert raw.tolist() == (COUNTS / 65536).tolist()
    assert torch.equal(read_patch(path, kind="srh"), srh_to_rgb(raw))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_colours_are_divided_by_255(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patch.{suffix}"
    Image.fromarray(COLOURS).save(path)
    x = read_patch(path, kind="rgb")
    assert x.shape == (3, 9, 7) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(COLOURS).permute(2, 0, 1).float() / 255)


def test_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "patch.jpg"
    Image.fromarray(np.full((9, 7, 3), 120, np.uint8)).save(path, quality=95)
    assert (read_patch(path, kind="rgb") * 255 - 120).abs().max() <= 1


def test_opaque_alpha_is_dropped_and_other_alpha_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    alpha = np.full((9, 7, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(path)
    assert torch.equal(read_patch(path, kind="rgb") * 255, torch.from_numpy(COLOURS).permute(2, 0, 1).float())
    alpha[4, 4] = 254
    Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(path)
    assert "alpha channel is not opaque" in refused(path, "rgb").reason


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied_in_every_format(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"patch.{suffix}"
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:8] = 200  # the upper half
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    turned = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[orientation]
    expected = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
    found = read_patch(path, kind="rgb") * 255
    assert found.shape == expected.shape and (found - expected).abs().max() < 12  # JPEG is not exact


def test_a_transparent_colour_is_refused_where_a_pixel_has_it(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    Image.fromarray(COLOURS).save(path, transparency=tuple(map(int, COLOURS[0, 0])))
    assert "is transparent; flatten it" in refused(path, "rgb").reason
    unused = next(c for c in range(256) if not (COLOURS == c).all(2).any())
    Image.fromarray(COLOURS).save(path, transparency=(unused,) * 3)
    assert torch.equal(read_patch(path, kind="rgb") * 255, torch.from_numpy(COLOURS).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", "L"), ("jpg", "CMYK"), ("tif", "L"), ("tif", "CMYK"), ("tif", "P"), ("bmp", "L"), ("bmp", "P")],
)
def test_colour_modes_are_refused_in_every_format(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"patch.{suffix}"
    Image.fromarray(COLOURS).convert(mode).save(path)
    assert f"mode is {mode}" in refused(path, "rgb").reason


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_alpha_follows_one_rule_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patch.{suffix}"
    for least in (255, 254):
        alpha = np.full((*COLOURS.shape[:2], 1), 255, np.uint8)
        alpha[0, 0] = least
        Image.fromarray(np.concatenate([COLOURS, alpha], 2)).save(path)
        if least == 255:
            assert read_patch(path, kind="rgb").shape[0] == 3
        else:
            assert "alpha channel is not opaque" in refused(path, "rgb").reason


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_several_frames_are_refused_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patch.{suffix}"
    Image.fromarray(COLOURS).save(path, save_all=True, append_images=[Image.fromarray(COLOURS[::-1])])
    assert "it holds several images; wanted one" in refused(path, "rgb").reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("kind", ["rgb", "srh"])
def test_pointers_and_web_pages_are_named(tmp_path: Path, content: bytes, words: str, kind: str) -> None:
    path = tmp_path / "patch.png"
    path.write_bytes(content)
    assert words in refused(path, kind).reason


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "I;16"])
def test_other_colour_modes_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "patch.png"
    image = Image.fromarray(COUNTS[0]) if mode == "I;16" else Image.fromarray(COLOURS).convert(mode)
    image.save(path)
    reason = refused(path, "rgb").reason
    assert f"mode is {mode}" in reason and "convert('RGB')" in reason


def _png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_refused_and_not_silently_reduced(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    path.write_bytes(_png(4, 3, 16, (b"\0" + bytes(24)) * 3))
    reason = refused(path, "rgb").reason
    assert reason.startswith("its channels have [16] bits; wanted 8: divide values of 16 bits by 257")


@pytest.mark.parametrize("depth", [16, 24, 32])
def test_a_bmp_of_fewer_bits_is_refused_and_not_silently_widened(tmp_path: Path, depth: int) -> None:
    pixels = np.arange(4 * 4 * depth // 8, dtype=np.uint8).tobytes()  # 4 x 4, no padding
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, depth, 0, len(pixels), 2835, 2835, 0, 0)
    start = struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54)
    (tmp_path / "1.bmp").write_bytes(start + header + pixels)
    if depth == 16:
        assert "its channels have [5] bits; wanted 8" in refused(tmp_path / "1.bmp", "rgb").reason
    else:
        blue_first = np.frombuffer(pixels, np.uint8).reshape(4, 4, -1)[::-1, :, 2::-1].transpose(2, 0, 1)
        assert np.array_equal(read_patch(tmp_path / "1.bmp", kind="rgb") * 255, blue_first.astype(np.float32))


def test_the_hint_for_16_bit_grey_keeps_its_values(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    pixels = np.array([[0, 257, 25700], [32896, 60000, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(path)
    reason = refused(path, "rgb").reason
    assert "would make most of its values white" in reason
    code = reason.partition(", as in PIL.")[2]
    eval(code, {"Image": Image, "pixels": pixels}).save(path)
    kept = (read_patch(path, kind="rgb") * 255).round().int()
    assert kept[0].tolist() == [[0, 1, 100], [128, 233, 255]]


@pytest.mark.parametrize("side", [5000, 20000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(side, side, 8, b""))
    refused(path, "rgb")


def test_a_tiff_that_declares_too_many_pixels_is_refused(tiff: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_module, "MAX_PIXELS", 239)
    assert refused(tiff).reason == "it declares 20 x 12 pixels; at most 239 are read, cut it into patches"


def test_a_tiff_whose_header_was_inflated_is_refused(tiff: Path) -> None:
    with tifffile.TiffFile(tiff) as file:
        places = [(page.tags[tag].valueoffset, 30000) for page in file.pages for tag in (256, 257)]
    content = bytearray(tiff.read_bytes())
    for at, value in places:
        content[at : at + 4] = struct.pack("<I", value)
    tiff.write_bytes(content)
    refused(tiff)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (
            np.moveaxis(COUNTS, 0, -1),
            r"shape is (20, 12, 2); wanted (2, h, w), planes CH2 and CH3; the planes come last",
        ),
        (COUNTS[0], "shape is (20, 12)"),
        (np.concatenate([COUNTS, COUNTS]), "shape is (4, 20, 12)"),
        (COUNTS.astype(np.uint8), "values are uint8; wanted uint16"),
        (COUNTS.astype(np.int16), "values are int16; wanted uint16"),
        (COUNTS.astype(np.float32), "values are float32; wanted uint16"),
    ],
    ids=["last", "one", "four", "uint8", "int16", "float32"],
)
def test_wrong_tiffs_say_what_was_found(tmp_path: Path, array: np.ndarray, found: str) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, np.ascontiguousarray(array), photometric="minisblack")
    assert found in refused(path).reason


def test_a_colour_tiff_read_as_srh_hints_at_the_kind(tmp_path: Path) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COLOURS, photometric="rgb")
    assert "kind='rgb'" in refused(path).reason


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(COUNTS)
        writer.write(COUNTS[:, :5])
    assert "holds 2 images" in refused(path).reason
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert "holds several images" in refused(path, "rgb").reason


def test_a_tiff_of_many_pages_is_refused_without_counting_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "patch.tif"
    frames = [Image.fromarray(COLOURS)] * 3
    frames[0].save(path, save_all=True, append_images=frames[1:])
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda image: pytest.fail("the frames were counted")))
    assert "holds several images" in refused(path, "rgb").reason


OME = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:a">
<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="12" SizeY="20" SizeC="2" SizeZ="1"
 SizeT="1" BigEndian="false"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>
<Channel ID="Channel:0:1" SamplesPerPixel="1"/>
<TiffData IFD="0" FirstC="0" PlaneCount="1"><UUID FileName="patch.tif">urn:uuid:a</UUID></TiffData>
<TiffData IFD="0" FirstC="1" PlaneCount="1"><UUID FileName="{}">urn:uuid:b</UUID></TiffData></Pixels></Image></OME>"""


@pytest.mark.parametrize("where", ["../secret.tif", "absolute", "pipe"])
def test_a_tiff_never_opens_the_files_that_it_names(tmp_path: Path, where: str) -> None:
    secret, path = tmp_path / "secret.tif", tmp_path / "cohort" / "patch.tif"
    path.parent.mkdir()
    os.mkfifo(path.parent / "pipe")
    tifffile.imwrite(secret, COUNTS[1], metadata=None)
    named = str(secret) if where == "absolute" else where
    tifffile.imwrite(path, COUNTS[0], description=OME.format(named), metadata=None)
    assert "its shape is (20, 12); wanted (2, h, w)" in refused(path).reason
    assert readers_module.probe_kind(path.parent, path.name) == "rgb"


def test_the_planes_of_an_ome_tiff_are_read_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "patch.ome.tif"
    tifffile.imwrite(path, COUNTS, ome=True, metadata={"axes": "CYX"})
    assert read_raw(path).tolist() == (COUNTS / 65536).tolist()


@pytest.mark.parametrize("codec", [8, 32946])
def test_a_strip_that_unpacks_to_more_than_it_declares_is_refused(tmp_path: Path, codec: int) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS, compression="zlib")
    with tifffile.TiffFile(path) as file:
        page = file.pages[1]
        places = [page.tags[tag].valueoffset for tag in (273, 279)]
        kinds = [int(page.tags[tag].dtype) for tag in (273, 279)]
        codecs = [each.tags[259].valueoffset for each in file.pages]
    content = bytearray(path.read_bytes())
    bomb = zlib.compress(bytes(1 << 22))
    for at, value, kind in zip(places, (len(content), len(bomb)), kinds, strict=True):
        content[at : at + 4] = struct.pack("<I" if kind == 4 else "<HH", *((value,) if kind == 4 else (value, 0)))
    for at in codecs:
        content[at : at + 2] = struct.pack("<H", codec)
    path.write_bytes(content + bomb)
    assert refused(path).reason.startswith(f"a strip or tile of {len(bomb)} bytes unpacks to more than the 480")


def test_codecs_that_nothing_bounds_and_oversized_tiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS, compression="lzma")
    assert refused(path).reason == "its compression is LZMA; wanted none or deflate, as tifffile's 'zlib'"
    tifffile.imwrite(path, COUNTS, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as file:
        tags = [each.tags[tag] for each in file.pages for tag in (322, 323)]
    content = bytearray(path.read_bytes())
    for tag in tags:
        content[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 65520)
    path.write_bytes(content)
    assert "strips or tiles are more, or larger" in refused(path).reason


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"metadata": None}, {"tile": (16, 16)}], ids=str)
def test_a_truncated_tiff_is_refused_or_complete_never_filled_in(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS, **options)
    content = path.read_bytes()
    bad = 0
    for end in range(1, len(content), 29):
        path.write_bytes(content[:end])
        try:
            assert torch.equal(read_raw(path), torch.from_numpy(COUNTS.astype(np.float32)) / 65536), end
        except BadPatch:
            bad += 1
    assert bad > 0.8 * len(range(1, len(content), 29))


@pytest.mark.parametrize(("options", "tags"), [({"rowsperstrip": 8}, (273, 279)), ({"tile": (16, 16)}, (324, 325))])
@pytest.mark.parametrize("which", [0, 1], ids=["place", "size"])
def test_pixels_left_out_of_a_tiff_are_refused(
    tmp_path: Path, options: dict, tags: tuple[int, int], which: int
) -> None:
    path = tmp_path / "patch.tif"
    tifffile.imwrite(path, COUNTS, **options)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags[tags[which]]
        at, width = tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]
    content = bytearray(path.read_bytes())
    content[at : at + width] = bytes(width)
    path.write_bytes(content)
    assert refused(path).reason == "a part of its pixels is missing"


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"patch.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        refused(path, "rgb")


@pytest.mark.parametrize("kind", ["srh", "rgb"])
@pytest.mark.parametrize("content", [b"<html>404 not found</html>", b"I", b"II*\0" + bytes(40), b"\x89PNG\r\n\x1a\n"])
def test_what_is_not_an_image_is_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "patch.tif"
    path.write_bytes(content)
    refused(path, kind)


@pytest.mark.parametrize("kind", ["srh", "rgb"])
def test_missing_empty_folder_and_pipe(tmp_path: Path, kind: str) -> None:
    assert refused(tmp_path / "none.tif", kind).reason == "there is no such file"
    (tmp_path / "empty.tif").touch()
    assert refused(tmp_path / "empty.tif", kind).reason == "the file is empty"
    (tmp_path / "folder.tif").mkdir()
    assert "a folder" in refused(tmp_path / "folder.tif", kind).reason
    os.mkfifo(tmp_path / "pipe.tif")
    assert "a pipe" in refused(tmp_path / "pipe.tif", kind).reason
    (tmp_path / "circle.tif").symlink_to(tmp_path / "circle.tif")
    assert "cannot be looked at" in refused(tmp_path / "circle.tif", kind).reason


def test_random_damage_never_raises_anything_but_bad_patch(tiff: Path) -> None:
    content, rng = tiff.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for at in rng.integers(0, 300, 3):
            damaged[at] = rng.integers(0, 256)
        tiff.write_bytes(damaged)
        try:
            assert read_raw(tiff).shape[0] == 2
        except BadPatch:
            pass


def test_another_kind_is_refused(tiff: Path) -> None:
    with pytest.raises(ValueError, match=r"kind must be 'srh' .* or 'rgb' .*, got 'grey'"):
        read_patch(tiff, kind="grey")  # type: ignore[arg-type]


def test_bad_patch_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadPatch("a/b.tif", "why")))
    assert (error.path, error.reason, str(error)) == ("a/b.tif", "why", "cannot read patch 'a/b.tif': why")


class _OneBadPatch(Dataset):
    def __init__(self, path: str) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_patch(self.path, kind="srh")


@pytest.mark.parametrize(
    "name", ["it's bad.tif", 'a "quote".tif', 'it\'s "both".tif', "back\\slash.tif", "line\nend.tif"]
)
def test_bad_patch_crosses_a_worker_with_its_path_and_reason(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    batches = iter(DataLoader(_OneBadPatch(path), num_workers=1))
    with pytest.raises(BadPatch) as caught:
        next(batches)
    assert list(batches) == []  # the end of the loader ends its worker, for which a garbage collector waits seconds
    assert (caught.value.path, caught.value.reason) == (path, "there is no such file")
    assert "Traceback" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["it's.tif", 'a "quote".tif', 'it\'s "both".tif', "back\\slash.tif", "line\nend.tif"])
@pytest.mark.parametrize("reason", ["why", "says 'cannot read patch': no", "two\nlines"])
def test_path_and_reason_are_recovered_from_a_workers_text(name: str, reason: str) -> None:
    """A DataLoader hands over the traceback as text and makes an exception of the same class from it."""
    try:
        raise BadPatch(name, reason) from ValueError("earlier")
    except BadPatch:
        text = f"Caught BadPatch in DataLoader worker process 0.\nOriginal {traceback.format_exc()}"
    error = BadPatch(text)
    assert (error.path, error.reason) == (name, reason)
    assert "Traceback" in error.__notes__[0]
