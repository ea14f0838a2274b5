"""Numbers of small evaluations and trainings stay where they were committed, within one patch and 2 % of a loss."""

from __future__ import annotations

import copy

import pytest
from committed_numbers import COMMAND, deviations, measured_numbers, stored_numbers


@pytest.mark.slow
def test_numbers_are_where_they_were():
    lines = deviations(stored_numbers(), measured_numbers())
    assert not lines, "\n".join([*lines, f"if this is meant to be so: {COMMAND}"])


def test_every_evaluation_and_training_is_among_them():
    stored = stored_numbers()
    evaluations = {key.split(" / ")[0] for key in stored["accuracies"]}
    targets = {f"whitebox {name}" for name in ("features", "embedding", "decision", "paper", "ensemble")}
    assert evaluations == targets | {"transfer", "budget worst", "budget random", "certify"}
    kinds = {"hidisc", "hsat", "free", "warm", "dual norm", "clean and adversarial"}
    assert kinds < set(stored["losses"])
    assert all(len(losses) == 5 for losses in stored["losses"].values())


@pytest.mark.parametrize(("rows_moved", "seen"), [(1, False), (-1, False), (2, True), (-2, True)])
def test_one_row_may_move_and_two_may_not(rows_moved, seen):
    stored = {"accuracies": {"a / patch": [0.5, 18]}, "losses": {}}
    measured = {"accuracies": {"a / patch": [0.5 + rows_moved / 18, 18]}, "losses": {}}
    assert bool(deviations(stored, measured)) is seen


@pytest.mark.parametrize(("factor", "seen"), [(1.019, False), (0.981, False), (1.021, True), (0.979, True)])
def test_a_loss_may_move_by_two_percent(factor, seen):
    stored = {"accuracies": {}, "losses": {"hsat": [10.0, 8.0]}}
    measured = {"accuracies": {}, "losses": {"hsat": [10.0, 8.0 * factor]}}
    lines = deviations(stored, measured)
    assert bool(lines) is seen
    assert not seen or "hsat, loss 1" in lines[0]


def test_a_loss_that_is_no_number_is_seen():
    stored = {"accuracies": {"a": [0.5, 18]}, "losses": {"hsat": [10.0]}}
    assert "hsat" in deviations(stored, stored | {"losses": {"hsat": [float("nan")]}})[0]
    assert "a" in deviations(stored, stored | {"accuracies": {"a": [float("nan"), 18]}})[0]


@pytest.mark.parametrize("kind", ["accuracies", "losses"])
def test_missing_and_new_numbers_are_named(kind):
    stored = {"accuracies": {"a": [0.5, 18]}, "losses": {"b": [1.0]}}
    fewer, more = copy.deepcopy(stored), copy.deepcopy(stored)
    del fewer[kind][next(iter(fewer[kind]))]
    more[kind]["other"] = [0.5, 18]
    assert next(iter(stored[kind])) in deviations(stored, fewer)[0]
    assert "other" in deviations(stored, more)[0]


def test_other_numbers_of_rows_and_of_losses_are_seen():
    stored = {"accuracies": {"a": [0.5, 18]}, "losses": {"b": [1.0, 2.0]}}
    assert "18" in deviations(stored, stored | {"accuracies": {"a": [0.5, 16]}})[0]
    assert "b" in deviations(stored, stored | {"losses": {"b": [1.0]}})[0]
