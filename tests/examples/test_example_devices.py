"""torchrun with real processes: two ranks, a killed rank, float16, compiled code, memory."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
UNTUNED = ("--data.tune_fraction", "0")
STEPS = "--train.steps 4 --train.eval_every 2 --train.save_every 2".split()


def train(argv):
    from train_hsat import main

    main([*map(str, argv)])


def torchrun(*argv, cwd, ranks=2, restarts=0, meeting="--standalone", script=EXAMPLES / "train_hsat.py"):
    """Two ranks over gloo on this machine, in a process group of their own."""
    words = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}", meeting]
    return subprocess.Popen(
        [sys.executable, *words, str(script), *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process):
    try:
        shown = process.communicate(timeout=400)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return shown


def rows_of(out):
    with (out / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close(out, other):
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
sys.path.insert(0, {examples!r})
if os.environ["RANK"] != "0":
    sys.argv[sys.argv.index("--out") + 1] += "-elsewhere"
from train_hsat import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "chosen",
    [
        (),
        ("--model.dual_norm", "--train.clean", "--attack.name", "nfgsm", "--attack.check_every", "3", *UNTUNED),
    ],
    ids=["pgd", "dual norm, clean images, a safeguarded single step"],
)
def test_two_ranks_are_one_process_with_two_parts(chosen, options, tmp_path):
    """Global negatives, attacks by group, BatchNorm by group, sharded evaluation; and only the first rank writes."""
    argv = [*options, *STEPS, *chosen, "--out"]
    (tmp_path / "script.py").write_text(SECOND_RANK_ELSEWHERE.format(examples=str(EXAMPLES)))
    process = torchrun(*argv, tmp_path / "ranks", cwd=tmp_path, script=tmp_path / "script.py")
    train([*argv, tmp_path / "parts", "--train.accumulate", "2"])
    shown = finished(process)
    assert process.returncode == 0, shown
    assert shown.count("encoder: ") == shown.count("train: ") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"script.py", "ranks", "parts"}, "the second rank wrote nothing"
    assert {p.name for p in (tmp_path / "ranks").iterdir()} == {p.name for p in (tmp_path / "parts").iterdir()}
    assert_close(tmp_path / "ranks", tmp_path / "parts")
    shares = [row.get("single_step_share") for row in rows_of(tmp_path / "ranks")]
    assert shares[0] == shares[2] and (shares[2] != shares[3]) == bool(chosen), "checks at steps 0 and 3"


@pytest.mark.slow
def test_free_training_on_two_ranks(options, tmp_path):
    """It ends, and learns from other images than one rank alone would: the ranks' weights are one."""
    argv = [*options, *STEPS, "--attack.name", "free", "--attack.replays", "2", "--out"]
    process = torchrun(*argv, tmp_path / "ranks", cwd=tmp_path)
    train([*argv, tmp_path / "alone"])
    shown = finished(process)
    assert process.returncode == 0, shown
    rows, alone = rows_of(tmp_path / "ranks"), rows_of(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in alone] == ["0", "1", "2", "3"]
    first = float(rows[0]["loss"]), float(alone[0]["loss"])  # BatchNorm by rank keeps them apart, but not far
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.5)


@pytest.fixture
def pretended():
    """pretended(rank, *argv): the trainer of one of two ranks, in a process group that is really of one."""
    import torch.distributed as dist

    from hsat.data import read_opensrh
    from ranks import Ranks
    from train_hsat import hold_out, load_settings
    from trainer import Trainer

    def build(rank, *argv):
        settings = load_settings([*map(str, argv)])
        cohort = hold_out(read_opensrh(settings.data.root), settings)
        return Trainer(settings, cohort, Ranks(rank, 2, torch.device("cpu")))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build
    dist.destroy_process_group()


def test_options_for_several_ranks_reach_the_trainer(options, pretended):
    assert pretended(0, *options).loss.gather
    assert not pretended(0, *options, "--train.global_negatives", "false").loss.gather
    with pytest.raises(ValueError, match="synchronised BatchNorm needs GPUs: torch has none for the CPU"):
        pretended(0, *options, "--train.sync_norm", "true")
    with pytest.raises(ValueError, match=r"--attack.name warm .* \(got 2 rank\(s\), --train.accumulate 1\)"):
        pretended(0, *options, "--attack.name", "warm", "--data.augmentation", "none")


def test_ranks_train_on_other_patients_and_other_views(options, pretended):
    """Each draws its own share of the batch; where augmentation is off, what they see is the patch itself."""
    mine, other = (next(iter(pretended(rank, *options).loader)) for rank in range(2))
    again = next(iter(pretended(1, *options).loader))
    assert torch.equal(other.images, again.images), "draws depend on names and seeds"
    assert not {*mine.patient.tolist()} & {*other.patient.tolist()}
    assert not torch.equal(mine.images, other.images)
    views = {image.numpy().tobytes() for batch in (mine, other) for image in batch.images}
    assert len(views) == len(mine) + len(other), "every view is augmented by draws of its own"


