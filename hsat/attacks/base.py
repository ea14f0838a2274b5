"""How attacks are called, and the checks of their settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hsat.attacks.loop import AscentConfig, ascend
from hsat.attacks.threat import check_threat, settings_number
from hsat.types import AttackResult, Objective, SuccessTest, ThreatModel


class GradientAttack(ABC):
    """The two ways to call an attack, once; each final class provides the numbers of its ascent."""

    @abstractmethod
    def _config(self) -> AscentConfig: ...

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
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Adversarial images, same shape, dtype and device as x, detached; see `run` for the arguments."""
        config = self._config()
        return ascend(
            x, objective, config, start=start, generator=generator, ids=ids, success=success, score=False
        ).x_adv

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The attack with its record.

        Args:
            x: (n, c, h, w) floats in the threat model's range.
            objective: Images -> scalar or (n,), maximised.
            start: (n, c, h, w), replaces the first restart's start and is projected first.
            generator: Source of random starts (torch's global one if None).
            ids: (n,) ints that make each image's noise its own.
            success: (x_adv) -> (n,) bool, stops images early.
            score: False saves the last forward pass of a single restart, and `value` is then not the value at x_adv.

        Returns:
            The result; see `AttackResult`.

        Raises:
            ValueError: For images out of range, wrong shapes, or a scalar objective with `success`.
            RuntimeError: Under inference_mode, or for an objective without a gradient path.
            FloatingPointError: For non-finite gradients.
        """
        config = self._config()
        return ascend(x, objective, config, start=start, generator=generator, ids=ids, success=success, score=score)


def settings_text(attack: Any, *, leave_out: Sequence[str] = ()) -> str:
    """The complete settings, as they would be typed: step sizes are written as grey levels where that is exact."""
    parts = []
    for option in fields(attack):
        if option.name in leave_out or option.type == "KW_ONLY":
            continue
        value = getattr(attack, option.name)
        parts.append(f"{option.name}={settings_number(value) if option.name == 'step_size' and value else repr(value)}")
    return f"{type(attack).__name__}({', '.join(parts)})"


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
