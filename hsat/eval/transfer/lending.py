"""Encoders by name: loaded when they are needed, held together or one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

from torch import nn

from hsat.embedding import eval_mode
from hsat.types import EmbeddingFunction

Hold = Literal["all", "one"]
EncoderSource = EmbeddingFunction | Callable[[], EmbeddingFunction]


class Lender:
    """Lends encoders by name, frozen meanwhile.

    encoders: modules, other callables of images, or functions without arguments that load one (`is_loader`).  A loaded
    encoder is kept for the next time under hold="all" and let go after its use under hold="one".
    checkpoints: what to call an encoder's weights, by name; for instance the SHA-256 of a file.
    """

    def __init__(self, encoders: Mapping[str, EncoderSource], *, checkpoints: Mapping[str, str], hold: Hold) -> None:
        self._encoders, self._checkpoints, self.hold = dict(encoders), dict(checkpoints), hold
        self._loaded: dict[str, EmbeddingFunction] = {}

    @contextmanager
    def lend(self, name: str) -> Iterator[EmbeddingFunction]:
        """The encoder, in evaluation mode and without parameter gradients inside the block; restored afterwards."""
        encoder = self._get(name)
        try:
            with eval_mode(encoder):
                yield encoder
        finally:
            if self.hold == "one":
                self._loaded.pop(name, None)

    def checkpoint(self, name: str) -> str:
        """What the caller says the weights are; "" when nothing was said."""
        return self._checkpoints.get(name, "")

    def fingerprint(self, name: str) -> str:
        """What identifies the weights: the checkpoint's name, else a module's own state; "" for other callables.

        The active branch of a dual BatchNorm is part of it, so the encoder is loaded for this.
        """
        with self.lend(name) as encoder:
            if not isinstance(encoder, nn.Module):
                return self.checkpoint(name)
            from hsat.models import active_branch, state_fingerprint

            branch = active_branch(encoder)
            return (self.checkpoint(name) or state_fingerprint(encoder)) + (f" ({branch})" if branch else "")

    def _get(self, name: str) -> EmbeddingFunction:
        if name in self._loaded:
            return self._loaded[name]
        source = self._encoders[name]
        if not is_loader(source):
            return cast(EmbeddingFunction, source)
        encoder = cast(Callable[[], EmbeddingFunction], source)()
        if not callable(encoder):
            raise TypeError(f"the function for encoder {name!r} gave a {type(encoder).__name__}, which is no encoder")
        self._loaded[name] = encoder
        return encoder


def is_loader(source: Any) -> bool:
    """Whether this is a function that loads an encoder rather than an encoder: it can be called without arguments.

    An encoder needs its images, so that the two cannot be confused; `lambda file=file: load_encoder(file)` is a loader.
    Modules are encoders, and so are callables that take any arguments (*args) or do not say what they take.
    """
    if isinstance(source, nn.Module):
        return False
    try:
        signature = inspect.signature(source)
        signature.bind()
    except (TypeError, ValueError):
        return False
    return not any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())
