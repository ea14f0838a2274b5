"""What a checkpoint says of optimiser, schedule and random states, checked against the objects that shall take it in.

Everything is checked before anything is changed: a fused optimiser step over moments of another shape reads memory that
is not theirs, and a schedule of torch takes over whatever names a file gives it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.models.state_dicts import find_non_finite, list_entries
from hsat.untrusted import shown

_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg")
_ADAM = ("step", "exp_avg", "exp_avg_sq")
_HOW = ("foreach", "fused")  # how a step is computed, not what it gives
_NUMPY_WORDS = 624


def check_model_values(state: Mapping[str, object]) -> None:
    """Check that the state of a model could have been reached by training.

    Args:
        state: Tensors by name.

    Raises:
        ValueError: Naming entries that hold NaN, infinity or a negative variance.
    """
    for name, value in state.items():
        _check_plain(value, f"{name} of its model")
    if entries := find_non_finite(state):
        raise ValueError(f"its model is not finite in {list_entries(entries)}")
    for name, value in state.items():
        if name.rpartition(".")[2] == "running_var" and isinstance(value, Tensor) and bool((value < 0).any()):
            raise ValueError(f"{name} of its model holds a negative variance")


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Tensor) and (
        value.layout != torch.strided or value.is_quantized or value.device.type != "cpu"
    ):
        raise ValueError(f"{where} is no plain tensor (sparse, quantised or without values)")


def checked_optimizer_state(stored: object, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser, with moments that lie in memory as its parameters do.

    Args:
        stored: Its state in the checkpoint.
        optimizer: The optimiser that shall take it in; it is not changed.

    Returns:
        A state dict for `optimizer`.

    Raises:
        ValueError: Naming the field that does not fit: a group of another size or with other options, a moment of
            another shape or dtype than its parameter, a number that is not finite, a negative square.
    """
    if not isinstance(stored, dict) or not {"state", "param_groups"} <= stored.keys():
        raise ValueError("it must hold state and param_groups")
    groups, now = stored["param_groups"], optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(now) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"param_groups must be a list of {len(now)} groups")
    for place, (group, mine) in enumerate(zip(groups, now, strict=True)):
        if group.get("params") != mine["params"]:
            raise ValueError(f"param_groups[{place}].params are not the {len(mine['params'])} parameters of the group")
        _check_options(group, mine, f"param_groups[{place}]")
    if not isinstance(stored["state"], dict):
        raise ValueError("state must hold the moments of each parameter")
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    moments = {}
    for key, entries in stored["state"].items():
        if key not in parameters or not isinstance(entries, dict):
            raise ValueError(f"state[{shown(key)}] belongs to none of the {len(parameters)} parameters")
        moments[key] = _checked_moments(entries, parameters[key], f"state[{key}]")
        missing = [name for name in _ADAM if entries and name not in entries]
        if missing and isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            raise ValueError(f"state[{key}] lacks {', '.join(missing)}")
    return {**stored, "state": moments}