LONG = "--train.steps 16 --train.eval_every 8 --train.save_every 2 --attack.steps 1".split()


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of a run of two ranks that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    process = torchrun(*options, *LONG, "--out", folder / "run", cwd=folder)
    shown = finished(process)
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
def test_killed_ranks_are_started_again_and_end_with_the_same_weights(victims, meeting, options, whole, tmp_path):
    """No more restarts than kills are needed: the ranks find each other at the first try."""
    meeting = meeting.format(port=free_port())
    process = torchrun(*options, *LONG, "--out", tmp_path / "run", cwd=tmp_path, restarts=len(victims), meeting=meeting)
    log, before = tmp_path / "run" / "train.csv", {}
    for number, victim in enumerate(victims):
        while process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") > 5 + 5 * number and workers_of(process) != before:
                break
            time.sleep(0.01)
        before = workers_of(process)
        os.kill(before[victim], signal.SIGKILL)
    shown = finished(process)
    assert process.returncode == 0, shown
    assert_same_bytes(tmp_path / "run", whole)


DIES_WHILE_IT_SAVES = """
import io, os, signal, sys
sys.path.insert(0, {examples!r})
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
from train_hsat import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_a_checkpoint(options, whole, tmp_path):
    (tmp_path / "script.py").write_text(DIES_WHILE_IT_SAVES.format(examples=str(EXAMPLES)))
    argv = [*options, *LONG, "--out", tmp_path / "run"]
    process = torchrun(*argv, cwd=tmp_path, restarts=1, script=tmp_path / "script.py")
    shown = finished(process)
    assert process.returncode == 0, shown
    assert shown.count("killed in the middle of") == 1 and shown.count("train: ") == 2, shown
    assert_same_bytes(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*partial"))


@pytest.mark.slow
def test_a_refused_run_stays_refused_when_it_is_started_again(options, whole, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    process = torchrun(*options, *LONG, "--out", whole, cwd=tmp_path, restarts=1)
    shown = finished(process)
    assert process.returncode != 0
    assert shown.count("add --resume to go on with it") == 2, shown
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_what_ranks_and_parts_cannot_share_is_refused(options, tmp_path, stops):
    message = stops(train, [*options, "--train.accumulate", "3", "--out", tmp_path / "run"])
    assert "--train.batch_patients=2" in message and "use 3" in message
    for name in ("warm", "free"):
        argv = [*options, "--attack.name", name, "--data.augmentation", "none", "--train.accumulate", "2"]
        message = stops(train, [*argv, "--out", tmp_path / "run"])
        assert f"--attack.name {name}" in message and "without --train.accumulate" in message and "fgsm_rs" in message
    with pytest.raises(SystemExit) as stop:
        train([*options, "--train.max_memory", "much", "--out", tmp_path / "run"])
    assert "8GB" in str(stop.value.code)
    assert not (tmp_path / "run").exists()


def test_parts_resume_bit_for_bit(options, tmp_path, monkeypatch):
    import trainer

    argv = [*options, *STEPS, "--train.accumulate", "2", "--data.tune_fraction", "0", "--attack.steps", "1", "--out"]
    train([*argv, tmp_path / "whole"])
    honest = trainer.Trainer.train_step

    def stopped(self, batch, epoch):
        if self.step == 3:
            raise KeyboardInterrupt
        return honest(self, batch, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "train_step", stopped)
        train([*argv, tmp_path / "run"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 2 and not (tmp_path / "run" / "final.safetensors").exists()
    train([*argv, tmp_path / "run", "--resume"])
    for name in ("final.safetensors", "train.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_float16_trains_and_keeps_the_scale(options, tmp_path):
    """The first steps are skipped until the scale fits: after two of them nothing would have been trained."""
    argv = [*options, "--train.steps", "6", "--train.precision", "16", "--data.tune_fraction", "0", "--out", tmp_path]
    train([*argv, "--resume"])
    assert "0.0" in {row["skipped"] for row in rows_of(tmp_path)}
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["extra"]["scaler"]["scale"] > 0
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert all(value.dtype != torch.float16 for value in state["model"].values())


def test_length_and_memory_are_said(options, tmp_path, capsys):
    loud = [word for word in options if word != "--quiet"]
    argv = [*loud, "--train.steps", "4", "--data.tune_fraction", "0", "--attack.steps", "1"]
    train([*argv, "--train.max_memory", "1MB", "--out", tmp_path / "run"])
    shown = capsys.readouterr().err
    assert "s per step (over 2 steps)" in shown and "for 1 more steps" in shown
    assert "of --train.max_memory 1 MB; " in shown and "were in use before it" in shown and "lower" not in shown


def test_shortage_of_memory_names_what_to_lower(options, tmp_path, stops, monkeypatch):
    import trainer

    def full(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(trainer, "adversarial_step", full)
    message = stops(train, [*options, "--out", tmp_path / "run"])
    for words in (
        "out of memory",
        "--train.accumulate (now 1",
        "--train.batch_patients (now 2",
        "--data.image_size (32)",
    ):
        assert words in message


@pytest.mark.slow
def test_compiled_training_is_close_to_eager(options, trained, tmp_path, capfd):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler for C++")
    argv = [*options, "--train.steps", "1", "--data.tune_fraction", "0", "--train.warmup", "0"]
    train([*argv, "--out", tmp_path / "eager"])
    train([*argv, "--train.compile", "--out", tmp_path / "compiled"])
    assert "compile, outer pass: 1 graph(s), no graph break" in capfd.readouterr().err
    eager, compiled = (float(rows_of(tmp_path / name)[0]["loss"]) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)
