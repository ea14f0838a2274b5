"""The training loop's state, one step of it, and the held-out evaluation that chooses the best encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from encoders import new_encoder
from hsat.attacks import PGD, Linf
from hsat.data import Cohort, HierarchicalDataset, PatchDataset, PatientBatchSampler, hierarchical_loader, patch_loader
from hsat.eval import KNNClassifier, embed, metrics
from hsat.losses import HiDiscLoss
from hsat.models import branch, is_dual, save_encoder, trained_branch
from hsat.training import (
    adversarial_step,
    augmentation_strength,
    cosine_with_warmup,
    epsilon_schedule,
    load_training_state,
    paper_clean_weight,
    save_checkpoint,
)
from hsat.types import LEVELS, HierarchicalBatch
from runs import Run, device_named, write_json

if TYPE_CHECKING:
    from train_hsat import TrainHSAT


class Trainer:
    """Everything a run keeps between steps."""

    def __init__(self, settings: TrainHSAT, cohort: Cohort) -> None:
        self.settings, self.cohort = settings, cohort
        data, train = settings.data, settings.train
        self.device = device_named(settings.device)
        torch.manual_seed(settings.seed)  # for backbones with dropout; nothing of hsat draws from it
        self.sampler = PatientBatchSampler(
            cohort,
            "train",
            batch_patients=train.batch_patients,
            seed=settings.seed,
            order=data.order,
            compat=settings.compat,
        )
        per_epoch = self.sampler.batches_per_epoch
        self.steps = train.steps or train.epochs * per_epoch
        self.epochs = math.ceil(self.steps / per_epoch)
        self.eps_warmup = _or(settings.attack.warmup_epochs, self.epochs // 8)
        self.plateau = _or(train.plateau, max(1, self.epochs // 800))
        self.loader = _loader(settings, cohort, self.sampler, plateau=self.plateau, pinned=self.device.type == "cuda")
        self.eval_every = _or(train.eval_every, max(1, self.steps // 10))
        self.layout = torch.channels_last if train.channels_last else torch.preserve_format
        self.model = new_encoder(settings.model, seed=settings.seed).to(self.device, memory_format=self.layout)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=train.precision == "bf16")
        self.loss = HiDiscLoss.from_code(train.loss, temperature=train.temperature)
        self.inner_loss = HiDiscLoss.from_code(settings.attack.levels, temperature=train.temperature)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
        warmup = int(train.warmup * self.steps)
        self.schedule = LambdaLR(self.optimizer, lambda step: cosine_with_warmup(step, steps=self.steps, warmup=warmup))
        self.step, self.best = 0, -1.0

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
        """One optimiser step; returns what is logged.  Raises FloatingPointError before a bad loss is stepped on."""
        batch = batch.to(self.device, non_blocking=True)
        batch = batch.replace(images=batch.images.to(memory_format=self.layout))
        generator = torch.Generator().manual_seed(_mixed(self.settings.seed, self.step))
        weight = paper_clean_weight(self.strength(epoch)) if self.settings.train.clean else 0.0
        attack = self.attack(epoch)
        self.model.train()
        try:
            result = adversarial_step(
                self.model,
                self.loss,
                attack,
                batch,
                inner_loss=self.inner_loss,
                clean_weight=weight,
                autocast=self.autocast,
                generator=generator,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step}: {error}; or try a lower --train.lr") from error
        value = float(result.loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"step {self.step}: the loss is {value}; try a lower --train.lr")
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self.optimizer.step()
        row = {"step": self.step, "epoch": epoch, "loss": value, "lr": self.schedule.get_last_lr()[0]}
        for name, terms in (("clean", result.clean), ("adversarial", result.adversarial)):
            if terms is not None:
                row |= {f"{name}_{level}": float(getattr(terms, level).detach()) for level in LEVELS}
        self.schedule.step()
        self.step += 1
        return row | {"eps": 0.0 if attack is None else float(attack.threat.eps), "strength": self.strength(epoch)}

    def save(self, run: Run) -> None:
        """The checkpoint to resume from."""
        save_checkpoint(
            run.last,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.schedule,
            epoch=self.step // self.sampler.batches_per_epoch,
            step=self.step,
            config=run.settings,
            extra={"best": self.best, "encoder": self.model.spec},
        )

    def restore(self, run: Run) -> None:
        """Go on from the last checkpoint, if there is one."""
        if run.last.exists():
            state = load_training_state(run.last, model=self.model, optimizer=self.optimizer, scheduler=self.schedule)
            self.step, self.best = state.step, float(state.extra["best"])
        run.keep_rows_before(self.step)


def _loader(
    settings: TrainHSAT, cohort: Cohort, sampler: PatientBatchSampler, *, plateau: int, pinned: bool
) -> Iterable[HierarchicalBatch]:
    """Batches of augmented views.  Under --compat paper the first plateau of a dynamic augmentation is static."""
    data, static_epochs = settings.data, settings.data.static_epochs
    if static_epochs is None:
        dynamic = data.dynamic and data.augmentation in ("v0", "v1")
        static_epochs = plateau if settings.compat == "paper" and dynamic else 0
    views = HierarchicalDataset(
        cohort,
        "train",
        slides=data.slides,
        patches=data.patches,
        views=data.views,
        image_size=data.image_size,
        augmentation=data.augmentation,
        uncropped=data.uncropped,
        static_epochs=static_epochs,
        compat=settings.compat,
        seed=settings.seed,
        on_bad=data.on_bad,
    )
    return hierarchical_loader(
        views, sampler, workers=data.workers, pin_memory=pinned, ids=data.ids, compat=settings.compat
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def held_out_accuracy(encoder: nn.Module, cohort: Cohort, settings: TrainHSAT) -> dict[str, float]:
    """Clean and PGD-5 kNN patch accuracy and MCA on held-out patients; the bank is the training split.

    With dual BatchNorm one branch serves bank, queries and attack: "pgd", or "normal" in a baseline without attack.
    """
    with branch(encoder, trained_branch(encoder)) if is_dual(encoder) else nullcontext():
        return _held_out(encoder, cohort, settings)


def _held_out(encoder: nn.Module, cohort: Cohort, settings: TrainHSAT) -> dict[str, float]:
    eps, size = settings.train.eval_eps, settings.train.eval_patches
    attack = PGD(Linf(eps), step_size=eps / 2, steps=5)
    loaders = {}
    for split in ("train", "tune"):
        dataset = PatchDataset(cohort, split, image_size=settings.data.image_size)
        chosen = np.random.default_rng(0).permutation(len(dataset))[: size if split == "tune" else 4 * size]
        dataset.rows = dataset.rows[np.sort(chosen)]
        loaders[split] = patch_loader(dataset, batch_size=64, workers=settings.data.workers)
    bank = embed(encoder, loaders["train"])
    knn = KNNClassifier(k=min(settings.train.k, len(bank))).fit(bank)
    found = {}
    for name, chosen_attack in (("clean", None), ("robust", attack)):
        table = embed(encoder, loaders["tune"], attack=chosen_attack)
        result = metrics(knn.predict_proba(table), table.label)
        found |= {f"tune_{name}_accuracy": result.accuracy, f"tune_{name}_mca": result.mca}
    return found


def keep_best(trainer: Trainer, run: Run, row: dict[str, Any], fingerprint: str) -> None:
    """Write the encoder when its held-out score is the highest so far.

    The score is the mean of accuracy and MCA under attack; for a training without attack, that on clean patches.
    """
    kind = "clean" if trainer.settings.attack.name == "none" else "robust"
    score = float(np.mean([row[f"tune_{kind}_accuracy"], row[f"tune_{kind}_mca"]]))
    if score > trainer.best:
        trainer.best = score
        about = {"step": trainer.step, "cohort": fingerprint, f"held_out_{kind}": score}
        save_encoder(trainer.model, run.out / "best.safetensors", metadata=about)
        write_json(run.out / "best.json", about | {key: value for key, value in row.items() if key.startswith("tune")})
