"""What classifiers share: checks of banks and queries, the winner of a row of scores, scores from logits."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.types import EmbeddingTable, align_labels
from hsat.types.precision import widest_dtype

Queries = np.ndarray | Tensor | EmbeddingTable
"""Embeddings (n, d) of any length, or a table of them."""

_QUERIES_PER_BLOCK = 1024
_EINSUM_BUFFER = 8192  # values; sums of longer rows would depend on what is measured with them


class LogitClassifier(ABC):
    """A fitted classifier whose scores are the softmax of its logits.

    Attributes:
        class_names: The classes, in the order of the columns of logits and scores.
    """

    class_names: tuple[str, ...]

    @property
    @abstractmethod
    def reads(self) -> Literal["unit", "raw"]:
        """Whether it decides from unit rows or from embeddings as the encoder gives them."""

    @property
    @abstractmethod
    def classes_with_rows(self) -> int:
        """Number of classes that it was fitted on."""

    @abstractmethod
    def logits(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) -> logits (n, classes), finite and differentiable; float32, float64 for float64 z."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    def scores(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) -> class scores (n, classes), float64 and differentiable: softmax of the logits."""
        logits = self.logits(z)
        return raise_winner(positive_softmax(logits.to(widest_dtype(logits.device))), logits.detach().argmax(1))

    def predict_proba(self, z: Queries) -> np.ndarray:
        """Class scores (n, classes) float64 of an array, a tensor or a table, in blocks.

        Raises:
            ValueError: If a table has classes that the classifier does not know, or if it lacks the lengths that a
                classifier of raw features needs; for rows that are not finite, naming the first.
        """
        rows = query_rows(z, self.class_names, reads=self.reads)
        scores = np.empty((len(rows), len(self.class_names)))
        with torch.no_grad():
            for part in chunks(len(rows), _QUERIES_PER_BLOCK):
                if self.reads == "unit":
                    unit_rows(rows[part], first=part.start)  # names the row
                block = torch.from_numpy(np.array(rows[part], dtype=np.float64))
                scores[part] = self.scores(block.to(self.device, widest_dtype(self.device))).cpu().numpy()
        return scores

    def predict(self, z: Queries) -> np.ndarray:
        """Index of the highest score among `class_names`, (n,) int64; ties go to the lower index."""
        winner: np.ndarray = self.predict_proba(z).argmax(1)
        return winner


def positive_softmax(logits: Tensor) -> Tensor:
    """Softmax of rows (n, classes) in which no class has the share 0, which means that a class has no vote at all."""
    return F.softmax(logits, dim=1).clamp_min(torch.finfo(logits.dtype).tiny)


def check_bank(table: EmbeddingTable) -> int:
    """The number of its rows; TypeError for what is no table, ValueError for an empty one."""
    if not isinstance(table, EmbeddingTable):
        raise TypeError(f"the bank must be an EmbeddingTable, as embed gives, got {type(table).__name__}")
    if not len(table):
        raise ValueError(f"the bank is empty (cohort {table.cohort!r}, split {table.split!r}): nothing to search")
    return len(table)


def query_rows(
    z: Queries, class_names: Sequence[str], *, width: int | None = None, reads: Literal["unit", "raw"] = "unit"
) -> np.ndarray:
    """Queries as an array (n, width), without a copy where that is possible.

    Args:
        z: Embeddings or a table; a table's classes are matched by name.
        class_names: The classes that a table may have.
        width: The width that they must have; None for any.
        reads: "raw" takes the rows of a table as the encoder gave them.

    Raises:
        ValueError: For another shape, an unknown class, and a table without lengths where raw rows are asked for.
    """
    if isinstance(z, EmbeddingTable):
        align_labels(z.label, z.class_names, tuple(class_names))
        z = z.raw() if reads == "raw" else z.z
    array = np.asarray(z.detach().cpu().double() if isinstance(z, Tensor) else z)
    if array.ndim != 2 or (width is not None and array.shape[1] != width):
        form = "n, d" if width is None else f"n, {width}"
        raise ValueError(f"queries must be ({form}) as the bank's embeddings are, got shape {array.shape}")
    return array


def unit_rows(rows: np.ndarray, *, first: int = 0) -> np.ndarray:
    """Rows (n, d) as float64 unit rows; a row of zeros stays.

    Raises:
        ValueError: Naming the first row that is not finite, counted from `first`.
    """
    array = np.asarray(rows, dtype=np.float64)
    length = np.sqrt(row_products("nd,nd->n", array, array))
    if not np.isfinite(length).all():
        raise ValueError(f"queries are not finite, first in row {first + np.flatnonzero(~np.isfinite(length))[0]}")
    unit: np.ndarray = array / np.where(length > 0, length, 1.0)[:, None]
    return unit


def unit_tensor(z: Tensor) -> Tensor:
    """Embeddings (n, d) of any length as unit rows, as wide as the device allows and differentiable; zeros stay.

    Raises:
        ValueError: Naming the first row that is not finite; on other devices than the CPU only without a graph, since
            reading it in every step of an attack would hold them up.
    """
    wide = z.to(widest_dtype(z.device))
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if (z.device.type == "cpu" or not torch.is_grad_enabled()) and not bool(length.isfinite().all()):
        row = int((~length.isfinite()).nonzero()[0, 0])
        raise ValueError(f"queries are not finite, first in row {row}")
    return wide / torch.where(length > 0, length, 1.0)


def row_products(subscripts: str, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`einsum` over the last axis, piece by piece where it would use a buffer and add in an order of its own."""
    if rows.shape[-1] <= _EINSUM_BUFFER:
        whole: np.ndarray = np.einsum(subscripts, rows, others)
        return whole
    products: np.ndarray = np.einsum(subscripts, rows[..., :_EINSUM_BUFFER], others[..., :_EINSUM_BUFFER])
    for part in list(chunks(rows.shape[-1], _EINSUM_BUFFER))[1:]:
        products = products + np.einsum(subscripts, rows[..., part], others[..., part])
    return products


def clip_k(k: int, rows: int) -> int:
    """k, or the number of rows with a UserWarning where k is more."""
    if rows < k:
        warnings.warn(f"k={k} is more than the {rows} rows of the bank; using k={rows}", stacklevel=3)
    return int(min(k, rows))


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(n)."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def raise_winner(values: Tensor, winner: Tensor) -> Tensor:
    """The same values (n, classes), with the winner (n,) of each row at least one float above all others.

    Rounding can make the winner tie with other classes or fall behind them.  Gradients are those of `values`.
    """
    plain, column = values.detach(), winner[:, None]
    others = plain.scatter(1, column, -torch.inf).amax(1, keepdim=True)
    raised = torch.maximum(plain.gather(1, column), torch.nextafter(others, torch.full_like(others, torch.inf)))
    is_winner = F.one_hot(winner, values.shape[1]).bool()
    return torch.where(is_winner, raised + (values - plain), values)


def logits_dtype(z: Tensor) -> torch.dtype:
    """The dtype of the logits of embeddings z: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32
