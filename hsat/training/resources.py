"""Length and memory of a run: how long it will take, whether it fits, and what to lower where it does not."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hsat.quantities import memory_text, time_text

__all__ = [
    "StepClock",
    "is_out_of_memory",
    "largest_batch",
    "memory_report",
    "memory_text",
    "parse_memory",
    "peak_memory",
    "time_text",
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CPU_WORDS = ("defaultcpuallocator", "can't allocate memory", "cannot allocate memory")


def parse_memory(text: str) -> int:
    """Bytes in "8GB", "500 MB", "7.5GiB" or "1000000".

    Raises:
        ValueError: For anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < math.inf:
        raise ValueError(f"write an amount of memory such as 8GB, 500MB or 7.5GiB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: what torch allocated on a GPU, what the whole process held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest_batch(batch: int, *, before: float, peak: float, limit: float) -> int:
    """The batch that fits into `limit` bytes, if memory beyond `before` grows in proportion to the batch; 0 for none.

    Args:
        batch: Size of the batch that was measured, in whatever it counts.
        before: Bytes held before the first step.
        peak: The most during it.
        limit: Bytes that may be held.
    """
    if peak <= before:
        return batch
    return max(0, math.floor(batch * (limit - before) / (peak - before)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a GPU's memory, or the machine's, is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CPU_WORDS)


class StepClock:
    """Seconds per step of this process, the first step left out: it warms caches and compiles; and of other work.

    `tick` is called once after each step and gives, once, after `after` timed steps, the estimate for the rest.  The
    held-out evaluations and checkpoints between the steps are timed by `other_work`; once each was seen, `whole` takes
    them into account.

    Args:
        after: Number of timed steps.
    """

    def __init__(self, *, after: int = 2) -> None:
        self._after, self._ticks, self._begin, self._last = after, 0, 0.0, 0.0
        self._other: dict[str, list[float]] = {}
        self._made = time.perf_counter()
        self._between = 0.0  # seconds of other work from the first step to the last one
        self._since_last = 0.0  # and after that

    def tick(self, left: int) -> str | None:
        """The sentence to show after a step, or None.

        Args:
            left: Steps still to go.
        """
        self._ticks += 1
        self._last = time.perf_counter()
        self._between, self._since_last = self._between + self._since_last, 0.0
        if self._ticks == 1:
            self._begin, self._between = self._last, 0.0
        if self._ticks != self._after + 1:
            return None
        rest = time_text(self._seconds * left)
        return f"{self._seconds:.2g} s per step (over {self._after} steps), about {rest} for {left} more steps"

    @property
    def _seconds(self) -> float:
        """Per step; of the first step where there is no other one."""
        if self._ticks < 2:
            return self._last - self._made
        return (self._last - self._begin - self._between) / (self._ticks - 1)

    @contextmanager
    def other_work(self, name: str) -> Iterator[None]:
        """Time what is done inside the block, between two steps.

        Args:
            name: What it is: "held-out evaluation", "checkpoint".
        """
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._other.setdefault(name, []).append(seconds)
        self._since_last += seconds

    def whole(self, left: int, others: Mapping[str, int]) -> str:
        """The sentence about all that is still to be done.

        Args:
            left: Steps still to go.
            others: How often each kind of other work will be done.
        """
        means = {name: sum(times) / len(times) for name, times in self._other.items()}
        seconds = self._seconds * left + sum(means.get(name, 0.0) * count for name, count in others.items())
        parts = [f"{left} more steps ({self._seconds:.2g} s each)"]
        parts += [f"{count} {name}s ({means[name]:.2g} s each)" for name, count in others.items() if name in means]
        return f"about {time_text(seconds)} to go: {', '.join(parts)}"


def memory_report(limit_text: str, *, before: int, peak: int, patients: int, groups: int) -> str:
    """After the first step: a sentence about its peak and a limit, and which batch would fit.

    Args:
        limit_text: The limit, as in "8GB".
        before: Bytes in use before the step.
        peak: Most bytes in use during it.
        patients: Patients per batch, of all groups together.
        groups: Ranks times parts of a batch.
    """
    limit = parse_memory(limit_text)
    text = f"peak memory of the first step: {memory_text(peak)} of --train.max_memory {memory_text(limit)}"
    if peak <= limit:
        return text
    if before >= limit:
        return f"{text}; {memory_text(before)} were in use before it, by program and encoder: no batch would fit"
    fits = largest_batch(patients // groups, before=before, peak=peak, limit=limit) * groups
    if not fits:
        return (
            f"{text}; not even one patient at a time fits: lower --data.image_size, or use a smaller --model.backbone"
        )
    return f"{text}; about --train.batch_patients {fits} would fit, or raise --train.accumulate"
