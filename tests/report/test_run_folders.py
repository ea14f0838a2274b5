"""Run folders: what older versions wrote still opens, and values of another kind are named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hsat.report import open_runs, write_report

OLD_RECORD = {  # of schema 1: no classifier, no schema, settings under their older names
    "attack": "", "attack_name": "clean", "backwards": 0.0, "checkpoint": "", "cohort": "c0ffee", "eps": "0",
    "eps_value": 0, "flags": ["a flag"], "forwards": 0.0, "high": None, "k": 20, "level": "patch", "low": None,
    "metric": "accuracy", "model": "old", "n": 4, "seed": 0, "split": "val", "surrogate": "", "target": "knn",
    "settings": {"how": "mean", "absent": "skip", "keys": "id", "compat": "", "bank_rows": 9, "layer": "features"},
    "temperature": 0.07, "value": 0.75, "versions": {"hsat": "0.1.0"},
}  # fmt: skip
OLD_DIFFERENCE = {
    "model": "new", "against": "old", "condition": "clean", "k": 20, "level": "patch", "metric": "accuracy",
    "value": 1, "value_against": 0.75, "difference": 0.25, "low": None, "high": None, "not_above": None, "n": 4,
    "patients": 1, "reason": "one patient only",
}  # fmt: skip


OLD_ABOUT = {  # without the number of its form
    "cohort": "c0ffee", "command": ["examples/train_hsat.py", "--out", "run"],
    "settings": {"seed": 0, "train": {"steps": 2}}, "versions": {"hsat": "0.1.0", "threads": "2"},
}  # fmt: skip
OLD_LOG = """\
step,epoch,loss,lr,adversarial_patch,adversarial_slide,adversarial_patient,eps,strength,tune_clean_mca
0,0,3.5,0.0,1.5,1.0,1.0,0.00392156862745098,1.0,
1,0,2.5,0.001,1.0,0.75,0.75,0.00392156862745098,1.0,0.5
2,1,2.0,0.0
"""


def test_a_training_of_an_older_version_opens(tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(OLD_ABOUT))
    (folder / "train.csv").write_text(OLD_LOG)
    (run,) = open_runs([folder])
    assert run.about["settings"]["train"]["steps"] == 2 and "schema" not in run.about
    assert run.training["loss"] == [3.5, 2.5], "the last row is not finished"
    assert np.isnan(run.training["tune_clean_mca"][0]) and run.training["tune_clean_mca"][1] == 0.5
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert "Training loss of trained." in page and "train.steps" in page and "examples/train_hsat.py" in page


def test_a_run_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(OLD_ABOUT | {"schema": 99}))
    with pytest.raises(ValueError, match="has form 99, and this version of hsat reads up to 1; update hsat"):
        open_runs([tmp_path])


@pytest.fixture
def old_run(tmp_path):
    """A run folder as commit 91c38be wrote it."""
    run = tmp_path / "run"
    folder = run / "evidence" / "old"
    folder.mkdir(parents=True)
    attacked = OLD_RECORD | {"attack": "PGD(Linf(eps=8/255))", "attack_name": "PGD-8", "eps_value": 8 / 255}
    (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (OLD_RECORD, attacked)))
    (run / "differences.json").write_text(json.dumps([OLD_DIFFERENCE]))
    (run / "run.json").write_text(json.dumps(OLD_ABOUT))
    about = {"checkpoint": "", "class_names": ["a", "b"], "model": "old", "target": "knn", "variance": [1, 0.0]}
    (folder / "about.json").write_text(json.dumps(about))
    label = np.array([0, 1, 0, 1], dtype=np.int32)
    for name in ("clean", "PGD-8"):
        np.savez_compressed(
            folder / f"{name}.npz",
            name=np.str_(name),
            patch_label=label,
            patch_prediction_k20=label,
            places=np.zeros((4, 2), dtype=np.float32),
            place_label=label,
            movement=np.float64("nan"),
        )
    return run


def test_a_run_of_an_older_version_opens(old_run, tmp_path):
    (run,) = open_runs([old_run])
    assert [(record.schema, record.classifier, record.target) for record in run.records] == [(1, "", "knn")] * 2
    (artifacts,) = run.artifacts
    assert artifacts.conditions["PGD-8"].prediction["patch", 20].tolist() == [0, 1, 0, 1]
    assert artifacts.variance == (1.0, 0.0) and artifacts.conditions["clean"].movement is None
    assert run.differences[0].difference == 0.25
    page = write_report([old_run], tmp_path / "page.html").read_text()
    assert "Attacks on the vote of the nearest neighbours" in page and "a flag" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "0.5"}, r"line 1: value is '0\.5'; Input should be a valid number"),
        ({"value": True}, "line 1: value is True; Input should be a valid number"),
        ({"n": 1.5}, r"line 1: n is 1\.5; Input should be a valid integer"),
        ({"k": -1}, "line 1: k is -1; Input should be greater than or equal to 0"),
        ({"flags": "x"}, "line 1: flags is 'x'; Input should be a valid array"),
        ({"settings": {"bank_rows": "9"}}, "line 1, settings: bank_rows is '9'; Input should be a valid integer"),
        ({"extra": 1}, r"line 1: unknown fields \['extra'\]"),
    ],
)
def test_values_of_another_kind_are_named(old_run, changes, message):
    (old_run / "records.jsonl").write_text(json.dumps(OLD_RECORD | changes))
    with pytest.raises(ValueError, match=message):
        open_runs([old_run])
