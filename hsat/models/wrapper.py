"""The user's own module as an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from hsat.models.backbone_output import OutputError, OutputTypeError, has_attribute
from hsat.models.encoder import Encoder, Features
from hsat.models.heads import HeadSpec, head_spec, projection_head
from hsat.models.pixel_normalisation import HOW_TO_STATE, choose_normalisation


def wrap_encoder(
    module: nn.Module,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    norm: str | None = None,
    head: int | str | HeadSpec | nn.Module | None = None,
    embedding_dim: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    features: str | int | Features | nn.Module | None = None,
    feature_dim: int | None = None,
) -> Encoder:
    """Any nn.Module as an encoder: images (n, c, h, w) in [0, 1] -> unit rows, pixel handling inside.

    Args:
        module: The user's module; it is held, not copied.
        mean: Pixel normalisation that the module was trained with, on the [0, 1] scale, together with std.
        std: See mean.
        norm: In place of mean and std: "imagenet"; "timm", the values that come with a timm model; "none" for a module
            that takes [0, 1] as it is, or normalises by itself; "image" for each image's own mean and std, channel by
            channel; or "m,m,m/s,s,s".
        head: None gives normalised features; otherwise as in `build_encoder`.
        embedding_dim: Width of the head's output.
        input_size: Side or (height, width) to which images are resized inside, differentiably; None takes them as they
            are.
        features: Where the features come from.  None: `module(x)`.  A name such as "forward_features" or
            "trunk.encode": that method of the module; if it names a submodule, or is one, that submodule is wrapped
            instead.  Any other name, or a number: that entry of the dict, the tuple or the output object that the
            module gives, such as "pooler_output" of Hugging Face's models.  A function: it gets the normalised, resized
            images; write it against the module passed here (a deep copy of the encoder still calls the original through
            it, whereas a name follows the copy).  Features may be (n, d), or maps (n, d, h, w) or (n, h, w, d),
            averaged over h and w; tokens (n, t, d) need a `features` that picks.
        feature_dim: Width of the features; found by running black images when a head needs it and it is not given.

    Returns:
        The encoder, which holds the module.

    Raises:
        TypeError: For what is no module, and options of another kind.
        ValueError: Where the pixel normalisation is not stated, and naming options that do not fit.

    Example:
        >>> import torch
        >>> encoder = wrap_encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), norm="none")
        >>> encoder(torch.rand(2, 3, 2, 2)).norm(dim=1)
        tensor([1.0000, 1.0000], grad_fn=...)
    """
    if not isinstance(module, nn.Module):
        hint = "; for a function pass the module it calls, and the function as features=" if callable(module) else ""
        raise TypeError(f"wrap_encoder takes a torch.nn.Module, got {type(module).__name__}{hint}")
    pixels = choose_normalisation(norm, mean, std, backbone=module)
    if pixels is None:
        raise ValueError(
            f"say how the pixels were normalised that {type(module).__name__} was trained on: {HOW_TO_STATE}; another"
            " normalisation gives wrong numbers without any error"
        )
    backbone, source = _feature_source(module, features)
    own_head = head if isinstance(head, nn.Module) else None
    encoder = Encoder(
        backbone,
        feature_dim=feature_dim,
        head=own_head,
        embedding_dim=None if own_head is None else embedding_dim,
        mean=pixels.mean,
        std=pixels.std,
        input_size=input_size,
        features=source,
        per_image=pixels.per_image,
    )
    encoder.pixels_stated_by = pixels.stated_by
    if isinstance(source, int) or (isinstance(source, str) and not has_attribute(backbone, source)):
        _check_entry(encoder, module, source)
    if head is not None and not isinstance(head, nn.Module):
        spec = head_spec(head, embedding_dim)
        width = encoder.feature_dim
        built = projection_head(spec.kind, in_features=width, embedding_dim=spec.embedding_dim, hidden=spec.hidden)
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        encoder.attach_head(built if like is None else built.to(like), embedding_dim=built.out_features)
    elif own_head is None and embedding_dim is not None and embedding_dim != encoder.feature_dim:
        raise ValueError(f"embedding_dim={embedding_dim} needs a head; write head={embedding_dim} for a linear one")
    return encoder


def _feature_source(
    module: nn.Module, features: str | int | Features | nn.Module | None
) -> tuple[nn.Module, str | int | Features | None]:
    """The module to hold, and how to call it."""
    if getattr(features, "__self__", None) is module:
        features = str(features.__name__)  # type: ignore[union-attr]  # a name follows deep copies
    if isinstance(features, str):
        if not has_attribute(module, features):
            return module, features  # an entry of the output, which the first pass looks for
        attribute = attrgetter(features)(module)
        if isinstance(attribute, nn.Module):
            return attribute, None
        if not callable(attribute):
            raise TypeError(f"features={features!r} is a {type(attribute).__name__}, not a method or submodule")
        return module, features
    if isinstance(features, nn.Module):
        return features, None
    if (
        features is not None
        and not callable(features)
        and (isinstance(features, bool) or not isinstance(features, int))
    ):
        raise TypeError(
            f"features must be a name, a number, a function of images or None, got {type(features).__name__}"
        )
    return module, features


def _check_entry(encoder: Encoder, module: nn.Module, entry: str | int) -> None:
    """Raise unless the output of the module has this entry, where black images of some usual size show it."""
    try:
        _ = encoder.feature_dim  # runs it
    except (OutputError, OutputTypeError) as error:
        if isinstance(entry, int):
            raise TypeError(f"features must be a name, or a number of an entry: {error}") from None
        children = ", ".join(name for name, _ in module.named_children()) or "none"
        raise ValueError(
            f"{type(module).__name__} has no attribute {entry!r} to take features from; its submodules: {children};"
            f" {error}"
        ) from None
    except ValueError:
        return  # it takes none of these sizes: the first pass will tell
