"""Encoders: backbones with their pixel normalisation and projection head, and what is done to whole models."""

from __future__ import annotations

from hsat.models.building import build_encoder
from hsat.models.checkpoints import load_checkpoint, load_encoder, save_encoder, state_fingerprint
from hsat.models.dual_norm import DualBatchNorm, branch, convert_to_dual, is_dual
from hsat.models.encoder import Encoder
from hsat.models.heads import ProjectionHead, projection_head
from hsat.models.modes import frozen
from hsat.models.weight_files import LoadReport, checkpoint_hash
from hsat.models.wrapping import wrap_encoder
from hsat.models.zoo import PAPER_NAMES

__all__ = [
    "PAPER_NAMES",
    "DualBatchNorm",
    "Encoder",
    "LoadReport",
    "ProjectionHead",
    "branch",
    "build_encoder",
    "checkpoint_hash",
    "convert_to_dual",
    "frozen",
    "is_dual",
    "load_checkpoint",
    "load_encoder",
    "projection_head",
    "save_encoder",
    "state_fingerprint",
    "wrap_encoder",
]
