"""hsat train under torchrun with real processes: two ranks, killed ranks, and what each of them says."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

UNTUNED = ("--data.tune_fraction", "0")
STEPS = "--train.steps 4 --train.eval_every 2 --train.save_every 2".split()


def assert_close(rows_of, out, other):
    weights, wanted = (load_file(path / "final.safetensors") for path in (out, other))
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for row, expected in zip(rows_of(out), rows_of(other), strict=True):
        assert {k: float(v) for k, v in row.items() if v} == pytest.approx(
            {k: float(v) for k, v in expected.items() if v}, abs=1e-4, rel=1e-5
        )


SECOND_RANK_ELSEWHERE = """
import os, sys
if os.environ["RANK"] != "0":
    sys.argv[sys.argv.index("--out") + 1] += "-elsewhere"
from hsat.cli.train import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param((), id="pgd", marks=pytest.mark.slow),
        pytest.param(
            ("--model.dual_norm", "--train.clean", "--attack.name", "nfgsm", "--attack.check_every", "3", *UNTUNED),
            id="dual norm, clean images, a safeguarded single step",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_are_one_process_with_two_parts(chosen, options, train, rows_of, torchrun, finish, tmp_path):
    """Global negatives, attacks by group, BatchNorm by group, sharded evaluation; and only the first rank writes."""
    argv = [*options, *STEPS, *chosen, "--out"]
    (tmp_path / "script.py").write_text(SECOND_RANK_ELSEWHERE)
    process = torchrun(tmp_path / "script.py", *argv, tmp_path / "ranks", cwd=tmp_path)
    train([*argv, tmp_path / "parts", "--train.accumulate", "2"])
    shown = finish(process)
    assert process.returncode == 0, shown
    assert shown.count("encoder: ") == shown.count("train: ") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"script.py", "ranks", "parts"}, "the second rank wrote nothing"
    assert {p.name for p in (tmp_path / "ranks").iterdir()} == {p.name for p in (tmp_path / "parts").iterdir()}
    assert_close(rows_of, tmp_path / "ranks", tmp_path / "parts")
    shares = [row.get("single_step_share") for row in rows_of(tmp_path / "ranks")]
    assert shares[0] == shares[2] and (shares[2] != shares[3]) == bool(chosen), "checks at steps 0 and 3"


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["embedding", "features"])
def test_free_training_on_two_ranks(layer, options, train, rows_of, torchrun, finish, tmp_path):
    """It ends, and learns from other images than one rank alone would: the ranks' weights are one."""
    argv = [*options, *STEPS, "--attack.name", "free", "--attack.replays", "2", "--train.layer", layer, "--out"]
    process = torchrun("train", *argv, tmp_path / "ranks", cwd=tmp_path)
    train([*argv, tmp_path / "alone"])
    shown = finish(process)
    assert process.returncode == 0, shown
    rows, alone = rows_of(tmp_path / "ranks"), rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in alone] == ["0", "1", "2", "3"]
    first = float(rows[0]["loss"]), float(alone[0]["loss"])  # BatchNorm by rank keeps them apart, but not far
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.5)


LONG = "--train.steps 16 --train.eval_every 8 --train.save_every 2 --attack.steps 1".split()


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory, torchrun, finish):
    """The folder of a run of two ranks that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    process = torchrun("train", *options, *LONG, "--out", folder / "run", cwd=folder)
    shown = finish(process)
    assert process.returncode == 0, shown
    return folder / "run"


def assert_same_bytes(out, whole):
    for name in ("final.safetensors", "best.safetensors", "train.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def workers_of(process):
    """{rank: id} of the processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children.read_text().split()}
    return {int(word[5:]): int(pid) for pid, words in environments.items() for word in words if word[:5] == b"RANK="}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(1,), (0,), (1, 0)], ids=str)
@pytest.mark.parametrize("meeting", ["--standalone", "--master_port={port}"])
def test_killed_ranks_are_started_again_and_end_with_the_same_weights(
    victims, meeting, options, whole, torchrun, finish, tmp_path
):
    """No more restarts than kills are needed: the ranks find each other at the first try."""
    meeting = meeting.format(port=free_port())
    process = torchrun(
        "train", *options, *LONG, "--out", tmp_path / "run", cwd=tmp_path, restarts=len(victims), meeting=meeting
    )
    log, before = tmp_path / "run" / "train.csv", {}
    for number, victim in enumerate(victims):
        while process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") > 5 + 5 * number and workers_of(process) != before:
                break
            time.sleep(0.01)
        before = workers_of(process)
        os.kill(before[victim], signal.SIGKILL)
    shown = finish(process)
    assert process.returncode == 0, shown
    assert_same_bytes(tmp_path / "run", whole)


DIES_WHILE_IT_SAVES = """
import io, os, signal, sys
from hsat.training import checkpoint

honest, saved = checkpoint.torch.save, []

def half(values, file, **options):
    if "/.last.pt-" not in str(getattr(file, "name", "")):
        return honest(values, file, **options)
    saved.append(1)
    if len(saved) < 3:
        return honest(values, file)
    whole = io.BytesIO()
    honest(values, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    print("killed in the middle of", file.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    checkpoint.torch.save = half
from hsat.cli.train import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_a_checkpoint(options, whole, torchrun, finish, tmp_path):
    (tmp_path / "script.py").write_text(DIES_WHILE_IT_SAVES)
    argv = [*options, *LONG, "--out", tmp_path / "run"]
    process = torchrun(tmp_path / "script.py", *argv, cwd=tmp_path, restarts=1)
    shown = finish(process)
    assert process.returncode == 0, shown
    assert shown.count("killed in the middle of") == 1 and shown.count("train: ") == 2, shown
    assert_same_bytes(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*partial"))


@pytest.mark.slow
def test_a_refused_run_stays_refused_when_it_is_started_again(options, whole, torchrun, finish, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    process = torchrun("train", *options, *LONG, "--out", whole, cwd=tmp_path, restarts=1)
    shown = finish(process)
    assert process.returncode != 0
    assert shown.count("go on with it (--resume)") == 2, shown
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
