"""Signals, full disks, dead readers and a second run: training ends with one line that says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from hsat.run_folder import lock_folder

SAME = ("final.safetensors", "best.safetensors", "best.json", "train.csv")
LONG = "--train.steps 3000 --train.eval_every 9999 --train.save_every 9999 --data.tune_fraction 0".split()


TEN = "--train.steps 10 --train.eval_every 5".split()
PACED = """
import sys, time
from hsat.training.trainer import Trainer

honest = Trainer.step

def step(self, batch):
    row = honest(self, batch)
    time.sleep(0.5)  # so that a signal comes before the last step, on a fast machine as well
    return row

Trainer.step = step
from hsat.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(options, train, threads, tmp_path_factory):
    """The folder of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train([*options, *TEN, "--out", out])
    return out


def wait_for_rows(process, out, rows):
    """Until the log holds so many rows, or the process has ended."""
    log = out / "train.csv"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") <= rows):
        time.sleep(0.01)


def assert_one_line(shown, *parts):
    """What a process said after what every training says at its start."""
    lines = [line for line in shown.splitlines() if not line.startswith(("train: ", "val: ", "tune: "))]
    assert len(lines) == 1, shown
    for part in parts:
        assert part in lines[0], shown
    return lines[0]


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [
        pytest.param(signal.SIGINT, 130, "1", id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "0", id="SIGTERM"),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number, status, workers, whole, options, train, launch, finish, tmp_path
):
    """Sent to the whole group, as a terminal does; the command that is printed ends with the bytes of a whole run."""
    out = tmp_path / "run"
    (tmp_path / "script.py").write_text(PACED)
    process = launch("script.py", "train", *options, *TEN, "--data.workers", workers, "--out", out, cwd=tmp_path)
    wait_for_rows(process, out, 2)
    os.killpg(process.pid, number)
    shown = finish(process)
    assert process.returncode == status, shown
    line = assert_one_line(shown, "stopped after step ", " of 10, which is saved; to go on: hsat train ", "--resume")
    assert not (out / "final.safetensors").exists() and not list(out.glob(".*"))
    program, command, *words = shlex.split(line.partition("to go on: ")[2])
    assert (program, command) == ("hsat", "train")
    train(words)
    for name in SAME:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


SLOW_STEP = """
import time
from hsat.training.trainer import Trainer

honest = Trainer.step

def step(self, batch):
    row = honest(self, batch)
    if self.done == 2:
        print("in a step", flush=True)
        time.sleep(60)
    return row

Trainer.step = step
import sys
from hsat.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(options, launch, finish, tmp_path):
    (tmp_path / "script.py").write_text(SLOW_STEP)
    process = launch("script.py", "train", *options, "--out", "run", cwd=tmp_path)
    for line in process.stdout:
        if line == "in a step\n":
            break
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the step goes on"
    os.kill(process.pid, signal.SIGINT)
    shown = finish(process)
    assert process.returncode == 130 and time.monotonic() - begin < 30, shown
    assert_one_line(shown, "interrupted; to go on: hsat train ", "--resume")


@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on(options, train, rows_of, torchrun, finish, tmp_path):
    """SIGTERM to torchrun, which hands it on to its ranks."""
    out = tmp_path / "run"
    (tmp_path / "script.py").write_text(PACED)
    process = torchrun("script.py", "train", *options, *RANKS, "--out", out, cwd=tmp_path)
    wait_for_rows(process, out, 1)
    process.terminate()
    shown = finish(process)
    assert process.returncode != 0 and shown.count("stopped after step ") == 1, shown
    assert "interrupted" not in shown and "error: " not in shown
    words = shlex.split(next(line for line in shown.splitlines() if "to go on: " in line).partition("to go on: ")[2])
    assert words[:5] == ["torchrun", "--nproc_per_node=2", "-m", "hsat", "train"]
    process = torchrun(*words[4:], cwd=tmp_path)
    shown = finish(process)
    assert process.returncode == 0, shown
    train([*options, *RANKS, "--train.accumulate", "2", "--out", tmp_path / "whole"])  # which two ranks compute, too
    rows, wanted = rows_of(out), rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, expected in zip(rows, wanted, strict=True):
        assert float(row["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)


RANKS = "--train.steps 12 --data.tune_fraction 0 --attack.steps 1".split()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(options, launch, finish, tmp_path):
    with lock_folder(tmp_path / "run"):  # as a training does in this process
        second = launch("train", *options, "--out", "run", cwd=tmp_path)
        shown = finish(second)
    assert second.returncode == 1, shown
    assert_one_line(shown, "error: another process writes into run; ", "another --out")


SMALL_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from hsat.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(options, launch, finish, tmp_path):
    """The checkpoint does not fit; the system's limit on the size of files stands for the end of the disk."""
    (tmp_path / "script.py").write_text(SMALL_FILES)
    process = launch("script.py", "train", *options, "--out", "run", cwd=tmp_path)
    shown = finish(process)
    assert process.returncode == 1, shown
    assert_one_line(shown, "error: no space is left to write (", "free some", "--resume goes on")
    assert not (tmp_path / "run" / "last.pt").exists() and not list((tmp_path / "run").glob(".*"))


def readers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(word) for word in children]


@pytest.mark.slow
def test_a_dead_reader_is_one_line(options, launch, finish, tmp_path):
    out = tmp_path / "run"
    process = launch("train", *options, *LONG, "--data.workers", "1", "--out", out, cwd=tmp_path)
    wait_for_rows(process, out, 2)
    for pid in readers_of(process):
        os.kill(pid, signal.SIGKILL)
    shown = finish(process)
    assert process.returncode == 1, shown
    assert_one_line(shown, "error: a process that reads patches has died", "--data.workers (now 1", "--resume goes on")


def test_a_signal_before_the_first_step_is_one_line(options, launch, finish, tmp_path):
    process = launch("train", *options, "--out", "run", cwd=tmp_path)
    while process.poll() is None and b"SIGTERM" not in caught(process.pid):
        time.sleep(0.005)
    process.terminate()
    shown = finish(process)
    assert process.returncode == 143, shown
    assert_one_line(shown, "to go on: hsat train ")


def caught(pid):
    """Whether the process has a handler for SIGTERM, as /proc says."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return b"SIGTERM"
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return b"SIGTERM" if mask >> (signal.SIGTERM - 1) & 1 else b""


def ranks_of(process):
    """{rank: id} of the processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children.read_text().split()}
    return {int(word[5:]): int(pid) for pid, words in environments.items() for word in words if word[:5] == b"RANK="}


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_at_most_one_line(options, torchrun, finish, tmp_path):
    """torchrun ends the other rank, too, and may do so before that one has said why."""
    out = tmp_path / "run"
    process = torchrun("train", *options, *LONG, "--out", out, cwd=tmp_path)
    wait_for_rows(process, out, 1)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    shown = finish(process)
    assert process.returncode != 0, shown
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1, shown
    for line in lines:
        assert "another process of this run has stopped; the same command with --resume goes on" in line
