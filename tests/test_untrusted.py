"""Files of others outside of weights: pipes are not waited for, archives do not unpack to gigabytes."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hsat.attacks import FittedUniversal
from hsat.eval.comparison import load_scores
from hsat.files import load_array, load_arrays
from hsat.report.artifacts import read_artifacts
from hsat.report.run_folders import open_runs
from hsat.training.checkpoint import read_checkpoint, write_checkpoint
from hsat.untrusted import as_cell, of_cell, open_regular, shown, strict_json


@pytest.mark.parametrize("read", [load_scores, FittedUniversal.load, read_checkpoint, load_array])
def test_a_pipe_is_refused_at_once_and_named(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is a named pipe"):
        read(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=r"loop is a link that cannot be followed"):
        read(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


def test_a_pipe_among_the_evidence_of_a_run_is_refused_at_once(tmp_path):
    (tmp_path / "evidence" / "model").mkdir(parents=True)
    (tmp_path / "train.csv").write_text("step,loss\n0,1.5\n")
    os.mkfifo(tmp_path / "evidence" / "model" / "about.json")
    with pytest.raises(ValueError, match=r"about\.json is a named pipe"):
        read_artifacts(tmp_path / "evidence")
    with pytest.raises(ValueError, match=r"about\.json is a named pipe"):
        open_runs([tmp_path])


def test_what_is_opened_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with open_regular(tmp_path / "link", kind="note") as file:
        assert file.read() == b"content"


def test_an_archive_of_zeros_is_not_unpacked(tmp_path):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (300 << 20,)})
        for _ in range(300):
            entry.write(bytes(1 << 20))
    assert len(body.getvalue()) < 1 << 20
    with pytest.raises(ValueError, match=r"unpack to 314\d{6}"):
        load_arrays(io.BytesIO(body.getvalue()))
    (tmp_path / "scores.npz").write_bytes(body.getvalue())
    with pytest.raises(ValueError, match=r"scores\.npz.*unpack to"):
        load_scores(tmp_path / "scores.npz")


def test_arrays_that_compress_well_are_read():
    body = io.BytesIO()
    np.savez_compressed(body, a=np.zeros(1 << 20), b=np.arange(3))
    body.seek(0)
    arrays = load_arrays(body)
    assert arrays["a"].shape == (1 << 20,) and arrays["b"].tolist() == [0, 1, 2]


def test_a_compressed_training_checkpoint_is_refused(tmp_path):
    write_checkpoint(tmp_path / "last.pt", {"model": {"a": torch.zeros(1000)}})
    assert read_checkpoint(tmp_path / "last.pt")["model"]["a"].shape == (1000,)
    with zipfile.ZipFile(tmp_path / "last.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"packed\.pt.*compressed"):
        read_checkpoint(tmp_path / "packed.pt")


def test_the_json_of_a_universal_perturbation_is_read_strictly(tmp_path):
    metadata = {"format": "hsat universal perturbation 1", "about": "[" * 100_000}
    save_file({"delta": torch.zeros(1, 3, 4, 4)}, tmp_path / "u.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"u\.safetensors is not a universal perturbation.*inside each other"):
        FittedUniversal.load(tmp_path / "u.safetensors")


def test_brackets_inside_texts_are_no_nesting():
    text = '{"a": "[[[[\\"[[[[", "b": [1, 2.5, -3e2, true, null], "c": {"]": "}"}}'
    value = strict_json(text, where="x", depth=2, containers=3)
    assert value == {"a": '[[[["[[[[', "b": [1, 2.5, -300.0, True, None], "c": {"]": "}"}}
    with pytest.raises(ValueError, match="x: more than 1 objects or lists inside"):
        strict_json(text, where="x", depth=1, containers=3)
    with pytest.raises(ValueError, match="x: more than 2 objects and lists"):
        strict_json(text, where="x", depth=2, containers=2)


def test_values_are_shown_short():
    assert shown("a" * 100).endswith("(100 characters)") and len(shown("a" * 100)) < 100
    assert shown([1] * 10**5) == "a list of 100000"
    assert (shown(True), shown(None), shown(0.5)) == ("True", "None", "0.5")
    assert shown(1 << 20_000) == "a whole number of 20001 bits"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-1+1", "@SUM(A1)", "\tx", "\rx", "'=x", "''@", "-a.png"])
def test_cells_of_a_spreadsheet_are_no_formulas(text):
    assert as_cell(text) == f"'{text}" and of_cell(f"'{text}") == text


@pytest.mark.parametrize("value", ["a=b", "-1.5", "+3e-4", "", "'a", "-.5", "a/b.png", 3, None, 0.5])
def test_other_cells_stay(value):
    assert as_cell(value) == value
    assert not isinstance(value, str) or of_cell(value) == value
