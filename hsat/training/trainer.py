"""A training from its first step to its last: batches, steps, held-out evaluations, checkpoints, the log."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsat.attacks import PGD, Linf
from hsat.data import Cohort, PatchStore, PatientBatchSampler
from hsat.distributed import World, batch_share, shared_world, world_rank, world_size
from hsat.models import Encoder
from hsat.training.agreement import assert_ranks_agree, assert_same
from hsat.training.checkpoint import (
    RandomStateMismatch,
    TrainingState,
    load_training_state,
    save_checkpoint,
)
from hsat.training.config import TrainConfig
from hsat.training.encoder_files import BEST, FINAL, training_facts, write_best, write_final
from hsat.training.folder import FolderFactory, TrainingFolder
from hsat.training.gradients import check_state
from hsat.training.inner_attack import check_groups
from hsat.training.interrupts import StopRequest, TrainingInterrupted, stop_on_signals
from hsat.training.optimization import Optimization
from hsat.training.reporting import CHECKPOINT, EVALUATION, TrainingReport
from hsat.training.schedules import (
    augmentation_strength,
    epsilon_schedule,
    paper_clean_weight,
)
from hsat.training.validation import HELD_OUT, Validation, held_out_validation
from hsat.training.views import view_loader
from hsat.types import HierarchicalBatch

DEFAULTS = TrainConfig()

_log = logging.getLogger("hsat")


class Trainer:
    """Trains an encoder with HSAT, or with the baseline HiDisc, on the training split of a cohort.

    `fit` is the whole training.  A loop of one's own is

        for batch in trainer.batches():
            row = trainer.step(batch)

    Under torch.distributed every rank makes the same trainer; the first one writes.  Where there are several groups of
    patients (ranks x accumulate), each group is attacked by itself, with noise by an image's place in the whole batch:
    two ranks compute what one process computes with accumulate=2.

    Args:
        encoder: The network that is trained, in place; moved to `device`.
        cohort: With a split "train".  Patients of a split "tune" are held out to choose the best encoder.
        config: All options.
        out: The run folder (docs/files.md).  A function opens one with other settings in run.json, as the command does.
        validate: Encoder -> numbers, of which "score" chooses the best encoder; by default `held_out_validation` on the
            split "tune", where the cohort has it.
        device: Where it computes; None is where the encoder is.
        store: The cohort's patch store, read in place of its files.
        resume: Go on with the run in the folder.
        progress: Show a progress bar.

    Attributes:
        encoder: The network.
        done: Steps made so far.
        total: Steps of the whole run.

    Raises:
        ValueError: For options that do not fit together, a cohort without a training split, a folder that holds
            another run, and ranks that disagree.
    """

    def __init__(
        self,
        encoder: Encoder,
        cohort: Cohort,
        config: TrainConfig = DEFAULTS,
        *,
        out: str | Path | FolderFactory = "runs/hsat",
        validate: Validation | None = None,
        device: torch.device | str | None = None,
        store: PatchStore | None = None,
        resume: bool = False,
        progress: bool = False,
    ) -> None:
        config = config.resolve(cohort.kind)
        self.encoder, self.cohort, self.config, self.store = encoder, cohort, config, store
        self.device = torch.device(device) if device is not None else next(encoder.parameters()).device
        self.rank, self.ranks, self.progress = world_rank(), world_size(), progress
        check_groups(config.attack, ranks=self.ranks, accumulate=config.accumulate)
        torch.manual_seed(config.seed + self.rank)  # for backbones with dropout; nothing of hsat draws from it
        self._plan_steps()
        self.optimization = Optimization(encoder, config, total=self.total, device=self.device)
        self.done, self.best = 0, -1.0
        self.saved: int | None = None  # steps in last.pt
        self._validate = validate if validate is not None else self._default_validation()
        self.report = TrainingReport(
            config,
            device=self.device,
            groups=self.ranks * config.accumulate,
            total=self.total,
            eval_every=None if self._validate is None else self.eval_every,
            shown=progress,
        )
        self.facts = training_facts(cohort, config)
        fingerprint = cohort.fingerprint()
        writes = self.rank == 0
        self.folder = (
            out(cohort=fingerprint, writes=writes)
            if callable(out)
            else TrainingFolder(
                Path(out),
                {"train": config.model_dump(mode="json"), "encoder": encoder.spec or repr(type(encoder).__name__)},
                cohort=fingerprint,
                resume=resume,
                writes=writes,
            )
        )
        self._restore()

    def _plan_steps(self) -> None:
        """The sampler and the lengths that follow from it."""
        config = self.config
        self.sampler = PatientBatchSampler(
            self.cohort,
            "train",
            batch_patients=batch_share(
                config.batch_patients, ranks=self.ranks, parts=config.accumulate, name="--train.batch_patients"
            ),
            seed=config.seed,
            order=config.views.order,
            compat=config.preset,
            rank=self.rank,
            world_size=self.ranks,
        )
        per_epoch = self.sampler.batches_per_epoch
        self.total = config.steps or config.epochs * per_epoch
        self.epochs = math.ceil(self.total / per_epoch)
        self.eps_warmup = _or(config.attack.warmup_epochs, self.epochs // 8)
        if self.eps_warmup > self.epochs and config.attack.name != "none":
            raise ValueError(
                f"eps would never be reached: --attack.warmup_epochs {self.eps_warmup} is longer than the run of"
                f" {self.epochs} epochs ({self.total} steps of {per_epoch} an epoch); give at most {self.epochs}, an"
                f" eighth of the run ({self.epochs // 8}) for instance, or train longer"
            )
        self.plateau = _or(config.plateau, max(1, self.epochs // 800))
        self.eval_every = _or(config.eval_every, max(1, self.total // 10))
        self.loader = view_loader(
            config, self.sampler, plateau=self.plateau, pin_memory=self.device.type == "cuda", store=self.store
        )

    def _default_validation(self) -> Validation | None:
        if HELD_OUT not in self.cohort.splits:
            return None
        config = self.config
        return held_out_validation(
            self.cohort,
            image_size=config.views.image_size,
            patches=config.eval_patches,
            eps=config.eval_eps,
            k=config.k,
            robust=config.attack.name != "none",
            workers=config.views.workers,
            store=self.store,
            on_bad=config.views.on_bad,
        )

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to the end; returns the path of the best encoder (the final one where no patient was held out).

        Ctrl-C and SIGTERM end the training after the current step, with a checkpoint; a second Ctrl-C ends it at once.

        Raises:
            TrainingInterrupted: After such a signal.
            FloatingPointError: Before a loss or gradient that is not finite is stepped on; names the last good state.
            ValueError: If float16 skipped every step.
        """
        bar = self.report.progress(done=self.done, shown=self.progress and self.rank == 0)
        with self._naming_last_state(), stop_on_signals() as request, shared_world() as world, bar:
            for batch in self.batches():
                row = self.step(batch)
                self.report.after_step(self.done, loss=row["loss"])
                with self.report.other_work(EVALUATION) if self._is_due else nullcontext():
                    values = self.validate_if_due()
                self.folder.log(row | values)
                self.report.after_evaluation(self.done, values, best=self.best)
                if self.done % self.config.save_every == 0 or self.done == self.total:
                    with self.report.other_work(CHECKPOINT):
                        self.save()
                self._stop_if_requested(request, world)
        return self._finish()

    def batches(self) -> Iterator[HierarchicalBatch]:
        """The batches from the current step to the last one, epoch by epoch."""
        per_epoch = self.sampler.batches_per_epoch
        while self.done < self.total:
            epoch, begun = divmod(self.done, per_epoch)
            self.sampler.set_epoch(epoch, strength=self.strength(epoch), start_batch=begun)
            for batch in self.loader:
                yield batch
                if self.done >= self.total:
                    break

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.done // self.sampler.batches_per_epoch

    def strength(self, epoch: int) -> float:
        """Augmentation strength in this epoch; the static pipelines ignore it.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            In [0, 1].
        """
        views = self.config.views
        return views.strength * (augmentation_strength(epoch, self.epochs, self.plateau) if views.dynamic else 1.0)

    def attack(self, epoch: int) -> PGD | None:
        """The PGD of the inner maximisation in this epoch, or None for the baseline.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            The attack at this epoch's eps.
        """
        chosen = self.config.attack
        if chosen.name == "none":
            return None
        eps = epsilon_schedule(epoch, warmup=self.eps_warmup, eps=chosen.eps, epochs=self.epochs)
        return PGD(Linf(eps), step_size=chosen.step_size, steps=chosen.steps)

    def step(self, batch: HierarchicalBatch) -> dict[str, float]:
        """One batch, with one optimiser step (free: several).

        Args:
            batch: Views of patches, as `batches` gives them, on the encoder's device.

        Returns:
            What train.csv says of it, of the last optimiser step: step, epoch, loss, lr, the terms of the loss, eps,
            strength.

        Raises:
            FloatingPointError: Before a loss or a gradient that is not finite is stepped on.
            ValueError: If no parameter got a gradient.
        """
        epoch, attack = self.epoch, self.attack(self.epoch)
        weight = paper_clean_weight(self.strength(epoch)) if self.config.clean else 0.0
        values = self.optimization.step(batch, attack, number=self.done, clean_weight=weight)
        row = {"step": self.done, "epoch": epoch} | values
        self.done += 1
        row |= {"eps": 0.0 if attack is None else float(attack.threat.eps), "strength": self.strength(epoch)}
        return row | self.optimization.inner.logged()

    def validate_if_due(self) -> dict[str, float]:
        """The held-out numbers where it is time for them, and the best encoder kept; else nothing."""
        if self._validate is None or not self._is_due:
            return {}
        self.check_state()
        values = dict(self._validate(self.encoder))
        score = values.pop("score")
        if score > self.best and self.optimization.skipped < self.done:
            self.best = score
            if self.folder.writes:
                step, facts = self.done, self.facts
                write_best(self.folder, self.encoder, step=step, score=score, numbers=values, training=facts)
        return values

    @property
    def _is_due(self) -> bool:
        """Whether a held-out evaluation comes after the last step, where patients are held out."""
        return self._validate is not None and (self.done % self.eval_every == 0 or self.done == self.total)

    def check_state(self) -> None:
        """Raise FloatingPointError naming what is not finite in the encoder or the optimiser's state.

        Raises:
            FloatingPointError: Naming the step and the entries.
        """
        try:
            check_state(self.encoder, self.optimization.optimizer)
        except FloatingPointError as error:
            raise FloatingPointError(f"after step {self.done - 1}: {error}") from error

    # --- what happens around the steps --------------------------------------------------------------------------------

    def _stop_if_requested(self, request: StopRequest, world: World) -> None:
        """After a signal: save, and end with TrainingInterrupted."""
        if request.agreed(world) and self.done < self.total:
            self.save()
            raise TrainingInterrupted(step=self.done, total=self.total, signal=request.signal)

    def save(self) -> None:
        """Write last.pt, the checkpoint to resume from; all ranks call this, the first one writes."""
        if self.saved == self.done:
            return
        extra = {
            "best": self.best,
            "encoder": self.encoder.spec,
            "training": self.facts,
        } | self.optimization.state_dict()
        save_checkpoint(
            self.folder.last,
            model=self.encoder,
            optimizer=self.optimization.optimizer,
            scheduler=self.optimization.schedule,
            epoch=self.epoch,
            step=self.done,
            config=self.folder.settings,
            extra=extra | self.optimization.state_dict(),
        )
        self.saved = self.done

    def _finish(self) -> Path:
        """Write the final encoder; raises ValueError if float16 skipped every step."""
        self.optimization.report_skipped(self.done, out=self.folder.out)
        final, best = self.folder.out / FINAL, self.folder.out / BEST
        if self.folder.writes:
            write_final(self.folder, self.encoder, step=self.done, training=self.facts)
        return best if best.exists() else final

    @contextmanager
    def _naming_last_state(self) -> Iterator[None]:
        """Where a number is not finite inside the block, the error says which state is kept.

        The state in memory is not saved then.  Its weights are those before the bad step, but BatchNorm's statistics
        have moved, and free training may have taken a part of the step; and the nearer a state is to the failure, the
        less room there is to steer clear of it.  last.pt is a state that the run passed through.
        """
        try:
            yield
        except FloatingPointError as error:
            kept = (
                f"nothing was saved before it (--train.save_every {self.config.save_every})"
                if self.saved is None
                else f"the last good state, after {self.saved} steps, is in {self.folder.last}"
            )
            raise FloatingPointError(f"{error}; {kept}") from error

    def _restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        folder = self.folder
        if os.path.lexists(folder.last):  # a link that leads nowhere is an error, not a new beginning
            state = self._load_state()
            folder.check_settings(state.config, f"that {folder.last} was written with")
            self._take_extra(state.extra)
            self.done = state.step
            if self.done > self.total:
                raise ValueError(f"{folder.last} is damaged: it stands at step {self.done} of {self.total}")
            if (place := self.optimization.schedule.last_epoch) != self.done:
                raise ValueError(f"{folder.last} is damaged: its scheduler stands at step {place}, it at {self.done}")
            self.saved = self.done
            folder.note_changes(state.config, self.done)
        else:
            folder.note_changes(folder.began, 0)
        assert_same("the step to go on from", self.done)
        if self.done:
            assert_ranks_agree(model=self.encoder, optimizer=self.optimization.optimizer)
        folder.keep_rows_before(self.done)

    def _load_state(self) -> TrainingState:
        optimizer, schedule = self.optimization.optimizer, self.optimization.schedule
        load = partial(load_training_state, self.folder.last, optimizer=optimizer, scheduler=schedule)
        try:
            return load(model=self.encoder)
        except RandomStateMismatch:
            _log.info("note: resuming with another number of ranks; dropout, if any, draws afresh")
        return load(model=self.encoder, restore_random=False)

    def _take_extra(self, extra: Mapping[str, Any]) -> None:
        try:
            self.best = float(extra["best"])
            if not math.isfinite(self.best):
                raise ValueError(f"best is {self.best}")
            self.optimization.load_state_dict(extra)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder.last} is damaged ({type(error).__name__}: {error})") from error


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
