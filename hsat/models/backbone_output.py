"""What backbones give, made into one vector per image: maps, dicts, tuples, outputs of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from hsat.types.row_checks import SQUEEZED, is_squeezed


class OutputError(ValueError):
    """A backbone's output that cannot be read as one vector per image, whatever the size of the images."""


class OutputTypeError(TypeError):
    """A backbone's output that is no tensor."""


def as_vectors(out: object, n: int, *, channels_last: bool = False) -> Tensor:
    """The features (n, d) of n images.

    Args:
        out: What the backbone gave: (n, d), or a map (n, d, h, w), which is averaged over h and w.
        n: Number of images.
        channels_last: Whether a map is (n, h, w, d).

    Raises:
        OutputTypeError: For what is no tensor, saying what to pass.
        OutputError: For another shape, likewise.
    """
    if not isinstance(out, Tensor):
        raise OutputTypeError(
            f"the backbone must return a tensor (n, d), got {type(out).__name__}; pass features= to wrap_encoder: the"
            f" name or number of the entry that holds the features, or a function of the images; this is"
            f" {describe_output(out)}"
        )
    if out.ndim == 4:
        out = out.mean((1, 2) if channels_last else (2, 3))
    if out.ndim != 2 or len(out) != n:
        shape = tuple(out.shape)
        tokens = " (tokens?); to take the class token" if out.ndim == 3 else ";"
        reason = f". {SQUEEZED}; or" if is_squeezed(shape, n) else tokens
        raise OutputError(
            f"the backbone must return (n, d) or (n, d, h, w) for {n} images, got {shape}{reason}"
            f" pass features=, such as features=lambda x: module.forward_features(x)[:, 0], to wrap_encoder"
        )
    return out


def pick_output(out: object, entry: str | int | object) -> object:
    """One entry of a dict, a tuple, or an output object such as Hugging Face's.

    Raises:
        OutputError: Where there is none of that name or number, listing those that there are.
    """
    if isinstance(entry, str) and isinstance(out, Mapping) and entry in out:
        return out[entry]
    if isinstance(entry, str) and not isinstance(out, Mapping | Tensor) and getattr(out, entry, None) is not None:
        return getattr(out, entry)
    if isinstance(entry, int) and isinstance(out, Sequence) and -len(out) <= entry < len(out):
        return out[entry]
    raise OutputError(f"features={entry!r} is no part of the backbone's output, which is {describe_output(out)}")


def describe_output(out: object) -> str:
    """An output in words, with the entries that it has."""
    if isinstance(out, Tensor):
        return f"a tensor {tuple(out.shape)}"
    if isinstance(out, Mapping):
        return f"{type(out).__name__} with {', '.join(map(repr, out))}"
    if isinstance(out, Sequence):
        return f"{type(out).__name__} of {len(out)}"
    return type(out).__name__


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute of this dotted name."""
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def built_size(backbone: nn.Module) -> tuple[int, int] | None:
    """The (height, width) that a timm model was built for; None where it does not say."""
    patches = getattr(backbone, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None:
        settings = getattr(backbone, "pretrained_cfg", None)
        size = settings.get("input_size", (None, None, None))[1:] if isinstance(settings, Mapping) else None
    if isinstance(size, int):
        size = (size, size)
    if not size or any(not isinstance(side, int) for side in size):
        return None
    return size[0], size[1]


def channel_axis(out: Tensor, images: Tensor) -> int | None:
    """The axis of the channels in a map (n, d, h, w) or (n, h, w, d) of square images, whose h and w are equal.

    Returns:
        1 or 3; None where the shape does not tell.
    """
    _, first, second, third = out.shape
    if images.shape[2] != images.shape[3] or first == second == third:
        return None
    if second == third:
        return 1
    return 3 if first == second else None


def channel_axis_of_two(maps: Sequence[Tensor], name: str) -> int:
    """The axis that maps of images of two sizes have in common.

    Args:
        maps: Of images of one size, and of images twice as high and twice as wide.
        name: The backbone, for the message.

    Raises:
        OutputError: Where that does not tell.
    """
    if len(maps) == len(("one", "other")):
        sizes = list(zip(maps[0].shape[1:], maps[1].shape[1:], strict=True))
        same = [axis for axis, (small, large) in enumerate(sizes, start=1) if small == large]
        if same in ([1], [3]):
            return same[0]
    raise OutputError(
        f"{name} gives maps whose axis of channels cannot be told; pass features=, such as"
        " features=lambda x: module(x).mean((2, 3)) for (n, d, h, w), to wrap_encoder"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
