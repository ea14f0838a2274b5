"""Records as JSON lines: written whole, read back the same, broken lines named."""

from __future__ import annotations

import json
import os

import pytest

from hsat.eval import read_records, write_records
from hsat.eval.options import software_versions

NEWER = ("schema", "classifier", "chance")


def test_written_and_read_back_the_same(made_record, tmp_path):
    records = (
        made_record(),
        made_record(low=None, high=None, flags=(), model="größer"),
        made_record(value=1 / 3, forwards=11.0),
    )
    path = write_records(tmp_path / "runs" / "records.jsonl", iter(records))
    assert read_records(path) == records
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert os.listdir(path.parent) == ["records.jsonl"]


def test_a_failed_write_leaves_the_old_file(made_record, tmp_path):
    path = write_records(tmp_path / "records.jsonl", [made_record()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(path, [made_record(value=float("nan"))])
    assert read_records(path) == (made_record(),)
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_a_write_that_fails_halfway_leaves_the_old_file(made_record, tmp_path, monkeypatch):
    path = write_records(tmp_path / "records.jsonl", [made_record()])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_records(path, [made_record(value=0.1)])
    assert read_records(path) == (made_record(),)
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
def test_a_broken_line_is_named(made_record, tmp_path, line, message):
    path = write_records(tmp_path / "records.jsonl", [made_record()])
    good = path.read_text()
    bad = json.dumps(json.loads(good) | {"levle": 1}) if line is None else line
    path.write_text(good + "\n" + bad + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_versions_are_recorded():
    assert {"python", "torch", "numpy", "hsat"} <= software_versions().keys()


def test_records_of_schema_1_are_read(made_record, tmp_path):
    path = write_records(tmp_path / "records.jsonl", [made_record(schema=2, classifier="KNNClassifier(k=200)")])
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in NEWER}
    path.write_text(json.dumps(old) + "\n")
    assert read_records(path) == (made_record(),)
    assert (made_record().schema, made_record().classifier) == (1, "")


def test_records_of_schema_2_are_read(made_record, tmp_path):
    path = write_records(tmp_path / "records.jsonl", [made_record(schema=2, chance=0.25)])
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "chance"}
    path.write_text(json.dumps(old) + "\n")
    assert read_records(path) == (made_record(schema=2),) and made_record().chance is None


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (', "value": 0.99}', "the key 'value' comes twice"),
        (', "settings": {"x": Infinity}}', "Infinity is no number"),
        (', "n": ' + "1" * 5000 + "}", "digits"),
        (', "value": 1e308}', "value of accuracy is 1e[+]308, which must lie in"),
        (', "value": -0.5}', "value of accuracy is -0.5"),
        (', "high": 1.5}', "high of accuracy is 1.5"),
        (', "chance": -5.0}', "chance of accuracy is -5.0"),
    ],
)
def test_what_is_no_share_or_comes_twice_is_refused_by_its_line(made_record, tmp_path, ending, message):
    path = write_records(tmp_path / "records.jsonl", [made_record()])
    values = json.loads(path.read_text())
    name = ending.split('"')[1]
    kept = values if "twice" in message else {key: value for key, value in values.items() if key != name}
    path.write_text(path.read_text() + json.dumps(kept)[:-1] + ending + "\n")
    with pytest.raises(ValueError, match=rf"records\.jsonl, line 2: .*{message}"):
        read_records(path)


def test_drops_and_drifts_may_leave_what_shares_keep(made_record, tmp_path):
    drop = made_record(metric="accuracy_drop", value=-0.25, low=-0.5, high=0.0, chance=None)
    rounded = made_record(value=1 + 2e-16)
    assert read_records(write_records(tmp_path / "records.jsonl", [drop, rounded])) == (drop, rounded)
