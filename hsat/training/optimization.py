"""The outer minimisation of a training: precision, losses, optimiser, and one optimiser step on a batch."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hsat.attacks import PGD
from hsat.distributed import average_statistics, global_indices, synchronize_batchnorm, world_rank, world_size
from hsat.losses import HiDiscLoss
from hsat.models import DualBatchNorm, Encoder
from hsat.training.accumulation import SplitBatch, accumulated_step, split_batch
from hsat.training.agreement import assert_ranks_agree
from hsat.training.config import TrainConfig
from hsat.training.free import free_replays
from hsat.training.gradients import check_gradients, check_trainable, largest_gradient, non_finite_gradients
from hsat.training.inner_attack import FreeReplays, InnerAttack
from hsat.training.schedules import cosine_with_warmup
from hsat.training.step import StepResult, adversarial_step
from hsat.types import LEVELS, HierarchicalBatch

FORMATS = {"bf16": torch.bfloat16, "16": torch.float16}


_log = logging.getLogger(__name__)


class UnitFeatures(nn.Module):
    """Images -> the encoder's features as unit rows, which is what kNN reads; its projection head stands aside.

    Args:
        encoder: The encoder; parameters of its head want no gradient any more.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        if encoder.head is not None:
            encoder.head.requires_grad_(False)
            _log.info("note: the loss reads the features, so that the projection head stays as it is")

    def forward(self, x: Tensor) -> Tensor:
        """(n, feature_dim), rows of unit length, in float32 or wider.

        Args:
            x: Images (n, c, h, w) in [0, 1].

        Returns:
            The rows.
        """
        features = self.encoder.features(x)
        return F.normalize(features.float() if features.dtype in FORMATS.values() else features, dim=1)


