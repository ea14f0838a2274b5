"""How attacks are called, and the checks of their settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hsat.attacks import radius
from hsat.attacks.ascend import Climb, ascend
from hsat.types import AttackResult, Objective, ThreatModel

Success = Callable[[Tensor], Tensor]


class Ascent(ABC):
    """The two ways to call an attack, once; each final class below provides the numbers of its ascent."""

    @abstractmethod
    def _climb(self) -> Climb: ...

    def __repr__(self) -> str:
        return settings_text(self)

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Success | None = None,
    ) -> Tensor:
        """Adversarial images, same shape, dtype and device as x, detached; see `run` for the arguments."""
        climb = self._climb()
        return ascend(
            x, objective, climb, start=start, generator=generator, ids=ids, success=success, score=False
        ).x_adv

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Success | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The attack with its record.

        x: (n, c, h, w) floats in the threat model's range.  objective: images -> scalar or (n,), maximised.
        start: (n, c, h, w), replaces the first restart's start and is projected first.  generator: source of random
        starts (torch's global one if None).  ids: (n,) ints that make each image's noise its own.  success:
        (x_adv) -> (n,) bool, stops images early.  score=False saves the last forward pass of a single restart, and
        `value` is then not the value at x_adv.
        """
        climb = self._climb()
        return ascend(x, objective, climb, start=start, generator=generator, ids=ids, success=success, score=score)


def settings_text(attack: Any, *, leave_out: Sequence[str] = ()) -> str:
    """The complete settings, as they would be typed: step sizes are written as grey levels where that is exact."""
    parts = []
    for option in fields(attack):
        if option.name in leave_out or option.type == "KW_ONLY":
            continue
        value = getattr(attack, option.name)
        parts.append(f"{option.name}={radius.text(value) if option.name == 'step_size' and value else repr(value)}")
    return f"{type(attack).__name__}({', '.join(parts)})"


def check_threat(threat: ThreatModel) -> None:
    """Raise TypeError unless it is a threat model."""
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat must be a threat model such as Linf(8/255), got {threat!r}")


def check_steps(threat: ThreatModel, step_size: float, steps: int = 1, restarts: int = 1) -> None:
    """Raise unless threat, step size and counts make sense."""
    check_threat(threat)
    if not (math.isfinite(step_size) and step_size >= 0):
        raise ValueError(f"step_size must be a finite number >= 0 in units of the pixel range, got {step_size!r}")
    check_counts(steps=steps, restarts=restarts)


def check_counts(**counts: int) -> None:
    """Raise unless all are whole numbers >= 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")


def check_number(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raise unless value is a finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        bound = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}")
