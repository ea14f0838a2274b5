from __future__ import annotations

import pytest
import torch

from hsat.quantities import value_text
from hsat.training.resources import (
    StepClock,
    is_out_of_memory,
    largest_batch,
    memory_text,
    parse_memory,
    peak_memory,
    time_text,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7), ("2 KiB", 2048), ("2TB", 2 * 10**12)],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 GX", "-1GB", "0GB", "8,5GB", "nan", "9" * 400 + "GB"])
def test_other_words_are_no_amount(text):
    with pytest.raises(ValueError, match="8GB"):
        parse_memory(text)


def test_texts_for_people():
    assert [memory_text(n) for n in (8e9, 5.04e8)] == ["8.0 GB", "504 MB"]
    assert [time_text(s) for s in (3.2, 90, 3600, 7500, 400_000)] == [
        "3 s",
        "2 min",
        "1 h 0 min",
        "2 h 5 min",
        "4 d 15 h",
    ]


def test_the_largest_batch_that_fits():
    # 2 held before, 10 at the peak of 4: each takes 2, so 8 bytes hold 3
    assert largest_batch(4, before=2, peak=10, limit=8) == 3
    assert largest_batch(4, before=2, peak=10, limit=20) == 9
    assert largest_batch(4, before=2, peak=10, limit=1) == 0
    assert largest_batch(4, before=10, peak=10, limit=12) == 4


def test_real_shortage_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


def test_peak_memory_of_this_process_grows():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 8 + 2**24)  # more than is in use now, touched
    assert peak_memory(torch.device("cpu")) > 2**24 and len(held)


def test_the_clock_speaks_once_and_leaves_out_the_first_step(monkeypatch):
    now = iter([99.0, 100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr("hsat.training.resources.time.perf_counter", lambda: next(now))
    clock = StepClock(after=2)
    assert clock.tick(9) is None and clock.tick(8) is None
    assert clock.tick(60) == "2 s per step (over 2 steps), about 2 min for 60 more steps"
    assert clock.tick(59) is None


def test_the_clock_counts_other_work_once_and_no_time_is_negative(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hsat.training.resources.time.perf_counter", lambda: now[0])
    clock = StepClock()
    now[0] = 3.0
    clock.tick(9)
    with clock.other_work("held-out evaluation"):  # after the first step, before the second
        now[0] = 23.0
    assert "(3 s each)" in clock.whole(8, {"held-out evaluation": 2})
    now[0] = 25.0
    clock.tick(8)
    with clock.other_work("held-out evaluation"):
        now[0] = 45.0
    assert clock.whole(7, {"held-out evaluation": 2}) == (
        "about 54 s to go: 7 more steps (2 s each), 2 held-out evaluations (20 s each)"
    )


def test_a_number_with_a_gradient_is_shown_without_a_warning():
    assert value_text(torch.tensor(0.25, requires_grad=True)) == "0.25"
