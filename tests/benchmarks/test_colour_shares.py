"""Shares of variance by hand, and the page of a small cohort."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hsat.data import read_opensrh, write_synthetic_cohort

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def shares():
    """The module of the benchmark."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("colour_shares")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("colour_shares", None)


def test_the_share_between_groups_by_hand(shares):
    values = np.array([[0.0, 1.0, 1.0], [0.0, 3.0, 3.0], [4.0, 1.0, 3.0], [4.0, 3.0, 5.0]])
    groups = np.array([7, 7, 9, 9])
    # third column: total 8 around 3; within 2 + 2
    np.testing.assert_allclose(shares.share_between(values, groups), [1, 0, 0.5])


def test_the_colours_of_painted_tissue_tell_its_classes(shares, tmp_path):
    cohort = read_opensrh(write_synthetic_cohort(tmp_path, patients_per_class=3, slides=1, patches=4, seed=0))
    found = shares.colour_shares(cohort, image_size=24)
    assert found["patients_share"]["mean red"] > 0.7
    assert found["classes_share"]["mean red"] > 1.5 * found["classes_share_by_chance"]
    assert 0 <= found["untrained"]["image"] <= 1
    assert "## a: " in shares.document({"versions": {}, "cohorts": {"a": found}})
