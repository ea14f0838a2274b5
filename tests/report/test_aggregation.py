"""Which records share a table, and what several records for one number become."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsat.report.aggregation import (
    Estimate,
    EvaluationSetting,
    aggregate_runs,
    drop_duplicates,
    format_estimate,
)


def chosen(records, level="patch", metric="accuracy"):
    return [record for record in records if (record.level, record.metric) == (level, metric)]


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
