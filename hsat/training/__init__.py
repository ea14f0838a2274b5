"""Training: the adversarial step, its schedules, and checkpoints from which a run resumes bit for bit."""

from __future__ import annotations

from hsat.training.resume import TrainingState, load_training_state, save_checkpoint
from hsat.training.schedules import (
    augmentation_strength,
    cosine_with_warmup,
    epsilon_schedule,
    paper_clean_weight,
)
from hsat.training.step import StepResult, adversarial_step

__all__ = [
    "StepResult",
    "TrainingState",
    "adversarial_step",
    "augmentation_strength",
    "cosine_with_warmup",
    "epsilon_schedule",
    "load_training_state",
    "paper_clean_weight",
    "save_checkpoint",
]
