from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "training.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def golden_numbers() -> dict:
    return json.loads((GOLDEN / "training.json").read_text())
