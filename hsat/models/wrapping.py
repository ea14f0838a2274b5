"""Turning the user's own module into an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from hsat.models.encoder import Encoder, Features
from hsat.models.heads import projection_head


def wrap_encoder(
    module: nn.Module,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    head: int | str | nn.Module | None = None,
    head_hidden: Sequence[int] = (),
    embedding_dim: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    features: str | Features | nn.Module | None = None,
    feature_dim: int | None = None,
) -> Encoder:
    """Any nn.Module as an encoder: images (n, c, h, w) in [0, 1] -> unit rows, pixel handling inside.

    mean, std: the pixel normalisation the module was trained with, on the [0, 1] scale; None if it does its own.
    input_size: side or (height, width) to which images are resized inside, differentiably; None takes them as they are.
    features: where the features come from.  None: `module(x)`.  A name such as "forward_features" or "trunk.encode":
    that method of the module; if it names a submodule, or is one, that submodule is wrapped instead.  A function: it
    gets the normalised, resized images; write it against the module passed here (a deep copy of the encoder still
    calls the original through it, whereas a name follows the copy).
    Features may be (n, d) or (n, d, h, w), averaged over h and w; tokens (n, t, d) need a `features` that picks.
    head: None gives normalised features; an int is a linear layer of that width; "linear", "mlp" and "mlp3_bn" are the
    paper's heads with embedding_dim and head_hidden; a module maps (n, feature_dim) to (n, anything).
    feature_dim: width of the features; found by running black images when a head needs it and it is not given.
    The module itself is held, not copied.  Raises TypeError or ValueError naming the option.
    """
    if not isinstance(module, nn.Module):
        hint = "; for a function pass the module it calls, and the function as features=" if callable(module) else ""
        raise TypeError(f"wrap_encoder takes a torch.nn.Module, got {type(module).__name__}{hint}")
    backbone, how = _feature_source(module, features)
    kind, width = _kind_of_head(head, embedding_dim)
    given = head if isinstance(head, nn.Module) else None
    encoder = Encoder(
        backbone,
        feature_dim=feature_dim,
        head=given,
        embedding_dim=None if given is None else embedding_dim,
        mean=mean,
        std=std,
        input_size=input_size,
        features=how,
    )
    if kind is not None:
        built = projection_head(kind, in_features=encoder.feature_dim, embedding_dim=width, hidden=head_hidden)
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        encoder.attach_head(built if like is None else built.to(like), embedding_dim=built.out_features)
    elif head_hidden:
        raise ValueError(f"head_hidden={tuple(head_hidden)} needs head='mlp' or 'mlp3_bn'")
    elif given is None and embedding_dim is not None and embedding_dim != encoder.feature_dim:
        raise ValueError(f"embedding_dim={embedding_dim} needs a head; write head={embedding_dim} for a linear one")
    return encoder


def _kind_of_head(head: int | str | nn.Module | None, embedding_dim: int | None) -> tuple[str | None, int | None]:
    """Which head to build, if any, and its width."""
    if isinstance(head, int):
        if embedding_dim not in {None, head}:
            raise ValueError(f"head={head} and embedding_dim={embedding_dim} disagree; give one of them")
        return "linear", head
    return (head, embedding_dim) if isinstance(head, str) else (None, None)


def _feature_source(
    module: nn.Module, features: str | Features | nn.Module | None
) -> tuple[nn.Module, str | Features | None]:
    """The module to hold, and how to call it."""
    if getattr(features, "__self__", None) is module:
        features = str(features.__name__)  # type: ignore[union-attr]  # a name follows deep copies
    if isinstance(features, str):
        try:
            found = attrgetter(features)(module)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"{type(module).__name__} has no attribute {features!r} to take features from; its submodules:"
                f" {children}"
            ) from None
        if isinstance(found, nn.Module):
            return found, None
        if not callable(found):
            raise TypeError(f"features={features!r} is a {type(found).__name__}, not a method or submodule")
        return module, features
    if isinstance(features, nn.Module):
        return features, None
    if features is not None and not callable(features):
        raise TypeError(f"features must be a name, a function of images or None, got {type(features).__name__}")
    return module, features
