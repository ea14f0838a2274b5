"""Training: the adversarial step, its schedules, and checkpoints from which a run resumes bit for bit.

Example:
    One step on a synthetic cohort, with an encoder of a few weights, and what it is worth on other patients:

    >>> from tempfile import TemporaryDirectory
    >>> from torch import nn
    >>> from hsat.data import read_opensrh, write_synthetic_cohort
    >>> from hsat.models import wrap_encoder
    >>> encoder = wrap_encoder(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)), norm="none")
    >>> config = TrainConfig(steps=1, batch_patients=2, eval_patches=8, views={"image_size": 48}, attack={"steps": 1})
    >>> with TemporaryDirectory() as folder:
    ...     cohort = read_opensrh(write_synthetic_cohort(f"{folder}/cohort", seed=0))
    ...     best = Trainer(encoder, cohort, config, out=f"{folder}/run").fit()
    ...     measured = held_out_validation(cohort, image_size=48, split="val", patches=8)(encoder)
    >>> best.name, 0 <= measured["tune_clean_accuracy"] <= 1
    ('final.safetensors', True)
"""

from __future__ import annotations

from hsat.training.accumulation import SplitBatch, accumulated_step, split_batch
from hsat.training.agreement import assert_ranks_agree, assert_same
from hsat.training.checkpoint import RandomStateMismatch, TrainingState, load_training_state, save_checkpoint
from hsat.training.config import InnerAttackConfig, TrainConfig, ViewConfig
from hsat.training.fast import LossGap, OverfittingGuard
from hsat.training.free import free_replays
from hsat.training.gradients import check_gradients, check_state, check_trainable, largest_gradient
from hsat.training.interrupts import TrainingInterrupted
from hsat.training.schedules import (
    augmentation_strength,
    cosine_with_warmup,
    epsilon_schedule,
    paper_clean_weight,
)
from hsat.training.step import StepResult, adversarial_step
from hsat.training.trainer import Trainer
from hsat.training.validation import held_out_validation
from hsat.training.warm_start import WarmStarts

__all__ = [
    "InnerAttackConfig",
    "LossGap",
    "OverfittingGuard",
    "RandomStateMismatch",
    "SplitBatch",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "TrainingState",
    "ViewConfig",
    "WarmStarts",
    "accumulated_step",
    "adversarial_step",
    "assert_ranks_agree",
    "assert_same",
    "augmentation_strength",
    "check_gradients",
    "check_state",
    "check_trainable",
    "cosine_with_warmup",
    "epsilon_schedule",
    "free_replays",
    "held_out_validation",
    "largest_gradient",
    "load_training_state",
    "paper_clean_weight",
    "save_checkpoint",
    "split_batch",
]
