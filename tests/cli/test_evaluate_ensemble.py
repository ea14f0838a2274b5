"""hsat evaluate --attacks ensemble, --cache, and a run that is killed and goes on."""

from __future__ import annotations

import csv
import time

import pytest

from hsat.eval import read_records

QUICK = "--data.image_size 32 --steps 2 --bootstrap 10 --gallery 0 --diagnose 0 --k 5 --eps 32/255 --quiet".split()


def evaluate(argv):
    from hsat.cli.evaluate import main

    main([*argv])


@pytest.fixture
def argv(trained, root):
    both = f"first={trained / 'best.safetensors'},second={trained / 'last.pt'}"
    return ["--checkpoint", both, "--data.root", str(root), *QUICK, "--batch_size", "4", "--query_patches", "8"]


@pytest.mark.slow
def test_an_ensemble_survives_a_kill_and_names_who_broke_what(argv, launch, kill, stops, tmp_path):
    ours = [*argv, "--attacks", "pgd,ensemble", "--cache", str(tmp_path / "cache")]
    evaluate([*ours, "--out", str(tmp_path / "whole")])
    out = tmp_path / "out"
    process = launch("evaluate", *ours, "--out", str(out), cwd=tmp_path)
    while process.poll() is None and not list(out.glob(".state/*/batch-*")):
        time.sleep(0.005)
    kill(process)
    assert 1 <= len(list(out.glob(".state/*/batch-*.arrays"))) < 4 and not (out / "records.jsonl").exists()
    assert "--resume" in stops(evaluate, [*ours, "--out", str(out)])
    message = stops(evaluate, [*ours, "--out", str(out), "--resume", "--seed", "1"])
    assert "begun under other settings" in message and "seed was 0, now 1" in message
    evaluate([*ours, "--out", str(out), "--resume"])
    for name in ("records.jsonl", "ensemble.csv", "table.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / ".state").exists()
    records = read_records(out / "records.jsonl")
    found = {(r.model, r.attack_name): r.value for r in records if (r.level, r.metric) == ("patch", "accuracy")}
    with (out / "ensemble.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for model, other in (("first", "second"), ("second", "first")):
        mine = [row for row in rows if row["model"] == model]
        assert found[model, "ensemble-32"] == sum(row["broken_by"] == "" for row in mine) / len(mine)
        assert found[model, "ensemble-32"] <= found[model, "PGD-32"]
        assert f"transfer from {other}" in (out / "table.md").read_text()


def test_threat_models_without_a_ball_of_pixels_are_refused(argv, stops, tmp_path):
    message = stops(evaluate, [*argv, "--attacks", "ensemble", "--threat", "raw_srh", "--out", str(tmp_path / "out")])
    assert "--attacks ensemble needs a ball of pixels" in message


def test_compute_is_stated_in_the_records(argv, tmp_path, stops):
    ways = ["--attacks", "pgd", "--noise", "false", "--compute", "channels_last,bfloat16,fold_batchnorm"]
    evaluate([*argv, *ways, "--out", str(tmp_path / "out")])
    how = {"memory_format": "channels_last", "autocast": "bfloat16", "batchnorm": "folded"}
    assert all(record.settings["computed"] == how for record in read_records(tmp_path / "out" / "records.jsonl"))
    assert "compute" in stops(evaluate, [*argv, "--compute", "faster", "--out", str(tmp_path / "out")])
