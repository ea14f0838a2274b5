"""Numpy's files are read from several threads at a time, and nothing else is taken for them."""

import hashlib
import io
import json
import threading
import zipfile

import numpy as np
import pytest

from hsat.eval.comparison import load_scores
from hsat.files import (
    CorruptFileError,
    atomic_path,
    is_partial,
    load_array,
    load_arrays,
    read_arrays,
    read_json_lines,
    remove_partials,
    write_arrays,
    write_file,
    write_json_lines,
)


def test_only_one_header_is_parsed_at_a_time(tmp_path, monkeypatch):
    """CPython 3.11's parser, which numpy uses for headers, fails by chance with SystemError when threads share it."""
    np.save(tmp_path / "one.npy", np.arange(4))
    inside, most, real = [], [], np.load

    def watched(*args, **options):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.005)
        try:
            return real(*args, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(np, "load", watched)
    threads = [threading.Thread(target=load_array, args=(tmp_path / "one.npy",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_mapped_and_read_arrays_are_equal(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(6.0).reshape(2, 3))
    mapped = load_array(tmp_path / "one.npy", memory_map=True)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, load_array(tmp_path / "one.npy"))


def test_the_other_kind_and_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.arange(3))
    np.save(tmp_path / "one.npy", np.arange(3))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"two\.npz is an archive"):
        load_array(tmp_path / "two.npz")
    with (tmp_path / "one.npy").open("rb") as file, pytest.raises(ValueError, match="it is one array"):
        load_arrays(file)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_array(tmp_path / "objects.npy")


def header(*, descr="<f4", shape=(3,), version=(1, 0)):
    """A .npy file that says it holds so many values, and holds 64 bytes of them."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    content = bytearray(file.getvalue() + bytes(64))
    content[6:8] = bytes(version)
    return bytes(content)


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "magic string"),
        (b"\x93NUMPY", "magic string"),
        (b"no array at all", "magic string"),
        (header(shape=(2**45, 8)), r"end at byte \d+, and the file has 192"),
        (header(shape=(17,)), "end at byte 196, and the file has 192"),
        (header(shape=(-1, 4)), r"says shape \(-1, 4\)"),
        (header(version=(3, 0)), "its format is 3.0"),
        (header()[:90], "reading array header"),
    ],
)
def test_damaged_and_crafted_files_are_named_and_cost_nothing(tmp_path, content, named, memory_map):
    (tmp_path / "one.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"one\.npy is damaged.*{named}"):
        load_array(tmp_path / "one.npy", memory_map=memory_map)


@pytest.mark.parametrize("shape", [(10**13,), (10**6, 10**6)])
def test_arrays_of_an_archive_that_claim_more_than_it_holds_are_refused(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "claim.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", header(shape=shape))
    (tmp_path / "one.npy").write_bytes(header(shape=shape))
    with (tmp_path / "claim.npz").open("rb") as file, pytest.raises(ValueError, match="and the file has 192"):
        load_arrays(file)
    with (tmp_path / "one.npy").open("rb") as file, pytest.raises(ValueError, match="it is one array"):
        load_arrays(file)
    content = (tmp_path / "claim.npz").read_bytes()
    line = json.dumps({"about": {}, "sha256": hashlib.sha256(content).hexdigest()}).encode()
    (tmp_path / "x.arrays").write_bytes(line + b"\n" + content)
    with pytest.raises(CorruptFileError, match=r"x\.arrays holds no arrays"):
        read_arrays(tmp_path / "x.arrays")
    with pytest.raises(ValueError, match=r"claim\.npz: no file of scores"):
        load_scores(tmp_path / "claim.npz")


def test_archives_of_other_packings_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("about.npy", header())
    with (tmp_path / "a.npz").open("rb") as file, pytest.raises(ValueError, match=r"'about\.npy' is packed as"):
        load_arrays(file)


def test_files_notice_a_single_bit(tmp_path):
    path = tmp_path / "x.arrays"
    write_arrays(path, {"a": [1, "b"]}, {"z": np.arange(5.0)})
    about, arrays = read_arrays(path)
    assert about == {"a": [1, "b"]} and arrays["z"].tolist() == [0, 1, 2, 3, 4]
    content = bytearray(path.read_bytes())
    for at in range(content.index(b"\n") + 1, len(content), 37):
        changed = bytes(content[:at]) + bytes([content[at] ^ 1]) + bytes(content[at + 1 :])
        path.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            read_arrays(path)


def test_a_folder_where_arrays_should_be_is_named(tmp_path):
    (tmp_path / "x.arrays").mkdir()
    with pytest.raises(CorruptFileError, match="folder"):
        read_arrays(tmp_path / "x.arrays")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "y.arrays")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = write_file(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_path(path) as working:
        working.write_text("new")
        raise RuntimeError("halfway")
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["a.txt"]
    (path.parent / ".a.txt-x.partial").write_text("left by a process that was killed")
    assert is_partial(path.parent / ".a.txt-x.partial") and not is_partial(path)
    remove_partials(path.parent)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_json_lines_name_their_place(tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", [{"a": 1}, {"b": [None]}])
    assert [value for _, value in read_json_lines(path)] == [{"a": 1}, {"b": [None]}]
    path.write_text(path.read_text() + "\n[3]\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 4: .*list"):
        list(read_json_lines(path))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines(path, [{"a": float("nan")}])
