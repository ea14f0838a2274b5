"""Encoders: backbones with their pixel normalisation and projection head, and what is done to whole models."""

from __future__ import annotations

from hsat.fingerprints import normalisation_of
from hsat.models.checkpoints import checkpoint_hash, load_checkpoint, save_encoder
from hsat.models.dual_norm import (
    DualBatchNorm,
    active_branch,
    branch,
    convert_to_dual,
    is_dual,
    set_branch,
    trained_branch,
    unused_branches,
)
from hsat.models.encoder import Encoder
from hsat.models.factory import build_encoder, has_encoder_spec, load_encoder
from hsat.models.folding import fold_batchnorm
from hsat.models.frozen import frozen
from hsat.models.heads import HeadSpec, ProjectionHead, projection_head
from hsat.models.metadata import LoadReport
from hsat.models.pixel_normalisation import PixelNormalisation
from hsat.models.wrapper import wrap_encoder
from hsat.models.zoo import PAPER_NAMES

__all__ = [
    "PAPER_NAMES",
    "DualBatchNorm",
    "Encoder",
    "HeadSpec",
    "LoadReport",
    "PixelNormalisation",
    "ProjectionHead",
    "active_branch",
    "branch",
    "build_encoder",
    "checkpoint_hash",
    "convert_to_dual",
    "fold_batchnorm",
    "frozen",
    "has_encoder_spec",
    "is_dual",
    "load_checkpoint",
    "load_encoder",
    "normalisation_of",
    "projection_head",
    "save_encoder",
    "set_branch",
    "trained_branch",
    "unused_branches",
    "wrap_encoder",
]
