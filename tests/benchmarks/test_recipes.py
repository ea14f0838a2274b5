"""The study of recipes: equal compute, a choice by rule, failures in the table, and a run at its smallest size."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from hsat.data import read_opensrh, write_synthetic_cohort
from hsat.models import load_encoder
from hsat.run_folder import read_training_log

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("recipe_candidates", "recipes", "recipes_report")


@pytest.fixture(scope="module")
def study():
    """The three modules of the study by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def result(study, recipe, *, right="", index=0, stage="final", cohort="painted", **more):
    """A finished run whose patches under the ensemble (trials: PGD-10) are as given, two of each patient."""
    radius = study["recipes"].RADII[cohort]
    share = right.count("1") / max(1, len(right))
    names = ("clean", *(f"PGD-10 {r}/255" for r in radius), f"ensemble {radius[0]}/255")
    run = {"recipe": recipe, "cohort": cohort, "index": index, "stage": stage, "multiple": 1, "equal": "passes"}
    made = study["recipe_candidates"].RECIPES[recipe]
    return {
        "run": run | {"backbone": ""},
        "family": made.family,
        "change": made.change,
        "accuracy": {"knn": {name: dict.fromkeys(("patch", "slide", "patient"), share) for name in names}},
        "right": {"knn": dict.fromkeys(names, right)},
        "patients": " ".join(str(row // 2) for row in range(len(right))),
        "steps": 10,
        "passes": 60.0,
        "config": made.config(cohort, steps=10, seed=index).model_dump(mode="json"),
        "train_cpu_seconds": 5.0,
        "chance": 0.25,
        "commit": "0" * 40,
        "versions": {"torch": "2"},
    } | more


def test_each_side_has_eight_trials_on_each_cohort(study):
    recipes = study["recipe_candidates"].RECIPES
    for cohort in ("painted", "ebhi"):
        for family in ("tuned HSAT", "HSAT+"):
            assert sum(cohort in one.trials and one.family == family for one in recipes.values()) == 8


def test_recipes_meet_at_equal_passes_and_at_equal_seconds(study):
    recipes = study["recipes"]
    for name, recipe in study["recipe_candidates"].RECIPES.items():
        run = recipes.Run(name, "painted", 3, "final")
        assert 0.98 <= recipes.steps_of(run, {}, "cpu") * recipe.passes_per_batch / 1440 <= 1, name
    run = recipes.Run("plus", "painted", 3, "final", equal="seconds")
    with pytest.raises(LookupError, match="how many seconds plus takes on painted"):
        recipes.steps_of(run, {}, "cpu")
    known = {"a": result(study, "hsat"), "b": result(study, "plus", train_cpu_seconds=4.0, steps=4)}
    assert recipes.steps_of(run, known, "cpu") == 120, "a batch takes twice the seconds of HSAT's, which has 240"


def test_the_published_recipes_are_the_librarys(study):
    config = study["recipe_candidates"].RECIPES["hsat"].config("painted", steps=3, seed=0)
    assert config.attack == type(config).hsat().attack and config.temperature == 0.07
    plus = study["recipe_candidates"].RECIPES["plus"].config("painted", steps=3, seed=0)
    ours = type(plus).hsat_plus()
    assert (plus.attack, plus.temperature, plus.layer) == (ours.attack, ours.temperature, ours.layer)


def test_the_choice_follows_the_primary_radius_and_passes_over_failures(study):
    trials = {
        "a": result(study, "tuned-pgd2", right="1000", stage="trial"),
        "b": result(study, "tuned-pgd1", right="1110", stage="trial"),
        "c": result(study, "plus", right="1111", stage="trial", failure="FloatingPointError: the loss is nan"),
        "d": result(study, "plus-hot", right="1100", stage="trial"),
        "e": result(study, "plus-rate", right="1111", stage="final"),
    }
    assert study["recipes"].choose(trials, "painted") == {"tuned HSAT": "tuned-pgd1", "HSAT+": "plus-hot"}
    assert study["recipes"].choose(trials, "ebhi") == {}


def test_a_difference_is_paired_over_patients_of_all_seeds(study):
    report = study["recipes_report"]
    runs = {}
    for index in (3, 4):
        runs[f"a{index}"] = result(study, "plus", right="1111110110101111", index=index)
        runs[f"b{index}"] = result(study, "hsat", right="1010100010100101", index=index)
    mine, theirs = ({"recipe": name, "multiple": 1} for name in ("plus", "hsat"))
    said = report.difference(runs, "painted", (mine, theirs), "ensemble 4/255")
    assert said.startswith("+37.5 [+") and said.endswith("2 runs, 16 patients")
    del runs["b4"]
    assert report.difference(runs, "painted", (mine, theirs), "clean").endswith("1 runs, 8 patients")
    del runs["b3"]
    assert report.difference(runs, "painted", (mine, theirs), "clean") == "not run"


def test_the_page_says_what_is_missing_and_what_failed(study, tmp_path):
    run = result(study, "plus", right="11", stage="trial", failure="ValueError: no pairs")
    page = study["recipes_report"].document({"trial-painted-0-plus-0.5x": run}, tmp_path / "no.json")
    assert "- `trial-painted-0-plus-0.5x` failed: ValueError: no pairs" in page
    assert "- trial, painted: 17 of 18 runs: " in page and "`trial-ebhi-0-plus-small-0.5x`" in page
    assert "`final-ebhi-4-hsat-1x`" in page and "No finalist has been run." in page and "Not diagnosed." in page
    study["recipes_report"].plot({"a": result(study, "plus", right="10", index=3)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_passes_of_pgd_that_a_check_brought_in_are_counted(study):
    """A failed check of HSAT+ sends fifty batches from four passes to six."""
    report = study["recipes_report"]
    assert report.passes_of(result(study, "plus", free_share=[0.9, 1.1])) == 60
    assert report.passes_of(result(study, "plus", free_share=[0.28, 0.9])) == 60 + 50 * 2
    assert report.passes_of(result(study, "hsat")) == 60


def test_remedies_are_measured_at_four_times_the_compute_beside_the_finalists(study):
    recipes, report = study["recipes"], study["recipes_report"]
    chosen = {"painted": {"tuned HSAT": "tuned-pgd2-plain", "HSAT+": "plus-plain"}, "ebhi": {}}
    runs = list(recipes.planned(["remedy"], chosen, ebhi=True))
    assert {(run.cohort, run.index, run.multiple) for run in runs} == {("painted", 0, 4)}
    names = [run.recipe for run in runs]
    assert names == ["plus-plain", "tuned-pgd2-plain", "plus-head-plain", "plus-plain-held", "plus"]
    done = {"a": result(study, "plus-plain-held", right="1101", stage="remedy")}
    assert recipes.choose(done, "painted") == {}, "they choose no finalist"
    (row,) = (line for line in report.trial_lines(done, "painted", "remedy") if "held-out" in line)
    assert "| 75.0 | 75.0 |" in row and "**" not in row


def test_a_recipe_that_holds_patients_out_takes_the_best_encoder_on_them(study, tmp_path):
    """Of three evaluations the one that the training kept, and not the last encoder, is what is attacked."""
    recipes = study["recipes"]
    run = recipes.Run("plus-plain-held", "painted", 0, "remedy", 4)
    small = {"classes": ("hgg", "lgg"), "patients_per_class": 8, "patches": 2}
    cohort = read_opensrh(write_synthetic_cohort(tmp_path / "cohort", **small))
    encoder, facts = recipes.train(run, cohort, steps=3, backbone="test_resnet", out=tmp_path, store=None)
    kept = load_encoder(tmp_path / "run/best.safetensors")
    last = load_encoder(tmp_path / "run/final.safetensors")
    assert encoder.fingerprint() == kept.fingerprint() != last.fingerprint() and facts["steps"] == 3
    scores = read_training_log(tmp_path / "run/train.csv")
    assert len([value for value in scores["tune_robust_accuracy"] if value == value]) == 3


def test_a_training_that_fails_is_a_result(study, tmp_path, monkeypatch):
    recipes = study["recipes"]

    def fail(*args, **options):
        raise FloatingPointError("step 3: the loss is nan")

    monkeypatch.setattr(recipes, "train", fail)
    monkeypatch.setattr(recipes, "open_cohort", lambda *args: None)
    options = argparse.Namespace(size="minutes", runs=tmp_path, ebhi=None, commit="0" * 40, out=tmp_path / "out")
    found = recipes.do_run(recipes.Run("plus", "painted", 0, "trial", 0.5), {}, options)
    assert found["failure"] == "FloatingPointError: step 3: the loss is nan"
    assert found["run"]["recipe"] == "plus" and found["commit"] == "0" * 40 and "torch" in found["versions"]


@pytest.mark.slow
def test_a_run_at_the_smallest_size_is_made_once(study, tmp_path, monkeypatch, one_thread):
    recipes = study["recipes"]
    argv = ["recipes.py", "--size", "minutes", "--stages", "trial", "--only", "painted-0-(plus|tuned-pgd2)-0"]
    monkeypatch.setattr(sys, "argv", [*argv, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    recipes.main()
    results = recipes.read_results(tmp_path / "out")
    assert [*results] == ["trial-painted-0-plus-0.5x", "trial-painted-0-tuned-pgd2-0.5x"]
    for one in results.values():
        assert len(one["right"]["knn"]["clean"]) == one["n"] == 224 == len(one["patients"].split())
        shown = one["right"]["knn"]["PGD-10 4/255"].count("1") / 224
        assert one["accuracy"]["knn"]["PGD-10 4/255"]["patch"] == pytest.approx(shown)
        assert one["passes"] <= 12 and one["config"]["seed"] == 0 and "failure" not in one
    monkeypatch.setattr(recipes, "do_run", lambda *args: pytest.fail("a finished run was repeated"))
    recipes.main()