class Optimization:
    """Makes optimiser steps on batches, with everything that lives from step to step.

    Args:
        encoder: The network, trained in place; moved to `device`.
        config: All options.
        total: Steps of the whole run, over which the learning rate falls.
        device: Where it computes.

    Attributes:
        network: Images -> the rows that the loss reads: the encoder, or its unit features.
        inner: The inner maximisation.
        optimizer: AdamW.
        schedule: Of its learning rate.
        scaler: Of float16's loss; does nothing for other precisions.
        skipped: Steps that float16 left out.

    Raises:
        ValueError: For an encoder without trainable parameters, and ranks whose weights differ.
    """

    def __init__(self, encoder: Encoder, config: TrainConfig, *, total: int, device: torch.device) -> None:
        self.encoder, self.config, self.device = encoder, config, device
        self.rank, self.ranks = world_rank(), world_size()
        self.skipped = 0
        self._compiled = not config.compile
        self._prepare_encoder()
        self.optimizer = make_adamw(encoder, lr=config.lr, weight_decay=config.weight_decay)
        self._options = {name: self.optimizer.defaults[name] for name in ("betas", "eps", "weight_decay")}
        self.scaler = make_scaler(config.precision, device)
        warmup = int(config.warmup * total)
        self.schedule = LambdaLR(self.optimizer, lambda step: cosine_with_warmup(step, steps=total, warmup=warmup))

    def _prepare_encoder(self) -> None:
        """Losses, precision and the forms of the encoder that the passes call."""
        config = self.config
        self.layout = torch.channels_last if config.channels_last else torch.preserve_format
        check_trainable(self.encoder)
        if config.sync_norm and self.ranks > 1:
            synchronize_batchnorm(self.encoder, device=self.device)
        assert_ranks_agree(model=self.encoder)  # DistributedDataParallel would make them rank 0's in silence
        self.encoder.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        if self.ranks > 1 and not config.clean:
            _freeze_unused_branch(self.encoder, attacked=config.attack.name != "none")
        self.network: nn.Module = self.encoder if config.layer == "embedding" else UnitFeatures(self.encoder)
        self.parallel: nn.Module = average_gradients(self.network) if self.ranks > 1 else self.network
        self.autocast = make_autocast(config.precision, self.device)
        everywhere = config.global_negatives and self.ranks > 1
        self.loss = HiDiscLoss.from_code(config.loss, temperature=config.temperature, gather=everywhere)
        self.inner_loss = HiDiscLoss.from_code(config.attack.levels, temperature=config.temperature)
        self.inner = InnerAttack(config.attack, self.network, self.inner_loss, autocast=self.autocast)

    def step(
        self, batch: HierarchicalBatch, attack: PGD | None, *, number: int, clean_weight: float
    ) -> dict[str, float]:
        """One batch, with one optimiser step (free: several).

        Args:
            batch: The images of this rank, on the CPU.
            attack: The PGD of this epoch; None for a training without attack.
            number: The number of the step, from 0.
            clean_weight: Share of the clean loss.

        Returns:
            Of the last optimiser step: the loss, lr, the terms of the loss, and whether float16 skipped it.

        Raises:
            FloatingPointError: Before a loss or a gradient that is not finite is stepped on.
            ValueError: If no parameter got a gradient.
        """
        count = self.config.accumulate
        parts = split_batch(batch, count) if count > 1 else None  # on the CPU, where ids are counted
        batch = self._to_device(batch)
        if parts is not None:
            parts = SplitBatch(batch, tuple(map(self._to_device, parts.parts)))
        # a GPU draws its noise itself: 128 images of 300 pixels cost a CPU 0.17 s
        home = self.device if self.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(home).manual_seed(_mix_seed(self.config.seed, number))
        self.parallel.train()
        if not self._compiled:
            compile_in_place(self.network, self.device)
            self._compiled = True
        try:
            for result in self._results(
                batch, parts, attack, number=number, clean_weight=clean_weight, generator=generator
            ):
                values = self._descend(result, number=number, has_gradients=parts is not None)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {number}: {error}") from error
        self.inner.keep(batch, result.x_adv)
        values = {"loss": values.pop("loss"), "lr": self.optimizer.param_groups[0]["lr"]} | values
        with warnings.catch_warnings():  # float16: a first step that overflows is left out, as it should be
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        return values

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what has no place of its own in it."""
        state: dict[str, Any] = {"inner": self.inner.state_dict()}
        if self.scaler.is_enabled():
            state |= {"scaler": self.scaler.state_dict(), "skipped": self.skipped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; learning rate, weight decay and the other options are those of this run.

        Raises:
            ValueError: Naming what cannot be used.
        """
        if "inner" in state:  # older checkpoints have none
            self.inner.load_state_dict(state["inner"])
        if "scaler" in state:
            if not 0 < float(state["scaler"].get("scale", 1)) < math.inf:
                raise ValueError(f"the scale of the loss is {state['scaler']['scale']}")
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state.get("skipped", 0))
        rate = self.config.lr
        self.schedule.base_lrs = [rate] * len(self.schedule.base_lrs)
        for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group.update(self._options)
            group["initial_lr"], group["lr"] = rate, rate * factor(self.schedule.last_epoch)

    def _to_device(self, batch: HierarchicalBatch) -> HierarchicalBatch:
        batch = batch.to(self.device, non_blocking=True)
        return batch.replace(images=batch.images.to(memory_format=self.layout))

    def _results(
        self,
        batch: HierarchicalBatch,
        parts: SplitBatch | None,
        pgd: PGD | None,
        *,
        number: int,
        clean_weight: float,
        generator: torch.Generator,
    ) -> Iterator[StepResult]:
        """The losses to descend on this batch, one after the other: one, or with free training one per replay."""
        several = self.ranks * self.config.accumulate > 1
        ids = global_indices(len(batch), rank=self.rank) if several else None
        groups = (batch,) if parts is None else parts.parts
        attack, start = self.inner.choose(pgd, groups, number, generator=generator, ids=ids)
        if isinstance(attack, FreeReplays):
            yield from free_replays(
                self.parallel,
                self.loss,
                batch,
                threat=attack.threat,
                replays=attack.replays,
                autocast=self.autocast,
                generator=generator,
                ids=ids,
            )
            return
        if parts is not None:
            self.optimizer.zero_grad(set_to_none=True)
            yield accumulated_step(
                self.parallel,
                self.loss,
                attack,
                parts,
                inner_loss=self.inner_loss,
                clean_weight=clean_weight,
                autocast=self.autocast,
                generator=generator,
                ids=ids,
                scale=self.scaler.scale,
            )
        else:
            yield adversarial_step(
                self.parallel,
                self.loss,
                attack,
                batch,
                inner_loss=self.inner_loss,
                clean_weight=clean_weight,
                autocast=self.autocast,
                generator=generator,
                start=start,
                ids=ids,
            )

    def _descend(self, result: StepResult, *, number: int, has_gradients: bool) -> dict[str, float]:
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
                self.scaler.scale(result.loss).backward()  # type: ignore[no-untyped-call]
        named["gradient"] = largest_gradient(self.encoder).to(result.loss.dtype)
        values = dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']}")
        overflow = not math.isfinite(values.pop("gradient"))
        if overflow and not self.scaler.is_enabled():
            check_gradients(self.encoder)  # raises, naming parameters
        self.scaler.step(self.optimizer)  # which leaves out a step whose gradients overflow
        self.scaler.update()
        if self.scaler.is_enabled():
            self._count_skipped(overflow, number)
            values["skipped"] = float(overflow)
        average_statistics(self.encoder)
        return values

    def report_skipped(self, done: int, *, out: Path) -> None:
        """Log how many of the steps float16 skipped; ValueError if it skipped all of them.

        Args:
            done: Number of steps of the run.
            out: Folder of the run, for the message.
        """
        if self.skipped and self.skipped >= done:
            raise ValueError(
                f"every one of the {done} steps was skipped, for float16 gradients overflowed: nothing was trained, and"
                f" {out} holds an encoder as it began. Take another --out with --train.precision bf16; or with more"
                f" steps, as each one halves the scale of the loss, now {self.scaler.get_scale():g}"
            )
        if self.skipped:
            _log.info("note: %d of %d steps were skipped, for float16 gradients overflowed", self.skipped, done)

    def _count_skipped(self, overflow: bool, number: int) -> None:
        """Raise FloatingPointError where float16 gradients overflow although the loss is not scaled up any more."""
        self.skipped += overflow
        if overflow and (scale := self.scaler.get_scale()) < 1:
            raise FloatingPointError(
                f"float16 gradients overflow although the loss is no longer scaled up (scale {scale:g};"
                f" {self.skipped} of {number + 1} steps were skipped): {non_finite_gradients(self.encoder)}"
            )


