"""The evaluations under torchrun: the files of one process, a killed rank, and one message when it fails."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hsat.eval import read_records
from hsat.report import short_summary

QUICK = "--data.image_size 32 --steps 2 --bootstrap 10 --k 5 --eps 32/255 --batch_size 3 --query_patches 5".split()


def evaluate(argv):
    from hsat.cli.evaluate import main

    main([*map(str, argv)])


@pytest.fixture
def argv(trained, root):
    both = f"first={trained / 'best.safetensors'},second={trained / 'last.pt'}"
    return ["--checkpoint", both, "--data.root", root, *QUICK]


def assert_same_results(out, other):
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("records.jsonl", "table.md", "differences.json", "ensemble.csv"):
        if (other / name).exists():
            assert (out / name).read_bytes() == (other / name).read_bytes(), name
    with np.load(out / "scores.npz") as found, np.load(other / "scores.npz") as wanted:
        assert found.files == wanted.files
        for name in wanted.files:
            np.testing.assert_array_equal(found[name], wanted[name])
    for path in (each for each in (other / "evidence").rglob("*") if each.is_file()):
        assert (out / path.relative_to(other)).read_bytes() == path.read_bytes(), path


@pytest.mark.slow  # tests/eval/test_evaluations.py holds the same of the library
@pytest.mark.parametrize("attacks", ["pgd", "pgd,ensemble"])
def test_two_ranks_write_what_one_process_writes(attacks, argv, torchrun, finish, tmp_path):
    ours = [*argv, "--attacks", attacks, "--target", "decision", "--diagnose", "0", "--gallery", "4"]
    process = torchrun("evaluate", *ours, "--out", tmp_path / "ranks", "--cache", "cache", cwd=tmp_path)
    evaluate([*ours, "--out", tmp_path / "one", "--quiet"])
    shown = finish(process)
    assert process.returncode == 0, shown
    assert_same_results(tmp_path / "ranks", tmp_path / "one")
    assert shown.count("evaluating first") == shown.count("results are in") == 1
    records = read_records(tmp_path / "one" / "records.jsonl")
    assert short_summary(records)[0] in shown
    assert len(list((tmp_path / "cache").iterdir())) == 4  # bank and queries of two encoders


@pytest.mark.slow
def test_transfer_by_two_ranks_and_a_state_that_one_goes_on_with(argv, torchrun, finish, tmp_path):
    from hsat.cli.transfer import main

    ours = [*map(str, argv), "--attacks", "pgd"]
    process = torchrun("transfer", *ours, "--out", tmp_path / "ranks", cwd=tmp_path)
    main([*ours, "--out", str(tmp_path / "one"), "--quiet"])
    shown = finish(process)
    assert process.returncode == 0, shown
    for name in ("records.jsonl", "table.md"):
        assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert shown.count("results are in") == 1
    main([*ours, "--attacks", "pgd,mifgsm", "--out", str(tmp_path / "ranks"), "--resume", "--quiet"])
    about = json.loads((tmp_path / "ranks" / "run.json").read_text())
    assert about["attacked_in_this_run"] == [["first", "MIFGSM-32"], ["second", "MIFGSM-32"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more", "files"),
    [
        ("budget", QUICK, ("records.jsonl", "table.md", "groups.csv")),
        ("export", "--data.image_size 32 --steps 2 --bootstrap 10 --k 5 --batch_size 5".split(), ()),
        (
            "certify",
            "--data.image_size 32 --k 5 --batch_size 3 --query_patches 5 --sigma 0.02 --samples 20".split(),
            ("records.jsonl", "table.md"),
        ),
    ],
)
def test_other_evaluations_by_two_ranks(command, more, files, trained, root, torchrun, finish, tmp_path):
    ours = ["--checkpoint", trained / "best.safetensors", "--data.root", root, *more]
    process = torchrun(command, *ours, "--out", tmp_path / "ranks", cwd=tmp_path)
    importlib.import_module(f"hsat.cli.{command}").main([*map(str, ours), "--out", str(tmp_path / "one"), "--quiet"])
    shown = finish(process)
    assert process.returncode == 0, shown
    assert shown.count("results are in") == 1
    one, ranks = tmp_path / "one", tmp_path / "ranks"
    assert {path.name for path in ranks.iterdir()} == {path.name for path in one.iterdir()}
    images = [path.relative_to(one) for path in one.rglob("*.tif")]
    assert bool(images) == (command == "export")
    for name in (*files, *images):
        assert (ranks / name).read_bytes() == (one / name).read_bytes(), name


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_one_message(argv, own_root, torchrun, finish, tmp_path):
    files = sorted((own_root / "studies").rglob("*.tif"))
    for path in files:
        path.write_bytes(b"II*\0" + b"x" * 99)
    ours = ["--attacks", "pgd", "--data.root", own_root, "--out", tmp_path / "out"]
    process = torchrun("evaluate", *argv, *ours, cwd=tmp_path)
    shown = finish(process)
    assert process.returncode != 0
    assert shown.count("error: ") == 1, shown
    assert "stopped" not in shown and "another process" not in shown and ".tif" in shown


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in children.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_and_those_that_go_on(argv, torchrun, finish, tmp_path, restarts):
    """One process with --resume, or the same torchrun, which starts its ranks anew."""
    ours = [*argv, "--attacks", "pgd,ensemble", "--diagnose", "0", "--batch_size", "2", "--cache", tmp_path / "cache"]
    out = tmp_path / "out"
    process = torchrun("evaluate", *ours, "--out", out, cwd=tmp_path, restarts=restarts)
    while process.poll() is None and not list(out.glob(".state/*/batch-*")):
        time.sleep(0.005)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    shown = finish(process)
    assert (process.returncode == 0) == (out / "records.jsonl").exists() == bool(restarts), shown
    if not restarts:
        assert list(out.glob(".state/*/batch-*.arrays"))
        evaluate([*ours, "--out", out, "--resume", "--quiet"])
    evaluate([*ours, "--out", tmp_path / "whole", "--quiet"])
    assert_same_results(out, tmp_path / "whole")
