"""The inner maximisation of a training: PGD as published, and cheaper ones with what they keep between steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsat.attacks import FFGSM, NFGSM, PGD, Linf, RandomNoise
from hsat.distributed import gather_objects
from hsat.training.config import InnerAttackConfig
from hsat.training.fast import LossGap, OverfittingGuard
from hsat.training.step import Loss
from hsat.training.warm_start import WarmStarts
from hsat.types import Attack, HierarchicalBatch

SINGLE_STEP = {"fgsm_rs": FFGSM, "nfgsm": NFGSM}
GUARDED = {"fgsm_rs": "single_step_share", "nfgsm": "single_step_share", "free": "free_share"}
"""What is compared with PGD, and the column of train.csv that says so."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FreeReplays:
    """In place of an attack: free training makes its perturbations while it descends, see `free_replays`.

    Attributes:
        threat: The feasible set.
        replays: How often a batch is used.
    """

    threat: Linf
    replays: int

    def as_attack(self) -> Attack:
        """The steps of the perturbation on weights that stand still: of size eps, one fewer than replays."""
        if self.replays == 1:
            return RandomNoise(self.threat)
        return PGD(self.threat, step_size=float(self.threat.eps), steps=self.replays - 1)


class InnerAttack:
    """Chooses the attack and its start for each batch.

    "pgd" is the paper's.  "fgsm_rs" and "nfgsm" make one step and "free" makes its steps while it descends; they are
    compared with the PGD every so many steps, and replaced by it where they fail.  "warm" is the PGD from where it
    ended on the same patches last time.

    Args:
        config: Which one.
        model: The encoder that is attacked.
        loss: What the attacks maximise.
        autocast: Makes the context of every pass.
    """

    def __init__(
        self,
        config: InnerAttackConfig,
        model: nn.Module,
        loss: Loss,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config, self.model, self.loss, self.autocast = config, model, loss, autocast
        self.gap: LossGap | None = None
        self.warm_starts = WarmStarts() if config.name == "warm" else None

    def choose(
        self,
        pgd: PGD | None,
        parts: Sequence[HierarchicalBatch],
        step: int,
        *,
        generator: torch.Generator,
        ids: Tensor | None = None,
    ) -> tuple[Attack | FreeReplays | None, Tensor | None]:
        """The attack for this batch, and where it starts (None: where the attack itself wants to).

        Args:
            pgd: The PGD of this epoch; None for a training without attack.
            parts: The batch, or its parts where each is attacked by itself.
            step: Number of the training step.
            generator: Of the noise.
            ids: Places of all images, (n,), by which noise is drawn; or None.
        """
        if pgd is None:
            return None, None
        if self.warm_starts is not None:
            return pgd, self.warm_starts.points(parts[0], pgd.threat, generator=generator)  # there are no more parts
        if self.config.name not in GUARDED or not isinstance(pgd.threat, Linf):
            return pgd, None
        free = FreeReplays(pgd.threat, self.config.replays)
        is_free = self.config.name == "free"
        fast = free.as_attack() if is_free else SINGLE_STEP[self.config.name](pgd.threat)
        chosen = free if is_free else fast
        if self.config.check_every == 0:
            return chosen, None
        guard = OverfittingGuard(fast, pgd, check_every=self.config.check_every, min_share=self.config.check_share)
        if guard.is_due(step):
            own = torch.Generator().manual_seed(generator.initial_seed())  # a check must not change the draws
            before, self.gap = self.gap, self._measure(guard, parts, generator=own, ids=ids)
            self._note_change(guard, before, step)
        return (pgd if guard.choose_attack(self.gap) is pgd else chosen), None

    def _note_change(self, guard: OverfittingGuard, before: LossGap | None, step: int) -> None:
        """Say so where a check puts PGD in the place of what it is compared with, or puts that back."""
        assert self.gap is not None
        failed, fails = (guard.choose_attack(gap) is guard.strong for gap in (before, self.gap))
        if failed == fails:
            return
        kind = "free training" if self.config.name == "free" else "the single step"
        what = f"{kind} finds {self.gap.share:.0%} of PGD's rise in loss"
        after = "catastrophic overfitting: PGD until that recovers" if fails else f"{self.config.name} again"
        _log.warning("step %d: %s (%.0f%% are wanted): %s", step, what, 100 * guard.min_share, after)

    def _measure(
        self,
        guard: OverfittingGuard,
        parts: Sequence[HierarchicalBatch],
        *,
        generator: torch.Generator,
        ids: Tensor | None,
    ) -> LossGap:
        """The mean over the parts of all ranks, so that all of them decide alike."""
        own = [None] * len(parts) if ids is None else torch.split(ids, [len(part) for part in parts])
        gaps = [
            guard.measure(self.model, self.loss, part, autocast=self.autocast, generator=generator, ids=part_ids)
            for part, part_ids in zip(parts, own, strict=True)
        ]
        of_all = gather_objects([list(gap) for gap in gaps])
        return LossGap.mean([LossGap(*gap) for of_rank in of_all for gap in of_rank])

    def keep(self, batch: HierarchicalBatch, x_adv: Tensor | None) -> None:
        """Remember the perturbations, where that is wanted."""
        if self.warm_starts is not None and x_adv is not None:
            self.warm_starts.keep(batch, x_adv)

    def logged(self) -> dict[str, float]:
        """What train.csv says of the comparison with PGD; below `check_share` it is PGD that trains."""
        return {} if self.gap is None else {GUARDED[self.config.name]: self.gap.share}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "gap": None if self.gap is None else list(self.gap),
            "warm": None if self.warm_starts is None else self.warm_starts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; ValueError for a gap of losses that are no numbers."""
        gap = state["gap"]
        if gap is not None and not all(isinstance(loss, float | int) for loss in gap):
            raise ValueError(f"inner.gap is {gap}; three losses were wanted")
        self.gap = None if gap is None else LossGap(*gap)
        if self.warm_starts is not None:
            self.warm_starts.load_state_dict(state["warm"])


def check_groups(config: InnerAttackConfig, *, ranks: int, accumulate: int) -> None:
    """Check that an inner maximisation can serve several groups of patients.

    Args:
        config: The inner maximisation.
        ranks: Number of processes.
        accumulate: Parts of a batch in each.

    Raises:
        ValueError: Where it cannot, with what to type.
    """
    if config.name == "warm" and ranks * accumulate > 1:
        raise ValueError(
            "--attack.name warm remembers perturbations within one process, and from epoch to epoch patients change"
            f" theirs: it works without torchrun and without --train.accumulate (got {ranks} rank(s),"
            f" --train.accumulate {accumulate}); or use pgd, fgsm_rs or nfgsm"
        )
    if config.name == "free" and accumulate > 1:
        raise ValueError(
            "--attack.name free moves the images by one backward pass through the whole batch: it works without"
            f" --train.accumulate (got {accumulate}); share the batch among ranks (torchrun), or use fgsm_rs or nfgsm"
        )
