"""Train an encoder with HSAT (or, with --attack.name none, the HiDisc baseline).

Defaults are the paper's for OpenSRH.  Without --data.root a small synthetic cohort is used, with a recipe that fits a
laptop (configs/demo.yaml).  The run folder receives run.json (settings, versions, cohort), train.csv, last.pt (resume
with --resume), final.safetensors and best.safetensors, the latter chosen by robust kNN on held-out training patients.

    python examples/train_hsat.py --data.root /data/opensrh --out runs/hsat
    python examples/train_hsat.py --data.root /data/patches --data.layout folders --data.image_size 96
    torchrun --nproc_per_node=4 examples/train_hsat.py --data.root /data/opensrh --out runs/hsat   # docs/devices.md
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from tqdm import tqdm

from cohorts import describe, open_cohort, open_packed
from compute import go_on_finite, out_of_memory
from held_out import held_out_accuracy, keep_best
from hsat.data import BadPatch, Cohort
from hsat.models import save_encoder
from hsat.run_folder import lock_folder
from hsat.training import assert_ranks_agree, is_out_of_memory, parse_memory
from one_voice import one_voice
from ranks import Ranks, joined, one_after_the_first
from runs import Run, device_named, same_on_all_ranks
from settings import DataSettings, LoggerSettings, ModelSettings, Pixels, Section, Settings, explain, listed, read_yaml
from trainer import Trainer, naming_last_state

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


class AttackSettings(Section):
    """The inner maximisation."""

    name: Literal["none", "pgd", "fgsm_rs", "nfgsm", "free", "warm"] = Field(
        "pgd", description="none trains the HiDisc baseline; the last four are cheaper (docs/cheaper_inner.md)"
    )
    eps: Pixels = Field(8 / 255, description="radius of the l_inf ball: 8/255")
    step_size: Pixels = Field(2 / 255, description="size of a step: 2/255")
    steps: int = Field(5, gt=0, description="gradient steps")
    levels: Literal["p_s_pt", "p_s", "p_pt", "s_pt", "p", "s", "pt"] = Field("p_s_pt", description="loss it maximises")
    warmup_epochs: int | None = Field(None, ge=0, description="eps grows from 1/255 over these; an eighth of the run")
    replays: int = Field(4, gt=0, description="free: optimiser steps on each batch; give fewer train.steps for it")
    check_every: int = Field(20, ge=0, description="fgsm_rs, nfgsm: steps between comparisons with PGD; 0 is never")
    check_share: float = Field(0.5, ge=0, le=1, description="they train with PGD below this share of its rise in loss")


class TrainSettings(Section):
    """The outer minimisation."""

    epochs: int = Field(40_000, gt=0, description="passes over the (class-balanced) patients")
    steps: int | None = Field(None, gt=0, description="optimiser steps; instead of epochs")
    batch_patients: int = Field(16, gt=0, description="patients per batch, of all ranks and parts together")
    accumulate: int = Field(1, gt=0, description="parts that a batch is computed in; less memory, the same negatives")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    loss: Literal["p_s_pt", "p_s", "p_pt", "s_pt", "p", "s", "pt"] = Field("p_s_pt", description="loss it minimises")
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    clean: bool = Field(False, description="mix clean and adversarial losses with the paper's dynamic weight")
    plateau: int | None = Field(None, gt=0, description="epochs of equal augmentation strength; a share of the run")
    precision: Literal["32", "bf16", "16"] = Field(
        "32", description="of the passes through the encoder; bf16 is autocast, 16 is float16 with a scaled loss"
    )
    compile: bool = Field(
        False,
        description="torch.compile the encoder; TORCH_LOGS=graph_breaks shows where its graph breaks",
    )
    global_negatives: bool = Field(True, description="under torchrun: negatives of all ranks, not of each by itself")
    sync_norm: bool = Field(False, description="under torchrun: BatchNorm over the batch of all ranks (GPUs only)")
    max_memory: str | None = Field(None, description="such as 8GB: say after the first step what would fit into it")
    channels_last: bool = Field(False, description="memory layout that many CPUs and GPUs compute faster in")
    save_every: int = Field(500, gt=0, description="steps between checkpoints")
    eval_every: int | None = Field(None, gt=0, description="steps between held-out evaluations; a tenth of the run")
    eval_patches: int = Field(512, gt=0, description="held-out patches looked at in such an evaluation")
    eval_eps: Pixels = Field(4 / 255, description="radius of the PGD-5 attack in it")
    k: int = Field(20, gt=0, description="neighbours in it")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError(f"give epochs or steps, not both; got epochs {self.epochs} and steps {self.steps}")
        return self

    @field_validator("max_memory")
    @classmethod
    def _an_amount(cls, value: str | None) -> str | None:
        if value is not None:
            parse_memory(value)
        return value


class TrainHSAT(Settings):
    """Train an encoder with HSAT (or, with --attack.name none, the HiDisc baseline)."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    attack: AttackSettings = AttackSettings()
    train: TrainSettings = TrainSettings()
    log: LoggerSettings = LoggerSettings()
    compat: Literal["paper"] | None = Field(
        None,
        description="paper: draws and augments as the published code (docs/conventions.md); data options win over it",
    )
    seed: int = Field(0, ge=0, description="of weights, draws, augmentation and attacks")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU where there is one")
    rank_timeout: float = Field(300, gt=0, description="seconds to wait for other ranks to start")
    out: Path = Field(Path("runs/hsat"), description="run folder")
    resume: bool = Field(False, description="go on where the run in --out stopped")
    change: Annotated[list[Literal["train.lr", "train.precision"]], BeforeValidator(listed)] = Field(
        [], description="with --resume: options that may have other values than the run began with"
    )
    quiet: bool = Field(False, description="no progress bars")


