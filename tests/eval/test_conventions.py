"""The list of conventions: every entry names an option that exists, and what the presets really choose."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hsat.attacks import BIM, FFGSM, MIFGSM, PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import (
    AugmentationPolicy,
    HierarchicalDataset,
    PatientBatchSampler,
    hierarchical_loader,
    read_opensrh,
    write_synthetic_cohort,
)
from hsat.eval import (
    CONVENTIONS,
    PAPER,
    RunOptions,
    Scoring,
    Target,
    conventions_table,
    evaluate_whitebox,
    metrics_by_level,
    paper_attacks,
    rescore,
)
from hsat.models import build_encoder


def function(each):
    module, _, name = each.where.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("each", CONVENTIONS, ids=lambda each: each.name)
def test_every_entry_names_an_option_that_exists(each):
    parameters = inspect.signature(function(each)).parameters
    assert parameters[each.option].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert each.hsat_value != each.paper_value
    for value in (each.hsat_value, each.paper_value):
        eval(value, {"__builtins__": {}})  # it is Python, as typed


def test_names_and_options_are_there_once():
    assert len({each.name for each in CONVENTIONS}) == len({each.option for each in CONVENTIONS}) == len(CONVENTIONS)
    table = conventions_table().to_markdown()
    assert len(table.splitlines()) == 2 + len(CONVENTIONS)
    assert all(f"({each.option}={each.paper_value})" in table for each in CONVENTIONS)


def value_of(option):
    (each,) = (each for each in CONVENTIONS if each.option == option)
    return tuple(eval(value, {"__builtins__": {}}) for value in (each.hsat_value, each.paper_value))


def test_scoring_and_attack_entries_are_what_the_preset_chooses():
    for target, scoring, number in ((Target(), Scoring(), 0), (PAPER.target, PAPER.scoring, 1)):
        for option in ("pooling", "absent_classes", "group_by"):
            assert getattr(scoring, option) == value_of(option)[number]
        assert (target.objective, target.branch) == (value_of("target")[number], value_of("branch")[number])
    dual = build_encoder("test_byobnet", dual_norm=True, embedding_dim=4, seed=0)
    plain = build_encoder("test_byobnet", embedding_dim=4, seed=0)
    assert PAPER.target.branch_of(dual) == "pgd" and PAPER.target.branch_of(plain) is None
    assert Target("features", branch="normal").branch_of(dual) == "normal" and Target().branch_of(dual) is None


def test_training_entries_are_what_compat_chooses(tmp_path):
    root = write_synthetic_cohort(tmp_path / "c", classes=("hgg", "lgg"), patients_per_class=3, patches=1, size=32)
    cohort = read_opensrh(root)
    for chosen, number in ((None, 0), ("paper", 1)):
        policy = AugmentationPolicy.paper("v0") if chosen else AugmentationPolicy("v0")
        views = HierarchicalDataset(cohort, image_size=32, transform=policy)
        sampler = PatientBatchSampler(cohort, "train", batch_patients=2, compat=chosen)
        assert policy.uncropped == value_of("uncropped")[number]
        assert policy.static_epochs == value_of("static_epochs")[number]
        assert sampler.order == value_of("order")[number]
        slots = type(hierarchical_loader(views, sampler, compat=chosen).collate_fn).__name__ == "_SlotIds"
        assert slots == (value_of("ids")[number] == "slots")


def test_paper_attacks_are_those_of_the_paper_by_default():
    names, step = ("pgd", "bim", "mifgsm", "ffgsm"), dict(step_size=2 / 255, steps=10)
    own = paper_attacks((8 / 255,), names=names, random_start=None, ffgsm_step=None)
    assert list(own.values()) == [
        PGD(Linf(8 / 255), **step),
        BIM(Linf(8 / 255), **step),
        MIFGSM(Linf(8 / 255), **step),
        FFGSM(Linf(8 / 255)),
    ]
    defaults = {name: p.default for name, p in inspect.signature(paper_attacks).parameters.items()}
    for option in ("random_start", "ffgsm_step"):
        assert defaults[option] == value_of(option)[1]


def test_each_scoring_option_moves_what_it_should(golden, table):
    """On the published case without two of the classes: `absent_classes` moves the mca alone, `pooling` the scores."""
    z = np.eye(3)[golden["specs/five_classes/labels"] % 3]
    paths = [str(path).split("/") for path in golden["specs/five_classes/paths"]]
    numbered = [
        np.unique(column, return_inverse=True)[1]
        for column in zip(*[("/".join(p[-4:-2]), p[-4]) for p in paths], strict=True)
    ]
    queries = table(z, golden["specs/five_classes/labels"], slide=numbered[0], patient=numbered[1], classes=7)
    scores = golden["specs/five_classes/logits"]
    usual = metrics_by_level(scores, queries)
    one = {
        option: metrics_by_level(scores, queries, scoring=Scoring(**{option: value_of(option)[1]}))
        for option in ("pooling", "absent_classes", "group_by")
    }
    published = metrics_by_level(scores, queries, scoring=PAPER.scoring)
    for row, level in enumerate(("patch", "slide", "patient")):
        assert one["absent_classes"][level].as_dict() | {"mca": usual[level].mca} == usual[level].as_dict()
        assert one["group_by"][level].as_dict() == usual[level].as_dict(), "labels agree in every group"
        assert one["pooling"][level].mca == pytest.approx(usual[level].mca, abs=0.2)
        expected = golden["specs/five_classes/metrics"][row]
        found = [getattr(published[level], name) for name in ("accuracy", "top2", "top3", "mca", "map")]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert one["absent_classes"]["patch"].mca <= usual["patch"].mca
    assert (
        one["pooling"]["patch"].map != usual["patch"].map
        and one["pooling"]["patch"].accuracy == usual["patch"].accuracy
    )


def execute(page, folder):
    """The names that the Python blocks of a page define, run in order in a folder."""
    names = {"__name__": page.stem}
    text = page.read_text()
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            code = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)  # errors point into the page
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
    return names


def test_the_page_prints_this_list_and_its_python_runs(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "conventions.md"
    text = page.read_text()
    assert (
        text.partition("<!-- conventions -->\n")[2].partition("<!-- /conventions -->")[0]
        == conventions_table().to_markdown()
    )
    names = execute(page, tmp_path)
    values = {(r.attack_name, r.level, r.metric): r.value for r in names["means_result"].records}
    assert values["clean", "patch", "accuracy"] > values["PGD-16", "patch", "accuracy"]
    assert {r.settings["how"] for r in names["published"].records} == {"paper"}
    assert {table.model for table in names["tables"]} == {"means", "simple"}
    assert (names["each"].model, names["each"].against, names["each"].patients) == ("simple", "means", 8)


def test_every_record_has_an_interval_or_says_why_not(toy_encoder, toy_batches):
    def options(resamples):
        return dict(classifier=KNNClassifier(k=15), scoring=Scoring(bootstrap=resamples), run=RunOptions(noise=False))

    attacks = paper_attacks((8 / 255,), steps=4, names=("pgd",))
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(36,))
    for resamples in (0, 40):
        result = evaluate_whitebox(toy_encoder, bank, queries, attacks, **options(resamples))
        for record in result.records:
            has = record.low is not None and record.high is not None
            assert has != bool(record.settings.get("no_interval"))
            assert not has or (record.low <= record.value <= record.high and record.low < record.high)


PUBLISHED = dict(pooling="paper", absent_classes="zero", group_by="id_and_label")


@pytest.fixture
def evaluated(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(20, 16))
    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=2)}

    classifiers = [KNNClassifier(k=15), KNNClassifier(k=5)]

    def run(**scoring):
        return evaluate_whitebox(
            toy_encoder,
            bank,
            queries,
            attacks,
            classifier=classifiers,
            target="features",
            scoring=Scoring(**scoring, bootstrap=40),
            run=RunOptions(noise=False, seed=2),
        )

    return run


@pytest.mark.parametrize(
    "scoring", [{}, dict(pooling="paper"), dict(absent_classes="zero"), dict(group_by="id_and_label"), PUBLISHED]
)
def test_equals_evaluating_again(evaluated, scoring):
    assert rescore(evaluated(), Scoring(**scoring)).records == evaluated(**scoring).records


def test_there_and_back_again(evaluated):
    own = evaluated()
    assert rescore(rescore(own, PAPER.scoring), Scoring()).records == own.records


def test_a_patient_with_two_labels_is_two_groups(evaluated):
    result = evaluated()
    tables = {}
    for name, table in result.tables.items():
        label = table.label.copy()
        label[0] = (label[0] + 1) % 3  # one patch of a patient gets another label
        tables[name] = dataclasses.replace(table, label=label)
    mixed = dataclasses.replace(result, tables=tables)
    assert {record.level for record in rescore(mixed, Scoring()).records} == {"patch"}  # no level of mixed groups
    split = rescore(mixed, Scoring(group_by="id_and_label"))
    sizes = {record.level: record.n for record in split.records}
    before = {record.level: record.n for record in result.records}
    assert sizes == before | {level: before[level] + 1 for level in ("slide", "patient")}
    assert len(np.unique(result.tables["clean"].patient)) == before["patient"]
