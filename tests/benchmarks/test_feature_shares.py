"""Shares of variance of features by hand, and what the vote says of patients whose own patches are left out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hsat.types import EmbeddingTable

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("recipe_candidates", "recipes", "colour_shares", "feature_shares")


@pytest.fixture(scope="module")
def shares():
    """The module of the benchmark."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield [importlib.import_module(name) for name in NAMES][-1]
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def table(directions, *, classes, patches=30):
    """Patches of patients that lie at these angles, in degrees; 30 of each, so that 20 neighbours fit into one."""
    angles = np.deg2rad(np.repeat(directions, patches) + np.tile(np.linspace(-1, 1, patches), len(directions)))
    patient = np.repeat(np.arange(len(directions)), patches)
    rows = np.stack([np.cos(angles), np.sin(angles), np.zeros_like(angles)], 1)
    ids = np.arange(len(rows))
    return EmbeddingTable(rows, np.asarray(classes)[patient], ids, patient, patient, class_names=("a", "b"))


def test_the_joint_share_by_hand(shares):
    rows = np.array([[0.0, 1.0, 5.0], [0.0, 3.0, 5.0], [4.0, 1.0, 5.0], [4.0, 3.0, 5.0]])
    # all columns: total 16 + 4 + 0 around the mean, of which 16 lies between the groups
    assert shares.joint_share(rows, np.array([7, 7, 9, 9])) == pytest.approx(0.8)


def test_patients_in_their_classes_are_right_without_their_own_patches(shares):
    """Four patients in two clusters of one class each."""
    found = shares.feature_shares(table([0, 5, 90, 95], classes=[0, 0, 1, 1]), table([2, 92], classes=[0, 1]))
    assert found["patients_share"] > 0.99 and found["classes_share"] > 0.99
    assert found["other_training_patients"] == found["new_patients"] == 1


def test_patients_that_mix_with_the_other_class_are_wrong_without_their_own_patches(shares):
    """Each patient's nearest one is of the other class, and its own patches hide it."""
    mixed = table([0, 5, 90, 95], classes=[0, 1, 0, 1])
    found = shares.feature_shares(mixed, mixed)
    assert found["patients_share"] > 0.99 and found["classes_share"] < 0.01
    assert (found["other_training_patients"], found["new_patients"]) == (0, 1)


def test_the_page_has_a_row_for_every_encoder(shares):
    values = {"patients_share": 0.9, "classes_share": 0.4, "other_training_patients": 0.8, "new_patients": 0.81}
    rows = [{"seed": 3, "recipe": "any", "multiple": 0, "shares": values}]
    rows.append({"seed": 3, "recipe": "HSAT+: no augmentation", "multiple": 4.0, "shares": values})
    page = shares.document({"versions": {}, "encoders": rows})
    assert "| 3 | any | untrained | 90.0 | 40.0 | 80.0 | 81.0 |" in page
    assert "| 3 | HSAT+: no augmentation | 4x | 90.0 | 40.0 | 80.0 | 81.0 |" in page
