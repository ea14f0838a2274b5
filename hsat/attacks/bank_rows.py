"""A bank of embeddings as attacks read it: unit rows and labels, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from hsat.types import EmbeddingTable

BankLike = EmbeddingTable | tuple[Tensor, Tensor]


def bank_rows(bank: BankLike) -> tuple[Tensor, Tensor, int]:
    """Float32 unit rows (m, d) and labels (m,) on the CPU, and how many class names there are (0 for tensors).

    bank: an EmbeddingTable, or embeddings (m, d) of any length and their labels (m,) int64.  Raises TypeError for
    anything else, ValueError for shapes that do not fit and rows that are not finite, naming the first.
    """
    if isinstance(bank, EmbeddingTable):  # its rows are checked units; memory-mapped ones are read here, once
        return torch.tensor(bank.z).float(), torch.tensor(bank.label), len(bank.class_names)
    if not (isinstance(bank, tuple) and len(bank) == 2 and all(isinstance(part, Tensor) for part in bank)):
        raise TypeError(f"the bank must be an EmbeddingTable or (embeddings, labels), got {type(bank).__name__}")
    z, label = (part.detach().cpu() for part in bank)
    if z.ndim != 2 or not z.dtype.is_floating_point or label.shape != z.shape[:1]:
        raise ValueError(
            f"the bank must be embeddings (m, d) and labels (m,);"
            f" got {tuple(z.shape)} {z.dtype} and {tuple(label.shape)}"
        )
    check_labels(label)
    z = z.double()
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        raise ValueError(f"the bank is not finite, first in row {int((~length.isfinite()).flatten().nonzero()[0])}")
    return (z / torch.where(length > 0, length, 1.0)).float(), label.long(), 0


def check_labels(label: Tensor, *, classes: int | None = None) -> None:
    """Raise unless these are class indices (n,), below `classes` when that is given."""
    if not isinstance(label, Tensor) or label.dtype.is_floating_point or label.dtype == torch.bool or label.ndim != 1:
        form = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise TypeError(f"labels must be integers (n,), the index of each image's class; got {form}")
    if classes is not None and len(label) and not (0 <= int(label.min()) and int(label.max()) < classes):
        raise ValueError(
            f"labels run from {int(label.min())} to {int(label.max())}, but the bank has {classes} classes;"
            " they must index the bank's classes"
        )
