"""Reasons to distrust a number: of bank and queries, and of accuracies beside each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsat.attacks import Linf, RandomNoise
from hsat.classifiers import KNNClassifier
from hsat.eval import RunOptions, Scoring, evaluate_whitebox
from hsat.eval.flags import accuracy_flags, bank_flags, count_shared_rows
from hsat.types import EmbeddingTable


@pytest.fixture
def tables(table):
    """A bank and queries of two classes and of patients of their own, from one cohort."""
    label = np.array([0, 0, 1, 1])
    options = dict(class_names=("glioma", "normal"), cohort="one")
    bank = table(np.eye(4), label, patient=[1, 1, 2, 2], **options)
    return bank, table(np.eye(4) + 0.1, label, patient=[3, 3, 4, 4], **options)


def test_sound_tables_have_no_flags(tables):
    assert bank_flags(*tables) == ()


def test_patients_that_are_known(tables):
    bank, queries = tables
    shared = replace(queries, patient=np.array([2, 2, 4, 4]))
    assert bank_flags(bank, shared) == ("bank and queries share 1 patients",)
    assert bank_flags(bank, replace(shared, cohort="two")) == (), "ids of another cohort are other patients"


def test_classes_without_a_row_of_the_bank(tables):
    bank, queries = tables
    names = ("glioma", "normal", "metastasis")
    queries = replace(queries, label=np.array([0, 2, 2, 1]), class_names=names)
    wider = replace(bank, class_names=names)
    reason = "the bank has no row of 1 of the queries' classes (metastasis): 2 of 4 queries can never be right"
    assert bank_flags(wider, queries) == (reason,)
    turned = replace(bank, label=1 - bank.label, class_names=("normal", "glioma"))
    assert bank_flags(turned, tables[1]) == (), "classes are told apart by name"


def test_a_single_class(tables):
    bank, queries = tables
    (reason,) = bank_flags(bank, replace(queries, label=np.zeros(4, dtype=np.int64)))
    assert reason == "the queries hold one class only (glioma): always saying it is right every time"
    flags = bank_flags(replace(bank, label=np.ones(4, dtype=np.int64)), queries)
    assert [flag.split(":")[0] for flag in flags] == [
        "the bank holds one class only (normal)",
        "the bank has no row of 1 of the queries' classes (glioma)",
    ]


def test_accuracies_beside_each_other():
    assert accuracy_flags(0.5, level="patch") == accuracy_flags(0.5, level="patch", chance=0.5, clean=0.5) == ()
    assert accuracy_flags(0.25, level="slide", chance=1 / 3) == ("slide accuracy below chance: 25.0 % against 33.3 %",)
    assert accuracy_flags(0.75, level="patient", clean=0.7) == (
        "patient accuracy under attack above that of the clean images: 75.0 % against 70.0 %",
    )


def table_of(z, **others):
    index = np.arange(len(z))
    return EmbeddingTable(z, index % 2, index, index, index, ("a", "b"), **others)


def test_queries_that_are_in_the_bank_are_counted():
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((500, 16)), rng.standard_normal((40, 16))
    assert count_shared_rows(table_of(bank), table_of(queries)) == 0
    queries[:7] = bank[100:107] * (1 + 1e-7 * rng.standard_normal((7, 16)))  # as of another batch size
    assert count_shared_rows(table_of(bank), table_of(queries)) == 7
    assert bank_flags(table_of(bank), table_of(queries)) == (
        "7 of 40 queries are also in the bank, with the same embedding",
    )
    queries[:3] += 1e-4
    assert count_shared_rows(table_of(bank), table_of(queries)) == 4
    assert count_shared_rows(table_of(bank), table_of(queries[:, :8])) == 0


def test_rows_of_one_direction_and_other_lengths_are_other_images():
    z = np.ones((6, 1))
    bank, queries = table_of(z, norm=np.arange(1.0, 7)), table_of(z[:2], norm=np.array([2.5, 3.0]))
    assert count_shared_rows(bank, queries) == 1


def test_one_loader_as_bank_and_queries_is_flagged(toy_encoder, toy_batches):
    batches = toy_batches(seed=0, sizes=(24,))
    attack = RandomNoise(Linf(8 / 255))
    run, scoring = RunOptions(noise=False), Scoring(bootstrap=0)
    result = evaluate_whitebox(
        toy_encoder, batches, batches, {"noise": attack}, run=run, scoring=scoring, classifier=KNNClassifier(k=3)
    )
    assert all("24 of 24 queries are also in the bank, with the same embedding" in one.flags for one in result.records)
