"""A trained head as a classifier: any module from features to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hsat.classifiers.base import LogitClassifier, logits_dtype
from hsat.fingerprints import fingerprint_state
from hsat.types import EmbeddingTable

_LONGEST_REPR = 80


class Head(LogitClassifier, nn.Module):
    """A module that maps embeddings, as the encoder gives them, to logits: a classifier that needs no bank.

    The module is put into evaluation mode and keeps its parameters; nothing is trained or frozen here.  What you pass
    is held and not copied: `train()` on the head, or on a `DecisionModel` that holds it, reaches your module.

    Args:
        module: Embeddings (n, d) of any length -> logits (n, classes).
        class_names: The classes, in the order of the logits.

    Raises:
        ValueError: If names are missing or come twice.

    Example:
        >>> head = Head(nn.Identity(), class_names=("hgg", "normal"))
        >>> head.predict(torch.tensor([[0.0, 1.0], [3.0, 2.0]]))
        array([1, 0])
    """

    def __init__(self, module: nn.Module, class_names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(class_names, str) or not class_names or len(set(class_names)) < len(class_names):
            raise ValueError(f"class_names must be names that differ, got {class_names!r}")
        self.module = module
        self.class_names = tuple(class_names)
        self.eval()

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """Embeddings as the encoder gives them."""
        return "raw"

    @property
    def classes_with_rows(self) -> int:
        """Number of classes: a head can decide for each."""
        return len(self.class_names)

    def fit(self, bank: EmbeddingTable) -> Head:
        """The head itself; it was trained elsewhere, and the bank only has to be of its classes.

        Args:
            bank: Embeddings with labels.

        Returns:
            This object.

        Raises:
            ValueError: If the bank's classes are other ones.
        """
        if tuple(bank.class_names) != self.class_names:
            raise ValueError(f"the head has classes {self.class_names}, the bank {tuple(bank.class_names)}")
        return self

    def __repr__(self) -> str:
        """In one line, with the beginning of the SHA-256 of the weights: records tell heads apart by it."""
        text = repr(self.module)
        text = text if len(text) <= _LONGEST_REPR and "\n" not in text else type(self.module).__name__
        return f"Head({text}, {len(self.class_names)} classes, weights {fingerprint_state(self.module)[:8]})"

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter is; the CPU for a module without any."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the module.

        Args:
            z: (n, d) embeddings as the encoder gives them, of any dtype, on the module's device.

        Returns:
            (n, classes), float32 (float64 for float64 z).

        Raises:
            ValueError: If the module gives another shape, or, without a graph, values that are not finite.
        """
        weight = next((p for p in self.parameters() if p.dtype.is_floating_point), None)
        logits: Tensor = self.module(z if weight is None else z.to(weight.dtype))
        if not isinstance(logits, Tensor) or logits.shape != (len(z), len(self.class_names)):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the head must give logits ({len(z)}, {len(self.class_names)}), one per class; got {got}")
        if not torch.is_grad_enabled() and not logits.isfinite().all():  # reading it in every step would hold up a GPU
            rows = (~logits.isfinite()).any(1).nonzero()[:, 0].tolist()
            raise ValueError(
                f"the head's logits are not finite in {len(rows)} of {len(z)} rows, first in row {rows[0]}"
            )
        return logits.to(logits_dtype(z))

    def forward(self, z: Tensor) -> Tensor:
        """The logits; see `logits`.

        Args:
            z: (n, d) embeddings.

        Returns:
            (n, classes).
        """
        return self.logits(z)
