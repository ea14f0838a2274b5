"""Put faster forwards into the layers of a constant model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from hsat.models.constant.convolutions import PackedConvolution, is_large, torch_lays_out
from hsat.models.constant.layer import ConstantLayer, is_plain, usual_forward
from hsat.models.constant.norms import ScalingNorm
from hsat.models.constant.stems import StemConvolution, is_stem


@contextmanager
def constant_layers(modules: Iterable[nn.Module], *, fast: bool) -> Iterator[None]:
    """Inside the block, layers on CPU make use of it that their weights are constant.

    Convolutions on images in channels_last keep their weights laid out (`PackedConvolution`); values are bit for bit
    those of torch.  fast: also, with other last bits, strided convolutions on few channels get a faster gradient
    (`StemConvolution`; in bfloat16, whose rounding is coarser by far, they always do), and BatchNorm in evaluation mode
    is one factor and one summand (`ScalingNorm`).

    Only float32 modules of exactly torch's classes are replaced, with float32 or bfloat16 images, where torch computes
    with oneDNN; all else, compiled models and second derivatives included, goes the usual way.  Weights that are
    changed in the block are noticed, but for changes through `.data`, which torch does not count.  What is kept takes
    up to twice the memory of the weights for each of two shapes, and is given back at the end.
    """
    parts = list(modules)
    compiled = any(getattr(p, "_compiled_call_impl", None) is not None or hasattr(p, "_orig_mod") for p in parts)
    replaced: list[nn.Module] = []
    try:
        for part in parts if torch_lays_out() and not compiled else ():
            forward = _faster(part, fast=fast)
            if forward is not None:
                part.__dict__["forward"] = forward
                replaced.append(part)
        yield
    finally:
        for part in replaced:
            part.__dict__.pop("forward", None)


def _faster(part: nn.Module, *, fast: bool) -> ConstantLayer | None:
    if type(part) not in (nn.Conv2d, nn.BatchNorm2d):
        return None
    if part.__dict__.get("forward", usual := usual_forward(part)) != usual:  # of an outer block, or its owner's
        return None
    if not all(is_plain(each) for each in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
        return None
    if isinstance(part, nn.Conv2d) and is_stem(part):
        return StemConvolution(part, exact=not fast)
    if isinstance(part, nn.Conv2d) and is_large(part):
        return PackedConvolution(part)
    return ScalingNorm(part) if isinstance(part, nn.BatchNorm2d) and fast else None
