"""hsat certify: what it writes, that the attack on its certificates runs, and how it refuses."""

from __future__ import annotations

import json
import time

import pytest

from hsat.eval import read_records

QUICK = "--data.image_size 32 --k 5 --sigma 0.02 --samples 40 --selection 5 --bootstrap 10 --quiet".split()


def certify(argv):
    from hsat.cli.certify import main

    main([*argv])


def test_writes_records_table_and_curve(trained, root, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]
    certify([*argv, "--radii", "0,0.01,5", "--check", "2", "--out", str(out)])
    records = read_records(out / "records.jsonl")
    assert [(r.level, r.eps_value) for r in records] == [
        (level, radius) for level in ("patch", "slide", "patient") for radius in (0.0, 0.01, 5.0)
    ]
    assert {r.metric for r in records} == {"certified_accuracy"} and records[2].value == 0.0
    shown = capsys.readouterr()
    assert "certified patches attacked" in shown.err or "nothing to check" in shown.err
    assert (out / "table.md").read_text().strip() in shown.out
    assert (out / "certified_accuracy.png").stat().st_size > 5000
    assert json.loads((out / "run.json").read_text())["settings"]["sigma"] == 0.02


@pytest.mark.slow
def test_a_killed_run_goes_on(trained, root, launch, kill, stops, tmp_path):
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK, "--batch_size", "2"]
    certify([*argv, "--out", str(tmp_path / "whole")])
    out = tmp_path / "out"
    process = launch("certify", *argv, "--out", str(out), cwd=tmp_path)
    while process.poll() is None and not list(out.glob(".state/*/batch-*")):
        time.sleep(0.005)
    kill(process)
    assert list(out.glob(".state/*/batch-*")) and not (out / "records.jsonl").exists()
    assert "--resume" in stops(certify, [*argv, "--out", str(out)])
    certify([*argv, "--out", str(out), "--resume"])
    for name in ("records.jsonl", "table.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / ".state").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--checkpoint FILE"),
        (["--sigma", "0"], "sigma"),
        (["--radii", "0.1,-1"], "radii must be numbers of at least 0"),
        (["--data.root", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_end_the_program_with_their_name(argv, named, trained, root, tmp_path, stops):
    start = ["--data.root", str(root), *QUICK, "--out", str(tmp_path)]
    start += ["--checkpoint", str(trained / "final.safetensors")] if argv else []
    assert named in stops(certify, [*start, *argv])


def test_it_says_what_it_will_cost(trained, root, tmp_path, caplog):
    caplog.set_level("INFO", logger="hsat")
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]
    certify([*[word for word in argv if word != "--quiet"], "--out", str(tmp_path / "out")])
    assert any(
        message.startswith("12 patches: at most 45 forward and 0 backward passes each, about ")
        for message in caplog.messages
    )
