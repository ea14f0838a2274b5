"""What a call must leave as it was, read before and after it: settings, random states, tensors and modules."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NOT_IN_USE = "not in use"
"""State of a generator that has drawn nothing yet, and may be made during a call."""

Place = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How a state of the process is read, and how it is set again."""


class Snapshot:
    """The state of the process, of some tensors and of a module, at the time this is made.

    tensors: by the names under which changes are told; their values, `.grad` and `.requires_grad` are kept.
    module: its parameters with `.grad` and `.requires_grad`, its buffers, and the mode of each submodule are kept.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.module, self.tensors = module, dict(tensors)
        self.settings = {name: read() for name, (read, _) in SETTINGS.items()}
        self.random_states = {name: read() for name, (read, _) in RANDOM_STATES.items()}
        self.kept = self._kept()

    def changed_settings(self) -> list[str]:
        """Names of the settings of the process that are different now."""
        return [name for name, (read, _) in SETTINGS.items() if not _same(self.settings[name], read())]

    def changed_random_states(self) -> list[str]:
        """Names of the global generators whose state is different now."""
        known = {name: state for name, state in self.random_states.items() if not isinstance(state, str)}
        return [name for name, state in known.items() if not _same(state, RANDOM_STATES[name][0]())]

    def changed_values(self) -> list[str]:
        """Names of what is different now in the tensors and in the module."""
        now = self._kept()
        return [name for name in self.kept | now if not _same(self.kept.get(name), now.get(name))]

    def restore_process(self) -> None:
        """Set back the settings and the global generators that are different now, as far as torch allows it."""
        for name in self.changed_settings():
            SETTINGS[name][1](self.settings[name])
        for name in self.changed_random_states():
            RANDOM_STATES[name][1](self.random_states[name])

    def _kept(self) -> dict[str, Any]:
        module = self.module
        kept: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            kept |= {name: _copy(tensor), f"{name}.requires_grad": tensor.requires_grad}
            if tensor.is_leaf:
                kept[f"{name}.grad"] = _copy(tensor.grad)
        kept |= {f"parameter {name}": _copy(p) for name, p in module.named_parameters()}
        kept |= {f"gradient of {name}": _copy(p.grad) for name, p in module.named_parameters()}
        kept |= {f"requires_grad of {name}": p.requires_grad for name, p in module.named_parameters()}
        kept |= {f"buffer {name}": _copy(b) for name, b in module.named_buffers()}
        return kept | {f"mode of module {name!r}": m.training for name, m in module.named_modules()}


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())  # NaN is the same as NaN
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _ignore(state: Any) -> None:
    """For what can be read and not be set."""


def _autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _read_autocast() -> tuple[Any, ...]:
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return _autocast_depth(), torch.is_autocast_cache_enabled(), *kinds


def _set_autocast(state: tuple[Any, ...]) -> None:
    depth, cache, *kinds = state
    for _ in range(_autocast_depth() - depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(cache)
    for kind, enabled, dtype in kinds:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _read_determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _read_cudnn() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def _set_cudnn(state: tuple[bool, ...]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = state


def _get_default_device() -> torch.device:
    """The device on which tensors are made; torch 2.8's own function fails once the device was set to None."""
    return torch.empty(0).device


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_warnings(filters: list[Any]) -> None:
    warnings.resetwarnings()  # forgets which warnings were shown, as every change of the filters does
    warnings.filters[:] = filters  # type: ignore[index]


def _read_cuda_states() -> list[Tensor] | str:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use else NOT_IN_USE


SETTINGS: dict[str, Place] = {
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "inference mode": (torch.is_inference_mode_enabled, _ignore),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "autocast": (_read_autocast, _set_autocast),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (_get_default_device, _set_default_device),
    "deterministic algorithms": (_read_determinism, _set_determinism),
    "torch.backends.cudnn (enabled, benchmark, deterministic)": (_read_cudnn, _set_cudnn),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the number of threads between operations": (torch.get_num_interop_threads, _ignore),
    "numpy's treatment of errors": (np.geterr, lambda state: np.seterr(**state)),
    "the filters of warnings": (lambda: list(warnings.filters), _set_warnings),
}
"""What holds for the whole process, or thread.  `_ignore`: torch sets the one by leaving a context, the other once."""

RANDOM_STATES: dict[str, Place] = {
    "numpy's": (lambda: np.random.get_state(legacy=False), np.random.set_state),
    "Python's": (random.getstate, random.setstate),
    "torch's": (torch.get_rng_state, torch.set_rng_state),
    "torch's on CUDA": (_read_cuda_states, torch.cuda.set_rng_state_all),
}
