"""Encoders: backbones with their pixel normalisation and projection head, and what is done to whole models.

Example:
    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> encoder = build_encoder("resnet10t", head=8, norm="none", seed=0)
    >>> encoder(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 8])
    >>> with TemporaryDirectory() as folder:
    ...     path = save_encoder(encoder, f"{folder}/encoder.safetensors")
    ...     again = load_encoder(path)  # builds it, in evaluation mode
    ...     report = load_checkpoint(encoder, path)  # into an encoder that is there
    >>> all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    True
"""

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
from hsat.models.pixel_normalisation import PixelNormalisation, standardise_images
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
    "standardise_images",
    "trained_branch",
    "unused_branches",
    "wrap_encoder",
]
