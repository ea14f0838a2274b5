"""Score tables: what they refuse, and that a file gives back what was written, whole or not at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.eval import (
    Provenance,
    RunOptions,
    ScoreTable,
    Scoring,
    evaluate_whitebox,
    load_scores,
    save_scores,
    score_levels,
    score_tables,
)

GOOD = dict(
    scores=np.array([[0.2, 0.8], [0.6, 0.4]]),
    label=np.array([1, 0]),
    patch=np.array([7, 5]),
    slide=np.array([1, 1]),
    patient=np.array([3, 3]),
    class_names=("no", "yes"),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(class_names=("one",)), ValueError, "scores of 2 classes but 1 class names"),
        (dict(slide=np.array([1])), ValueError, r"2 rows of scores but slide has shape \(1,\)"),
        (dict(patient=np.array([0.5, 1.0])), TypeError, "patient must hold integers, got float64"),
        (dict(label=np.array([0, 2])), ValueError, "labels run from 0 to 2 for 2 class names"),
        (dict(patch=np.array([5, 5])), ValueError, "patch 5 stands 2 times in the table; wanted once"),
        (dict(scores=np.array([[np.nan, 1], [0, 1]])), ValueError, "scores are not finite"),
    ],
)
def test_tables_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        ScoreTable(**GOOD | change)


def test_a_file_gives_back_what_was_written(tmp_path):
    first = ScoreTable(**GOOD, cohort="abc", split="val", model="a", condition="PGD-8", k=20)
    second = dataclasses.replace(first, scores=first.scores[:, ::-1].copy(), model="ü", class_names=("yes", "no"))
    path = save_scores(tmp_path / "deep" / "scores.npz", [first, second])
    assert [file.name for file in path.parent.iterdir()] == ["scores.npz"]
    for table, again in zip((first, second), load_scores(path), strict=True):
        for field in dataclasses.fields(ScoreTable):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(table, field.name))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 damaged"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores.npz: no file of scores"):
        load_scores(tmp_path / "scores.npz")


def test_pickles_are_not_opened(tmp_path):
    np.savez(tmp_path / "scores.npz", about=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="no file of scores"):
        load_scores(tmp_path / "scores.npz")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_scores(tmp_path / "scores.npz")


def test_of_an_evaluation(toy_encoder, toy_batches):
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(20, 16))
    result = evaluate_whitebox(
        toy_encoder,
        bank,
        queries,
        {"PGD-8": attack},
        classifier=[KNNClassifier(k=15), KNNClassifier(k=5)],
        target="features",
        scoring=Scoring(bootstrap=0),
        run=RunOptions(noise=False),
        provenance=Provenance(model="toy"),
    )
    tables = score_tables(result)
    assert [(t.model, t.condition, t.k) for t in tables] == [
        ("toy", name, k) for name in ("clean", "PGD-8") for k in (15, 5)
    ]
    for table in tables:
        expected = score_levels(result.scores[table.condition][table.k], result.tables[table.condition])
        assert expected["patch"].accuracy == (table.scores.argmax(1) == table.label).mean()
        assert (table.cohort, table.split) == ("toy", "val")
