from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsat.data import Cohort, read_opensrh
from hsat.models import build_encoder
from hsat.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))  # the tests of reads share their counter and their cases
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "training.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def golden_numbers() -> dict:
    return json.loads((GOLDEN / "training.json").read_text())


@pytest.fixture(scope="session")
def cohort(root: Path) -> Cohort:
    """The tiny cohort with a patient of each class held out."""
    return read_opensrh(root).with_split(val_fraction=0.3, names=("train", "tune"), of="train")


@pytest.fixture
def make_trainer(cohort: Cohort, one_thread: None, tmp_path: Path) -> Callable[..., Trainer]:
    """make_trainer(name, config, dual_norm=..., **options): a trainer of a tiny encoder with a folder of that name."""

    def make(name: str, config: Any, *, dual_norm: bool = False, **options: Any) -> Trainer:
        encoder = build_encoder("test_byobnet", embedding_dim=16, dual_norm=dual_norm, seed=0)
        return Trainer(encoder, options.pop("cohort", cohort), config, out=tmp_path / name, **options)

    return make
