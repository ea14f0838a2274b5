"""Sentences, doubts and tables from records, without HTML."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsat.eval import Difference, TableCell
from hsat.report import read_artifacts
from hsat.report.aggregation import (
    Estimate,
    EvaluationSetting,
    aggregate_runs,
    drop_duplicates,
    format_estimate,
    list_conditions,
)
from hsat.report.page.sections import flatten_settings
from hsat.report.summary import (
    cross_attack_flags,
    record_flags,
    summarize_model,
    summary_sentence,
    transfer_sentence,
)
from hsat.report.tables import confusion_table, drop_table, effort_table, level_table, page_differences_table


def chosen(records, level="patch", metric="accuracy"):
    return [record for record in records if (record.level, record.metric) == (level, metric)]


def test_the_strongest_attack_at_the_largest_eps(made_records):
    summary = summarize_model(chosen(made_records("HSAT", 0.8)))
    assert (summary.clean.estimate.value, summary.noise.estimate.value, summary.worst.estimate.value) == (
        0.8,
        0.76,
        0.4,
    )
    assert (summary.worst.name, summary.worst.eps_text, summary.attacks) == ("PGD-8", "8/255", 2)


def test_the_sentence_names_the_best_first_with_intervals(made_records):
    summaries = [summarize_model(chosen(made_records(*pair))) for pair in (("HiDisc", 0.6), ("HSAT", 0.8))]
    assert summary_sentence(summaries) == (
        "HSAT keeps 40.0 % [30.0, 50.0] of the patches right under the strongest of 2 attacks at eps 8/255"
        " (clean 80.0 %); HiDisc keeps 30.0 % [20.0, 40.0] (clean 60.0 %)."
    )
    assert "40.0 % [30.0, 50.0] MCA under" in summary_sentence(summaries, metric="mca")


def test_without_attacks_the_sentence_says_so(made_records):
    clean = [record for record in chosen(made_records()) if record.attack_name == "clean"]
    assert summary_sentence([summarize_model(clean)]) == (
        "No attack was measured. On clean patches HSAT has 80.0 % [70.0, 90.0] accuracy."
    )
    assert summary_sentence([]) == "Nothing measured."


def test_another_norm_is_not_mixed_in(made_records):
    records = chosen(made_records())
    other = replace(records[-1], attack="PGD(L2(eps=0.5))", attack_name="L2-0.5", eps="0.5", eps_value=0.5, value=0.01)
    assert summarize_model([*records, other]).worst.name == "PGD-8"
    with pytest.raises(ValueError, match=r"got records of \['HSAT', 'x'\]"):
        summarize_model([*records, replace(other, model="x")])


def test_several_runs_are_mean_and_standard_deviation(made_records):
    runs = [made_records("HSAT", value, seed=seed) for seed, value in enumerate((0.7, 0.8, 0.9))]
    cell = aggregate_runs([chosen(records)[0] for records in runs])
    assert cell == Estimate(pytest.approx(0.8), None, None, pytest.approx(0.1), 3, (36,))
    assert format_estimate(cell, unit=" %") == "80.0 ± 10.0 % (3 runs)"
    assert aggregate_runs([]) is None


def test_a_record_given_twice_counts_once(made_records):
    records = made_records()
    assert drop_duplicates([*records, *records]) == tuple(records)
    assert len(drop_duplicates([*records, *made_records(seed=1)])) == 2 * len(records)


@pytest.mark.parametrize("change", [{"cohort": "x"}, {"split": "test"}, {"target": "embedding"}, {"temperature": 0.1}])
def test_what_decides_a_number_separates_settings(made_records, change):
    assert EvaluationSetting.of(made_records()[0]) != EvaluationSetting.of(made_records(**change)[0])
    assert EvaluationSetting.of(made_records()[0]) == EvaluationSetting.of(
        made_records("other", seed=5, checkpoint="y")[0]
    )


def test_the_same_measurement_of_two_evaluations_is_one_run(made_records):
    clean, *_, attacked = (chosen(made_records(seed=seed))[i] for seed, i in ((0, 0), (1, 0), (0, -1)))
    again = replace(clean, seed=7, settings=clean.settings | {"bootstrap": 5}, low=0.0)
    assert aggregate_runs([clean, again]) == aggregate_runs([clean])  # clean images know no seed
    assert aggregate_runs([clean, replace(again, checkpoint="other weights")]).runs == 2
    assert aggregate_runs([attacked, replace(attacked, seed=7)]).runs == 2
    unnamed = replace(clean, checkpoint="")
    assert aggregate_runs([unnamed, replace(unnamed, seed=1)]).runs == 2, "weights nobody named may differ"


ANYTHING = [{"how": "paper"}, {"bank_rows": 91}, {"layer": "embedding"}, {"absent": "zero"}]
ANYTHING += [{"index": "IVF8,Flat"}, {"convention": "pooling"}]


def test_exact_indexes_give_the_same_numbers(made_records):
    record = made_records()[0]
    flat, torch = (
        EvaluationSetting.of(replace(record, settings=record.settings | {"index": i})) for i in ("flat", "torch")
    )
    assert flat == torch == EvaluationSetting.of(record)


@pytest.mark.parametrize("change", ANYTHING)
def test_arithmetic_and_bank_separate_settings(made_records, change):
    record = made_records()[0]
    assert EvaluationSetting.of(record) != EvaluationSetting.of(replace(record, settings=record.settings | change))


def test_one_name_for_two_attacks_is_two_conditions(made_records):
    records = chosen(made_records())
    stronger = [replace(r, attack=r.attack.replace("10", "50"), value=0.1) for r in records if r.attack_name == "PGD-8"]
    labels = [column.label for column in list_conditions([*records, *stronger])]
    assert labels == ["clean", "noise-8", "PGD-4", "PGD-8 (1)", "BIM-8", "PGD-8 (2)"]
    table = level_table([*records, *stronger], level="patch", metrics=("accuracy",))
    cells = {label: cells[0].text for label, *cells in table.rows}
    assert (cells["PGD-8 (1)"], cells["PGD-8 (2)"]) == ("40.0", "10.0")
    assert "PGD-8 (2): PGD(Linf(eps=8/255), steps=50)" in table.notes


def test_flags_are_gathered_per_model(made_records):
    records = made_records("a", flags=("masked",)) + made_records("b")
    (flag,) = record_flags(records)
    assert (flag.model, flag.reason) == ("a", "masked")
    assert flag.conditions == ("clean", "noise-8", "PGD-4", "PGD-8", "BIM-8")


def with_value(records, name, value):
    return [replace(record, value=value) if record.attack_name == name else record for record in records]


def test_no_signs_without_reason(made_records):
    assert cross_attack_flags(chosen(made_records())) == []


def test_an_attack_that_does_no_more_than_noise(made_records):
    records = with_value(with_value(chosen(made_records()), "PGD-8", 0.76), "BIM-8", 0.77)
    reasons = [flag.reason for flag in cross_attack_flags(records)]
    assert any("no less than random noise of the same size (76.0 % against 76.0 %)" in reason for reason in reasons)


def test_an_attack_that_leaves_nothing_raises_no_doubt(made_records):
    records = chosen(made_records())
    for name in ("noise-8", "PGD-4", "PGD-8", "BIM-8"):
        records = with_value(records, name, 0.0)
    assert cross_attack_flags(records) == []


def test_a_larger_eps_that_leaves_more(made_records):
    records = with_value(chosen(made_records()), "PGD-4", 0.3)
    (flag,) = cross_attack_flags(records)
    assert flag.reason == "a larger eps leaves more than a smaller one (40.0 % at 8/255, 30.0 % before)"
    assert cross_attack_flags(with_value(records, "PGD-4", 0.391)) == []  # less than a point


def test_cells_of_a_level(made_records):
    records = made_records("HiDisc", 0.6) + [r for r in made_records("HSAT", 0.8) if r.attack_name != "BIM-8"]
    table = level_table(records, level="slide", metrics=("accuracy", "mca"))
    assert table.groups == [("HiDisc", 2), ("HSAT", 2)]
    assert table.head == ("condition", "Acc", "MCA", "Acc", "MCA")
    rows = {label: [(cell.text, cell.small) for cell in cells] for label, *cells in table.rows}
    assert next(iter(rows)) == "clean"
    assert rows["PGD-8"][2] == ("40.0", "30.0 to 50.0")
    assert rows["BIM-8"][2:] == [("–", ""), ("–", "")]
    assert level_table(records, level="slide", metrics=("top9",)) is None


def test_sizes_that_differ_are_named(made_records):
    records = made_records("a") + [replace(record, n=7) for record in made_records("b")]
    table = level_table(records, level="patch", metrics=("accuracy",))
    assert "n = 7, 36" in table.caption and any("differ between cells" in note for note in table.notes)


def test_confusion_by_counting(tmp_path, made_artifacts):
    made_artifacts(tmp_path, "HSAT")
    (artifacts,) = read_artifacts(tmp_path)
    table = confusion_table(artifacts, "PGD-8", 20)
    truth = artifacts.conditions["PGD-8"].label["patch"]
    taken = artifacts.conditions["PGD-8"].prediction["patch", 20]
    for i, (label, *cells) in enumerate(table.rows):
        mine = [b for a, b in zip(truth, taken, strict=True) if a == i]
        assert label == f"{artifacts.class_names[i]} ({len(mine)})"
        for j, cell in enumerate(cells):
            assert cell.shade == pytest.approx(mine.count(j) / len(mine))
            assert cell.text == f"{100 * mine.count(j) / len(mine):.0f}"
    assert np.mean(truth != taken) > 0.2
    assert confusion_table(artifacts, "PGD-8", 21) is None
    assert confusion_table(artifacts, "none", 20) is None


def test_transfer_matrix(made_records):
    pairs = [("a", "b", 0.3), ("b", "b", 0.5), ("a", "a", 0.4), ("others", "b", 0.3), ("others", "a", -0.05)]
    records = [
        replace(
            chosen(made_records(target, gap))[-1],
            surrogate=surrogate,
            metric="accuracy_drop",
            value=gap,
            low=gap - 0.1,
            high=gap + 0.1,
        )
        for surrogate, target, gap in pairs
    ]
    clean = chosen(made_records("b", 0.9))[0]
    table = drop_table([clean, *records], level="patch", attack="BIM-8")
    assert table.groups == [("b", 1), ("a", 1)] and table.head == ("attack made on", "Acc-D", "Acc-D")
    assert [(label, [cell.text for cell in cells]) for label, *cells in table.rows] == [
        ("(clean)", ["90.0", "–"]),
        ("a", ["30.0", "40.0"]),
        ("b", ["50.0", "–"]),
        ("mean of the others", ["30.0", "−5.0"]),
    ]
    assert drop_table([clean], level="patch", attack="BIM-8") is None
    assert transfer_sentence([clean, *records]) == (
        "Attacks at eps 8/255 that were made on other encoders take, on average over these,"
        " -5.0 [-15.0, 5.0] points from a (BIM-8); 30.0 [20.0, 40.0] points from b (BIM-8)."
    )
    assert transfer_sentence([clean]) == ""


def test_differences_on_the_same_patients():
    first = Difference(
        model="HSAT",
        against="HiDisc",
        condition="clean",
        k=20,
        level="patch",
        metric="accuracy",
        value=0.5,
        value_against=0.6,
        difference=-0.1,
        low=-0.2,
        high=0.05,
        not_above=0.9,
        n=36,
        patients=6,
    )
    table = page_differences_table([first, replace(first, level="patient", low=None)], metric="accuracy", k=20)
    assert table.groups == [("HSAT − HiDisc", 2)] and table.head == ("condition", "patch", "patient")
    assert table.rows == [("clean", TableCell("−10.0", "−20.0 to +5.0"), TableCell("−10.0"))]
    assert page_differences_table([first], metric="mca", k=20) is None


def test_how_attacks_went(made_records):
    records = [replace(record, forwards=11.0, backwards=10.0) for record in made_records()]
    table = effort_table(records)
    assert len(table.rows) == 4
    assert list(table.rows[0][1:]) == ["–", "11 / 10", "0.0", "0.0", "0.0"]
    assert effort_table([record for record in records if not record.attack]) is None


def test_nested_settings_become_flat():
    assert flatten_settings({"a": {"b": 1, "c": "x"}, "d": None}) == {"a.b": "1", "a.c": "x", "d": "null"}
