from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "models.npz"


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def filled_state(golden):
    """Builds the published state dict of a name, its values drawn from the names of its entries."""

    def fill(name: str) -> dict[str, torch.Tensor]:
        entries = json.loads(zlib.decompress(golden[f"{name}/keys"].tobytes()))
        return {key: draw(key, tuple(shape)) for key, shape in entries}

    def draw(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        r = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64)
        if key.endswith("running_var"):
            values = 0.5 + r.rand(*shape)
        elif key.endswith("running_mean"):
            values = 0.1 * r.randn(*shape)
        elif len(shape) >= 2:
            values = r.randn(*shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif key.endswith("weight"):
            values = 0.5 + r.rand(*shape)
        else:
            values = 0.1 * r.randn(*shape)
        return torch.tensor(values).float()

    return fill


@pytest.fixture(scope="session")
def golden_input():
    return torch.from_numpy(np.random.RandomState(42).rand(2, 3, 64, 64))
