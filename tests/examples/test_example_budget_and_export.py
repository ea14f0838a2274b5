"""hierarchical_budget.py and export_adversarial.py: what they write agrees with itself, and how they refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import time

import numpy as np
import pytest

from hsat.data import read_opensrh
from hsat.data.readers import read_raw
from hsat.eval import read_records

QUICK = "--data.image_size 32 --k 5 --steps 2 --bootstrap 10 --quiet --eps 8/255".split()


@pytest.fixture
def start(trained, root):
    return ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]


def budget(argv):
    from hierarchical_budget import main

    main([*argv])


def export(argv):
    from export_adversarial import main

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


def test_files_are_a_cohort_inside_the_ball_and_no_run_overwrites_another(start, root, tmp_path, stops, capsys):
    export([*start, "--out", str(tmp_path / "adv")])
    records = read_records(tmp_path / "adv/records.jsonl")
    assert {r.attack_name for r in records} == {"clean", "PGD-raw_srh-8", "PGD-raw_srh-8 (files)"}
    assert {r.settings["bootstrap"] for r in records} == {10}
    source, files = read_opensrh(root), read_opensrh(tmp_path / "adv/cohort")
    where = {record.path: row for row, record in enumerate(source.records)}
    gap = [
        (read_raw(files.path(row)).double() - read_raw(source.path(where[record.path])).double()).abs().max().item()
        for row, record in enumerate(files.records)
    ]
    assert len(gap) == len({record.path for record in files.records}) == 12
    assert 0.9 * 8 / 255 < max(gap) <= 8 / 255 + 1e-7
    assert "of their numbers changed" in capsys.readouterr().err
    assert "exists and is left untouched" in stops(export, [*start, "--out", str(tmp_path / "adv")])


def kill_after_a_batch(launch, script, argv, out):
    """Start the script and kill it once a batch is finished."""
    process = launch(f"{script}.py", *argv, "--out", str(out), cwd=out.parent)
    while process.poll() is None and not list(out.glob(".state/**/batch-*")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(out.glob(".state/**/batch-*")) and not (out / "records.jsonl").exists()


@pytest.mark.parametrize(("script", "call"), [("hierarchical_budget", budget), ("export_adversarial", export)])
def test_a_killed_run_goes_on(script, call, start, launch, stops, tmp_path):
    ours, out, whole = [*start, "--batch_size", "2"], tmp_path / "out", tmp_path / "whole"
    call([*ours, "--out", str(whole)])
    kill_after_a_batch(launch, script, ours, out)
    assert "--resume" in stops(call, [*ours, "--out", str(out)])
    assert "seed was 0, now 1" in stops(call, [*ours, "--out", str(out), "--resume", "--seed", "1"])
    call([*ours, "--out", str(out), "--resume"])
    assert {path.relative_to(out) for path in out.rglob("*")} == {path.relative_to(whole) for path in whole.rglob("*")}
    for path in (path for path in whole.rglob("*") if path.suffix in (".tif", ".jsonl", ".csv", ".md")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("script", "argv", "named"),
    [
        (budget, ["--fractions", "0.5,2"], r"fractions of the patches lie in \(0, 1\]; got 2"),
        (budget, ["--eps", "8"], "8/255"),
        (budget, ["--threat", "stain"], "--threat stain is for stained colour images"),
        (export, ["--eps", "4/255,8/255"], r"--eps has \d"),
        (export, ["--threat", "linf"], "an SRH file holds two channels"),
    ],
)
def test_mistakes_end_the_program_with_their_name(script, argv, named, start, tmp_path, stops):
    import re

    assert re.search(named, stops(script, [*start, *argv, "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out" / "records.jsonl").exists()
