"""BatchNorm folded into the layers before it: the same function with fewer passes over memory, for evaluation."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hsat.models.constant.norms import scale_and_shift
from hsat.models.dual_norm import DualBatchNorm
from hsat.models.encoder import PROBED_SIZES, Encoder
from hsat.models.modes import frozen

_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # exactly these: subclasses may do more to their weights
TOLERATED = 1e-4
"""Largest difference that folding may make, as a share of the largest feature: float32 rounding gives about 1e-6."""


class Scaled(nn.Module):
    """x * scale + shift for each channel: a BatchNorm in evaluation mode that has no layer before it to go into."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Images, maps or vectors (n, c, ...) -> the same shape."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


def fold_batchnorm(encoder: Encoder) -> Encoder:
    """A copy of an encoder in evaluation mode that computes the same without BatchNorm; the original is left alone.

    A BatchNorm that reads what a convolution or a linear layer gives, and nothing else reads, goes into that layer's
    weights (in float64, then rounded); any other becomes a scale and a shift for each channel.  Features and embeddings
    are those of the original up to rounding; that is checked on two random images.  The copy is for evaluation: its
    parameters are frozen, its `spec` is None, `batchnorm_folded` is True, which records of evaluations state.

    Raises TypeError for anything but an `Encoder`, ValueError for one without BatchNorm, in training mode, with dual
    BatchNorm, with a BatchNorm that keeps no statistics or that is not reached by `features` and the head of the copy,
    and where the check fails.
    """
    _check(encoder)
    folded = copy.deepcopy(encoder)
    images = _two_images(folded)
    with frozen(encoder, folded), torch.no_grad():
        before = _trace(folded, images)
        norms = [(name, part) for name, part in folded.named_modules() if isinstance(part, _BatchNorm)]
        for name, norm in norms:
            _fold(folded, name, norm, before)
        for original, mine in ((encoder.features, folded.features), (encoder, folded)):
            _check_same(original(images), mine(images))
    folded.spec, folded.batchnorm_folded = None, True
    return folded.eval().requires_grad_(False)


class _Trace:
    """Which layer's output each BatchNorm reads, and how often every layer was run in one pass."""

    def __init__(self) -> None:
        self.runs: Counter[nn.Module] = Counter()
        self.before: dict[nn.Module, nn.Module] = {}
        self.made: list[tuple[Tensor, int, nn.Module]] = []  # tensors, and their version before anything in place

    def watch(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A hook for linear layers and BatchNorm."""
        self.runs[module] += 1
        if isinstance(module, _BatchNorm):
            read = inputs[0]
            for made, version, maker in self.made:
                if made is read and version == read._version:
                    self.before[module] = maker
        elif not (isinstance(module, nn.Linear) and output.ndim > 2):  # its channels would come last
            self.made.append((output, output._version, module))


def _trace(encoder: Encoder, images: Tensor) -> _Trace:
    trace = _Trace()
    watched = [part for part in encoder.modules() if isinstance(part, _BatchNorm) or type(part) in _LINEAR]
    handles = [part.register_forward_hook(trace.watch) for part in watched]
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _fold(encoder: Encoder, name: str, norm: _BatchNorm, trace: _Trace) -> None:
    """Take one BatchNorm out; an activation that timm put into it stays."""
    if not trace.runs[norm]:
        raise ValueError(
            f"BatchNorm {name} of the copy was not run; features= may be a function that holds the original module."
            " Give the name of a method instead, as in wrap_encoder(module, features='forward_features')"
        )
    maker = trace.before.get(norm)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"BatchNorm {name} keeps no statistics, so that it is no fixed scale and cannot be folded")
    scale, shift = scale_and_shift(norm)
    if maker is not None and trace.runs[maker] == trace.runs[norm] == 1 == [*trace.before.values()].count(maker):
        _absorb(maker, scale, shift)
        rest: list[nn.Module] = []
    else:
        rest = [Scaled(scale.to(norm.running_mean), shift.to(norm.running_mean))]
    rest += [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    owner = encoder.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Sequential(*rest) if rest else nn.Identity())


def _absorb(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Multiply a layer's outputs by scale and add shift, by way of its weights."""
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    wanted = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=wanted)
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=wanted)


def _check(encoder: object) -> None:
    if not isinstance(encoder, Encoder):
        raise TypeError(f"fold_batchnorm takes an Encoder, got {type(encoder).__name__}; see wrap_encoder")
    if any(isinstance(part, DualBatchNorm) for part in encoder.modules()):
        raise ValueError("dual BatchNorm has two functions in one encoder; only a plain BatchNorm can be folded")
    norms = [part for part in encoder.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        raise ValueError(f"the encoder's {type(encoder.backbone).__name__} has no BatchNorm to fold")
    if any(norm.training for norm in norms):
        raise ValueError("BatchNorm in training mode depends on the batch and cannot be folded; call encoder.eval()")


def _check_same(original: Tensor, folded: Tensor) -> None:
    largest = float((original - folded).abs().max())
    if not largest <= TOLERATED * max(1.0, float(original.abs().max())):
        raise ValueError(
            f"folding changes the output by {largest:.2g}: something reads a layer's output before its BatchNorm;"
            " evaluate the encoder as it is"
        )


def _two_images(encoder: Encoder) -> Tensor:
    height, width = encoder.input_size or encoder.fixed_size or (PROBED_SIZES[2],) * 2
    first = next(encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, encoder._channels(), height, width, generator=generator).to(first.device)
