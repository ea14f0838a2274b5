"""kill -9 at any moment, then --resume: the same bytes as a run that nobody killed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

SAME = ("final.safetensors", "best.safetensors", "best.json", "train.csv")


def wait_for_rows(process, path, wanted):
    """Until the log holds so many rows, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") <= wanted):
        time.sleep(0.01)


def assert_same(out, trained):
    for name in SAME:
        assert (out / name).read_bytes() == (trained / name).read_bytes(), f"{name} differs"
    assert not [path.name for path in out.glob(".*")], "something half written was left behind"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.slow
def test_killed_twice_and_resumed_with_another_number_of_workers(trained, options, train, launch, kill, tmp_path):
    out, chance = tmp_path / "run", random.Random()
    argv = [*options, "--out", str(out)]
    for workers, rows, switches in (("0", 3, []), ("1", 5, ["--resume"])):
        process = launch("train", *argv, *switches, "--data.workers", workers, cwd=tmp_path)
        wait_for_rows(process, out / "train.csv", rows)
        time.sleep(chance.uniform(0, 0.05))
        kill(process)
        assert (out / "run.json").exists() and not (out / "final.safetensors").exists()
    train([*argv, "--resume"])
    assert_same(out, trained)


@pytest.mark.slow
def test_killed_at_random_moments_until_it_is_through(trained, options, launch, kill, train, tmp_path):
    out, chance = tmp_path / "run", random.Random()
    argv, pauses = ["train", *options, "--out", str(out), "--resume"], []
    process = launch(*argv, cwd=tmp_path)
    begin = time.monotonic()
    wait_for_rows(process, out / "train.csv", 1)
    longest = 2 * (time.monotonic() - begin)
    while process.poll() is None and len(pauses) < 12:
        kill(process)
        process = launch(*argv, "--data.workers", str(len(pauses) % 2), cwd=tmp_path)
        pauses.append(chance.uniform(0.1, longest))
        try:
            process.wait(pauses[-1])
        except subprocess.TimeoutExpired:
            continue
    kill(process) if process.poll() is None else process.communicate()
    train([*options, "--out", str(out), "--resume"])
    assert_same(out, trained)


def test_a_torn_log_and_a_half_written_checkpoint_do_not_matter(copied, trained, options, train):
    (copied / "final.safetensors").unlink()
    (copied / ".last.pt-0.partial").write_bytes(b"PK half of it")
    path = copied / "train.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    path.write_bytes(b"".join(lines) + b"1")
    train([*options, "--out", str(copied), "--resume"])
    assert path.read_bytes() == (trained / "train.csv").read_bytes()
    assert (copied / "final.safetensors").read_bytes() == (trained / "final.safetensors").read_bytes()


def test_resuming_before_the_first_checkpoint_starts_over(trained, options, copied, train):
    for name in ("last.pt", "best.safetensors", "best.json", "final.safetensors"):
        (copied / name).unlink()
    train([*options, "--out", str(copied), "--resume"])
    assert_same(copied, trained)


def test_a_finished_run_resumes_to_itself(copied, trained, options, train):
    argv = [word for word in options if word != "--quiet"]
    train([*argv, "--out", str(copied), "--resume", "--data.workers", "1", "--train.save_every", "1"])
    assert_same(copied, trained)


def test_the_log_is_not_rewritten_at_every_step(tmp_path):
    from hsat.training.folder import TrainingFolder

    run = TrainingFolder(tmp_path, {}, cohort="")
    run.keep_rows_before(0)
    run.log({"step": 0, "loss": 1.0})
    file = (tmp_path / "train.csv").stat().st_ino
    run.log({"step": 1, "loss": 2.0})
    assert (tmp_path / "train.csv").stat().st_ino == file
    run.log({"step": 2, "loss": 3.0, "tune": 0.5})
    run.log({"step": 3, "loss": 4.0})
    wanted = "step,loss,tune\n0,1.0,\n1,2.0,\n2,3.0,0.5\n3,4.0,\n"
    assert (tmp_path / "train.csv").read_text().replace("\r\n", "\n") == wanted


def test_a_run_is_not_overwritten(copied, trained, options, train, stops):
    message = stops(train, [*options, "--out", str(copied)])
    assert str(copied) in message and "--resume" in message
    assert_same(copied, trained)


def test_other_settings_are_refused_by_name(copied, trained, options, train, stops):
    argv = [*options, "--out", str(copied), "--resume", "--train.lr", "0.01", "--attack.eps", "4/255", "--seed", "7"]
    message = stops(train, [*argv, "--data.tune_fraction", "0.4"])
    for text in ("train.lr was 0.001, now 0.01", "seed was 0, now 7", "attack.eps", "data.tune_fraction"):
        assert text in message
    assert "train.steps" not in message
    assert_same(copied, trained)


def test_another_cohort_is_refused(copied, own_root, options, train, stops):
    argv = [*options, "--out", str(copied), "--resume", "--data.root", str(own_root)]
    train(argv)  # a copy elsewhere is the same cohort
    victim = sorted(own_root.glob("studies/*/1/patches/*"))[0]
    victim.write_bytes(victim.read_bytes() + b"0")
    message = stops(train, argv)
    assert "another cohort" in message
    assert json.loads((copied / "run.json").read_text())["cohort"][:12] in message


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: content[: len(content) // 2], "truncated, damaged"),
        (lambda content: b"", "empty"),
        (lambda content: b"<!DOCTYPE html><html>", "HTML"),
        (lambda content: content[:9999] + bytes([content[9999] ^ 4]) + content[10000:], "checksum"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(
    damage, named, copied, trained, options, train, stops
):
    (copied / "last.pt").write_bytes(damage((trained / "last.pt").read_bytes()))
    message = stops(train, [*options, "--out", str(copied), "--resume"])
    assert str(copied / "last.pt") in message and named in message
    assert load_file(copied / "final.safetensors").keys() == load_file(trained / "final.safetensors").keys()
    assert (copied / "train.csv").read_bytes() == (trained / "train.csv").read_bytes()


def test_the_checkpoint_of_another_run_is_refused_by_its_settings(copied, trained, options, train, stops):
    """Its model fits; its seed, and with it the draws to come, do not."""
    content = torch.load(copied / "last.pt", weights_only=True)
    content["config"]["seed"] = 7
    torch.save(content, copied / "last.pt")
    message = stops(train, [*options, "--out", str(copied), "--resume"])
    assert str(copied / "last.pt") in message and "seed was 7, now 0" in message
    assert (copied / "final.safetensors").read_bytes() == (trained / "final.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"step": 99}, {"step": "3"}, {"extra": {}}, {"extra": {"best": 0.0, "inner": {"gap": [1], "warm": None}}}],
)
def test_a_crafted_checkpoint_is_named(change, copied, options, train, stops):
    torch.save(torch.load(copied / "last.pt", weights_only=True) | change, copied / "last.pt")
    message = stops(train, [*options, "--out", str(copied), "--resume"])
    assert str(copied / "last.pt") in message and "damaged" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", b"{"), ("run.json", b"[]"), ("train.csv", b"\xff\xfe,1\n2,3\n"), ("train.csv", b"a,b\n1,2\n")],
)
def test_a_damaged_file_of_the_run_is_named(name, content, copied, options, train, stops):
    (copied / name).write_bytes(content)
    message = stops(train, [*options, "--out", str(copied), "--resume"])
    assert f"{copied / name} is damaged" in message
    assert (copied / name).read_bytes() == content
