"""Reasons to distrust a number: of bank and queries, and of accuracies beside each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsat.eval.flags import accuracy_flags, bank_flags


@pytest.fixture
def tables(table):
    """A bank and queries of two classes and of patients of their own, from one cohort."""
    label = np.array([0, 0, 1, 1])
    options = dict(class_names=("glioma", "normal"), cohort="one")
    bank = table(np.eye(4), label, patient=[1, 1, 2, 2], **options)
    return bank, table(np.eye(4), label, patient=[3, 3, 4, 4], **options)


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
