"""The commands compute with one thread here, as the processes do that tests start."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def threads(one_thread: None) -> None:
    """Sums depend on how many threads share them."""
