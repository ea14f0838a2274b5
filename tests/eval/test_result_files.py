"""result.save(folder): every evaluation leaves what the page, the tables and other programs read."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest

from hsat.attacks import PGD, AttackEnsemble, Linf, NaturalShift
from hsat.classifiers import KNNClassifier
from hsat.eval import (
    CertifyOptions,
    Provenance,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    evaluate_budget,
    evaluate_transfer,
    evaluate_whitebox,
    load_scores,
    read_records,
)
from hsat.eval.budget import write_groups
from hsat.report import open_runs, read_artifacts, write_report

ATTACK = PGD(Linf(8 / 255), step_size=4 / 255, steps=2)
KNN, NAME = KNNClassifier(k=3), Provenance(model="mine", checkpoint="digest")


@pytest.fixture
def parts(toy_encoder, toy_batches):
    return toy_encoder, toy_batches(seed=0, sizes=(24,)), toy_batches(seed=1, sizes=(12,), first_id=1000)


def test_a_whitebox_result_is_saved_whole(parts, tmp_path):
    blur = next(iter(NaturalShift.standard(stained=False).items()))
    run = RunOptions(noise=False, keep_examples=2)
    result = evaluate_whitebox(*parts, {"PGD-8": ATTACK, blur[0]: blur[1]}, classifier=KNN, run=run, provenance=NAME)
    assert result.save(tmp_path / "mine") == tmp_path / "mine"
    assert read_records(tmp_path / "mine" / "records.jsonl") == result.records
    assert {table.condition for table in load_scores(tmp_path / "mine" / "scores.npz")} == set(result.tables)
    (artifacts,) = read_artifacts(tmp_path / "mine" / "evidence")
    assert set(artifacts.conditions) == {"clean", "PGD-8"} and artifacts.checkpoint == "digest"
    assert len(artifacts.conditions["PGD-8"].patches) == 2
    about = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert about["settings"] == {"model": "mine", "target": "decision", "seed": 0} and about["command"] == []
    (folder,) = open_runs([tmp_path / "mine"])
    assert folder.absent == () and "mine" in write_report([tmp_path / "mine"], tmp_path / "page.html").read_text()


def test_saving_again_replaces(parts, tmp_path):
    for steps in (1, 2):
        attack = PGD(Linf(8 / 255), step_size=4 / 255, steps=steps)
        result = evaluate_whitebox(*parts, {"PGD": attack}, classifier=KNN, run=RunOptions(noise=False))
        result.save(tmp_path)
    assert read_records(tmp_path / "records.jsonl") == result.records
    (artifacts,) = read_artifacts(tmp_path / "evidence")
    assert np.array_equal(artifacts.conditions["PGD"].label["patch"], result.tables["PGD"].label)


def test_an_ensemble_says_what_broke_each_patch(parts, tmp_path):
    ensemble = AttackEnsemble.standard(Linf(8 / 255), steps=1, targets=1, queries=2)
    result = evaluate_whitebox(*parts, {"ensemble-8": ensemble}, classifier=KNN, run=RunOptions(noise=False))
    with (result.save(tmp_path) / "ensemble.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["patch"]) for row in rows] == result.outcomes["ensemble-8"].patch.tolist()


def test_budgets_transfers_and_certificates(parts, tmp_path):
    encoder, bank, queries = parts
    run, scoring = RunOptions(noise=False), Scoring(bootstrap=0)
    budget = evaluate_budget(*parts, ATTACK, classifier=KNN, run=run, scoring=scoring, provenance=NAME)
    named = dataclasses.replace(
        budget, records=tuple(dataclasses.replace(record, model="=1+1") for record in budget.records)
    )
    assert "\n'=1+1," in (write_groups(tmp_path, [named]) / "groups.csv").read_text()
    with (budget.save(tmp_path / "budget") / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["group"]) for row in rows] == budget.groups.tolist()
    assert {(row["model"], row["attack"]) for row in rows} == {("mine", budget.records[-1].attack_name)}
    transfer = evaluate_transfer({"a": encoder}, bank, queries, {"PGD": ATTACK}, classifier=KNN, scoring=scoring)
    certificates = certify(
        *parts,
        Smoothing(sigma=0.1, selection=2, samples=2),
        options=CertifyOptions(noisy_bank=False),
        classifier=KNN,
        scoring=scoring,
    )
    for name, result in (("budget", budget), ("transfer", transfer), ("certificates", certificates)):
        result.save(tmp_path / name)
        assert read_records(tmp_path / name / "records.jsonl") == result.records
        assert (tmp_path / name / "run.json").exists()


def test_a_smaller_result_leaves_nothing_of_a_larger_one_and_other_files_stay(parts, tmp_path):
    ensemble = AttackEnsemble.standard(Linf(8 / 255), steps=1, targets=1, queries=2)
    run = RunOptions(noise=False)
    first = evaluate_whitebox(*parts, {"ensemble-8": ensemble}, classifier=KNN, run=run, provenance=NAME)
    other = Provenance(model="other")
    second = evaluate_whitebox(*parts, {"PGD-8": ATTACK}, classifier=KNN, run=run, provenance=other)
    first.save(tmp_path)
    mine = ("notes.txt", "evidence/notes.txt", "patches.png")
    for name in mine:
        (tmp_path / name).write_text("mine")
    second.save(tmp_path)
    alone = second.save(tmp_path / "alone")
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if alone not in (path, *path.parents)}
    assert names == {str(path.relative_to(alone)) for path in alone.rglob("*")} | set(mine)
    assert (tmp_path / "evidence" / "other").is_dir() and not (tmp_path / "ensemble.csv").exists()
    assert second.save(tmp_path) == tmp_path and read_records(tmp_path / "records.jsonl") == second.records


def test_a_result_stays_whole_when_the_next_one_cannot_be_written(parts, tmp_path):
    result = evaluate_whitebox(*parts, {"PGD-8": ATTACK}, classifier=KNN, run=RunOptions(noise=False), provenance=NAME)
    result.save(tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    broken = dataclasses.replace(result, tables={})
    for place in ("a", "new"):
        with pytest.raises(ValueError, match="clean"):
            broken.save(tmp_path / place)
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_is_no_result_and_goes(parts, tmp_path):
    result = evaluate_whitebox(*parts, {"PGD-8": ATTACK}, classifier=KNN, run=RunOptions(noise=False), provenance=NAME)
    (tmp_path / ".saving-killed" / "a").mkdir(parents=True)
    (tmp_path / "differences.json").write_text("[")
    result.save(tmp_path)
    assert not (tmp_path / "differences.json").exists() and not list(tmp_path.glob(".saving-*"))


def test_a_training_is_not_written_over(parts, tmp_path):
    result = evaluate_whitebox(*parts, {"PGD-8": ATTACK}, classifier=KNN, run=RunOptions(noise=False))
    (tmp_path / "train.csv").write_text("step\n")
    with pytest.raises(ValueError, match="holds a training"):
        result.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]
