"""A make-believe accelerator: tensors that say they lie on a device, compute on the CPU, and count what would stop it.

Every tensor on it is a wrapper around a CPU tensor.  What a GPU would refuse is refused here: operands on two devices,
a generator of the wrong device.  What would stop a GPU is noted: values that the host reads, results whose size depends
on values, and copies that block.  Needs a torch that lets Python register a device; the registration is for the whole
process, so this runs in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
READS = {  # these make CUDA wait: the host needs a value, or the size of the result depends on one
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "multinomial",
}
COPIES = ("_to_copy", "copy_", "copy")


class Pretend(Tensor):
    """A CPU tensor that says it is elsewhere."""

    inner: Tensor
    is_cuda = True  # the library takes more care with CUDA than with other devices

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:  # torch's own does not take subclasses
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])


class Watch(TorchDispatchMode):
    """Notes what would stop a device: `stops` holds (what, where) in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.stops)

    @property
    def reads(self) -> list[str]:
        """Where the host waited for a value."""
        return [where for what, where in self.stops if what == "read"]

    @property
    def copies(self) -> list[str]:
        """Where a copy to the device blocked."""
        return [where for what, where in self.stops if what == "copy"]


def caller() -> str:
    """The innermost line of the library's code, for people who look for the culprit."""
    frame = sys._getframe(1)
    while frame is not None and "/hsat/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/hsat/', 1)[1]}:{frame.f_lineno}" if frame else "elsewhere"


def is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type in (NAME, "privateuseone")


def run(func: Any, args: Any, kwargs: dict[str, Any], stops: list[tuple[str, str]]) -> Any:
    """One operation on the CPU tensors inside, with the rules of a device."""
    name = func.overloadpacket.__name__
    flat = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
    here = [v for v in flat if isinstance(v, Pretend)]
    asked = kwargs.get("device")
    there = is_pretend(asked) if asked is not None else bool(here)
    if name in ("_pin_memory", "pin_memory") or kwargs.pop("pin_memory", False):
        out = func(*args, **kwargs) if "pin_memory" not in name else args[0].clone()
        out.page_locked = True
        return out
    if name == "is_pinned":
        return getattr(args[0], "page_locked", False)
    if not here and not there:
        return func(*args, **kwargs)
    _check(name, func, args, kwargs, flat, here, there=there)
    _note(name, args, kwargs, here, there=there, stops=stops)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(
        *tree_map(lambda v: v.inner if isinstance(v, Pretend) else v, args),
        **tree_map(lambda v: v.inner if isinstance(v, Pretend) else v, kwargs),
    )
    if name == "_to_copy" and any(out is v.inner for v in here):
        out = out.clone()
    return _wrapped(func, args, kwargs, out, there=there)


def _wrapped(func: Any, args: Any, kwargs: dict[str, Any], out: Any, *, there: bool) -> Any:
    """What changes in place gives back the tensor that it was given; the rest is new."""
    written = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for v in tree_flatten(value)[0]:
                if isinstance(v, Pretend):
                    written[id(v.inner)] = v

    def wrap(v: Any) -> Any:
        if not isinstance(v, Tensor) or isinstance(v, Pretend):
            return v
        if id(v) in written:
            return written[id(v)]
        return Pretend(v) if there else v

    return tree_map(wrap, out)


def _check(
    name: str, func: Any, args: Any, kwargs: dict[str, Any], flat: list[Tensor], here: list[Tensor], *, there: bool
) -> None:
    """Raise what a device would raise."""
    if kwargs.get("generator") is not None and there:
        raise RuntimeError(f"{name}: the generator is on the CPU, the tensor on {NAME} ({caller()})")
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "generator" and value is not None and here:
            raise RuntimeError(f"{name}: the generator is on the CPU, the tensor on {NAME} ({caller()})")
    if name in COPIES or (name.startswith("index") and name not in ("index_add", "index_add_", "index_select")):
        return
    strangers = [v for v in flat if not isinstance(v, Pretend) and v.ndim > 0]
    if here and strangers:
        raise RuntimeError(
            f"{name}: tensors on two devices, {NAME} and cpu, shapes {[tuple(v.shape) for v in flat]} ({caller()})"
        )


def _note(
    name: str, args: Any, kwargs: dict[str, Any], here: list[Tensor], *, there: bool, stops: list[tuple[str, str]]
) -> None:
    if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
        stops.append(("read", caller()))
    elif name == "_to_copy" and bool(here) != there:
        quiet = there and kwargs.get("non_blocking", False) and getattr(args[0], "page_locked", False)
        if not quiet:
            stops.append(("copy" if there else "read", caller()))
    elif name == "copy_" and isinstance(args[0], Pretend) != isinstance(args[1], Pretend):
        into = isinstance(args[0], Pretend)
        asked = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        quiet = into and asked and getattr(args[1], "page_locked", False)
        if not quiet:
            stops.append(("copy" if into else "read", caller()))
    elif name == "where" and any(isinstance(v, Tensor) and not isinstance(v, Pretend) for v in args):
        stops.append(("copy", caller()))  # a number on the CPU is brought over
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                stops.append(("read", caller()))
            elif not isinstance(index, Pretend):
                stops.append(("copy", caller()))


class _Module:
    """What torch asks the module of a device for."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Make the device known to torch, once per process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    torch.autograd.set_multithreading_enabled(False)
    return torch.device(NAME, 0)


@contextmanager
def watched() -> Iterator[Watch]:
    """The block in which the device exists."""
    with Watch() as watch:
        yield watch


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device, in place."""
    for part in module.modules():
        for store, make in ((part._parameters, nn.Parameter), (part._buffers, lambda t: t)):
            for key, value in list(store.items()):
                if value is not None:
                    store[key] = make(Pretend(value.detach().clone()))
    return module


def brought(value: Any) -> Any:
    """CPU values of everything in it."""
    return tree_map(lambda v: v.inner if isinstance(v, Pretend) else v, value)
