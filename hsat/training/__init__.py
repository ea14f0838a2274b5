"""Training: the adversarial step, its schedules, and checkpoints from which a run resumes bit for bit."""

from __future__ import annotations

from hsat.training.accumulation import accumulated_step, split_batch
from hsat.training.devices import (
    average_statistics,
    image_slots,
    of_all_ranks,
    same_everywhere,
    share_of_batch,
    synchronised_norm,
)
from hsat.training.free import free_replays
from hsat.training.guards import (
    StepClock,
    is_out_of_memory,
    largest_batch,
    memory_text,
    parse_memory,
    peak_memory,
)
from hsat.training.resume import TrainingState, load_training_state, save_checkpoint
from hsat.training.schedules import (
    augmentation_strength,
    cosine_with_warmup,
    epsilon_schedule,
    paper_clean_weight,
)
from hsat.training.single_step import NFGSM, Gap, Safeguard
from hsat.training.step import StepResult, adversarial_step
from hsat.training.warm_start import WarmStarts

__all__ = [
    "NFGSM",
    "Gap",
    "Safeguard",
    "StepClock",
    "StepResult",
    "TrainingState",
    "WarmStarts",
    "accumulated_step",
    "adversarial_step",
    "augmentation_strength",
    "average_statistics",
    "cosine_with_warmup",
    "epsilon_schedule",
    "free_replays",
    "image_slots",
    "is_out_of_memory",
    "largest_batch",
    "load_training_state",
    "memory_text",
    "of_all_ranks",
    "paper_clean_weight",
    "parse_memory",
    "peak_memory",
    "same_everywhere",
    "save_checkpoint",
    "share_of_batch",
    "split_batch",
    "synchronised_norm",
]
