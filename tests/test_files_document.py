"""docs/files.md lists the fields and files that the code writes, and no others."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hsat.cli.evaluation import RESULTS
from hsat.eval import Difference, Record, ScoreTable, save_scores
from hsat.eval.records import SCHEMA
from hsat.models.metadata import EncoderSpec
from hsat.run_folder import SCHEMA as RUN_SCHEMA
from hsat.run_folder import write_run_file

TEXT = (Path(__file__).parents[1] / "docs" / "files.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(text: str) -> set[str]:
    """The code words in the first cells of the tables of a text."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"`([^`]*)`", cell)}


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def test_records():
    assert first_column(section("records.jsonl")) == set(fields_of(Record))
    needed = {
        name
        for name, field in fields_of(Record).items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    rows = re.findall(r"^\| `(\w+)` \| needed \|", section("records.jsonl"), re.MULTILINE)
    assert set(rows) == needed
    assert f"records of now have {SCHEMA} |" in section("records.jsonl")


def test_differences():
    assert first_column(section("differences.json")) == set(fields_of(Difference))


def test_scores(tmp_path):
    ids = np.arange(2)
    table = ScoreTable(np.eye(2), ids, ids, ids, ids, ("a", "b"))
    arrays = np.load(save_scores(tmp_path / "scores.npz", [table]))
    assert first_column(section("scores.npz")) == {name.removeprefix("0/") for name in arrays.files}
    for name in json.loads(str(arrays["about"]))[0]:
        assert f"`{name}`" in section("scores.npz")


def test_artifacts(made_artifacts, tmp_path):
    folder = made_artifacts(tmp_path, "HSAT")
    about = json.loads((folder / "about.json").read_text())
    arrays = np.load(folder / "PGD-8.npz")
    text = section("evidence/")
    assert all(f"`{name}`" in text for name in about)
    written = {name for name in arrays.files if "_prediction_" not in name}
    assert written <= first_column(text) and "patch_prediction_k20" in arrays.files
    assert first_column(text) - set(arrays.files) == {
        *("about.json", "<condition>.npz", "<condition>-000.png", "<condition>-000-perturbation.png"),
    }


def test_every_result_of_an_evaluation_is_listed():
    listed = first_column(TEXT.split("\n## ")[0])
    assert {name if name != "evidence" else "evidence/" for name in RESULTS} <= listed


def test_run_file(tmp_path):
    content = write_run_file(tmp_path, {}, cohort="c0ffee", command=["hsat"])
    assert content.keys() <= first_column(section("run.json"))
    assert f"form of run.json and train.csv: {RUN_SCHEMA};" in section("run.json")


def test_the_folder_of_a_training(trained):
    listed = first_column(TEXT.split("\n## ")[0])
    assert {path.name for path in trained.iterdir()} <= listed
    assert json.loads((trained / "run.json").read_text()).keys() <= first_column(section("run.json"))
    with (trained / "train.csv").open(newline="") as file:
        assert set(next(csv.reader(file))) <= first_column(section("train.csv"))
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    assert checkpoint.keys() == first_column(section("last.pt"))
    assert f'"{checkpoint["format"]}"' in section("last.pt")


def test_columns_that_only_some_trainings_have():
    """The names that the training gives its numbers, in its own words."""
    from hsat.training import validation
    from hsat.types import LEVELS

    terms = {f"{kind}_{level}" for kind in ("clean", "adversarial") for level in LEVELS}
    assert terms <= first_column(section("train.csv"))
    held_out = set(re.findall(r"tune_\w+", validation.held_out_validation.__doc__ or ""))
    assert len(held_out) == 4 and held_out <= first_column(section("train.csv"))


@pytest.mark.parametrize("name", ["best", "final"])
def test_metadata_of_encoders(trained, name):
    path = trained / f"{name}.safetensors"
    if not path.exists():
        pytest.skip("this training held no patients out")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"hsat"}
    content = json.loads(metadata["hsat"])
    assert content.keys() <= first_column(section("Encoders"))
    rare = {"image_size", "per_image"}  # which few files have
    assert content["encoder"].keys() | rare == fields_of(EncoderSpec).keys()
    assert all(f"`{key}`" in section("Encoders") for key in content["encoder"].keys() | rare)
