from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests of reads share their counter and their cases
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "training.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def golden_numbers() -> dict:
    return json.loads((GOLDEN / "training.json").read_text())
