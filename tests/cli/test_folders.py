"""Default folders carry the time, collide with nothing, and are found again by --resume."""

from __future__ import annotations

import time

import pytest

from hsat.cli.evaluation import has_state
from hsat.cli.folders import choose_folder, settle_folder
from hsat.cli.ranks import Ranks
from hsat.cli.train import Train, is_unfinished


@pytest.fixture
def clock(monkeypatch):
    """clock(text): it is now that time of the day, in the year's last month."""

    shown = time.strftime

    def set_time(text):
        now = time.strptime(f"2026-11-{text}", "%Y-%m-%d %H:%M")
        monkeypatch.setattr("hsat.cli.folders.time.strftime", lambda form: shown(form, now))

    return set_time


def test_a_folder_that_was_named_is_taken_as_it_is(tmp_path):
    assert choose_folder(tmp_path / "mine") == tmp_path / "mine" and not (tmp_path / "mine").exists()


def test_the_time_is_part_of_the_name_and_names_are_in_its_order(tmp_path, clock):
    out, made = tmp_path / "runs" / "evaluation-TIME", []
    for now in ("28 17:30", "28 17:30", "28 17:30", "28 17:31", "29 08:00"):
        clock(now)
        made.append(choose_folder(out))
    assert [path.name for path in made[:3]] == [
        "evaluation-2026-11-28-1730",
        "evaluation-2026-11-28-1730-02",
        "evaluation-2026-11-28-1730-03",
    ]
    assert made == sorted(made) and len(set(made)) == 5 and all(path.is_dir() for path in made)


def test_resume_takes_the_newest_unfinished_run(tmp_path, capsys):
    out = tmp_path / "evaluation-TIME"
    for name in ("evaluation-2026-11-28-1730", "evaluation-2026-11-28-1731", "evaluation-old", "evaluation-2"):
        (tmp_path / name / ".state").mkdir(parents=True)
    (tmp_path / "evaluation-2026-11-29-1000").mkdir()  # finished
    assert choose_folder(out, resume=True, is_unfinished=has_state).name == "evaluation-2026-11-28-1731"
    assert "evaluation-2026-11-28-1731, the newest unfinished run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no unfinished run .*budget-\*; name the folder of the run: --out FOLDER"):
        choose_folder(tmp_path / "budget-TIME", resume=True, is_unfinished=has_state)


def test_a_training_is_unfinished_until_its_last_file(tmp_path):
    assert not is_unfinished(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert is_unfinished(tmp_path)
    (tmp_path / "final.safetensors").touch()
    assert not is_unfinished(tmp_path)


def test_processes_that_are_started_anew_go_on_where_the_others_were(tmp_path, monkeypatch):
    class Board(dict):
        def check(self, keys):
            return all(key in self for key in keys)

        def set(self, key, value):
            self[key] = value.encode()

        get = dict.__getitem__

    monkeypatch.chdir(tmp_path)
    board, settings = Board(), Train.load([])
    first = settle_folder(settings, Ranks.alone("cpu")._replace(board=board), resume=False, is_unfinished=has_state)
    again = Ranks.alone("cpu")._replace(board=board, again=True)
    assert settle_folder(settings, again, resume=False, is_unfinished=has_state).out == first.out
    other = settle_folder(settings, Ranks.alone("cpu"), resume=False, is_unfinished=has_state)
    assert other.out != first.out


@pytest.mark.slow
def test_two_ranks_write_into_one_folder(torchrun, finish, options, tmp_path):
    shown = finish(torchrun("train", *options, "--train.steps", "1", cwd=tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "final.safetensors").exists(), shown
    assert f"hsat evaluate --run runs/{folder.name}" in shown


def test_a_training_is_resumed_without_its_name(options, tmp_path, monkeypatch, capsys, stops):
    from hsat.cli.train import main

    monkeypatch.chdir(tmp_path)
    assert "finds no unfinished run runs/hsat-*" in stops(main, [*options, "--resume"])
    main([*options])
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "final.safetensors").unlink()  # as if it had been killed after its last checkpoint
    main([*options, "--resume"])
    assert (folder / "final.safetensors").exists() and list((tmp_path / "runs").iterdir()) == [folder]
    assert f"hsat evaluate --run runs/{folder.name}" in capsys.readouterr().err
