"""Length and memory of a run: how long it will take, whether it fits, and what to lower where it does not."""

from __future__ import annotations

import math
import re
import resource
import sys
import time

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
    """Seconds per step of this process, the first step left out: it warms caches and compiles.

    `tick` is called once after each step and gives, once, after `after` timed steps, the estimate for the rest.

    Args:
        after: Number of timed steps.
    """

    def __init__(self, *, after: int = 2) -> None:
        self._after, self._ticks, self._begin = after, 0, 0.0

    def tick(self, left: int) -> str | None:
        """The sentence to show after a step, or None.

        Args:
            left: Steps still to go.
        """
        self._ticks += 1
        if self._ticks == 1:
            self._begin = time.perf_counter()
        if self._ticks != self._after + 1:
            return None
        seconds = (time.perf_counter() - self._begin) / self._after
        rest = time_text(seconds * left)
        return f"{seconds:.2g} s per step (over {self._after} steps), about {rest} for {left} more steps"


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
