"""What all evaluations do alike: they refuse an occupied folder, replace it on request, and may be interrupted."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from hsat.cli.evaluation import RESULTS, remove_results
from hsat.cli.failures import explain_failure
from hsat.distributed import RankFailedError

FEW = "--data.image_size 32 --k 5 --bootstrap 0 --quiet --query_patches 4 --bank_patches 12".split()
COMMANDS = {
    "evaluate": "--steps 1 --attacks pgd --eps 8/255 --gallery 0 --diagnose 0 --noise false",
    "transfer": "--steps 1 --attacks pgd --eps 8/255",
    "certify": "--sigma 0.02 --samples 20 --selection 5",
    "budget": "--steps 1",
    "universal": "--epochs 1",
    "compare": "--steps 1 --attacks pgd",
}


@pytest.fixture
def argv_of(trained, root):
    """argv_of(command): its shortest options, without --out."""

    def options(command):
        file = trained / "final.safetensors"
        checkpoint = f"a={file}" if command in ("transfer", "universal") else str(file)
        return ["--checkpoint", checkpoint, "--data.root", str(root), *FEW, *COMMANDS[command].split()]

    return options


@pytest.mark.parametrize("command", COMMANDS)
def test_an_occupied_folder_is_refused_and_replaced_on_request(command, argv_of, stops, tmp_path):
    main, out = importlib.import_module(f"hsat.cli.{command}").main, tmp_path / "out"
    argv = [*argv_of(command), "--out", str(out)]
    main(argv)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = stops(main, argv)
    assert f"{out} holds the results of another run" in message and "--overwrite true" in message
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "ensemble.csv").write_text("of an earlier run")
    (out / "notes.txt").write_text("mine")
    main([*argv, "--overwrite", "true"])
    assert (out / "notes.txt").read_text() == "mine" and not (out / "ensemble.csv").exists()
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == {*before, Path("notes.txt")}
    assert (out / "records.jsonl").read_bytes() == before[Path("records.jsonl")]


def test_options_are_checked_before_anything_is_removed(argv_of, stops, tmp_path):
    from hsat.cli.evaluate import main

    argv = [*argv_of("evaluate"), "--out", str(tmp_path)]
    main(argv)
    before = (tmp_path / "records.jsonl").read_bytes()
    assert "nowhere.pt" in stops(main, [*argv, "--overwrite", "--checkpoint", "nowhere.pt"])
    assert "'pgdd'" in stops(main, [*argv, "--overwrite", "--attacks", "pgdd"])
    assert "not both" in stops(main, [*argv, "--overwrite", "--resume"])
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_the_folder_of_a_training_is_refused(argv_of, trained, stops):
    from hsat.cli.evaluate import main

    before = (trained / "run.json").read_bytes()
    for more in ([], ["--overwrite"], ["--resume"]):
        message = stops(main, [*argv_of("evaluate"), "--out", str(trained), *more])
        assert "holds a training" in message and "another --out" in message
    assert (trained / "run.json").read_bytes() == before


def test_results_alone_are_removed(tmp_path):
    for name in RESULTS:
        (tmp_path / name.replace("*", "x")).write_text("a result")
    for name in ("cohort/mine.csv", "mine.csv", "notes.html", "last.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something else")
    remove_results(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cohort", "mine.csv", "notes.html", "last.pt"}
    (tmp_path / "cohort" / "adversarial.json").write_text("of hsat export")
    remove_results(tmp_path)
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_evaluation_says_one_line_and_goes_on(
    number, status, trained, root, launch, finish, stops, tmp_path
):
    from hsat.cli.evaluate import main

    file, out = trained / "final.safetensors", tmp_path / "out"
    argv = ["--checkpoint", file, "--data.root", root, *FEW[:-4], "--steps", "20", "--attacks", "pgd,mifgsm"]
    argv += ["--batch_size", "1", "--diagnose", "0", "--gallery", "0"]
    process = launch("evaluate", *argv, "--out", out, cwd=tmp_path)
    while process.poll() is None and not list(out.glob(".state/*/batch-*")):
        time.sleep(0.005)
    os.killpg(process.pid, number)
    shown = finish(process)
    assert process.returncode == status, shown
    line = shown.splitlines()[-1]
    assert "Traceback" not in shown and line.startswith("interrupted; to go on: hsat evaluate ")
    assert list(out.glob(".state/*/batch-*")) and not (out / "records.jsonl").exists()
    assert "--resume" in stops(main, [*map(str, argv), "--out", str(out)])
    main(shlex.split(line.partition("hsat evaluate ")[2]))
    main([*map(str, argv), "--out", str(tmp_path / "whole")])
    for name in ("records.jsonl", "table.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_second_evaluation_in_the_same_folder_is_refused(argv_of, stops, tmp_path, monkeypatch):
    import hsat.cli.evaluation as evaluation
    from hsat.cli.evaluate import main
    from hsat.run_folder import lock_folder

    monkeypatch.setattr(evaluation, "lock_folder", lambda out: lock_folder(out, patience=0.1))
    with lock_folder(tmp_path / "out"):
        message = stops(main, [*argv_of("evaluate"), "--out", str(tmp_path / "out")])
    assert f"another process writes into {tmp_path / 'out'}" in message and "another --out" in message


def test_failures_from_outside_name_cause_and_cure():
    full = OSError(28, "No space left on device", "run/last.pt")
    by_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    by_torch.__context__ = full
    by_safetensors = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (full, by_torch, by_safetensors):
        message = explain_failure(error)
        assert "No space left on device" in message and "free some" in message and "--resume" in message
        assert "--resume" not in explain_failure(error, resumable=False)
    dead = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert "--data.workers (now 4" in explain_failure(dead, workers=4)
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3")
    for error in (gone, RankFailedError("another rank of this run has stopped")):
        assert explain_failure(error).endswith("has stopped; the same command with --resume goes on")
    assert explain_failure(ValueError("mine")) == "mine" and explain_failure(RuntimeError("a bug")) is None
