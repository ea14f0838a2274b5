"""Projection heads: from backbone features to the embedding that the contrastive loss sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

HEADS = ("linear", "mlp", "mlp3_bn")
PAPER_EMBEDDING_DIM = 128


@dataclass(frozen=True)
class HeadSpec:
    """The options of a projection head, see `projection_head`.

    Attributes:
        kind: "linear", "mlp" or "mlp3_bn".
        embedding_dim: Width of the embedding; None is the default of the kind.
        hidden: Widths of the hidden layers; empty is the default of the kind.
    """

    kind: str
    embedding_dim: int | None = None
    hidden: tuple[int, ...] = ()

    def __str__(self) -> str:
        kind = f"HeadSpec({self.kind!r}, hidden={self.hidden})" if self.hidden else repr(self.kind)
        return f"head={kind}, embedding_dim={self.embedding_dim}"


class ProjectionHead(nn.Module):
    """A stack of layers (n, in_features) -> (n, out_features); rows are not normalised here, the encoder does that.

    The layers sit in `layers`, numbered as in the published checkpoints, which therefore load by name.

    Args:
        layers: The modules in turn.
        in_features: Width of what the first one takes.
        out_features: Width of what the last one gives.
    """

    def __init__(self, layers: Sequence[nn.Module], *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, features: Tensor) -> Tensor:
        """(n, in_features) -> (n, out_features).

        Args:
            features: (n, in_features).

        Returns:
            (n, out_features).
        """
        projected: Tensor = self.layers(features)
        return projected


def projection_head(
    kind: str, *, in_features: int, embedding_dim: int | None = None, hidden: Sequence[int] = ()
) -> ProjectionHead:
    """One of the paper's three projection heads (arXiv 2503.10629, ablation of the projector).

    The width of the input is always the true feature width; the published code fixes it to 2048 for most backbones,
    so that narrower ones cannot run there.

    Args:
        kind: "linear": one affine layer.  "mlp": affine layers with ReLU between them.  "mlp3_bn": three affine layers,
            BatchNorm after each, ReLU after the first two; only the first has a bias.
        in_features: Width of the features.
        embedding_dim: Width of the output.  None means 128 (the paper's run with "mlp" used 2048), for "mlp3_bn" the
            feature width.
        hidden: Widths of the inner layers of "mlp" and "mlp3_bn"; empty means two of the feature width (2048, 2048 on a
            ResNet-50).

    Returns:
        The head, with random weights.

    Raises:
        ValueError: Naming the option, for an unknown kind or widths that do not fit it.
    """
    if kind not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, or None for no head; got {kind!r}")
    for name, widths in (("embedding_dim", () if embedding_dim is None else (embedding_dim,)), ("hidden", hidden)):
        if any(width < 1 for width in widths):
            raise ValueError(f"{name} must hold positive widths, got {tuple(widths)}")
    if kind == "linear" and hidden:
        raise ValueError(f"head='linear' has no hidden layers, got hidden={tuple(hidden)}; write head='mlp'")
    if kind == "mlp3_bn":
        if len(hidden) not in {0, 2}:
            raise ValueError(f"head='mlp3_bn' has two hidden layers, got hidden={tuple(hidden)}")
        embedding_dim = in_features if embedding_dim is None else embedding_dim
    out = PAPER_EMBEDDING_DIM if embedding_dim is None else embedding_dim
    inner = () if kind == "linear" else tuple(hidden) or (in_features, in_features)
    layers = _layers((in_features, *inner, out), batch_norm=kind == "mlp3_bn")
    return ProjectionHead(layers, in_features=in_features, out_features=out)


def head_spec(head: str | int | HeadSpec, embedding_dim: int | None) -> HeadSpec:
    """The options of a head that was given by its kind, by its width (a linear one) or as options.

    Raises:
        ValueError: If head and embedding_dim say different widths.
    """
    spec = head if isinstance(head, HeadSpec) else HeadSpec("linear", head) if isinstance(head, int) else HeadSpec(head)
    if embedding_dim is None:
        return spec
    if spec.embedding_dim not in {None, embedding_dim}:
        raise ValueError(f"head={head!r} and embedding_dim={embedding_dim} disagree; give one of them")
    return replace(spec, embedding_dim=embedding_dim)


def _layers(widths: Sequence[int], *, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(before, after, bias=i == 0 or not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(after))
        if i < last:
            layers.append(nn.ReLU(inplace=True))
    return layers
