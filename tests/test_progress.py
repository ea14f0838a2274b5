"""Progress: a bar where somebody watches, else a line every half minute without carriage returns."""

from __future__ import annotations

import pytest

from hsat import progress
from hsat.progress import Progress, show_progress


@pytest.fixture
def clock(monkeypatch):
    """clock[0]: the seconds of now."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_half_minute(clock, capsys):
    with Progress("training", total=100, unit="step") as bar:
        for number in range(100):
            clock[0] += 1.0
            bar.update(loss=number)
    shown = capsys.readouterr()
    assert "\r" not in shown.err and shown.out == ""
    assert shown.err.splitlines() == [
        "training: 30 of 100 steps, loss 29, 30 s gone, about 1 min to go",
        "training: 60 of 100 steps, loss 59, 1 min gone, about 40 s to go",
        "training: 90 of 100 steps, loss 89, 2 min gone, about 10 s to go",
    ]


def test_a_resumed_loop_counts_on(clock):
    bar = Progress("training", total=100, initial=90, unit="step")
    clock[0] += 10
    bar.update()
    assert bar.line() == "training: 91 of 100 steps, 10 s gone, about 2 min to go"


def test_short_loops_and_hidden_ones_say_nothing(clock, capsys):
    assert list(show_progress(iter("ab"), "reading")) == ["a", "b"]
    with Progress("hidden", total=2, shown=False) as bar:
        clock[0] += 100
        bar.update()
        with bar.aside():
            pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    assert list(show_progress([1, 2, 3], "attacking hsat")) == [1, 2, 3]
    shown = capsys.readouterr().err
    assert "attacking hsat" in shown and "3/3" in shown


def test_the_length_is_unknown(clock):
    bar = Progress("embedding", total=None)
    clock[0] += 5
    bar.update()
    assert bar.line() == "embedding: 1 batches, 5 s gone"


def test_a_loop_over_what_does_not_know_its_length(clock, capsys):
    class Batches:
        def __len__(self):
            raise TypeError("object of type 'Stream' has no len()")

        def __iter__(self):
            for number in range(2):
                clock[0] += 31
                yield number

    assert list(show_progress(Batches(), "embedding")) == [0, 1]
    assert "embedding: 1 batches, 31 s gone" in capsys.readouterr().err
