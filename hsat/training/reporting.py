"""What a training says while it runs: how far it is, how long it will take, its memory, the held-out numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from hsat.progress import Progress
from hsat.training.config import TrainConfig
from hsat.training.resources import StepClock, memory_report, peak_memory

EVALUATION, CHECKPOINT = "held-out evaluation", "checkpoint"

_log = logging.getLogger("hsat")


class TrainingReport:
    """Notes beside a training's progress.

    Args:
        config: The options.
        device: Where it computes.
        groups: Ranks times parts of a batch.
        total: Steps of the whole run.
        eval_every: Steps between two held-out evaluations; None where no patient is held out.
        shown: Whether to say anything beside the memory that was asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: torch.device,
        groups: int,
        total: int,
        eval_every: int | None,
        shown: bool,
    ) -> None:
        self._config, self._device, self._groups = config, device, groups
        self._total, self._eval_every, self._shown = total, eval_every, shown
        self._clock, self._memory_before, self._whole_is_known = StepClock(), peak_memory(device), False
        self._bar = Progress("training", total=total, unit="step", shown=False)

    @contextmanager
    def progress(self, *, done: int, shown: bool) -> Iterator[None]:
        """Show the progress of the steps inside the block, from step `done` on."""
        with Progress("training", total=self._total, initial=done, unit="step", shown=shown) as self._bar:
            yield

    @contextmanager
    def other_work(self, name: str) -> Iterator[None]:
        """Time what is done inside the block between two steps: an EVALUATION or a CHECKPOINT."""
        with self._clock.other_work(name):
            yield

    def after_step(self, done: int, *, loss: float) -> None:
        """After a step: its loss, and what there is to say about the length and the memory of the run, each once."""
        self._bar.update(loss=f"{loss:.3f}")
        if (estimate := self._clock.tick(self._total - done)) is not None and self._shown:
            more = "; held-out evaluations come on top, and are in the next estimate" if self._eval_every else ""
            self._note(estimate + more)
        if self._memory_before and self._config.max_memory is not None:
            text = memory_report(
                self._config.max_memory or "",
                before=self._memory_before,
                peak=peak_memory(self._device),
                patients=self._config.batch_patients,
                groups=self._groups,
            )
            self._note(text)
        self._memory_before = 0

    def after_evaluation(self, done: int, values: Mapping[str, float], *, best: float) -> None:
        """The held-out numbers as they come; after the first ones how long the run will take with all that is in it.

        Args:
            done: Steps made so far.
            values: The numbers; nothing where none were measured after this step.
            best: The best score so far.
        """
        if not values or not self._shown:
            return
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        self._note(f"step {done} of {self._total}: held out: {numbers}; best score {best:.3f}")
        if (left := self._total - done) and not self._whole_is_known:
            self._whole_is_known = True
            every = {EVALUATION: self._eval_every or self._total, CHECKPOINT: self._config.save_every}
            counts = {name: math.ceil(self._total / steps) - done // steps for name, steps in every.items()}
            self._note(self._clock.whole(left, counts))

    def _note(self, text: str) -> None:
        with self._bar.aside():
            _log.info("%s", text)
