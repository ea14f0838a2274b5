"""hsat train on packed patches: the same training, without the files; and views of an item at once."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from hsat.data import PatchStore, read_opensrh


@pytest.fixture
def train(options, tmp_path):
    """train(out, *argv): a training of three steps; the folder it left."""
    from hsat.cli.train import main

    def run(out, *argv):
        short = ["--train.steps", "3", "--train.eval_every", "3", "--attack.steps", "1"]
        main([*options, *short, *map(str, argv), "--out", str(tmp_path / out)])
        return tmp_path / out

    return run


@pytest.fixture
def files_are_closed(monkeypatch):
    """Whatever reads a patch's file for a training or an evaluation fails; packing may."""
    import hsat.data.datasets as room

    def refuse(path, **_options):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(room, "read_patch", refuse)


def same_run(one, other):
    for name in ("train.csv", "best.json", "final.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_packed_training_and_evaluation_are_those_of_the_files(train, root, tmp_path, files_are_closed, monkeypatch):
    packed = train("packed", "--data.packed", tmp_path / "patches")
    assert len(PatchStore.open(tmp_path / "patches", read_opensrh(root))) == len(read_opensrh(root))
    again = train("again", "--data.packed", tmp_path / "patches")  # opened, as it is there
    monkeypatch.undo()
    files = train("files")
    same_run(packed, files)
    same_run(again, files)


def test_auto_lies_beside_the_run_and_serves_other_splits(train, tmp_path, files_are_closed):
    items = train("items", "--data.packed", "auto", "--data.augment", "items")
    (folder,) = tmp_path.glob("packed-*")
    made = (folder / "images.npy").stat()
    again = train("again", "--data.packed", "auto", "--data.augment", "items", "--data.workers", "1")
    train("split", "--data.packed", "auto", "--data.split_seed", "5", "--attack.name", "none")
    assert [*tmp_path.glob("packed-*")] == [folder]
    assert (folder / "images.npy").stat().st_ino == made.st_ino
    same_run(items, again)


def test_items_train_as_images_to_rounding(train):
    images, items = (train(name, "--attack.name", "none", "--data.augment", name) for name in ("images", "items"))
    one, other = (load_file(out / "final.safetensors") for out in (images, items))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_changed_patch_is_named_with_what_to_do(options, own_root, tmp_path, stops):
    from hsat.cli.train import main

    argv = [*options, "--data.root", str(own_root), "--train.steps", "1", "--attack.name", "none"]
    argv += ["--data.packed", str(tmp_path / "patches"), "--data.tune_fraction", "0"]
    main([*argv, "--out", str(tmp_path / "run")])
    victim = sorted(own_root.glob("studies/*/1/patches/*"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(1, 1))
    message = stops(main, [*argv, "--out", str(tmp_path / "other")])
    assert victim.name in message and "delete the folder" in message and not (tmp_path / "other").exists()
