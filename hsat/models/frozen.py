"""Freezing a model for a while, and giving it back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; everything restored after it.

    Inside, every submodule has `training == False` and every parameter `requires_grad == False`; gradients with
    respect to the images still flow.  Afterwards, also after an exception, each submodule's `training` flag and each
    parameter's `requires_grad` are what they were one by one: a BatchNorm that was already in eval mode stays in it, a
    parameter that was already frozen stays frozen.  Blocks nest.  `.grad`, buffers and values are never touched.

    The flags are set directly, without calling `train()` or `eval()`, so that a module whose `train()` does more than
    set flags (merging low-rank weights, say) does not do it here.  Submodules and parameters shared by several modules
    are handled once.

    Several threads may run a model inside one block.  Blocks of two threads on one model would undo each other's flags.

        with frozen(encoder):
            x_adv = attack(x, feature_drift(encoder.features, x))

    Args:
        modules: Networks, all of them frozen.

    Yields:
        Nothing.

    Raises:
        TypeError: For what is not a torch.nn.Module, before anything is changed.
        ValueError: For a module that was made under `torch.inference_mode`, likewise: it can never be restored.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> with frozen(network):
        ...     network.training, network.weight.requires_grad
        (False, False)
        >>> network.training, network.weight.requires_grad
        (True, True)
    """
    for module in modules:
        _check_is_module(module)
        _check_is_restorable(module)
    flags = {id(part): (part, part.training) for module in modules for part in module.modules()}
    gradients = {id(p): (p, p.requires_grad) for module in modules for p in module.parameters()}
    try:
        for part, _ in flags.values():
            part.training = False
        for parameter, _ in gradients.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for part, training in flags.values():
            part.training = training
        for parameter, requires_grad in gradients.values():
            parameter.requires_grad_(requires_grad)


def _check_is_module(module: object) -> None:
    if isinstance(module, nn.Module):
        return
    owner = getattr(module, "__self__", None)
    if isinstance(owner, nn.Module):
        hint = f"; it is a method of a {type(owner).__name__}: pass that module itself, as in frozen(encoder)"
    elif callable(module):
        hint = "; for a function pass the modules it calls, as in frozen(backbone, head)"
    else:
        hint = ""
    raise TypeError(f"frozen() takes torch.nn.Module objects, got {type(module).__name__}{hint}")


def _check_is_restorable(module: nn.Module) -> None:
    """torch does not let parameters that were made in inference mode require gradients again, outside of it."""
    name = next((name for name, parameter in module.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"{type(module).__name__} was made under torch.inference_mode() (its parameter {name} was), so gradients"
            " cannot flow through it; build or load it outside of that block, torch.no_grad() does no harm"
        )