def load_settings(argv: list[str]) -> TrainHSAT:
    """Settings of the command line; without a cohort of the user's the demo's recipe lies beneath them."""
    settings = TrainHSAT.load(argv)
    if settings.data.root is not None or settings.config is not None:
        return settings
    recipe = read_yaml(DEMO)
    if "epochs" in settings.train.model_fields_set:
        del recipe["train"]["steps"]
    try:
        return TrainHSAT.over(recipe, argv)
    except ValidationError as error:
        raise SystemExit(explain(error, TrainHSAT, DEMO)) from None


def hold_out(cohort: Cohort, settings: TrainHSAT) -> Cohort:
    """Some training patients become the split "tune", by which the best encoder is chosen."""
    share, seed = settings.data.tune_fraction, settings.data.split_seed
    try:
        return cohort.with_split(val_fraction=share, seed=seed, names=("train", "tune"), of="train")
    except ValueError as error:
        raise ValueError(f"{error}; or hold out no training patient: --data.tune_fraction 0") from None


def train(settings: TrainHSAT, ranks: Ranks | None = None) -> Path:
    """Run or resume the training; returns the path of the best encoder (the final one where none was held out).

    ranks: which of several processes this is; all of them call this, and the first one writes and speaks.
    """
    ranks = ranks or Ranks(0, 1, device_named(settings.device))
    tuned = settings.data.tune_fraction > 0
    assert_ranks_agree(settings=same_on_all_ranks(settings.plain()))
    with one_after_the_first(ranks):  # who may write the synthetic cohort, and pack
        cohort = open_cohort(settings.data, seed=settings.seed)
        cohort = hold_out(cohort, settings) if tuned else cohort
        packed = open_packed(cohort, settings.data, out=settings.out)
    assert_ranks_agree(cohort=cohort, store=packed, seed=settings.seed)
    trainer = Trainer(settings, cohort, ranks, packed)
    fingerprint = cohort.fingerprint()
    resume = settings.resume or ranks.again
    if resume or not (settings.out / "run.json").exists():  # else the run is refused, and stays refused
        ranks.begin()
    run = Run(
        settings.out,
        settings.plain(),
        cohort=fingerprint,
        resume=resume,
        log=settings.log,
        defaults=TrainHSAT().plain(),
        writes=ranks.first,
    )
    if ranks.first:
        print(describe(cohort), file=sys.stderr)
    trainer.restore(run)
    per_epoch = trainer.sampler.batches_per_epoch
    silent = settings.quiet or not ranks.first
    bar = tqdm(total=trainer.steps, initial=trainer.step, desc="training", unit="step", disable=silent)
    with naming_last_state(trainer, run), bar:
        while trainer.step < trainer.steps:
            epoch, done = divmod(trainer.step, per_epoch)
            trainer.sampler.set_epoch(epoch, strength=trainer.strength(epoch), start_batch=done)
            for batch in trainer.loader:
                row = trainer.train_step(batch, epoch)
                for note in () if silent else trainer.notes():
                    bar.write(note, file=sys.stderr)
                if tuned and (trainer.step % trainer.eval_every == 0 or trainer.step == trainer.steps):
                    trainer.check_state()
                    row |= held_out_accuracy(trainer.model, cohort, settings, packed=packed)
                    if trainer.skipped < trainer.step:
                        keep_best(trainer, run, row, fingerprint)
                run.log(row)
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}")
                if trainer.step % settings.train.save_every == 0 or trainer.step == trainer.steps:
                    trainer.save(run)
                if trainer.step == trainer.steps:
                    break
    note = trainer.check_learned(run)
    if note and ranks.first:
        print(note, file=sys.stderr)
    final, best = run.out / "final.safetensors", run.out / "best.safetensors"
    if ranks.first:
        save_encoder(trainer.model, final, metadata={"step": trainer.step, "cohort": fingerprint})
    return best if best.exists() else final


def main(argv: list[str]) -> None:
    """Read the options, train, say where the encoder is; what the user can mend ends the program with the reason."""
    settings = load_settings(argv)
    try:
        with joined(settings.device, patience=timedelta(seconds=settings.rank_timeout)) as ranks, one_voice(ranks):
            with lock_folder(settings.out) if ranks.first else nullcontext():
                path = train(settings, ranks)
            if ranks.first:
                print(f"encoder: {path}")
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}. {go_on_finite(settings, argv)}") from None
    except (BadPatch, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"error: {out_of_memory(error, settings)}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
