"""Tables from HDF5 files: what users have, and what a file may not make a reader do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from hsat.types import EmbeddingTable

h5py = pytest.importorskip("h5py")

Z = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
LABELS, PATIENTS, SLIDES = ["b", "a", "b", "a"], ["004", "004", "011", "015"], ["x", "y", "z", "w"]


def write(path: Path, **datasets) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name.replace("__", "/"), data=values)
    return path


def whole(path: Path, **more) -> Path:
    return write(path, **{"features": Z, "labels": LABELS, "patient": PATIENTS, "slide": SLIDES} | more)


def read(path, **options):
    return EmbeddingTable.from_h5(path, **{"patients": "patient", "slides": "slide"} | options)


def assert_same(one, other):
    for name in ("z", "label", "patch", "slide", "patient", "norm"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.class_names == other.class_names and one.cohort == other.cohort


WANTED = EmbeddingTable.from_arrays(Z, LABELS, PATIENTS, SLIDES)


@pytest.mark.parametrize("kind", ["vlen", "fixed", "bytes"])
def test_one_file_of_everything(tmp_path, kind):
    texts = {"labels": LABELS, "patient": PATIENTS, "slide": SLIDES}
    if kind == "bytes":
        texts = {name: np.array(values, dtype="S8") for name, values in texts.items()}
    if kind == "fixed":
        texts = {name: np.array(values, dtype=h5py.string_dtype("utf-8", 8)) for name, values in texts.items()}
    assert_same(read(whole(tmp_path / "all.h5", **texts)), WANTED)


def test_packed_grouped_and_numbered_datasets(tmp_path):
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("patches")
        group.create_dataset("features", data=Z.astype(np.float16), chunks=(2, 2), compression="gzip", shuffle=True)
        group.create_dataset("y", data=np.array([[1], [0], [1], [0]], dtype=np.uint8), compression="lzf")
        group.create_dataset("case", data=np.array([4, 4, 11, 15], dtype=">i4"))
    one = EmbeddingTable.from_h5(
        path, features="/patches/features", labels="patches/y", patients="patches/case", class_names=("n", "t")
    )
    np.testing.assert_array_equal(one.raw().round(2), Z)
    assert one.label.tolist() == [1, 0, 1, 0] and one.patient.tolist() == [4, 4, 11, 15] == one.slide.tolist()


def test_one_file_per_slide_as_clam_writes_them(tmp_path):
    files = [
        write(tmp_path / f"{name}.h5", features=Z[begin:end], coords=np.zeros((end - begin, 2), int))
        for name, begin, end in (("S1", 0, 2), ("S2", 2, 3), ("007", 3, 4))
    ]
    labels, patients = (
        {"S1": "tumour", "S2": "normal", 7: "tumour", "007": "normal"},
        {"S1": "4", "S2": "4", "007": "5"},
    )
    one = EmbeddingTable.from_h5(files, labels=labels, patients=patients, split="val", encoder="UNI")
    wanted = EmbeddingTable.from_arrays(
        Z, ["tumour", "tumour", "normal", "normal"], [4, 4, 4, 5], ["S1", "S1", "S2", "007"], split="val", encoder="UNI"
    )
    assert_same(one, wanted)
    assert (one.split, one.encoder) == ("val", "UNI")
    with pytest.warns(UserWarning, match="every slide counts as a patient"):
        alone = EmbeddingTable.from_h5(files[0], labels=labels)
    np.testing.assert_array_equal(alone.slide, one.slide[:2])
    with pytest.raises(ValueError, match=r"S2\.h5: labels has no entry for slide 'S2'; its 1 entries are for 'S1'"):
        EmbeddingTable.from_h5(files, labels={"S1": "tumour"}, patients=patients)
    with pytest.raises(TypeError, match=r"labels must be the name of a dataset, or a mapping.*got list"):
        EmbeddingTable.from_h5(files, labels=["tumour"], patients=patients)
    wide = write(tmp_path / "wide.h5", features=np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"wide\.h5: 'features' has 5 columns, and in .*S1\.h5 it has 3"):
        EmbeddingTable.from_h5([files[0], wide], labels=labels | {"wide": "tumour"}, patients=patients)
    (tmp_path / "deep").mkdir()
    same = write(tmp_path / "deep" / "S1.h5", features=Z)
    with pytest.raises(ValueError, match="would be one slide, 'S1'"):
        EmbeddingTable.from_h5([files[0], same], labels=labels, patients=patients)


def test_a_mapping_serves_a_file_that_names_its_slides(tmp_path):
    path = write(tmp_path / "all.h5", features=Z, slide=SLIDES)
    one = read(path, labels=dict(zip(SLIDES, LABELS, strict=True)), patients=dict(zip(SLIDES, PATIENTS, strict=True)))
    assert_same(one, WANTED)


def test_refused_values_are_named_with_file_and_row(tmp_path):
    good = whole(tmp_path / "good.h5")
    z = Z.copy()
    z[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"bad\.h5, row 1: the embedding holds NaN"):
        read([good, whole(tmp_path / "bad.h5", features=z)])
    with pytest.raises(ValueError, match=r"gap\.h5, row 2: patient is 'NA'"):
        read([good, whole(tmp_path / "gap.h5", patient=["1", "2", "NA", "3"], slide=["1", "2", "3", "4"])])
    with pytest.raises(
        ValueError, match=r"other\.h5, row 0: slide 'x' belongs to patient '9' here and to '004' in .*good"
    ):
        read([good, whole(tmp_path / "other.h5", patient=["9", "9", "9", "9"])])
    with pytest.raises(ValueError, match=r"short\.h5: 'labels' \(labels\) has shape \(3,\); wanted \(4,\)"):
        read(whole(tmp_path / "short.h5", labels=LABELS[:3]))
    with pytest.raises(ValueError, match=r"'features' has shape \(1, 4, 3\); wanted \(n, d\)"):
        read(whole(tmp_path / "deep.h5", features=Z[None]))
    with pytest.raises(ValueError, match=r"has no dataset 'label'; there is 'features', 'labels', 'patient', 'slide'"):
        read(good, labels="label")
    with pytest.raises(ValueError, match=r"has no dataset 'features/x'; there is nothing"):
        read(good, features="features/x")
    with pytest.raises(ValueError, match=r"'features' holds values of dtype int64; embeddings are floats"):
        read(whole(tmp_path / "ints.h5", features=Z.astype(int)))
    with pytest.raises(ValueError, match=r"no name of a dataset"):
        read(good, features="../features")
    with pytest.raises(ValueError, match="no file is given"):
        read([])
    with pytest.raises(ValueError, match="'features' is no dataset; it is a group"):
        read(write(tmp_path / "group.h5", features__x=Z))


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.h5").write_text("features")
    cut = whole(tmp_path / "cut.h5")
    cut.write_bytes(cut.read_bytes()[:-700])
    for path in (tmp_path / "text.h5", cut):
        with pytest.raises(ValueError, match=rf"{path} is no HDF5 file that can be read"):
            read(path)
    with pytest.raises(FileNotFoundError, match="there is no HDF5 file at"):
        read(tmp_path / "absent.h5")
    with pytest.raises(ValueError, match="is a folder; give the HDF5 file in it"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(ValueError, match="a named pipe"):
        read(tmp_path / "pipe.h5")


def test_a_missing_h5py_is_one_line_that_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'^EmbeddingTable.from_h5 needs h5py: pip install "hsat\[wsi\]"$'):
        read(tmp_path / "all.h5")


def external_link(path, target):
    with h5py.File(path, "a") as file:
        del file["features"]
        file["features"] = h5py.ExternalLink(str(target), "/features")


def external_group(path, target):
    with h5py.File(path, "a") as file:
        del file["features"]
        file["group"] = h5py.ExternalLink(str(target), "/")


def soft_link_out(path, target):
    with h5py.File(path, "a") as file:
        del file["features"]
        file["out"] = h5py.ExternalLink(str(target), "/features")
        file["features"] = h5py.SoftLink("/out")


def virtual(path, target):
    layout = h5py.VirtualLayout(shape=(4, 3), dtype="f4", maxshape=(None, 3))
    source = h5py.VirtualSource(str(target), "features", shape=(4, 3), maxshape=(None, 3))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    with h5py.File(path, "a") as file:
        del file["features"]
        file.create_virtual_dataset("features", layout)


def external_storage(path, target):
    with h5py.File(path, "a") as file:
        del file["features"]
        file.create_dataset("features", (4, 3), "f4", external=[(str(target), 0, h5py.h5f.UNLIMITED)])


LEADING_OUT = {
    "external link": (external_link, "features", "is a link into another file; it is not followed"),
    "external group": (external_group, "group/features", "is a link into another file"),
    "soft link": (soft_link_out, "features", "is a soft link; it is not followed"),
    "virtual": (virtual, "features", "is a virtual dataset, made of other files"),
    "storage": (external_storage, "features", "is stored in other files"),
}


@pytest.mark.parametrize("way", LEADING_OUT)
def test_nothing_leads_out_of_the_file(tmp_path, way):
    """The other file holds the right values; they are not read."""
    lead, name, message = LEADING_OUT[way]
    path, target = whole(tmp_path / "in.h5"), whole(tmp_path / "out.h5")
    lead(path, target)
    with pytest.raises(ValueError, match=rf"in\.h5: '{name}' {message}"):
        read(path, features=name)


def read_or_hang(path, name):
    try:
        read(path, features=name)
    except ValueError:
        os._exit(0)
    os._exit(1)


@pytest.mark.parametrize("way", LEADING_OUT)
def test_the_other_file_is_not_even_opened(tmp_path, way):
    """It is a pipe: whoever opens it waits for a writer, and the test ends with a process that never ends."""
    lead, name, _ = LEADING_OUT[way]
    path, target = whole(tmp_path / "in.h5"), whole(tmp_path / "out.h5")
    lead(path, target)
    target.unlink()
    os.mkfifo(target)
    process = multiprocessing.get_context("fork").Process(target=read_or_hang, args=(path, name), daemon=True)
    process.start()
    process.join(30)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive and process.exitcode == 0


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path):
    path = whole(tmp_path / "all.h5")
    with h5py.File(path, "a") as file:
        file.create_dataset("never", (2**40, 1024), "f4")
        file.create_dataset("chunked", (2**30, 1024), "f4", chunks=(1, 1024))
        file.create_dataset("packed", (2**22, 1024), "f4", chunks=(2**10, 1024), compression="gzip")
        file.create_dataset("chunk", (4, 3), "f4", maxshape=(None, 3), chunks=(2**26, 3), compression="gzip")
        file.create_dataset("half", (4, 3), "f4", chunks=(2, 3), compression="gzip")[:2] = Z[:2]
        file.create_dataset("rows", (2**40,), h5py.string_dtype())
        file.create_dataset("empty", data=h5py.Empty("f4"))
        file.create_dataset("scalar", data=np.float32(1))
    for name, message in {
        "never": r"says it has shape \(1099511627776, 1024\), 4,503,599,627,370,496 bytes, and holds 0",
        "chunked": "says it has shape .* and holds 0",
        "packed": r"of shape .* unpacks from 0 to 17,179,869,184 bytes, and the limit is 268,435,456; give max",
        "chunk": "of shape .* unpacks from 0 to 805,306,368 bytes",
        "half": "holds 1 of its 2 chunks; the others were never written",
        "empty": "holds no array",
        "scalar": "holds no array",
    }.items():
        with pytest.raises(ValueError, match=f"'{name}' {message}"):
            read(path, features=name)
    with pytest.raises(ValueError, match="'rows' says it has shape"):
        read(path, labels="rows")


def test_the_limit_of_packed_data_is_an_argument(tmp_path):
    path = tmp_path / "all.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=np.ones((2000, 64), np.float32), compression="gzip", chunks=(500, 64))
        file.create_dataset("labels", data=np.arange(2000) % 2)
        file.create_dataset("patient", data=np.arange(2000) % 9)
    with pytest.raises(ValueError, match="to 512,000 bytes, and the limit is 100,000; give max_bytes=512000"):
        read(path, slides=None, max_bytes=100_000)
    assert len(read(path, slides=None, max_bytes=512_000)) == 2000 == len(read(path, slides=None))


def test_objects_lists_and_long_texts_are_refused(tmp_path):
    path = whole(tmp_path / "all.h5")
    with h5py.File(path, "a") as file:
        lists = file.create_dataset("lists", (4,), h5py.vlen_dtype(np.float32))
        lists[0] = np.ones(3)
        file.create_dataset("links", (4,), h5py.ref_dtype)
        file.create_dataset("pairs", (4,), np.dtype([("a", "f4"), ("b", "i4")]))
        file.create_dataset("complex", data=np.ones((4, 3), dtype=np.complex64))
        file.create_dataset("raw", data=np.zeros(4, dtype="V3"))
        file.create_dataset("grid", data=np.array([["a", "b"]] * 4, dtype=object), dtype=h5py.string_dtype())
        file.create_dataset("long", data=["x" * 300_000] * 4)
    for name in ("lists", "links"):
        for role in ("features", "labels"):
            with pytest.raises(ValueError, match=f"'{name}' holds objects or lists of any length"):
                read(path, **{role: name})
    for role, name in (("features", "complex"), ("labels", "complex"), ("labels", "pairs"), ("patients", "raw")):
        with pytest.raises(ValueError, match=f"'{name}' holds values of dtype"):
            read(path, **{role: name})
    with pytest.raises(ValueError, match=r"'slide' holds values of dtype object; embeddings are floats"):
        read(path, features="slide")
    with pytest.raises(ValueError, match=r"'grid' has shape \(4, 2\); texts are one per row"):
        read(path, labels="grid")
    with pytest.raises(ValueError, match="'long' holds over 1,000,000 bytes of text; ids and labels are short"):
        read(path, labels="long", max_bytes=1_000_000)


@pytest.mark.parametrize("options", [{}, {"chunks": (3,)}, {"chunks": (3,), "compression": "gzip"}])
def test_texts_however_they_are_stored(tmp_path, options):
    path = whole(tmp_path / "all.h5")
    with h5py.File(path, "a") as file:
        for name, values in (("label", ["grün", "", "x" * 500, "b"]), ("case", PATIENTS)):
            file.create_dataset(name, data=values, dtype=h5py.string_dtype(), **options)
    assert_same(read(path, patients="case"), WANTED)
    with pytest.raises(ValueError, match="row 1: label is empty"):
        read(path, labels="label")
    with pytest.raises(ValueError, match="'label' holds over 300 bytes of text"):
        read(path, labels="label", max_bytes=300)


def test_a_text_that_stands_a_million_times_is_not_read(tmp_path):
    """Each reference is 16 bytes, and all of them are to one text."""
    n = 2000
    path = write(tmp_path / "all.h5", features=np.ones((n, 2), np.float32), labels=["x" * 300_000] + ["y"] * (n - 1))
    with h5py.File(path) as file:
        offset = file["labels"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset : offset + 16 * n] = content[offset : offset + 16] * n
    path.write_bytes(content)
    with h5py.File(path) as file:
        assert len(file["labels"][1500]) == 300_000
    with pytest.raises(ValueError, match="'labels' holds over 268,435,456 bytes of text; ids and labels are short"):
        read(path, patients=None, slides=None)


def test_filters_that_need_a_plugin_are_refused(tmp_path):
    path = whole(tmp_path / "all.h5")
    with h5py.File(path, "a") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((2, 3))
        settings.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((4, 3))
        h5py.h5d.create(file.id, b"blosc", h5py.h5t.NATIVE_FLOAT, space, settings)
    with pytest.raises(ValueError, match=r"'blosc' is packed by filter 32001; known are gzip.*compression='gzip'"):
        read(path, features="blosc")


def test_a_chunk_that_explodes_is_refused(tmp_path):
    path = whole(tmp_path / "all.h5")
    with h5py.File(path, "a") as file:
        good = file.create_dataset("good", data=Z, chunks=(2, 3), compression="gzip", shuffle=True, fletcher32=True)
        bomb = file.create_dataset("bomb", (4, 3), "f4", chunks=(2, 3), compression="gzip")
        for row in (0, 2):
            bomb.id.write_direct_chunk((row, 0), zlib.compress(b"0" * 10_000_000 * (row == 2) + b"0" * 24))
        skipped = file.create_dataset("skipped", (4, 3), "f4", chunks=(4, 3), compression="gzip")
        skipped.id.write_direct_chunk((0, 0), Z.tobytes(), filter_mask=1)
        broken = file.create_dataset("broken", (4, 3), "f4", chunks=(4, 3), compression="gzip")
        broken.id.write_direct_chunk((0, 0), b"no gzip")
        assert good.fletcher32
    for name in ("good", "skipped"):
        np.testing.assert_array_equal(read(path, features=name).z, WANTED.z)
    with pytest.raises(ValueError, match=r"'bomb' unpacks to more than it says, at \(2, 0\)"):
        read(path, features="bomb")
    with pytest.raises(ValueError, match="is no HDF5 file that can be read"):
        read(path, features="broken")
