"""Two principal axes: where embeddings lie on a flat map, and how much of them the map shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Plane:
    """centre: (d,).  axes: (2, d) orthonormal rows.  variance: (2,) shares of the total variance along the axes."""

    centre: np.ndarray
    axes: np.ndarray
    variance: np.ndarray

    def place(self, z: np.ndarray) -> np.ndarray:
        """Coordinates of embeddings (n, d) on the map, (n, 2) float64."""
        placed: np.ndarray = (np.asarray(z, dtype=np.float64) - self.centre) @ self.axes.T
        return placed


def fit_plane(z: np.ndarray) -> Plane:
    """The first two principal axes of embeddings (n, d), computed in float64.

    The sign of an axis is such that its entry of largest size is positive, so that the map does not depend on the
    linear algebra library.  An axis without variance (one row, one column) is zero, with share 0.

    Raises ValueError for no rows.
    """
    if z.ndim != 2 or not len(z) or not z.shape[1]:
        raise ValueError(f"a map needs embeddings (n, d) with n, d >= 1, got shape {z.shape}")
    rows = np.asarray(z, dtype=np.float64)
    centre = rows.mean(0)
    gap = rows - centre
    # the smaller of the two products; both have the same leading eigenvalues
    wide = gap.shape[1] > gap.shape[0]
    values, vectors = np.linalg.eigh(gap @ gap.T if wide else gap.T @ gap)
    total = float((gap**2).sum())
    axes, variance = np.zeros((2, z.shape[1])), np.zeros(2)
    for i in range(min(2, len(values))):
        value, vector = values[-1 - i], vectors[:, -1 - i]
        if total == 0 or value <= 1e-12 * total:
            continue
        axis = gap.T @ vector if wide else vector
        axis = axis / np.linalg.norm(axis)
        axes[i] = axis * np.sign(axis[np.abs(axis).argmax()])
        variance[i] = value / total
    return Plane(centre=centre, axes=axes, variance=variance)


def share_of_movement(plane: Plane, before: np.ndarray, after: np.ndarray) -> float:
    """How much of the squared movement from (n, d) to (n, d) lies in the map, in [0, 1]; NaN where nothing moved."""
    gap = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    total = float((gap**2).sum())
    return float(((gap @ plane.axes.T) ** 2).sum()) / total if total > 0 else float("nan")
