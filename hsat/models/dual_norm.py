"""Two sets of BatchNorm statistics in one network: one for clean images, one for adversarial ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

BRANCHES = ("normal", "pgd")
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""Every BatchNorm of torch; those of timm, which carry an activation, are subclasses."""


class DualBatchNorm(nn.Module):
    """A pair of BatchNorm layers, of which one is active: bn_list.0 is "normal" (clean), bn_list.1 is "pgd".

    Both start as copies of the layer that is replaced (its weights, statistics, fused activation if any).  Only the
    active layer is used and, in training mode, only its statistics move.  Which one is active is not part of the state
    dict; use `branch` to choose.  Key names are those of the published `resnet50_multi_bn` checkpoints.

    Args:
        norm: The layer that is doubled.
    """

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.bn_list = nn.ModuleList([norm, copy.deepcopy(norm)])
        self.active = BRANCHES[0]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x with the active layer.

        Args:
            x: What the layer normalises, (n, channels, ...).

        Returns:
            The same shape.
        """
        out: Tensor = self.bn_list[BRANCHES.index(self.active)](x)
        return out

    def extra_repr(self) -> str:
        """Name the active branch."""
        return f"active={self.active!r}"


def is_dual(module: nn.Module) -> bool:
    """Whether the module holds a DualBatchNorm.

    Args:
        module: Any module.

    Returns:
        Whether it does.
    """
    return any(isinstance(part, DualBatchNorm) for part in module.modules())


def convert_to_dual(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside by a DualBatchNorm, in place; returns the module (a new one if it is a BatchNorm).

    Layers that are dual already stay as they are.  Call it before the optimiser is built: the "pgd" copies are new
    parameters.

    Args:
        module: A network, changed in place.

    Returns:
        The module; a new one if it is a BatchNorm itself.

    Raises:
        ValueError: If there is no BatchNorm to replace.
    """
    if isinstance(module, BatchNorm):
        return DualBatchNorm(module)
    if not any(isinstance(part, BatchNorm) for part in module.modules()):
        raise ValueError(f"{type(module).__name__} has no BatchNorm layer, so there is nothing to double")
    _convert_children(module)
    return module


def _convert_children(module: nn.Module) -> None:
    if isinstance(module, DualBatchNorm):
        return
    for name, child in list(module.named_children()):
        if isinstance(child, BatchNorm):
            setattr(module, name, DualBatchNorm(child))
        else:
            _convert_children(child)


@contextmanager
def branch(module: nn.Module, name: str) -> Iterator[None]:
    """Inside the block, every DualBatchNorm of the module uses the branch "normal" or "pgd"; restored afterwards.

    Blocks nest, and every layer gets back the branch it had, also after an exception.  Outside of any block the branch
    is "normal", or what `set_branch` chose.  The published evaluation attacks one branch and scores the other; use one
    block around both.

        with branch(encoder, "pgd"):
            x_adv = attack(x, hierarchical(encoder, loss, batch))

    Args:
        module: A network with dual BatchNorm.
        name: "normal" or "pgd".

    Yields:
        Nothing.

    Raises:
        ValueError: For another name, or if the module has no DualBatchNorm.
    """
    layers = _layers(module, name)
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = name
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def set_branch(module: nn.Module, name: str) -> None:
    """Use the branch "normal" or "pgd" from now on; for an encoder that is only evaluated.  Errors as in `branch`.

    Args:
        module: A network with dual BatchNorm.
        name: "normal" or "pgd".

    Raises:
        ValueError: For another name, or if the module has no DualBatchNorm.
    """
    for layer in _layers(module, name):
        layer.active = name


def active_branch(module: nn.Module) -> str | None:
    """The branch in use, or None without dual BatchNorm.  ValueError if the layers disagree.

    Args:
        module: Any module.

    Returns:
        "normal" or "pgd"; None without dual BatchNorm.

    Raises:
        ValueError: If its layers are in different branches.
    """
    names = sorted({part.active for part in module.modules() if isinstance(part, DualBatchNorm)})
    if len(names) > 1:
        raise ValueError(f"{type(module).__name__} has layers in branch {' and in branch '.join(map(repr, names))}")
    return names[0] if names else None


def trained_branch(module: nn.Module) -> str:
    """The branch to evaluate where none was chosen: "pgd", unless "normal" was trained on more batches.

    Training with an attack moves "pgd" in its adversarial passes, and "normal" only where clean images are mixed in; a
    baseline without an attack moves "normal" alone.  Counted by `num_batches_tracked`.  Errors as in `branch`.

    Args:
        module: A network with dual BatchNorm.

    Returns:
        "normal" or "pgd".

    Raises:
        ValueError: If the module has no DualBatchNorm.
    """
    layers = _layers(module, BRANCHES[0])
    normal, pgd = (sum(_batches(layer.bn_list[i]) for layer in layers) for i in range(len(BRANCHES)))
    return "normal" if normal > pgd else "pgd"


def unused_branches(module: nn.Module) -> tuple[str, ...]:
    """Branches without a batch in training although the other one had some: they normalise with initial statistics.

    Args:
        module: A network with dual BatchNorm.

    Returns:
        Their names; none for a network that was never trained.

    Raises:
        ValueError: If the module has no DualBatchNorm.
    """
    layers = _layers(module, BRANCHES[0])
    counts = [sum(_batches(layer.bn_list[i]) for layer in layers) for i in range(len(BRANCHES))]
    return tuple(name for name, count in zip(BRANCHES, counts, strict=True) if count == 0 < max(counts))


def _batches(norm: nn.Module) -> int:
    count = getattr(norm, "num_batches_tracked", None)
    return 0 if count is None else int(count)


def _layers(module: nn.Module, name: str) -> list[DualBatchNorm]:
    """The dual layers of the module, for a branch that there is."""
    if name not in BRANCHES:
        raise ValueError(f"branch must be 'normal' or 'pgd', got {name!r}")
    layers = [part for part in module.modules() if isinstance(part, DualBatchNorm)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no dual BatchNorm, so there is no {name!r} branch;"
            f" build it with build_encoder(..., dual_norm=True) or call convert_to_dual first"
        )
    return layers
