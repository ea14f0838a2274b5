"""How many threads a command computes with on a CPU: what the user says, else the faster of two by a short measurement.

Sums of float32 depend on how many threads share them, in the last bits.  So the number is said and recorded where it is
not the one that torch begins with, and a run that goes on keeps it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from hsat.cli.options import say
from hsat.eval import Record
from hsat.models import Encoder, frozen
from hsat.run_folder import write_json

Threads = Literal["auto"] | Annotated[int, Field(gt=0)]

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user, or torchrun, has chosen already."""
_FASTER = 1.2  # times as fast as torch's own number, or it stays
_IMAGES = 2


@contextmanager
def computing_threads(threads: Threads) -> Iterator[None]:
    """Compute with so many threads inside the block; "auto" leaves the number as it is.  It is set back afterwards."""
    before = torch.get_num_threads()
    if threads != "auto":
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_threads(
    threads: Threads,
    encoder: Encoder,
    *,
    image_size: int,
    device: torch.device,
    state: Path,
    environment: Mapping[str, str] | None = None,
) -> int | None:
    """Choose the number of threads, inside `computing_threads`.

    With "auto", on a CPU, and where neither the user nor torchrun has set OMP_NUM_THREADS or MKL_NUM_THREADS, a few
    images go through the encoder and back, with torch's own number of threads and with one.  Where threads wait for
    each other, on busy cores or with small images, one is faster; it is taken if it is clearly so, and said.

    Args:
        threads: What --threads says.
        encoder: Whose speed counts.
        image_size: Side of the images.
        device: Where it computes.
        state: Folder of finished batches; the number is kept there for a run that goes on.
        environment: Variables; those of this process if none are given.

    Returns:
        The number, where it is another than torch's own or the user's words; None where nothing was chosen.
    """
    if threads != "auto":
        return threads
    default, kept = torch.get_num_threads(), state / "threads.json"
    given = os.environ if environment is None else environment
    if device.type != "cpu" or default == 1 or any(name in given for name in VARIABLES):
        return None
    if kept.is_file():
        count = max(1, int(json.loads(kept.read_text())["threads"]))
    else:
        count = 1 if one_is_faster(encoder, image_size, default) else default
        state.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"threads": count})
    if count == default:
        return None
    torch.set_num_threads(count)
    say(f"computing with {count} thread(s), not {default}: faster here, by a short measurement (--threads {default})")
    return count


def one_is_faster(encoder: Encoder, image_size: int, default: int) -> bool:
    """Whether one thread is clearly faster than torch's own number, each timed twice in turn after a warm-up."""
    images = torch.rand(_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {default: [], 1: []}
    try:
        with frozen(encoder), torch.random.fork_rng(devices=[]):
            for _ in range(3):
                for count, taken in seconds.items():
                    torch.set_num_threads(count)
                    begin = time.perf_counter()
                    leaf = images.clone().requires_grad_()
                    torch.autograd.grad(encoder.features(leaf).square().sum(), leaf)
                    taken.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(default)
    return min(seconds[default][1:]) > _FASTER * min(seconds[1][1:])


def name_threads(records: Iterable[Record], threads: int | None) -> tuple[Record, ...]:
    """The records, with a number of threads that was chosen among how they were computed."""
    if threads is None:
        return tuple(records)
    return tuple(
        dataclasses.replace(
            record,
            settings={**record.settings, "computed": {**record.settings.get("computed", {}), "threads": threads}},
        )
        for record in records
    )