def _check_options(group: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for an option of another kind than now; what is not a number must be the same."""
    for name in now.keys() | group.keys():
        switch = not isinstance(now.get(name), int | float | list | tuple | Tensor) or isinstance(now[name], bool)
        if name == "params" or (name in _HOW and isinstance(group.get(name), bool | None)):
            continue
        if name not in now or name not in group:
            if isinstance(group.get(name), bool | None) and switch:
                continue  # of another version of torch
            raise ValueError(f"{where} {'lacks' if name in now else 'has the unknown option'} {shown(name)}")
        value = group[name]
        if switch:
            if type(value) is not type(now[name]) or value != now[name]:
                raise ValueError(f"{where}.{name} is {shown(value)}, and {shown(now[name])} is due")
            continue
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        if isinstance(now[name], list | tuple) != isinstance(value, list | tuple) or not all(map(_is_size, numbers)):
            raise ValueError(f"{where}.{name} is {shown(value)}; finite numbers of at least 0 were wanted")
        if name == "betas" and (len(numbers) != len(now[name]) or not all(number < 1 for number in numbers)):
            raise ValueError(f"{where}.betas are {numbers[:3]}; {len(now[name])} numbers below 1 were wanted")


def _is_size(value: object) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _checked_moments(entries: Mapping[str, Any], parameter: Tensor, where: str) -> dict[str, Any]:
    moments: dict[str, Any] = {}
    for name, value in entries.items():
        if name == "step" and not _is_size(value):
            raise ValueError(f"{where}.step is {shown(value)}; a number of at least 0 was wanted")
        if name not in _LIKE_PARAMETER or (name == "momentum_buffer" and value is None):
            moments[name] = value
            continue
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            form = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(f"{where}.{name} is {form}, and its parameter {parameter.dtype} {tuple(parameter.shape)}")
        _check_plain(value, f"{where}.{name}")
        if name in _SQUARES and bool((value < 0).any()):
            raise ValueError(f"{where}.{name} holds a negative square")
        # a tensor of a file may be a view in which values share memory
        moments[name] = torch.empty_like(parameter, device="cpu", requires_grad=False).copy_(value)
    if entries_ := find_non_finite({f"{where}.{name}": value for name, value in moments.items()}):
        raise ValueError(f"it is not finite in {list_entries(entries_)}")
    return moments


def check_schedule_state(stored: object, now: Mapping[str, Any], schedule: object) -> None:
    """Check what a schedule would take over: the names that it has now, with values of the same kinds.

    Args:
        stored: Its state in the checkpoint.
        now: `schedule.state_dict()`.
        schedule: The schedule that shall take it in.

    Raises:
        ValueError: Naming the field that does not fit.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"it is {shown(stored)}, and a dict was wanted")
    for name in stored.keys() ^ now.keys():
        if not isinstance(stored.get(name, now.get(name)), bool | None) or (name in stored and hasattr(schedule, name)):
            raise ValueError(f"it {'holds the unknown name' if name in stored else 'lacks'} {shown(name)}")
    for name in stored.keys() & now.keys():
        _check_kind(stored[name], now[name], name)


def _check_kind(value: object, now: object, where: str) -> None:
    """Raise ValueError unless a value is of the kind of another; NaN is no number."""
    plain = value is None or isinstance(value, bool | int | float | str)
    if isinstance(now, bool):
        fits = isinstance(value, bool)
    elif isinstance(now, int | float):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    elif isinstance(now, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(now)
    elif isinstance(now, Mapping):
        fits = isinstance(value, Mapping)
    else:
        fits = plain if now is None else isinstance(value, type(now))
    if not fits:
        raise ValueError(f"{where} is {shown(value)}, where the schedule has {shown(now)}")
    if isinstance(now, list | tuple) and isinstance(value, list | tuple):
        for place, (inner, mine) in enumerate(zip(value, now, strict=True)):
            _check_kind(inner, mine, f"{where}[{place}]")
    elif isinstance(now, Mapping) and isinstance(value, Mapping):
        for key in value.keys() & now.keys():
            _check_kind(value[key], now[key], f"{where}.{key}")


def checked_random_states(states: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Random states of a checkpoint in the forms in which python, numpy and torch take them.

    Each is tried on a generator that is thrown away.

    Args:
        states: Those of one rank, by the names python, numpy, torch, cuda and generators.
        generators: Those that shall take in the last ones.

    Returns:
        The states by the same names.

    Raises:
        ValueError: Naming the one that cannot be used.
    """
    python, name = _tuples(states["python"]), "python"
    try:
        random.Random().setstate(python)
        name = "numpy"
        numpy = _numpy_state(states["numpy"])
        np.random.RandomState().set_state(numpy)
        name = "torch"
        torch.Generator().set_state(states["torch"])
        name, cuda = "cuda", states["cuda"] if torch.cuda.is_available() else []
        if not isinstance(states["cuda"], list) or len(cuda) > torch.cuda.device_count():
            raise ValueError("a list of one state for each device was wanted")
        for state in cuda:
            torch.Generator("cuda").set_state(state)
        for key, generator in generators.items():
            name = f"generators.{key}"
            torch.Generator(generator.device).set_state(states["generators"][key])
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"the random state {name} cannot be used: {reason}") from error
    return {**states, "python": python, "numpy": numpy, "cuda": cuda}


def _numpy_state(state: Any) -> tuple[Any, ...]:
    name, keys, place, has_gauss, gauss = state
    if not isinstance(keys, Tensor) or keys.shape != (_NUMPY_WORDS,) or keys.dtype != torch.int64:
        raise ValueError(f"its words are {shown(keys)}; {_NUMPY_WORDS} whole numbers were wanted")
    if type(place) is not int or not 0 <= place <= _NUMPY_WORDS:  # numpy would read beyond its words
        raise ValueError(f"its place is {shown(place)}; a number from 0 to {_NUMPY_WORDS} was wanted")
    return name, keys.numpy().astype(np.uint32), place, has_gauss, gauss


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
