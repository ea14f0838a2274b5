"""The check that notices when an attack of one gradient step has stopped to be an attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hsat.attacks import PGD, hierarchical
from hsat.models import frozen
from hsat.training.step import Loss, local_loss, statistics_of, unwrapped
from hsat.types import Attack, HierarchicalBatch


class Gap(NamedTuple):
    """Mean attacked loss on one batch: at the clean images, after the fast attack, after the strong one."""

    clean: float
    fast: float
    strong: float

    @property
    def share(self) -> float:
        """Share of the strong attack's rise that the fast one reaches; 1 where the strong one found no rise."""
        rise = self.strong - self.clean
        return (self.fast - self.clean) / rise if rise > 0 else 1.0

    @classmethod
    def mean(cls, gaps: Sequence[Gap]) -> Gap:
        """Of equally large batches, such as those of all ranks.  The same order gives the same bits."""
        if not gaps:
            raise ValueError("there is no gap to take the mean of; give those of one or more batches")
        return cls(*(math.fsum(values) / len(gaps) for values in zip(*gaps, strict=True)))


@dataclass(frozen=True)
class Safeguard:
    """Train with a fast attack for as long as it is nearly as strong as a short PGD; with the PGD otherwise.

    A network can learn to mask the one gradient that a single-step attack reads (catastrophic overfitting): the fast
    attack then finds next to nothing, and several steps find nearly everything (arXiv:2001.03994, section 5).  Every
    `every` steps both attack the same batch, and `Gap.share` below `least` means: train with `strong` until a later
    check finds the fast attack trustworthy again (falling back to PGD is the remedy of arXiv:2006.03089).

        gap = safeguard.measure(model, loss, batch, generator=generator) if safeguard.due(step) else gap
        attack = safeguard.attack(gap)

    fast, strong: attacks; `strong` names the ball, and what `fast` gives is projected into it before it is measured.
    every: steps between checks, the first at step 0.  least: in [0, 1]; of a linear loss FFGSM reaches 0.86, since one
    step cannot undo its random start everywhere.  Raises ValueError for numbers out of range.
    """

    fast: Attack
    strong: PGD
    _: KW_ONLY
    every: int = 20
    least: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number of steps >= 1, got {self.every!r}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least is a share and must lie in [0, 1], got {self.least!r}")

    def due(self, step: int) -> bool:
        """Is it time for a check?"""
        return step % self.every == 0

    def attack(self, gap: Gap | None) -> Attack:
        """What to train with after this check; the fast attack where there was none yet."""
        return self.strong if gap is not None and gap.share < self.least else self.fast

    def measure(
        self,
        model: nn.Module,
        loss: Loss,
        batch: HierarchicalBatch,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Gap:
        """Attack the batch with both, as `adversarial_step` would; the model is frozen meanwhile and left as it was.

        loss: the loss that the attacks climb; it may be a scalar or per image.  generator, ids: handed to the attacks.
        One device read.  With several ranks each measures its own batch, without a word to the others; their decision
        must be one, so train by the mean of all: `Gap.mean([Gap(*found) for found in of_all_ranks(list(gap))])`.
        """
        encoder, x = unwrapped(model), batch.images
        how: dict[str, Any] = {"generator": generator} | ({} if ids is None else {"ids": ids})
        with statistics_of(encoder, "pgd"), frozen(encoder), autocast():
            objective = hierarchical(encoder, local_loss(loss), batch)
            fast = self.strong.threat.project(self.fast(x, objective, **how), x)
            strong = self.strong(x, objective, **how)
            with torch.no_grad():
                values = torch.stack([objective(images).float().mean() for images in (x, fast, strong)])
        return Gap(*values.tolist())
