"""Regular expressions in paths: what they find, and that they end."""

from __future__ import annotations

import pytest

from hsat.data.path_patterns import search_paths

PATHS = ["a/SOB_B_A-14-22549AB-40.png", "a/none.png", "a/SOB_M_DC-15-1X-\udcff.png"]


@pytest.mark.parametrize("pattern", [r"-(\d+)-", r"SOB_[BM]_[A-Z]+-(\d+)-(?:\w+)-|SOB_[BM]_[A-Z]+-(\d+)-"])
def test_here_and_in_a_second_process(pattern):
    assert search_paths("patient", pattern, PATHS) == ["14", None, "15"]
    assert search_paths("patient", pattern, []) == []


def test_whole_match_without_a_group():
    assert search_paths("slide", r"\d+", PATHS) == ["14", None, "15"]


@pytest.mark.parametrize("pattern", [r"^(\w+[./]?)+!", r"(a|a?)+!", r"(?:\w*)*(?:\w*)*!"])
def test_an_expression_that_does_not_end_is_stopped(pattern):
    with pytest.raises(ValueError, match=r"^patient=.* takes more than 0\.2 seconds on 1 paths; write it without"):
        search_paths("patient", pattern, ["a" * 60 + ".png"], seconds=0.2)


def test_what_is_none_is_refused():
    with pytest.raises(ValueError, match=r"patient='\(' is no regular expression"):
        search_paths("patient", "(", PATHS)
    with pytest.raises(ValueError, match="slide has 1001 characters; a regular expression has at most 1000"):
        search_paths("slide", "a" * 1001, PATHS)
    with pytest.raises(ValueError, match="is no regular expression"):
        search_paths("slide", "(" * 499 + ")" * 500, PATHS)
