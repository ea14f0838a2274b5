"""Building an encoder from the name of its backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from hsat.models.checkpoints import load_backbone
from hsat.models.dual_norm import convert_to_dual
from hsat.models.encoder import Encoder, check_normalisation
from hsat.models.heads import projection_head
from hsat.models.zoo import PAPER_NAMES, create_backbone, feature_width, find_architecture, fixed_size


def build_encoder(  # noqa: PLR0913
    name: str,
    *,
    embedding_dim: int | None = None,
    head: str | int | nn.Module | None = "linear",
    head_hidden: Sequence[int] = (),
    weights: str | PathLike[str] | None = None,
    pretrained: bool = False,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    dual_norm: bool = False,
    seed: int | None = None,
) -> Encoder:
    """An encoder by one of the paper's names (`PAPER_NAMES`) or any timm name, with its projection head.

    A paper name gives the published architecture and pixel normalisation; its weights are random unless asked for,
    also where the name says "pretrained", "normal" or "at".  Any other timm name takes pixels as they are, unless
    pretrained=True, which brings the mean and std those weights were trained with.
    pretrained: fetch timm's ImageNet weights; the one way in which hsat downloads anything.
    weights: a local file with backbone weights (plain, or under "model" or "state_dict"; prefixes such as "module."
    are recognised); classifier, projector and normalisation entries are left out, and listed in
    `encoder.weights_report`; any other mismatch is an error.  The adversarial ImageNet weights of the "..._at" names
    come in this way; asking for them with pretrained=True names the file to fetch.
    head, embedding_dim, head_hidden: see `projection_head`; an int is a linear head of that width; None gives
    normalised features.  mean, std: replace the name's normalisation; 0 and 1 switch it off.  input_size: resize
    inside; needed when a backbone takes one size only.  dual_norm: BatchNorm in two branches, see `branch`.
    seed: draw the random weights from this seed and leave torch's global generator alone.

    Raises ValueError naming the option, for an unknown name with the closest known ones; ImportError where timm cannot
    be imported.
    """
    if weights is not None and pretrained:
        raise ValueError("pretrained=True and weights= both set the backbone's weights; give one of them")
    architecture = find_architecture(name, pretrained=pretrained)
    given = check_normalisation(mean, std)
    with _drawn_from(seed):
        backbone = create_backbone(architecture, pretrained=pretrained)
        width = feature_width(backbone)
        built = _head(head, width, embedding_dim, head_hidden)
    if given[0] is None:
        trained = pretrained and (architecture.scratch or name not in PAPER_NAMES)
        given = _trained_with(backbone) if trained else architecture.normalisation or (None, None)
    encoder = Encoder(
        backbone,
        feature_dim=width,
        head=built,
        embedding_dim=getattr(built, "out_features", None),
        mean=given[0],
        std=given[1],
        input_size=input_size,
        fixed_size=fixed_size(backbone),
    )
    if weights is not None:
        encoder.weights_report = load_backbone(encoder, weights)
    if architecture.dual or dual_norm:
        convert_to_dual(encoder.backbone)
    if not isinstance(head, nn.Module):
        encoder.spec = {
            "name": name,
            "embedding_dim": encoder.embedding_dim,
            "head": "linear" if isinstance(head, int) else head,
            "head_hidden": list(head_hidden),
            "input_size": encoder.input_size,
            "mean": encoder.mean,
            "std": encoder.std,
            "dual_norm": architecture.dual or dual_norm,
        }
    return encoder


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Random weights from the seed, with torch's global CPU generator put back; None: from that generator."""
    if seed is None:
        yield
        return
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(state)


def _trained_with(backbone: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """mean and std of timm's pretrained weights."""
    return check_normalisation(backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])


def _head(
    head: str | int | nn.Module | None, width: int, embedding_dim: int | None, hidden: Sequence[int]
) -> nn.Module | None:
    if isinstance(head, nn.Module):
        return head
    if head is None:
        if embedding_dim not in {None, width}:
            raise ValueError(f"head=None gives features of width {width}, not embedding_dim={embedding_dim}")
        return None
    if isinstance(head, int):
        if embedding_dim not in {None, head}:
            raise ValueError(f"head={head} and embedding_dim={embedding_dim} disagree; give one of them")
        return projection_head("linear", in_features=width, embedding_dim=head, hidden=hidden)
    return projection_head(head, in_features=width, embedding_dim=embedding_dim, hidden=hidden)
