"""What separates the columns of a table."""

from __future__ import annotations

import pytest

from hsat.data.separators import find_separator


@pytest.mark.parametrize(
    ("header", "separator"),
    [("path;exclude", ";"), ("a\tb", "\t"), ("a|b", "|"), ("a,b;c", ","), ("path", ","), ("", ",")],
)
def test_separators(header, separator):
    assert find_separator(header) == separator
