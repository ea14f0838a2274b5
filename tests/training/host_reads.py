"""Counts what would make a GPU wait for the host, on CPU tensors: a mode that looks at every call of torch.

    with HostReads() as reads:
        attack(images, objective)
    assert len(reads) == 1, reads

Seen are the operations whose result is a Python value, or whose result has a size that depends on values.  Inside a
function of torch that is written in Python the mode is off; those that wait inside are in the lists below.  Backward
passes are such functions, too, but they run code of ours: the mode goes on again around each backward of a
`torch.autograd.Function`.  Not seen: hooks on tensors, and integers that C++ takes from tensors in other functions than
those listed.  All tensors are on the CPU, so `.to(images.device)` cannot be told from a move; only the CPU by its name
counts.  Operands on two devices and copies that block need a GPU: tests/gpu/test_gpu.py.
"""

from __future__ import annotations

import inspect
import linecache
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import hsat

PACKAGE = Path(hsat.__file__).parent
BELOW = os.path.join(PACKAGE, "")

ALWAYS = {
    *"__bool__ __float__ __int__ __index__ __complex__ __contains__ __format__ __repr__ __array__".split(),
    *"item tolist cpu numpy is_nonzero equal allclose".split(),
    *"nonzero argwhere masked_select unique unique_consecutive bincount multinomial".split(),
    *"linalg_inv linalg_solve linalg_cholesky linalg_eigh linalg_svd linalg_lstsq".split(),  # is the matrix singular?
}
MOVES = {"to", "as_tensor", "asarray", "tensor"}
FROM_LISTS = {"tensor", "as_tensor", "asarray", "new_tensor"}  # of a list of tensors, each is read
MADE = {"full", "zeros", "ones", "empty", "rand", "randn", "randint", "arange", "linspace"}  # sizes, ends, values
SHAPED = {
    "new_full",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "view",
    "reshape",
    "expand",
    "repeat",
    "narrow",
}
INDEXED = {"__getitem__": 1, "__setitem__": 1, "index_put": 1, "index_put_": 1}  # where the index stands
BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class Line(NamedTuple):
    """A line of the package that was being run."""

    file: str
    number: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} {self.function}: {self.text}"


class HostRead(NamedTuple):
    """One read: the function of torch, and the lines of the package that led to it, the innermost first."""

    what: str
    lines: tuple[Line, ...]

    @property
    def where(self) -> str:
        """The innermost line of the package."""
        return str(self.lines[0]) if self.lines else "outside hsat"

    def __repr__(self) -> str:
        return f"{self.what} at {self.where}"


class HostReads(TorchFunctionMode, Sequence[HostRead]):
    """The reads inside the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._reads: list[HostRead] = []
        self._cpu: list[torch.device] = []  # made from text inside the block

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, place: Any) -> Any:
        return self._reads[place]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._reads)) or "no reads"

    def clear(self) -> None:
        """Forget what was read so far."""
        self._reads.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(func is other for other in BACKWARD):
            return self._backward(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in ALWAYS or (name in CONDITIONS and CONDITIONS[name](args, kwargs)) or self._moves(name, args, kwargs):
            self._reads.append(HostRead(name, tuple(lines_of_the_package())))
        result = func(*args, **kwargs)
        if func is torch.device and isinstance(next(iter(args), None), str) and result.type == "cpu":
            self._cpu.append(result)
        return result

    def _moves(self, name: str, args: Any, kwargs: Any) -> bool:
        """Does a tensor go to the CPU by its name?"""
        if name not in MOVES or not args or not isinstance(args[0], Tensor):
            return False
        wanted = [value for value in (*args[1:], kwargs.get("device")) if isinstance(value, str | torch.device)]
        return any(value == "cpu" if isinstance(value, str) else any(value is d for d in self._cpu) for value in wanted)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A backward pass, with the mode on inside the backward of each Function written in Python.

        Where one raises, torch itself restores the modes of the thread.
        """
        with ExitStack() as hooks:
            for node in python_nodes((args, kwargs)):
                hooks.callback(node.register_prehook(lambda _: self._on()).remove)
                hooks.callback(node.register_hook(lambda *_: self._off()).remove)
            return func(*args, **kwargs)

    def _on(self) -> None:
        self.__enter__()

    def _off(self) -> None:
        self.__exit__(None, None, None)


def lines_of_the_package() -> Iterator[Line]:
    """Lines of the package that are being run, the innermost first."""
    for frame, number in traceback.walk_stack(inspect.currentframe()):
        path = frame.f_code.co_filename
        if path.startswith(BELOW):
            text = linecache.getline(path, number).strip()
            yield Line(Path(path).relative_to(PACKAGE).as_posix(), number, frame.f_code.co_name, text)


def python_nodes(outputs: Any) -> Iterator[Any]:
    """The Functions written in Python in the graph behind all tensors in it, each once."""
    left, seen = [tensor.grad_fn for tensor in tensors_in(outputs)], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [other for other, _ in node.next_functions]
        if hasattr(type(node), "saved_tensors"):
            yield node


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def by_value(index: Any) -> bool:
    """Does the shape of what an index picks, or where it lies, depend on values that the host must know?"""
    for part in index if isinstance(index, tuple | list) else (index,):
        if isinstance(part, slice) and tensors_in([part.start, part.stop, part.step]):
            return True
        if isinstance(part, Tensor) and (part.dtype in (torch.bool, torch.uint8) or part.ndim == 0):
            return True
    return False


CONDITIONS: dict[str, Callable[[Any, Any], bool]] = {
    "where": lambda args, kwargs: len(args) + len(kwargs) == 1,
    "one_hot": lambda args, kwargs: (*args[1:], kwargs.get("num_classes"), -1)[0] in (None, -1),
    "repeat_interleave": lambda args, kwargs: (
        kwargs.get("output_size") is None
        and (len(args) + len(kwargs) == 1 or bool(tensors_in([*args[1:], kwargs.get("repeats")])))
    ),
    **{name: lambda args, kwargs: bool(tensors_in([args, kwargs])) for name in MADE},
    **{name: lambda args, kwargs: bool(tensors_in([args[1:], kwargs])) for name in SHAPED},
    **{
        name: lambda args, kwargs: bool(args) and not isinstance(args[0], Tensor) and bool(tensors_in(args[0]))
        for name in FROM_LISTS - {"new_tensor"}
    },
    "new_tensor": lambda args, kwargs: not isinstance(args[1], Tensor) and bool(tensors_in(args[1])),
    **{name: lambda args, kwargs, at=at: by_value(args[at]) for name, at in INDEXED.items()},
}
"""Functions that wait for some arguments: (args, kwargs) -> does it?"""
