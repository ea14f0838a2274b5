"""Two real ranks that were given other things: they end before the first step, and leave no run behind."""

from __future__ import annotations

import csv
import json
import shutil
import socket
from pathlib import Path

import pytest
import tifffile
import torch
import torch.distributed as dist
from safetensors.torch import load_file

CASES = """
import glob, json, os
from hsat.cli.train import load_settings, train
from hsat.cli.transfer import Transfer
from hsat.cli.evaluate import Evaluate
from hsat.cli.evaluation import open_run
from hsat.cli.ranks import join_ranks

rank = int(os.environ["RANK"])
opened = {
    "train": lambda argv, ranks: train(load_settings(argv), ranks),
    "whitebox": lambda argv, ranks: open_run(Evaluate.load(argv), ranks),
    "transfer": lambda argv, ranks: open_run(Transfer.load(argv), ranks),
}
found = {}
with join_ranks("cpu") as ranks:
    for name, (script, *both) in json.load(open("cases.json")).items():
        try:
            opened[script](both[rank], ranks)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
threads = [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]
found["threads"] = " ".join(name for name in threads if "gloo" in name)
json.dump(found, open(f"rank{rank}.json", "w"))
"""


def by_hand(launch, finish, *commands, cwd):
    """What processes write that somebody started without torchrun, but with its variables."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    place |= {"WORLD_SIZE": str(len(commands))}
    running = [launch("train", *words, cwd=cwd, RANK=str(rank), **place) for rank, words in enumerate(commands)]
    shown = [finish(process) for process in running]
    return shown, [process.returncode for process in running]


@pytest.fixture(scope="module")
def other_pixels(root, tmp_path_factory):
    """(a copy of the cohort in which one patch has other pixels, the path of that patch)."""
    copy = Path(shutil.copytree(root, tmp_path_factory.mktemp("other") / "srh"))
    path = sorted((copy / "studies").rglob("*.tif"))[5]
    tifffile.memmap(path, mode="r+")[...] += 1
    return copy, path.relative_to(copy).as_posix()


@pytest.mark.slow
def test_ranks_that_differ_are_named_before_anything_is_written(
    root, options, other_pixels, torchrun, finish, tmp_path
):
    """Several runs in turn, of the same two ranks."""
    from hsat.cli.encoders import new_encoder
    from hsat.cli.train import load_settings

    settings = load_settings(options)
    for seed in range(2):
        torch.save(new_encoder(settings.model, seed=seed).backbone.state_dict(), tmp_path / f"{seed}.pt")
    out, copy = ["--out", str(tmp_path / "out")], ["--data.root", str(other_pixels[0])]
    evaluation = ["--data.root", str(root), "--checkpoint", "a=x,b=y", "--device", "cpu", *out]
    training = [*options, *out]
    weights = [[*training, "--model.norm", "none", "--model.weights", str(tmp_path / f"{seed}.pt")] for seed in (0, 1)]
    cases = {
        "pixels": ("train", training, [*training, *copy]),
        "learning rate": ("train", training, [*training, "--train.lr", "0.5", "--data.workers", "1"]),
        "weights": ("train", *weights),
        "whitebox pixels": ("whitebox", evaluation, [*evaluation, *copy]),
        "whitebox steps": ("whitebox", evaluation, [*evaluation, "--steps", "3"]),
        "transfer pixels": ("transfer", evaluation, [*evaluation, *copy]),
        "transfer steps": ("transfer", evaluation, [*evaluation, "--steps", "3"]),
        "whitebox agrees": ("whitebox", evaluation, [*evaluation, "--quiet"]),
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "script.py").write_text(CASES)
    process = torchrun("script.py", cwd=tmp_path)
    shown = finish(process)
    assert process.returncode == 0, shown
    found, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert found == other, "both say the same"
    assert found.pop("threads") == "", "a thread of gloo that outlives its group may abort the interpreter's end"
    assert found.pop("whitebox agrees") == ""
    assert all("rank 1 disagrees with rank 0 about the" in message for message in found.values())
    for name in ("pixels", "whitebox pixels", "transfer pixels"):
        assert f"pixels of patches: {other_pixels[1]} is " in found[name]
    assert "settings: train.lr is 0.5, not 0.001." in found["learning rate"], "workers may differ"
    assert "the weights: backbone." in found["weights"]
    for name in ("whitebox steps", "transfer steps"):
        assert "settings: steps is 3, not 10." in found[name]
    assert not any((tmp_path / "out").rglob("*")), "no run.json, no state"


@pytest.mark.slow
def test_ranks_started_by_hand_end_with_one_reason(root, options, other_pixels, finish, launch, tmp_path):
    """They used to train each by itself: nothing but torchrun's own mark was looked at."""
    argv = [*options, "--out", "out"]
    shown, codes = by_hand(launch, finish, argv, [*argv, "--data.root", other_pixels[0]], cwd=tmp_path)
    assert codes == [1, 1], shown
    first, second = ([line for line in text.splitlines() if line and not line.startswith("[Gloo]")] for text in shown)
    assert len(first) == 1 and not second, shown
    assert f"rank 1 disagrees with rank 0 about the pixels of patches: {other_pixels[1]}" in first[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_started_by_hand_train_together(options, train, finish, launch, tmp_path):
    argv = [*options, "--data.tune_fraction", "0", "--train.steps", "3", "--out"]
    shown, codes = by_hand(launch, finish, *[[*argv, "ranks"]] * 2, cwd=tmp_path)
    assert codes == [0, 0], shown
    train([*argv, str(tmp_path / "parts"), "--train.accumulate", "2"])
    found, wanted = (load_file(tmp_path / name / "final.safetensors") for name in ("ranks", "parts"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    with (tmp_path / "ranks" / "train.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3, "one run wrote here, not two"


def test_an_error_of_the_connection_says_that_rank_0_has_ended(monkeypatch):
    """What it kept is gone: another error is still told, one of the connection would only puzzle."""
    import hsat.cli.ranks as module
    from hsat.cli.ranks import Ranks

    monkeypatch.setattr(module, "GRACE", 0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for error, expected, words in (
            (RuntimeError("Connection closed by peer"), SystemExit, "rank 0 has ended"),
            (ValueError("no such option"), ValueError, "no such option"),
        ):
            kept = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
            board = dist.TCPStore("127.0.0.1", kept.port, 2, is_master=False, wait_for_workers=False)
            with (
                pytest.raises(expected, match=words),
                module.silence_other_ranks(Ranks(1, 2, torch.device("cpu"), board=board)),
            ):
                del kept
                raise error
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kept", [True, False], ids=["torchrun's store", "a store of rank 0"])
def test_a_restart_goes_on_only_with_what_has_begun(kept, monkeypatch):
    """A run that was refused, because another one is in its folder, is refused again by the next attempt."""
    from hsat.cli.ranks import Ranks, has_begun

    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(kept))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not has_begun(store)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert has_begun(store) is not kept
    Ranks(1, 2, torch.device("cpu"), board=store).begin()
    assert has_begun(store) is not kept, "that is for rank 0 to say"
    Ranks(0, 2, torch.device("cpu"), board=store).begin()
    assert has_begun(store)
    Ranks(0, 1, torch.device("cpu")).begin()  # alone there is nobody to tell
