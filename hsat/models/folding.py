"""BatchNorm folded into the layers before it: the same function with fewer passes over memory, for evaluation."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hsat.models.dual_norm import BatchNorm, DualBatchNorm
from hsat.models.encoder import PROBED_SIZES, Encoder
from hsat.models.frozen import frozen

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
    weights (in float64, then rounded); any other becomes a scale and a shift for each channel.  torch.fx says which
    layer reads which; a BatchNorm that is called by a module which torch.fx cannot trace becomes a scale and a shift,
    with a warning that names the module.  Features and embeddings are those of the original up to rounding; that is
    checked on two random images.  The copy is for evaluation: its parameters are frozen, its `spec` is None,
    `batchnorm_folded` is True, which records of evaluations state.

    Args:
        encoder: In evaluation mode; left as it is.

    Returns:
        The copy.

    Raises:
        TypeError: For anything but an `Encoder`.
        ValueError: For an encoder without BatchNorm, in training mode, with dual BatchNorm, with a BatchNorm that keeps
            no statistics or that is not reached by `features` and the head of the copy, and where the check fails.
    """
    _check(encoder)
    folded = copy.deepcopy(encoder)
    images = _two_images(folded)
    with frozen(encoder, folded), torch.no_grad():
        runs, reads = _runs(folded, images), _reads(folded)
        for name, norm in [(name, part) for name, part in folded.named_modules() if isinstance(part, BatchNorm)]:
            if not runs.count[norm]:
                raise ValueError(
                    f"BatchNorm {name} of the copy was not run; features= may be a function that holds the original"
                    " module. Give the name of a method instead, as in wrap_encoder(..., features='forward_features')"
                )
            layer = reads.before.get(norm)
            once = layer is not None and runs.count[layer] == runs.count[norm] == 1
            _fold(folded, name, norm, layer if once and layer not in runs.channels_last else None)
        _check_same(encoder.features(images), folded.features(images))
        _check_same(encoder(images), folded(images))
    for name, reason in reads.untraced.items():
        warnings.warn(
            f"torch.fx cannot trace {name} ({reason}): its BatchNorm became a scale and a shift", stacklevel=2
        )
    folded.spec, folded.batchnorm_folded = None, True
    return folded.eval().requires_grad_(False)


@dataclass
class _Reads:
    """Which layer's output each BatchNorm reads and nothing else does, where torch.fx can tell.

    untraced: modules that torch.fx could not trace and that call a BatchNorm themselves, by name, with the reason.
    """

    before: dict[nn.Module, nn.Module] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Follows a module down to torch's own layers and every BatchNorm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the graph."""
        return isinstance(m, BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _reads(encoder: Encoder) -> _Reads:
    """Read off the graphs of backbone and head; traced is a copy, which keeps nothing of what tracing leaves behind."""
    reads, traced = _Reads(), copy.deepcopy(encoder)
    original = dict(zip(traced.modules(), encoder.modules(), strict=True))
    for name, part in traced.named_children():
        _read(part, name, reads)
    reads.before = {original[norm]: original[layer] for norm, layer in reads.before.items()}
    return reads


def _read(module: nn.Module, name: str, reads: _Reads) -> None:
    """Trace a module as a whole or, where that fails (a shape decides what runs, say), its parts one by one."""
    if isinstance(module, BatchNorm) or not any(isinstance(part, BatchNorm) for part in module.modules()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever the module's own code raises when it is handed no numbers
        if any(isinstance(part, BatchNorm) for part in module.children()):
            reads.untraced[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        for child, part in module.named_children():
            _read(part, f"{name}.{child}", reads)
        return
    parts = dict(module.named_modules())
    for node in graph.nodes:
        norm = _called(node, parts)
        if isinstance(norm, BatchNorm) and (layer := _alone_before(node, parts)) is not None:
            reads.before[norm] = layer


def _called(node: object, parts: dict[str, nn.Module]) -> nn.Module | None:
    """The module that a step of a graph calls, or None."""
    return parts[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None


def _alone_before(node: fx.Node, parts: dict[str, nn.Module]) -> nn.Module | None:
    """The convolution or linear layer whose output this step reads, if no other step does."""
    read: Any = node.args[0] if node.args else None
    while isinstance(_called(read, parts), nn.Identity) and len(read.users) == 1:
        read = read.args[0]
    layer = _called(read, parts)
    return layer if layer is not None and type(layer) in _LINEAR and len(read.users) == 1 else None


class _Runs:
    """How often each layer was run in one pass, and which linear layers gave more than vectors."""

    def __init__(self) -> None:
        self.count: Counter[nn.Module] = Counter()
        self.channels_last: set[nn.Module] = set()

    def watch(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A hook for linear layers and BatchNorm."""
        self.count[module] += 1
        if isinstance(module, nn.Linear) and output.ndim > 2:  # BatchNorm's channels are another axis than its own
            self.channels_last.add(module)


def _runs(encoder: Encoder, images: Tensor) -> _Runs:
    runs = _Runs()
    watched = [part for part in encoder.modules() if isinstance(part, BatchNorm) or type(part) in _LINEAR]
    handles = [part.register_forward_hook(runs.watch) for part in watched]
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _fold(encoder: Encoder, name: str, norm: BatchNorm, layer: nn.Module | None) -> None:
    """Take one BatchNorm out, into `layer` where there is one; an activation that timm put into it stays."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"BatchNorm {name} keeps no statistics, so that it is no fixed scale and cannot be folded")
    scale, shift = _scale_and_shift(norm)
    rest: list[nn.Module] = []
    if layer is None:
        rest.append(Scaled(scale.to(norm.running_mean), shift.to(norm.running_mean)))
    else:
        _absorb(layer, scale, shift)
    rest += [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    owner = encoder.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Sequential(*rest) if rest else nn.Identity())


def _scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift), both (c,) float64, of a BatchNorm that keeps statistics, in evaluation mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _absorb(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Multiply a layer's outputs by scale and add shift, by way of its weights."""
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias.double() * scale + shift
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(layer.weight), requires_grad=trained)
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=trained)


def _check(encoder: object) -> None:
    if not isinstance(encoder, Encoder):
        raise TypeError(f"fold_batchnorm takes an Encoder, got {type(encoder).__name__}; see wrap_encoder")
    if any(isinstance(part, DualBatchNorm) for part in encoder.modules()):
        raise ValueError("dual BatchNorm has two functions in one encoder; only a plain BatchNorm can be folded")
    norms = [part for part in encoder.modules() if isinstance(part, BatchNorm)]
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
    return torch.rand(2, encoder.channels, height, width, generator=generator).to(first.device)
