"""The document about large banks runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "large_banks.md"


@pytest.mark.filterwarnings("ignore:k=")
def test_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(DOCUMENT), "exec", dont_inherit=True), names)
    np.testing.assert_array_equal(
        names["one"].predict_proba(names["queries"]), names["many"].predict_proba(names["queries"])
    )
    assert names["recall"] > 0.5 and (tmp_path / "index" / "index.faiss").is_file()
