"""The training loop's state and one step of it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from compute import adamw, autocast_of, check_memory, compile_in_place, in_parallel, scaler_of
from encoders import new_encoder
from hsat.attacks import PGD, Linf
from hsat.data import Cohort, PatchStore, PatientBatchSampler
from hsat.distributed import average_statistics, batch_share, global_indices, synchronize_batchnorm
from hsat.losses import HiDiscLoss
from hsat.training import (
    RandomStateMismatch,
    SplitBatch,
    StepClock,
    StepResult,
    TrainingState,
    accumulated_step,
    adversarial_step,
    assert_ranks_agree,
    assert_same,
    augmentation_strength,
    check_gradients,
    check_state,
    check_trainable,
    cosine_with_warmup,
    epsilon_schedule,
    free_replays,
    largest_gradient,
    load_training_state,
    paper_clean_weight,
    peak_memory,
    save_checkpoint,
    split_batch,
)
from hsat.training.gradients import non_finite_gradients
from hsat.types import LEVELS, HierarchicalBatch
from inner import Inner
from ranks import Ranks
from runs import Run, device_named
from views import view_loader

if TYPE_CHECKING:
    from train_hsat import TrainHSAT


class Trainer:
    """Everything a run keeps between steps.

    model is the encoder itself; parallel is what the outer passes call: the encoder, or it in DistributedDataParallel.
    Where there are several groups of patients (ranks x --train.accumulate), each group is attacked by itself, with
    noise by an image's place in the whole batch: two ranks compute what one process computes with --train.accumulate 2.
    """

    def __init__(
        self, settings: TrainHSAT, cohort: Cohort, ranks: Ranks | None = None, packed: PatchStore | None = None
    ) -> None:
        self.settings, self.cohort = settings, cohort
        data, train = settings.data, settings.train
        self.ranks = ranks or Ranks(0, 1, device_named(settings.device))
        self.device, self.several = self.ranks.device, self.ranks.size * train.accumulate > 1
        self.inner = Inner(settings, ranks=self.ranks.size)
        torch.manual_seed(settings.seed + self.ranks.rank)  # for backbones with dropout; nothing of hsat draws from it
        self.sampler = PatientBatchSampler(
            cohort,
            "train",
            batch_patients=batch_share(
                train.batch_patients, ranks=self.ranks.size, parts=train.accumulate, name="--train.batch_patients"
            ),
            seed=settings.seed,
            order=data.order,
            compat=settings.compat,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
        )
        per_epoch = self.sampler.batches_per_epoch
        self.steps = train.steps or train.epochs * per_epoch
        self.epochs = math.ceil(self.steps / per_epoch)
        self.eps_warmup = _or(settings.attack.warmup_epochs, self.epochs // 8)
        self.plateau = _or(train.plateau, max(1, self.epochs // 800))
        self.loader = view_loader(settings, self.sampler, plateau=self.plateau, device=self.device, packed=packed)
        self.eval_every = _or(train.eval_every, max(1, self.steps // 10))
        self.layout = torch.channels_last if train.channels_last else torch.preserve_format
        self.model = new_encoder(settings.model, seed=settings.seed)
        check_trainable(self.model)
        if train.sync_norm and self.ranks.size > 1:
            synchronize_batchnorm(self.model, device=self.device)
        assert_ranks_agree(model=self.model)  # DistributedDataParallel would make them rank 0's in silence
        self.model.to(self.device, memory_format=self.layout)
        self.parallel = in_parallel(self.model, settings) if self.ranks.size > 1 else self.model
        self.autocast = autocast_of(train.precision, self.device)
        everywhere = train.global_negatives and self.ranks.size > 1
        self.loss = HiDiscLoss.from_code(train.loss, temperature=train.temperature, gather=everywhere)
        self.inner_loss = HiDiscLoss.from_code(settings.attack.levels, temperature=train.temperature)
        self.optimizer = adamw(self.model, lr=train.lr, weight_decay=train.weight_decay)
        self.scaler = scaler_of(train.precision, self.device)
        warmup = int(train.warmup * self.steps)
        self.schedule = LambdaLR(self.optimizer, lambda step: cosine_with_warmup(step, steps=self.steps, warmup=warmup))
        self.step, self.best = 0, -1.0
        self.saved: int | None = None  # steps in last.pt
        self.skipped = 0  # steps that float16 left out
        self.clock, self.memory_before, self.compiled = StepClock(), peak_memory(self.device), not train.compile

    def attack(self, epoch: int) -> PGD | None:
        """The inner maximisation in this epoch, or None for the baseline."""
        chosen = self.settings.attack
        if chosen.name == "none":
            return None
        eps = epsilon_schedule(epoch, warmup=self.eps_warmup, eps=chosen.eps, epochs=max(self.epochs, self.eps_warmup))
        return PGD(Linf(eps), step_size=chosen.step_size, steps=chosen.steps)

    def strength(self, epoch: int) -> float:
        """Augmentation strength in this epoch; the static pipelines ignore it."""
        data = self.settings.data
        return data.strength * (augmentation_strength(epoch, self.epochs, self.plateau) if data.dynamic else 1.0)

    def train_step(self, batch: Any, epoch: int) -> dict[str, float]:
        """One batch, with one optimiser step (free: several); returns what is logged of the last.

        Raises FloatingPointError before a loss or a gradient that is not finite is stepped on, and ValueError where no
        parameter got a gradient.
        """
        count = self.settings.train.accumulate
        parts = split_batch(batch, count).parts if count > 1 else ()  # on the CPU, where ids are counted
        batch, parts = self._moved(batch), tuple(map(self._moved, parts))
        # a GPU draws its noise itself: 128 images of 300 pixels cost a CPU 0.17 s
        home = self.device if self.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(home).manual_seed(_mixed(self.settings.seed, self.step))
        weight = paper_clean_weight(self.strength(epoch)) if self.settings.train.clean else 0.0
        attack = self.attack(epoch)
        self.parallel.train()
        if not self.compiled:
            compile_in_place(self.model, self.device)
            self.compiled = True
        try:
            for result in self._results(batch, parts, attack, clean_weight=weight, generator=generator):
                values = self._descend(result, has_gradients=bool(parts))
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step}: {error}") from error
        self.inner.keep(batch, result.x_adv)
        row = {"step": self.step, "epoch": epoch, "loss": values.pop("loss")}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row |= values
        with warnings.catch_warnings():  # float16: a first step that overflows is left out, as it should be
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        self.step += 1
        row |= {"eps": 0.0 if attack is None else float(attack.threat.eps), "strength": self.strength(epoch)}
        return row | self.inner.logged()

    def notes(self) -> Iterator[str]:
        """After a step: what there is to say about the length and the memory of the run, each once."""
        if (estimate := self.clock.tick(self.steps - self.step)) is not None:
            yield estimate
        if self.memory_before and (text := check_memory(self.settings, self.ranks, before=self.memory_before)):
            yield text
        self.memory_before = 0

    def _moved(self, batch: HierarchicalBatch) -> HierarchicalBatch:
        batch = batch.to(self.device, non_blocking=True)
        return batch.replace(images=batch.images.to(memory_format=self.layout))

    def _results(
        self,
        batch: HierarchicalBatch,
        parts: tuple[HierarchicalBatch, ...],
        pgd: PGD | None,
        *,
        clean_weight: float,
        generator: torch.Generator,
    ) -> Iterator[StepResult]:
        """The losses to descend on this batch, one after the other: one, or with free training one per replay."""
        ids = global_indices(len(batch), rank=self.ranks.rank) if self.several else None
        if pgd is not None and self.settings.attack.name == "free":
            yield from free_replays(
                self.parallel,
                self.loss,
                batch,
                threat=pgd.threat,
                replays=self.settings.attack.replays,
                autocast=self.autocast,
                generator=generator,
                ids=ids,
            )
            return
        attack, start = self.inner.choose(self, parts or (batch,), pgd, generator=generator, ids=ids)
        common: dict[str, Any] = {
            "inner_loss": self.inner_loss,
            "clean_weight": clean_weight,
            "autocast": self.autocast,
            "generator": generator,
            "ids": ids,
        }
        if parts:
            self.optimizer.zero_grad(set_to_none=True)
            split = SplitBatch(batch, parts)
            yield accumulated_step(self.parallel, self.loss, attack, split, scale=self.scaler.scale, **common)
        else:
            yield adversarial_step(self.parallel, self.loss, attack, batch, start=start, **common)

    def _descend(self, result: StepResult, *, has_gradients: bool) -> dict[str, float]:
        """One optimiser step; the loss and its terms as numbers, read in one go with the largest gradient.

        has_gradients: whether backward was called already.
        """
        named = {"loss": result.loss.detach()}
        for name, terms in (("clean", result.clean), ("adversarial", result.adversarial)):
            if terms is not None:
                named |= {f"{name}_{level}": getattr(terms, level).detach() for level in LEVELS}
        if not has_gradients:
            self.optimizer.zero_grad(set_to_none=True)
            if result.loss.requires_grad:  # else nothing has a gradient, which largest_gradient says
                self.scaler.scale(result.loss).backward()
        named["gradient"] = largest_gradient(self.model).to(result.loss.dtype)
        values = dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']}")
        overflow = not math.isfinite(values.pop("gradient"))
        if overflow and not self.scaler.is_enabled():
            check_gradients(self.model)  # raises, naming parameters
        self.scaler.step(self.optimizer)  # which leaves out a step whose gradients overflow
        self.scaler.update()
        if self.scaler.is_enabled():
            self._count_skipped(overflow)
            values["skipped"] = float(overflow)
        average_statistics(self.model)
        return values

    def _count_skipped(self, overflow: bool) -> None:
        """Raise FloatingPointError where float16 gradients overflow although the loss is not scaled up any more."""
        self.skipped += overflow
        if overflow and (scale := self.scaler.get_scale()) < 1:
            raise FloatingPointError(
                f"float16 gradients overflow although the loss is no longer scaled up (scale {scale:g};"
                f" {self.skipped} of {self.step + 1} steps were skipped): {non_finite_gradients(self.model)}"
            )

    def check_state(self) -> None:
        """Raise FloatingPointError naming what is not finite in the encoder or the optimiser's state."""
        try:
            check_state(self.model, self.optimizer)
        except FloatingPointError as error:
            raise FloatingPointError(f"after step {self.step - 1}: {error}") from error

    def check_learned(self, run: Run) -> str | None:
        """At the end: a sentence on skipped steps, or None without any.  Raises ValueError if every one was skipped."""
        if self.skipped < self.step or not self.step:
            text = f"note: {self.skipped} of {self.step} steps were skipped, for float16 gradients overflowed"
            return text if self.skipped else None
        raise ValueError(
            f"every one of the {self.step} steps was skipped, for float16 gradients overflowed: nothing was trained,"
            f" and {run.out} holds an encoder as it began. Take another --out with --train.precision bf16; or with more"
            f" steps, as each one halves the scale of the loss, now {self.scaler.get_scale():g}"
        )

    def save(self, run: Run) -> None:
        """The checkpoint to resume from; all ranks call this, the first one writes."""
        save_checkpoint(
            run.last,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.schedule,
            epoch=self.step // self.sampler.batches_per_epoch,
            step=self.step,
            config=run.settings,
            extra={"best": self.best, "encoder": self.model.spec, "inner": self.inner.state()}
            | ({"scaler": self.scaler.state_dict(), "skipped": self.skipped} if self.scaler.is_enabled() else {}),
        )
        self.saved = self.step

    def restore(self, run: Run) -> None:
        """Go on from the last checkpoint, if there is one."""
        if run.last.exists():
            state = self._loaded(run)
            run.check_settings(state.config, f"that {run.last} was written with")
            try:
                self.step, self.best = state.step, float(state.extra["best"])
                if "inner" in state.extra:  # older checkpoints have none
                    self.inner.restore(state.extra["inner"])
                if "scaler" in state.extra:
                    self.scaler.load_state_dict(state.extra["scaler"])
                self.skipped = int(state.extra.get("skipped", 0))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{run.last} is damaged ({type(error).__name__}: {error})") from error
            if self.step > self.steps:
                raise ValueError(f"{run.last} is damaged: it stands at step {self.step} of {self.steps}")
            self.saved = self.step
            self._take_rate()
            run.note_changes(state.config, self.step)
        else:
            run.note_changes(run.began, 0)
        assert_same("the step to go on from", self.step)
        if self.step:
            assert_ranks_agree(model=self.model, optimizer=self.optimizer)
        run.keep_rows_before(self.step)

    def _take_rate(self) -> None:
        """The learning rate of the settings, where a checkpoint of another one was loaded (--change train.lr)."""
        rate = self.settings.train.lr
        if self.schedule.base_lrs == [rate] * len(self.schedule.base_lrs):
            return
        self.schedule.base_lrs = [rate] * len(self.schedule.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.schedule.last_epoch)

    def _loaded(self, run: Run) -> TrainingState:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.schedule}
        try:
            return load_training_state(run.last, **parts)
        except RandomStateMismatch:
            pass
        if self.ranks.first:
            print("note: resuming with another number of ranks; dropout, if any, draws afresh", file=sys.stderr)
        return load_training_state(run.last, restore_random=False, **parts)


@contextmanager
def naming_last_state(trainer: Trainer, run: Run) -> Iterator[None]:
    """Where a number is not finite inside the block, the error says which state is kept.

    The state in memory is not saved then.  Its weights are those before the bad step, but BatchNorm's statistics have
    moved, and free training may have taken a part of the step; and the nearer a state is to the failure, the less room
    there is to steer clear of it.  last.pt is a state that the run passed through.
    """
    try:
        yield
    except FloatingPointError as error:
        kept = (
            f"nothing was saved before it (--train.save_every {trainer.settings.train.save_every})"
            if trainer.saved is None
            else f"the last good state, after {trainer.saved} steps, is in {run.last}"
        )
        raise FloatingPointError(f"{error}; {kept}") from error


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)
