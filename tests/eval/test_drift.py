"""The records of evaluate_drift: the mean and its interval over patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hsat.attacks import Linf, RandomNoise
from hsat.eval import RunOptions, Scoring, evaluate_drift
from hsat.types import HierarchicalBatch


def batch(patients: int, *, each: int = 3) -> HierarchicalBatch:
    n = patients * each
    images, ids = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n)
    return HierarchicalBatch(images, ids, ids, ids // each, torch.zeros(n, dtype=torch.int64))


def drift_of(queries: HierarchicalBatch, *, bootstrap: int = 400):
    result = evaluate_drift(
        lambda x: (x - 0.5).flatten(1),
        [queries],
        {"noise": RandomNoise(Linf(0.5))},
        scoring=Scoring(bootstrap=bootstrap),
        run=RunOptions(noise=False),
    )
    (record,) = result.records
    moved = 1 - (result.tables["clean"].z.astype(np.float64) * result.tables["noise"].z).sum(1)
    return record, moved


def test_the_interval_is_that_of_other_records():
    """Student's quantile on the logit scale, of half a drift; not quantiles of resamples."""
    queries = batch(6)
    record, moved = drift_of(queries)
    assert record.value == pytest.approx(moved.mean())
    of_patient = moved.reshape(6, 3).mean(1)
    share = record.value / 2
    error = of_patient.std(ddof=1) / np.sqrt(6) / 2  # what the bootstrap estimates
    radius = stats.t.ppf(0.975, 5) * error / (share * (1 - share))
    expected = 2 / (1 + np.exp(-(np.log(share / (1 - share)) + np.array([-radius, radius]))))
    assert np.array([record.low, record.high]) - record.value == pytest.approx(expected - record.value, rel=0.1)


@pytest.mark.parametrize(("patients", "bootstrap", "reason"), [(1, 100, "one patient only"), (3, 0, "no resamples")])
def test_without_an_interval_the_record_says_why_as_others_do(patients, bootstrap, reason):
    record, _ = drift_of(batch(patients), bootstrap=bootstrap)
    assert record.low is None and record.settings["no_interval"] == reason
