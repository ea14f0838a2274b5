"""hsat export: the files are a cohort inside the ball, and no run overwrites another."""

from __future__ import annotations

import pytest

from hsat.data import read_opensrh
from hsat.data.readers import read_raw
from hsat.eval import read_records

QUICK = "--data.image_size 32 --k 5 --steps 2 --bootstrap 10 --quiet --eps 8/255".split()


@pytest.fixture
def start(trained, root):
    return ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]


def export(argv):
    from hsat.cli.export import main

    main([*argv])


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
    before = (tmp_path / "adv" / "records.jsonl").read_bytes()
    assert "holds the results of another run" in stops(export, [*start, "--out", str(tmp_path / "adv")])
    export([*start, "--out", str(tmp_path / "adv"), "--overwrite", "true"])
    assert (tmp_path / "adv" / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--eps", "4/255,8/255"], "--eps has 3"),
        (["--threat", "linf"], "an SRH file holds two channels"),
    ],
)
def test_mistakes_end_the_program_with_their_name(argv, named, start, tmp_path, stops):
    assert named in stops(export, [*start, *argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_it_says_what_it_will_cost(start, tmp_path, caplog):
    caplog.set_level("INFO", logger="hsat")
    export([*[word for word in start if word != "--quiet"], "--out", str(tmp_path / "adv")])
    assert any(
        message.startswith("12 patches: at most 5 forward and 2 backward passes each, about ")
        for message in caplog.messages
    )
