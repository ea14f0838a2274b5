"""hsat budget: what it writes agrees with itself, how it refuses; and that it and hsat export go on after a kill."""

from __future__ import annotations

import csv
import importlib
import json
import time

import numpy as np
import pytest

from hsat.eval import read_records

QUICK = "--data.image_size 32 --k 5 --steps 2 --bootstrap 10 --quiet --eps 8/255".split()


@pytest.fixture
def start(trained, root):
    return ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]


def budget(argv):
    from hsat.cli.budget import main

    main([*argv])


def test_budgets_of_patients_are_counted_and_fall(start, tmp_path, capsys):
    budget([*start, "--attacks", "pgd,bim", "--fractions", "0.4,1", "--out", str(tmp_path)])
    records = read_records(tmp_path / "records.jsonl")
    accuracy = {r.attack_name: r.value for r in records if r.metric == "accuracy"}
    assert list(accuracy) == ["clean", "PGD-8@40%", "PGD-8@100%", "BIM-8@40%", "BIM-8@100%"]
    assert accuracy["clean"] >= accuracy["PGD-8@40%"] >= accuracy["PGD-8@100%"]
    with (tmp_path / "groups.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] == "PGD-8"]
    assert len(rows) == records[0].n == 2
    needed = np.array([float(row["needed"] or "inf") for row in rows])
    size = np.array([int(row["patches"]) for row in rows])
    for fraction in (0.4, 1):
        assert np.mean(needed > np.floor(fraction * size)) == accuracy[f"PGD-8@{100 * fraction:g}%"]
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["order"] == "worst"
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def kill_after_a_batch(launch, kill, command, argv, out):
    """Start the command and kill it once a batch is finished."""
    process = launch(command, *argv, "--out", str(out), cwd=out.parent)
    while process.poll() is None and not list(out.glob(".state/**/batch-*")):
        time.sleep(0.005)
    kill(process)
    assert list(out.glob(".state/**/batch-*")) and not (out / "records.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["budget", pytest.param("export", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(command, start, launch, kill, stops, tmp_path):
    call = importlib.import_module(f"hsat.cli.{command}").main
    ours, out, whole = [*start, "--batch_size", "2"], tmp_path / "out", tmp_path / "whole"
    call([*ours, "--out", str(whole)])
    kill_after_a_batch(launch, kill, command, ours, out)
    assert "--resume" in stops(call, [*ours, "--out", str(out)])
    assert "seed was 0, now 1" in stops(call, [*ours, "--out", str(out), "--resume", "--seed", "1"])
    call([*ours, "--out", str(out), "--resume"])
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(whole) for path in whole.rglob("*")}
    for path in (path for path in whole.rglob("*") if path.suffix in (".tif", ".jsonl", ".csv", ".md")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--fractions", "0.5,2"], r"fractions of the patches lie in \(0, 1\]; got 2"),
        (["--eps", "8"], "8/255"),
        (["--threat", "stain"], "--threat stain is for stained colour images"),
    ],
)
def test_mistakes_end_the_program_with_their_name(argv, named, start, tmp_path, stops):
    import re

    assert re.search(named, stops(budget, [*start, *argv, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_it_says_what_it_will_cost(start, tmp_path, caplog):
    caplog.set_level("INFO", logger="hsat")
    budget([*[word for word in start if word != "--quiet"], "--attacks", "pgd", "--out", str(tmp_path)])
    assert any(
        message.startswith("12 patches: at most 4 forward and 2 backward passes each, about ")
        for message in caplog.messages
    )
