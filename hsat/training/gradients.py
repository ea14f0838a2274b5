"""Gradients and states looked at before they are used: NaN, infinity, and encoders that get no gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsat.models.state_dicts import find_non_finite, largest_magnitude, list_entries


class Stateful(Protocol):
    """An optimiser, a learning-rate schedule, a gradient scaler: whatever keeps its state in a dict."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


def check_trainable(model: nn.Module) -> None:
    """Check that there is something to train.

    Args:
        model: The network.

    Raises:
        ValueError: Naming parameters, if none of them has `requires_grad`.
    """
    names, kind = [name for name, _ in model.named_parameters()], type(model).__name__
    if not names:
        raise ValueError(f"{kind} has no parameters, so there is nothing to train")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"none of the {len(names)} parameters of {kind} has requires_grad ({list_entries(names)}),"
            " so a step would train nothing; call .requires_grad_(True) on those that are to be trained"
        )


def largest_gradient(model: nn.Module) -> Tensor:
    """Largest absolute value in the gradients of all parameters, () on their device; reads nothing from the device.

    It is NaN or infinite where any gradient is, and finite where all are, also where their L2 norm would overflow.
    For loops that read the loss anyway, which then read both at once; `check_gradients` reads by itself.
    Call it between backward and the optimiser's step.  Parameters without a gradient, such as those of a BatchNorm
    branch that this step did not use, are left out.

    Args:
        model: After backward.

    Returns:
        () on the gradients' device.

    Raises:
        ValueError: Where no parameter has a gradient, with the reason.
    """
    largest = largest_magnitude(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    if largest is None:
        check_trainable(model)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        raise ValueError(
            f"none of the {len(names)} parameters of {type(model).__name__} that are to be trained got a gradient"
            f" ({list_entries(names)}), so a step would train nothing: was backward() called, and is the loss made of"
            " the model's output, with nothing in between that is detached or computed under torch.no_grad()?"
        )
    return largest


def check_gradients(model: nn.Module) -> float:
    """Raise before an optimiser's step that would spoil the weights; returns the largest absolute gradient.

        result.loss.backward()
        check_gradients(encoder)
        optimizer.step()

    One reduction over all gradients and one read of the device; parameters are looked at singly only to name them.
    Under DistributedDataParallel the gradients, and so the answer, are the same on all ranks.
    Not for loops with a GradScaler: there an overflow is expected, the scaler leaves out that step, and
    `largest_gradient` tells which ones it leaves out.

    Args:
        model: After backward and before the optimiser's step.

    Returns:
        The largest absolute gradient.

    Raises:
        FloatingPointError: Naming the parameters whose gradient holds NaN or infinity.
        ValueError: Where no parameter has a gradient at all.
    """
    largest = float(largest_gradient(model))
    if not math.isfinite(largest):
        raise FloatingPointError(non_finite_gradients(model))
    return largest


def non_finite_gradients(model: nn.Module) -> str:
    """A sentence that names the parameters whose gradient holds NaN or infinity (reads the device for each)."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    entries = find_non_finite(grads)
    return f"the gradient is not finite in {len(entries)} of {len(grads)} parameters: {list_entries(entries)}"


def check_state(model: nn.Module, optimizer: Stateful | None = None) -> None:
    """Check that the state of a model, and of its optimiser, is finite; one read of the device.

    `save_checkpoint` and `save_encoder` do this by themselves.

    Args:
        model: The network.
        optimizer: Its optimiser.

    Raises:
        FloatingPointError: Naming what is NaN or infinite.
    """
    if entries := non_finite_state(model, optimizer):
        raise FloatingPointError(f"the state is not finite in {list_entries(entries)}")


def non_finite_state(model: nn.Module, optimizer: Stateful | None = None) -> list[str]:
    """Entries of the state dicts of a model and its optimiser that hold NaN or infinity, as `find_non_finite`."""
    named: dict[str, object] = dict(model.state_dict())
    if optimizer is not None:
        named |= _flat(optimizer.state_dict(), "optimizer", _parameter_names(model, optimizer))
    return find_non_finite(named)


def _parameter_names(model: nn.Module, optimizer: Stateful) -> dict[int, str]:
    """Names of the model's parameters by their place in the state dict of a torch optimiser; empty for other things."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {place: names[id(parameter)] for place, parameter in enumerate(held) if id(parameter) in names}


def _flat(value: object, where: str, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The tensors in nested dicts and lists, by where they stand."""
    if isinstance(value, Tensor):
        return {where: value}
    if isinstance(value, Mapping):
        items = [
            (names.get(key, str(key)) if where == "optimizer.state" else str(key), item) for key, item in value.items()
        ]
    elif isinstance(value, list | tuple):
        items = [(str(place), item) for place, item in enumerate(value)]
    else:
        return {}
    return {name: tensor for key, item in items for name, tensor in _flat(item, f"{where}.{key}", names).items()}
