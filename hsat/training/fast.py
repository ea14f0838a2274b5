"""Fast adversarial training: attacks of one gradient step, guarded against catastrophic overfitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hsat.attacks import PGD, hierarchical
from hsat.models import frozen
from hsat.training.step import Autocast, Loss, local_loss, unwrap_parallel, use_branch
from hsat.types import Attack, HierarchicalBatch


class LossGap(NamedTuple):
    """Mean attacked loss on one batch: at the clean images, after the fast attack, after the strong one.

    Attributes:
        clean: At the clean images.
        fast: After the fast attack.
        strong: After the strong attack.
    """

    clean: float
    fast: float
    strong: float

    @property
    def share(self) -> float:
        """Share of the strong attack's rise that the fast one reaches; 1 where the strong one found no rise."""
        rise = self.strong - self.clean
        return (self.fast - self.clean) / rise if rise > 0 else 1.0

    @classmethod
    def mean(cls, gaps: Sequence[LossGap]) -> LossGap:
        """Of equally large batches, such as those of all ranks.  The same order gives the same bits.

        Args:
            gaps: One or more.

        Returns:
            The mean of each of the three losses.

        Raises:
            ValueError: For no gap.
        """
        if not gaps:
            raise ValueError("there is no gap to take the mean of; give those of one or more batches")
        return cls(*(math.fsum(values) / len(gaps) for values in zip(*gaps, strict=True)))


@dataclass(frozen=True)
class OverfittingGuard:
    """Train with a fast attack for as long as it is nearly as strong as a short PGD; with the PGD otherwise.

    A network can learn to mask the one gradient that a single-step attack reads (catastrophic overfitting): the fast
    attack then finds next to nothing, and several steps find nearly everything (arXiv:2001.03994, section 5).  Every
    `check_every` steps both attack the same batch.  A `LossGap.share` below `min_share` means: train with `strong`,
    until a later check gives a sufficient share (falling back to PGD is the remedy of arXiv:2006.03089).

        gap = guard.measure(model, loss, batch, generator=generator) if guard.is_due(step) else gap
        attack = guard.choose_attack(gap)

    Attributes:
        fast: The attack of one step.
        strong: The PGD; it names the ball, and what `fast` gives is projected into it before it is measured.
        check_every: Steps between checks, the first at step 0.
        min_share: In [0, 1]; of a linear loss FFGSM reaches 0.86, since one step cannot undo its random start
            everywhere.

    Raises:
        ValueError: For numbers out of range.
    """

    fast: Attack
    strong: PGD
    _: KW_ONLY
    check_every: int = 20
    min_share: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.check_every, bool) or not isinstance(self.check_every, int) or self.check_every < 1:
            raise ValueError(f"check_every must be a whole number of steps >= 1, got {self.check_every!r}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share must lie in [0, 1], got {self.min_share!r}")

    def is_due(self, step: int) -> bool:
        """Whether this step begins with a check.

        Args:
            step: Number of the step, from 0.

        Returns:
            Whether a check is due.
        """
        return step % self.check_every == 0

    def choose_attack(self, gap: LossGap | None) -> Attack:
        """What to train with after this check; the fast attack where there was none yet.

        Args:
            gap: What the last check measured; None before the first.

        Returns:
            The strong attack where the fast one reaches less than `min_share` of its rise, else the fast one.
        """
        return self.strong if gap is not None and gap.share < self.min_share else self.fast

    def measure(
        self,
        model: nn.Module,
        loss: Loss,
        batch: HierarchicalBatch,
        *,
        autocast: Autocast = nullcontext,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> LossGap:
        """Attack the batch with both, as `adversarial_step` would; the model is frozen meanwhile and left as it was.

        One device read.  With several ranks each measures its own batch and exchanges nothing; their decision must be
        one, so train by the mean of all: `LossGap.mean([LossGap(*values) for values in gather_objects(list(gap))])`.

        Args:
            model: Images -> embeddings; DistributedDataParallel is unwrapped.
            loss: What the attacks maximise; it may be a scalar or per image.
            batch: The images of this rank.
            autocast: Makes the context of every pass.
            generator: Source of the attacks' noise.
            ids: (n,), by which an image's noise is drawn.

        Returns:
            The three losses.
        """
        encoder, x = unwrap_parallel(model), batch.images
        with use_branch(encoder, "pgd"), frozen(encoder), autocast():
            objective = hierarchical(encoder, local_loss(loss), batch)
            fast = self.strong.threat.project(self.fast(x, objective, generator=generator, ids=ids), x)
            strong = self.strong(x, objective, generator=generator, ids=ids)
            with torch.no_grad():
                values = torch.stack([objective(images).float().mean() for images in (x, fast, strong)])
        return LossGap(*values.tolist())
