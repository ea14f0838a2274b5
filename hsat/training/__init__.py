"""Training: the adversarial step, its schedules, and checkpoints from which a run resumes bit for bit."""

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
