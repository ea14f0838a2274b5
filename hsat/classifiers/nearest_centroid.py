"""The nearest class mean: one centroid per class instead of a bank of neighbours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import LogitClassifier, check_bank, logits_dtype, raise_winner, unit_tensor
from hsat.classifiers.search import iter_blocks
from hsat.types import EmbeddingTable
from hsat.types.precision import widest_dtype


@dataclass(frozen=True, kw_only=True)
class NearestCentroid:
    """Settings of a classifier by the nearest class mean.

    The logit of a class is the cosine similarity to its centroid, divided by the temperature; the centroid is the
    normalised mean of the class's unit rows.  Mensink et al., "Distance-Based Image Classification" (TPAMI 2013), the
    nearest class mean; Snell et al., arXiv:1703.05175, call the centroids prototypes.  On unit vectors the nearest
    centroid by Euclidean distance is that of the highest cosine, so the decision is theirs.

    Attributes:
        temperature: Of the logits; does not change the decision.  0.07 as kNN has.

    Example:
        >>> ids = np.arange(3)
        >>> z = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> bank = EmbeddingTable(z, [0, 1, 1], ids, ids, ids, class_names=("hgg", "normal"))
        >>> NearestCentroid().fit(bank).predict(np.array([[2.0, 0.5]]))
        array([0])
    """

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not 1e-30 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 (at least 1e-30) and finite, got {self.temperature}")

    def fit(self, bank: EmbeddingTable) -> FittedNearestCentroid:
        """A classifier with one centroid for each class of this table.

        A class without rows is never decided for: it has the lowest logit there is, -1 / temperature.

        Args:
            bank: Embeddings with labels.

        Returns:
            The classifier.

        Raises:
            ValueError: For an empty table.
            TypeError: For what is no table.
        """
        check_bank(bank)
        sums = np.zeros((len(bank.class_names), bank.z.shape[1]))
        for part in iter_blocks(bank.z, item=8):
            np.add.at(sums, bank.label[part], bank.z[part].astype(np.float64))
        length = np.sqrt(np.einsum("cd,cd->c", sums, sums))
        if not np.isfinite(length).all():
            raise ValueError("the memory-mapped bank holds values that are not finite")
        centroid = sums / np.where(length > 0, length, 1.0)[:, None]
        return FittedNearestCentroid(
            settings=self,
            class_names=bank.class_names,
            centroid=torch.from_numpy(centroid),
            has_rows=torch.from_numpy(np.bincount(bank.label, minlength=len(sums)) > 0),
        )


@dataclass(frozen=True, eq=False)
class FittedNearestCentroid(LogitClassifier):
    """Centroids that answer queries.

    Attributes:
        settings: The settings that were fitted.
        class_names: The classes, in the order of the columns of logits and scores.
        centroid: (classes, d) float64 unit rows; zeros for a class without rows.
        has_rows: (classes,) bool, whether the class has rows.
    """

    settings: NearestCentroid
    class_names: tuple[str, ...]
    centroid: Tensor
    has_rows: Tensor

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """Unit rows: embeddings of any length are normalised first."""
        return "unit"

    @property
    def classes_with_rows(self) -> int:
        """Number of classes that have a centroid."""
        return int(self.has_rows.sum())

    @property
    def device(self) -> torch.device:
        """Where the centroids are."""
        return self.centroid.device

    def logits(self, z: Tensor) -> Tensor:
        """Cosine similarity to each centroid, divided by the temperature.

        Args:
            z: (n, d) embeddings of any length, on the centroids' device.

        Returns:
            (n, classes), float32 (float64 for float64 z).  The highest is the decision, ties go to the lower class.

        Raises:
            ValueError: For embeddings of another shape or width, and for rows that are not finite.
        """
        if z.ndim != 2 or z.shape[1] != self.centroid.shape[1]:
            raise ValueError(
                f"embeddings must be (n, {self.centroid.shape[1]}) as the bank's are, got {tuple(z.shape)}"
            )
        with torch.autocast(z.device.type, enabled=False):
            unit = unit_tensor(z)
            columns = [(unit * centroid).sum(1) for centroid in self.centroid]  # one by one: no (n, classes, d) numbers
            cosine = torch.where(self.has_rows, torch.stack(columns, 1), -1.0)
            # a centroid can be opposite to a query: a class without rows stays below it
            value = cosine / self.settings.temperature
            lowest = torch.where(self.has_rows, cosine.detach(), -torch.inf)
            return raise_winner(value.to(logits_dtype(z)), lowest.argmax(1))

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its centroids on a device.

        Args:
            device: Where embeddings will be.

        Returns:
            A copy; the centroids are float64, and float32 on devices without it.
        """
        dtype = widest_dtype(torch.device(device))
        return dataclasses.replace(self, centroid=self.centroid.to(device, dtype), has_rows=self.has_rows.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `logits` computes with, by name."""
        return {"centroid": self.centroid, "has_rows": self.has_rows}
