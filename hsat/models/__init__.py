"""Encoders: backbones with their pixel normalisation and projection head, and what is done to whole models."""

from __future__ import annotations

from hsat.models.building import build_encoder
from hsat.models.checkpoints import load_checkpoint, save_encoder, state_fingerprint
from hsat.models.dual_norm import (
    DualBatchNorm,
    active_branch,
    branch,
    convert_to_dual,
    is_dual,
    set_branch,
    trained_branch,
    untouched_branches,
)
from hsat.models.encoder import Encoder
from hsat.models.folding import fold_batchnorm
from hsat.models.heads import ProjectionHead, projection_head
from hsat.models.modes import frozen
from hsat.models.rebuilding import load_encoder, states_its_encoder
from hsat.models.weight_files import LoadReport, checkpoint_hash
from hsat.models.wrapping import wrap_encoder
from hsat.models.zoo import PAPER_NAMES

__all__ = [
    "PAPER_NAMES",
    "DualBatchNorm",
    "Encoder",
    "LoadReport",
    "ProjectionHead",
    "active_branch",
    "branch",
    "build_encoder",
    "checkpoint_hash",
    "convert_to_dual",
    "fold_batchnorm",
    "frozen",
    "is_dual",
    "load_checkpoint",
    "load_encoder",
    "projection_head",
    "save_encoder",
    "set_branch",
    "state_fingerprint",
    "states_its_encoder",
    "trained_branch",
    "untouched_branches",
    "wrap_encoder",
]
