"""The cheaper inner maximisations of train_hsat.py, and what they keep between steps (docs/cheaper_inner.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hsat.attacks import FFGSM, NFGSM, PGD, Linf
from hsat.distributed import gather_objects
from hsat.training import LossGap, OverfittingGuard, WarmStarts
from hsat.types import Attack, HierarchicalBatch

if TYPE_CHECKING:
    from train_hsat import TrainHSAT
    from trainer import Trainer

SINGLE_STEP = {"fgsm_rs": FFGSM, "nfgsm": NFGSM}


class Inner:
    """Chooses the attack and its start for each batch.

    pgd: the paper's.  fgsm_rs, nfgsm: one step, checked against the PGD every so many steps and replaced by it where it
    fails.  warm: the PGD from where it ended on the same patches last time.  free: no attack; see `hsat.free_replays`.
    ranks: how many processes train together; warm serves one, without --train.accumulate, and free no parts.
    """

    def __init__(self, settings: TrainHSAT, *, ranks: int = 1) -> None:
        self.settings = settings.attack
        self.gap: LossGap | None = None
        self.warm = WarmStarts() if self.settings.name == "warm" else None
        _check(settings)
        _check_groups(settings, ranks)

    def choose(
        self,
        trainer: Trainer,
        parts: Sequence[HierarchicalBatch],
        pgd: PGD | None,
        *,
        generator: torch.Generator,
        ids: Tensor | None,
    ) -> tuple[Attack | None, Tensor | None]:
        """The attack for this batch, and where it starts (None: where the attack itself wants to).

        parts: the batch, or its parts where each is attacked by itself.  ids: of all their images, or None.
        """
        if pgd is None:
            return None, None
        if self.warm is not None:
            return pgd, self.warm.points(parts[0], pgd.threat, generator=generator)  # there are no more
        if self.settings.name not in SINGLE_STEP:
            return pgd, None
        assert isinstance(pgd.threat, Linf)  # the trainer made it
        fast = SINGLE_STEP[self.settings.name](pgd.threat)
        if self.settings.check_every == 0:
            return fast, None
        guard = OverfittingGuard(fast, pgd, check_every=self.settings.check_every, min_share=self.settings.check_share)
        if guard.is_due(trainer.step):
            own = torch.Generator().manual_seed(generator.initial_seed())  # a check must not change the draws
            self.gap = _measured(guard, trainer, parts, generator=own, ids=ids)
        return guard.choose_attack(self.gap), None

    def keep(self, batch: HierarchicalBatch, x_adv: Tensor | None) -> None:
        """Remember the perturbations, where that is wanted."""
        if self.warm is not None and x_adv is not None:
            self.warm.keep(batch, x_adv)

    def logged(self) -> dict[str, float]:
        """What train.csv says of the safeguard."""
        return {} if self.gap is None else {"single_step_share": self.gap.share}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "gap": None if self.gap is None else list(self.gap),
            "warm": None if self.warm is None else self.warm.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self.gap = None if state["gap"] is None else LossGap(*state["gap"])
        if self.warm is not None:
            self.warm.load_state_dict(state["warm"])


def _measured(
    guard: OverfittingGuard,
    trainer: Trainer,
    parts: Sequence[HierarchicalBatch],
    *,
    generator: torch.Generator,
    ids: Tensor | None,
) -> LossGap:
    """The mean over the parts of all ranks, so that all of them decide alike."""
    own = [None] * len(parts) if ids is None else torch.split(ids, [len(part) for part in parts])
    gaps = [
        guard.measure(trainer.model, trainer.inner_loss, part, autocast=trainer.autocast, generator=generator, ids=mine)
        for part, mine in zip(parts, own, strict=True)
    ]
    by_rank = gather_objects([list(gap) for gap in gaps])
    return LossGap.mean([LossGap(*values) for of_rank in by_rank for values in of_rank])


def _check_groups(settings: TrainHSAT, ranks: int) -> None:
    """Raise ValueError where an inner maximisation cannot serve several ranks or parts, with what to type."""
    name, accumulate = settings.attack.name, settings.train.accumulate
    if name == "warm" and ranks * accumulate > 1:
        raise ValueError(
            "--attack.name warm remembers perturbations within one process, and from epoch to epoch patients change"
            f" theirs: it works without torchrun and without --train.accumulate (got {ranks} rank(s),"
            f" --train.accumulate {accumulate}); or use pgd, fgsm_rs or nfgsm"
        )
    if name == "free" and accumulate > 1:
        raise ValueError(
            "--attack.name free moves the images by one backward pass through the whole batch: it works without"
            f" --train.accumulate (got {accumulate}); share the batch among ranks (torchrun), or use fgsm_rs or nfgsm"
        )


def _check(settings: TrainHSAT) -> None:
    """Raise ValueError for settings that an inner maximisation cannot serve, with what to type."""
    data, train, attack = settings.data, settings.train, settings.attack
    if attack.name == "warm" and (data.augmentation != "none" or data.ids == "slots" or settings.compat == "paper"):
        raise ValueError(
            "warm starts belong to fixed pixels of known patches: give --data.augmentation none and true ids"
            f" (got augmentation {data.augmentation}, ids {data.ids or 'true'}, compat {settings.compat})"
        )
    if attack.name == "free" and train.precision == "16":
        raise ValueError("free training moves the images by an unscaled gradient; give --train.precision bf16 or 32")
    if attack.name == "free" and (train.clean or attack.levels != train.loss):
        raise ValueError(
            "free training attacks the loss that it descends, on adversarial images only: leave out --train.clean and"
            f" give --attack.levels {train.loss}"
        )
