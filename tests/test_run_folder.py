"""Run folders: the lock between processes, run.json, train.csv."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import pytest

from hsat.run_folder import (
    OccupiedFolderError,
    TrainingLog,
    installed_versions,
    lock_folder,
    read_run_file,
    read_training_log,
    write_json,
    write_run_file,
)

HOLD = """
import sys, time
from hsat.run_folder import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    with pytest.raises(OccupiedFolderError, match="--out"), lock_folder(tmp_path / "run", patience=0.2):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock_folder(tmp_path / "run", patience=5) as folder:
        assert folder.is_dir()


def test_the_lock_is_free_after_an_error_inside(tmp_path):
    with pytest.raises(RuntimeError), lock_folder(tmp_path / "run"):
        raise RuntimeError
    with lock_folder(tmp_path / "run", patience=0):
        pass


def test_only_results_stay_behind(tmp_path):
    with lock_folder(tmp_path / "refused"):
        pass
    with lock_folder(tmp_path / "run") as folder:
        (folder / "records.jsonl").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["run", "run/records.jsonl"]


def test_the_file_of_a_killed_process_does_not_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with lock_folder(tmp_path / "run", patience=1):
        pass


def test_other_folders_are_free(tmp_path, holder):
    with lock_folder(tmp_path / "other", patience=0):
        pass


def test_run_file_holds_settings_cohort_versions_and_command(tmp_path):
    written = write_run_file(tmp_path, {"attack": {"eps": 0.5}}, cohort="abc", command=["hsat", "train"], note="x")
    content = read_run_file(tmp_path)
    assert content == written
    assert content["settings"] == {"attack": {"eps": 0.5}}
    assert (content["cohort"], content["command"], content["note"]) == ("abc", ["hsat", "train"], "x")
    assert content["versions"] == installed_versions()
    assert {"python", "hsat", "torch", "numpy"} <= content["versions"].keys()


def test_run_files_of_the_first_edition_are_read_and_later_forms_refused(tmp_path):
    write_json(tmp_path / "run.json", {"settings": {}, "cohort": "abc"})
    assert read_run_file(tmp_path)["cohort"] == "abc"
    write_json(tmp_path / "run.json", {"schema": 99})
    with pytest.raises(ValueError, match=r"run\.json.*99"):
        read_run_file(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_a_damaged_run_file_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run\.json"):
        read_run_file(tmp_path)


def test_rows_gain_columns_and_resumed_runs_drop_later_rows(tmp_path):
    log = TrainingLog(tmp_path)
    log.append({"step": 0, "loss": 2.0})
    log.append({"step": 1, "loss": 1.0, "held_out": 0.5})
    again = TrainingLog(tmp_path)
    again.keep_rows_before(1)
    again.append({"step": 1, "loss": 0.5})
    columns = read_training_log(tmp_path / "train.csv")
    assert columns["step"] == [0, 1]
    assert columns["loss"] == [2.0, 0.5]
    assert all(math.isnan(value) for value in columns["held_out"])


def test_a_half_written_row_is_no_row(tmp_path):
    log = TrainingLog(tmp_path)
    log.append({"step": 0, "loss": 2.0})
    with log.path.open("a") as file:
        file.write("1")
    assert read_training_log(log.path) == {"step": [0], "loss": [2.0]}
    again = TrainingLog(tmp_path)
    again.keep_rows_before(5)
    assert log.path.read_text() == "step,loss\n0,2.0\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [("step,loss\n0,two\n", "line 2"), ("epoch,loss\n0,1\n", "step")],
)
def test_a_damaged_log_is_named_with_its_line(tmp_path, text, place):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.csv.*{place}"):
        read_training_log(path)


def test_a_diverged_loss_is_no_number_of_a_chart(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss\n0,inf\n1,1e301\n")
    assert all(math.isnan(value) for value in read_training_log(tmp_path / "train.csv")["loss"])


def test_a_pipe_in_place_of_the_log_is_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    for write in (lambda log: log.append({"step": 0}), lambda log: log.keep_rows_before(1)):
        with pytest.raises(ValueError, match=r"train\.csv is damaged .*named pipe"):
            write(TrainingLog(tmp_path))
