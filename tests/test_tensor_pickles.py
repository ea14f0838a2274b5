"""Pickles are followed without being run: what allocates or copies without bound is refused before torch reads it."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hsat.models import build_encoder
from hsat.models.checkpoints import read_weights
from hsat.tensor_files import check_archive
from hsat.training.checkpoint import read_checkpoint

START, MEMO = b"\x80\x02", b"}X\x05\x00\x00\x00model"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(digits)]) + digits


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def bytearray_of(size: int) -> bytes:
    return call(named("builtins", "bytearray"), number(size))


SMALL_LIST = b"](" + b"K\x00" * 5000 + b"e"
BOMBS = {
    "builtins.bytearray": bytearray_of(10**9),
    "builtins.bytearray, in Size": call(named("torch", "Size"), bytearray_of(10**8)),
    "torch.Tensor": call(named("torch", "Tensor"), number(50_000), number(50_000)),
    "torch.Tensor, made new": named("torch", "Tensor") + b"(" + number(10**9) + b"t\x81",
    "torch.Tensor, by its memo": named("torch", "Tensor") + b"q\x010" + b"h\x01(" + number(10**9) + b"tR",
    "torch.FloatTensor": call(named("torch", "FloatTensor"), number(10**9)),
    "torch.FloatStorage": call(named("torch", "FloatStorage"), number(10**9)),
    "torch.storage.UntypedStorage": call(named("torch.storage", "UntypedStorage"), number(10**9)),
    "_rebuild_from_type_v2": call(
        named(".".join(("torch", "_tensor")), "_rebuild_from_type_v2"),
        named("torch", "Tensor"),
        named("torch", "Tensor"),
        b"(" + number(10**9) + b"t",
        b"}",
    ),
    "copies": SMALL_LIST + b"q\x01" + named("torch", "Size") + b"q\x02" + b"h\x02h\x01\x85R\x86" * 100,
    "states": SMALL_LIST + b"q\x01" + b"".join([named("collections", "OrderedDict") + b")Rh\x01b\x86"] * 100),
    "posix.system": call(named("posix", "system"), b"X\x02\x00\x00\x00ls"),
}


def zipped(path: Path, content: bytes, *, name: str = "archive/data.pkl", before: bytes = b"") -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", "3\n")
    path.write_bytes(before + buffer.getvalue())
    return path


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("read", [read_weights, read_checkpoint])
def test_what_state_dicts_never_need_is_refused_before_torch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str, read: Any
) -> None:
    path = zipped(tmp_path / "bomb.pt", START + MEMO + BOMBS[bomb] + b"s.")
    monkeypatch.setattr(torch, "load", lambda *_args, **_options: pytest.fail("torch read the file"))
    with pytest.raises(ValueError, match=r"bomb\.pt holds") as caught:
        read(path)
    if ("." in bomb or "_" in bomb) and "memo" not in bomb:
        assert bomb.partition(",")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"), [({"name": "archive/DATA.PKL"}, "holds"), ({"before": b"PK, not yet"}, "stands before")]
)
def test_no_other_pickle_is_checked_than_torch_reads(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    path = zipped(tmp_path / "bomb.pt", START + MEMO + bytearray_of(9) + b"s.", **options)
    with pytest.raises(ValueError, match=named):
        read_weights(path)


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    for content in (START, b"", START + b"h\x07.", START + b"t.", START + b"\xff.", START + b"b."):
        with pytest.raises(ValueError, match=r"bomb\.pt is no file of weights: its pickle cannot be read"):
            read_weights(zipped(tmp_path / "bomb.pt", content))


def test_tensors_of_old_files_are_not_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": {"w": torch.zeros(4)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert read_weights(path).state["w"].shape == (4,)
    at = content.index(b"K\x04", content.index(b"cpu"))
    path.write_bytes(content[:at] + number(10**9) + content[at + 2 :])
    with pytest.raises(ValueError, match=r"its tensors have 1000000000 values, and the file \d+ bytes"):
        read_weights(path)


def lightning() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "pytorch-lightning_version": "2.1",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "kth_value": None}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict()],
        "hyper_parameters": {"lr": 0.1, "levels": ("patch", "slide"), "names": {"a", "b"}},
    }


def encoder_state() -> dict[str, Any]:
    return build_encoder("test_resnet", norm="none").state_dict()  # with the _metadata that state dicts carry


def every_kind() -> dict[str, Any]:
    weight = nn.Parameter(torch.rand(2, 2))
    with_note = torch.rand(3)
    with_note.note = "why"
    return {
        "state_dict": {"w": weight, "h": weight.detach().half(), "b": torch.zeros(2, dtype=torch.bfloat16)},
        "shape": weight.shape,
        "shapes": [torch.Size((2, number)) for number in range(300)],
        "note": with_note,
        "ordered": OrderedDict([(f"key {number}", OrderedDict()) for number in range(300)]),
        "counts": Counter("abc"),
        "blob": b"\x00\xff" * 500,
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "view": torch.arange(12).view(3, 4)[1:, ::2],
        "complex": 1j,
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [lightning, encoder_state, every_kind])
def test_what_trainings_save_is_let_through(tmp_path: Path, make: Any, legacy: bool) -> None:
    path = tmp_path / "good.pt"
    torch.save(make(), path, _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=True)
    with path.open("rb") as file:
        check_archive(file, path.stat().st_size)


def test_ordered_dicts_of_python_2_are_let_through(tmp_path: Path) -> None:
    pairs = b"](" + b"](X\x01\x00\x00\x00aK\x01e" * 50 + b"e"
    path = zipped(tmp_path / "old.pt", START + named("collections", "OrderedDict") + pairs + b"\x85R.")
    with path.open("rb") as file:
        check_archive(file, path.stat().st_size)


def test_what_the_user_trusts_is_let_through(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(lr=0.1)}, path)
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        check_archive(file, path.stat().st_size)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert list(read_weights(path).state) == ["w"]
