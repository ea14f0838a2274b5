"""Records as JSON lines: written whole, read back the same, broken lines named."""

from __future__ import annotations

import json
import os

import pytest

from hsat.eval import Record, read_records, write_records
from hsat.eval.records import software_versions


def record(**changes) -> Record:
    values = dict(
        model="hsat",
        attack="PGD(...)",
        attack_name="PGD-8",
        eps="8/255",
        eps_value=8 / 255,
        target="features",
        level="patch",
        metric="accuracy",
        value=0.5,
        low=0.25,
        high=0.75,
        n=100,
        k=200,
        temperature=0.07,
        seed=0,
        versions={"torch": "2"},
        flags=("doubtful",),
        settings={"random_start": True, "note": "noted"},
    )
    return Record(**(values | changes))


def test_written_and_read_back_the_same(tmp_path):
    records = (record(), record(low=None, high=None, flags=(), model="größer"), record(value=1 / 3, forwards=11.0))
    path = write_records(tmp_path / "runs" / "records.jsonl", iter(records))
    assert read_records(path) == records
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert os.listdir(path.parent) == ["records.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_records(tmp_path / "records.jsonl", [record()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(path, [record(value=float("nan"))])
    assert read_records(path) == (record(),)
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_records(tmp_path / "records.jsonl", [record()])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_records(path, [record(value=0.1)])
    assert read_records(path) == (record(),)
    assert os.listdir(tmp_path) == ["records.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"records.jsonl, line 3: not JSON \(.*at column 2\)"),
        ("[1]", "records.jsonl, line 3: expected a JSON object, got list"),
        ('{"model": "a"}', r"records.jsonl, line 3: fields \['attack', .* are missing"),
        (None, r"records.jsonl, line 3: unknown fields \['levle'\]"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write_records(tmp_path / "records.jsonl", [record()])
    good = path.read_text()
    bad = json.dumps(json.loads(good) | {"levle": 1}) if line is None else line
    path.write_text(good + "\n" + bad + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_versions_are_recorded():
    assert {"python", "torch", "numpy", "hsat"} <= software_versions().keys()


def test_records_of_schema_1_are_read(tmp_path):
    path = write_records(tmp_path / "records.jsonl", [record(schema=2, classifier="KNNClassifier(k=200)")])
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("schema", "classifier")}
    path.write_text(json.dumps(old) + "\n")
    assert read_records(path) == (record(),)
    assert (record().schema, record().classifier) == (1, "")