def _freeze_unused_branch(encoder: nn.Module, *, attacked: bool) -> None:
    """A branch of dual BatchNorm that this run never uses gets no gradient, for which ranks would wait in vain."""
    for layer in encoder.modules():
        if isinstance(layer, DualBatchNorm):
            layer.bn_list[0 if attacked else 1].requires_grad_(False)  # bn_list is (normal, pgd)


def _mix_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def make_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context of every pass through the encoder, for precision "32", "bf16" or "16"."""
    dtype = FORMATS.get(precision, torch.bfloat16)
    return partial(torch.autocast, device.type, dtype, enabled=precision in FORMATS)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; does nothing for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "16")


def make_adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused: one pass over weights, gradients and moments instead of a dozen, on CPUs and GPUs.

    Args:
        model: Its parameters are optimised.
        lr: Peak learning rate.
        weight_decay: Of AdamW.

    Returns:
        The optimiser.
    """
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused or None)


def average_gradients(model: nn.Module) -> DistributedDataParallel:
    """The encoder with gradients averaged over the ranks.

    Buffers are not broadcast: a pass may follow another before the backward pass; see `average_statistics`.
    """
    known = inspect.signature(DistributedDataParallel).parameters  # newer versions of torch call the option otherwise
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: Any = {name: False}
    return DistributedDataParallel(model, **options)


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile calls of the model, for outer and inner passes; keys of the state dict stay.

    Where its graph breaks, torch says itself under TORCH_LOGS=graph_breaks.

    Raises:
        ValueError: Without a compiler for C++, which torch.compile needs on the CPU.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("--train.compile needs a compiler for C++ (g++ or clang++), and none is in the PATH")
    model.compile()
