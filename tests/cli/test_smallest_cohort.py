"""The commands on the smallest cohort that can be read: one class, one patient to look up and one to ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsat.cli.budget import main as budget
from hsat.cli.evaluate import main as whitebox
from hsat.cli.export import main as export
from hsat.cli.report import main as report
from hsat.cli.transfer import main as transfer
from hsat.cli.universal import main as universal
from hsat.data import write_synthetic_cohort
from hsat.eval import read_records

QUICK = "--data.image_size 32 --k 1 --bootstrap 10 --quiet".split()


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smallest") / "srh"
    return write_synthetic_cohort(root, classes=("hgg",), patients_per_class=2, slides=1, patches=1, size=32)


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (whitebox, "--steps 1 --attacks pgd --eps 8/255 --batch_size 1"),
        (transfer, "--steps 1 --attacks pgd --eps 8/255"),
        (budget, "--steps 1"),
        (export, "--steps 1"),
        (universal, "--epochs 1"),
    ],
    ids=["whitebox", "transfer", "budget", "export", "universal"],
)
def test_one_patient_of_one_class(smallest, trained, tmp_path, command, extra):
    checkpoint = str(trained / "final.safetensors")
    given = f"a={checkpoint}" if command in (transfer, universal) else checkpoint
    out = tmp_path / "out"
    command(["--checkpoint", given, "--data.root", str(smallest), *QUICK, *extra.split(), "--out", str(out)])
    records = read_records(out / "records.jsonl")
    assert records and all(record.low is None for record in records), "one patient has no interval"
    assert all(any("one class only (hgg)" in flag for flag in record.flags) for record in records)
    if command is whitebox:
        report([str(out), "--out", str(tmp_path / "report.html")])
        assert "one class only (hgg)" in (tmp_path / "report.html").read_text()


def test_a_last_batch_of_one_image_is_diagnosed(root, trained, tmp_path):
    """--query_patches one above --batch_size."""
    start = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *QUICK]
    options = "--steps 1 --attacks pgd --eps 8/255 --query_patches 5 --batch_size 4".split()
    whitebox([*start, *options, "--out", str(tmp_path / "out")])
    records = read_records(tmp_path / "out" / "records.jsonl")
    images = {record.settings["diagnosis"]["images"] for record in records if "diagnosis" in record.settings}
    assert images == {5}
