"""Pickles of torch.save, followed without running them: what they would call, and how much that would allocate.

torch reads a file of weights by a short list of functions that run no code of the file.  Some of them make memory out
of a number (`bytearray(10**9)`, `torch.Tensor(50000, 50000)`) or copy what the file holds once as often as it likes.
State dicts need neither.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import IO, Any

import torch

_LEGACY_PICKLES = 5  # magic number, version, machine, content, keys of the storages that follow
# what files call it: nothing here imports or calls these
_REBUILDS = frozenset(
    ".".join(("torch", "_utils", f"_rebuild_{name}"))
    for name in (
        *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
        *("sparse_tensor", "qtensor", "meta_tensor_no_storage"),  # which readers refuse by the tensor's name
    )
)
_COPIES = frozenset(
    (
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "torch.Size",
        "_codecs.encode",
    )
)
_TYPED = ".".join(("torch", "_tensor", "_rebuild_from_type_v2"))
_CALLED = (
    _REBUILDS
    | _COPIES
    | {
        _TYPED,
        "torch.device",
        "torch.nn.parameter.Parameter",
        ".".join(("torch", "serialization", "_get_layout")),
        "builtins.complex",
        "__builtin__.complex",
    }
)
_STORAGE = re.compile(r"torch\.(cuda\.)?[A-Z]\w*Storage")
_PLAIN = frozenset(
    (
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
        *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE"),
        *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_SMALL = 4096
_MARK = object()


class _Global:
    """A name that the pickle looks up."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Container:
    """A list, dict or set, or what a call gave; `size` items were put into it."""

    def __init__(self, size: int = 0) -> None:
        self.size = size


class _Reader:
    """Follows a pickle, with a name for every lookup and a size for every container in place of the objects."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.claims: dict[object, int] = {}
        self._trusted = frozenset(_trusted_names())
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def read(self, file: IO[bytes]) -> None:
        begin = file.tell()
        for opcode, argument, place in pickletools.genops(file):
            if place is None or place - begin > self.most:
                raise ValueError(f"its pickle has more than {self.most} bytes, which are not read")
            self._take(opcode.name, argument)
            if self._copied > place - begin + _SMALL:
                raise _odd("copies of its own parts, again and again")
        self._stack.clear()
        self._memo.clear()
        self._copied = 0

    def _take(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PLAIN:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(self._looked_up(argument.replace(" ", ".")))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._called(function, arguments))
        elif name == "BUILD":
            self._copied += _size(stack.pop())
        elif name == "BINPERSID":
            self._claim(stack.pop())
            stack.append(None)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Opcodes of containers."""
        stack = self._stack
        if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Container())
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("LIST", "DICT"):
            stack.append(_Container(len(self._since_mark())))
        elif name in ("APPEND", "SETITEM", "APPENDS", "SETITEMS", "ADDITEMS"):
            items = self._since_mark() if name.endswith("S") else [stack.pop() for _ in range(1 + (name[0] == "S"))]
            if isinstance(stack[-1], _Container):
                stack[-1].size += len(items)
        else:
            raise _odd(f"the opcode {name}")

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _looked_up(self, name: str) -> _Global:
        known = name in _CALLED or name in self._trusted or name == "torch.Tensor" or _STORAGE.fullmatch(name)
        is_dtype = name.startswith("torch.") and isinstance(getattr(torch, name[6:], None), torch.dtype)
        if not (known or is_dtype):
            raise _refusal(name)
        return _Global(name)

    def _called(self, function: object, arguments: object) -> _Container:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _odd("a call of something else than a name")
        name = function.name
        if name == _TYPED:  # (function, type, arguments, state)
            inner = arguments[0]
            if not isinstance(inner, _Global) or inner.name not in _REBUILDS:
                raise _refusal(name)
        elif name not in _CALLED and name not in self._trusted:
            raise _refusal(name)
        copied = sum(map(_size, arguments)) if name in _COPIES else 0
        self._copied += copied
        return _Container(copied)

    def _claim(self, identity: object) -> None:
        """Take in what is said of a storage: ("storage", type, key, place, number of values, ...)."""
        if not isinstance(identity, tuple) or len(identity) < 5 or type(identity[4]) is not int:
            raise _odd("a storage without a number of values")
        self.claims[str(identity[2])[:_SMALL]] = identity[4]


def check_pickle(file: IO[bytes], *, most: int) -> None:
    """Check a pickle of tensors from the place where an open file stands.

    Args:
        file: The file; it is read up to the end of the pickle.
        most: Length in bytes up to which it is read.

    Raises:
        pickle.UnpicklingError: Naming an object that state dicts do not need, and torch might allocate for; or for
            what is no pickle.
        ValueError: For a longer pickle.
    """
    _followed(_Reader(most), file)


def check_legacy(file: IO[bytes], *, size: int, most: int) -> None:
    """Check the pickles with which files of before torch 1.6 begin, as `check_pickle`.

    Args:
        file: The file, from its beginning.
        size: Its length in bytes.
        most: Length in bytes up to which each pickle is read.

    Raises:
        pickle.UnpicklingError: See `check_pickle`.
        ValueError: For a longer pickle, and where the tensors have more values than the file has bytes.
    """
    reader = _Reader(most)
    for _ in range(_LEGACY_PICKLES):
        _followed(reader, file)
    values = sum(reader.claims.values())
    if min(reader.claims.values(), default=0) < 0 or values > size:
        raise ValueError(f"its tensors have {values} values, and the file {size} bytes")


def _followed(reader: _Reader, file: IO[bytes]) -> None:
    try:
        reader.read(file)
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError("the pickle is damaged") from error
    except ValueError as error:
        if str(error).startswith("its pickle has more"):
            raise
        raise pickle.UnpicklingError("the pickle is damaged") from error


def _trusted_names() -> list[str]:
    """Names that the user has told torch to trust (torch.serialization.add_safe_globals)."""
    names = []
    for entry in torch.serialization.get_safe_globals():
        item, name = entry if isinstance(entry, tuple) else (entry, None)
        names.append(name or f"{item.__module__}.{getattr(item, '__qualname__', '')}")
    return names


def _size(value: object) -> int:
    if isinstance(value, _Container):
        return value.size
    return len(value) if isinstance(value, tuple | str | bytes | Mapping) else 0


def _refusal(name: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"weights_only reading has no use for GLOBAL {name}")


def _odd(what: str) -> pickle.UnpicklingError:
    """As `_refusal`, for what has no name."""
    return pickle.UnpicklingError(f"weights_only reading has no use for {what}")
