"""What the records of an evaluation rest on, written as files: predictions, a map of the embeddings, the first patches.

    evidence/<model>/about.json          model, checkpoint, target, class names, what the map shows
    evidence/<model>/<condition>.npz     condition, levels, labels and predictions, map coordinates
    evidence/<model>/<condition>-000.png some patches of each class under that condition, 8 bits per channel
    evidence/<model>/<condition>-000-perturbation.png   what the attack added, scaled around grey

Folders and files are named after models and conditions; where a name does not fit into a file name, a part of its
digest stands in.  The real names are inside the files.  `hsat.report.read_artifacts` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hsat.eval.options import Provenance, Scoring
from hsat.eval.pooling import pool_by_level
from hsat.types import EmbeddingTable

CLEAN = "clean"


class HasConditions(Protocol):
    """An evaluation: embeddings, scores and examples by condition, as a `WhiteboxResult` has them."""

    @property
    def tables(self) -> Mapping[str, EmbeddingTable]: ...  # noqa: D102
    @property
    def scores(self) -> Mapping[str, Mapping[Any, np.ndarray]]: ...  # noqa: D102
    @property
    def class_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def examples(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def example_rows(self) -> Sequence[int]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class ArtifactSource:
    """An evaluation of your own, for `write_artifacts`.

    Attributes:
        tables: Embeddings of each condition; "clean" must be among them, and all have its rows in their order.
        scores: Class scores (n, classes) of each condition by k.
        class_names: Of the columns of the scores.
        examples: Some images (n, c, h, w) in [0, 1] of each condition, the same ones in each.
        example_rows: Rows of the tables that they belong to; by default they are the first.
    """

    tables: Mapping[str, EmbeddingTable]
    scores: Mapping[str, Mapping[Any, np.ndarray]]
    class_names: tuple[str, ...]
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    example_rows: Sequence[int] = ()


def write_artifacts(
    folder: str | os.PathLike[str],
    result: HasConditions,
    *,
    target: str = "",
    provenance: Provenance = Provenance(),
    scoring: Scoring = Scoring(),
    map_rows: int = 200,
) -> Path:
    """Write what a report needs of one model into `folder`/<model>; it replaces an earlier one, whole or not at all.

    Args:
        folder: The folder of all models, "evidence" in the folder of a run.
        result: A `WhiteboxResult`, or what has its tables, scores, examples and class names.
        target: As in the records, so that a reader can tell whether both belong together.
        provenance: Model and checkpoint, likewise.
        scoring: Pooling and grouping of the predictions.
        map_rows: So many patches, evenly spread, are placed on the map; its axes are the first two principal axes of
            all clean queries.

    Returns:
        The folder of the model.

    Raises:
        ValueError: Without clean queries, for tables whose patches differ from the clean ones, and for examples that
            are not rows of them.
    """
    tables, names = result.tables, result.class_names
    if CLEAN not in tables:
        raise ValueError(f"the conditions {list(tables)} do not hold {CLEAN!r}; the map is fitted on the clean queries")
    clean = tables[CLEAN]
    for name, table in tables.items():
        if not np.array_equal(table.patch, clean.patch):
            raise ValueError(f"condition {name!r} holds other patches than the clean queries, or another order")
    plane = fit_plane(clean.z)
    rows = np.unique(np.linspace(0, len(clean) - 1, min(map_rows, len(clean))).round().astype(int))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / _file_name(provenance.model)
    with tempfile.TemporaryDirectory(prefix=".evidence-", dir=folder) as scratch:
        working = Path(scratch) / "new"
        working.mkdir()
        for name, table in tables.items():
            arrays = _predictions(table, result.scores[name], names, scoring)
            arrays |= _placed(plane, table, clean, rows, names)
            shown = result.examples.get(name)
            if shown is not None:
                if result.scores[name]:  # rows among the predictions
                    arrays["patch_rows"] = _patch_rows(result.example_rows, shown, table)
                before = None if name == CLEAN else result.examples.get(CLEAN)
                arrays["scale"] = np.float64(_write_patches(working, _file_name(name), shown, before))
            np.savez_compressed(working / f"{_file_name(name)}.npz", name=np.str_(name), **arrays)
        about = {
            "model": provenance.model,
            "checkpoint": provenance.checkpoint,
            "target": target,
            "class_names": list(names),
            "variance": [float(share) for share in plane.variance],
        }
        (working / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if place.exists():
            place.replace(Path(scratch) / "old")
        working.replace(place)
    return place


def _predictions(
    table: EmbeddingTable, scores: Mapping[Any, np.ndarray], class_names: tuple[str, ...], scoring: Scoring
) -> dict[str, Any]:
    """Labels and predictions at each level; of classifiers without neighbours only k = 0 has a place in the file."""
    arrays: dict[str, Any] = {}
    for key, rows in scores.items():
        k = key if isinstance(key, int) else 0
        levels = pool_by_level(rows, table, class_names=class_names, pooling=scoring.pooling, group_by=scoring.group_by)
        for level, (pooled, labels, _) in levels.items():
            arrays[f"{level}_label"] = labels.astype(np.int32)
            arrays.setdefault(f"{level}_prediction_k{k}", pooled.argmax(1).astype(np.int32))
    return arrays


def _placed(
    plane: PCA2D, table: EmbeddingTable, clean: EmbeddingTable, rows: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, Any]:
    position = {name: index for index, name in enumerate(class_names)}
    lookup = np.array([position.get(name, -1) for name in table.class_names], dtype=np.int32)
    return {
        "places": plane.project(table.z[rows]).astype(np.float32),
        "place_label": lookup[table.label[rows]],
        "movement": np.float64(explained_displacement(plane, clean.z, table.z)),
    }


def _patch_rows(rows: Sequence[int], examples: Tensor, table: EmbeddingTable) -> np.ndarray:
    """Rows of the examples in the table; the first ones where none are named."""
    places = np.asarray(rows if len(rows) else range(len(examples)), dtype=np.int64)
    if places.shape != (len(examples),) or (len(places) and not 0 <= places.min() <= places.max() < len(table)):
        raise ValueError(f"example_rows {list(rows)} do not name {len(examples)} rows of a table of {len(table)}")
    return places


def _write_patches(folder: Path, stem: str, images: Tensor, before: Tensor | None) -> float:
    """Images as PNG, and what was added to `before`; returns the factor that the latter is shown with."""
    from PIL import Image

    shown = images.detach().cpu().float()
    pictures = [("", shown)]
    scale = 0.0
    if before is not None:
        gap = shown - before.detach().cpu().float()
        largest = float(gap.abs().max())
        scale = 0.5 / largest if largest > 0 else 1.0
        pictures.append(("-perturbation", 0.5 + gap * scale))
    for suffix, rows in pictures:
        for index, image in enumerate(rows):
            pixels = image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
            array = pixels.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(array)).save(folder / f"{stem}-{index:03}{suffix}.png", format="PNG")
    return scale


def _file_name(name: str) -> str:
    """A name that is safe as a file name everywhere and differs for different names, also where case is ignored."""
    plain = re.sub(r"[^A-Za-z0-9_.=+-]", "_", name).strip(".")[:60]
    return plain if plain == name and plain else f"{plain}~{hashlib.sha256(name.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, eq=False)
class PCA2D:
    """The first two principal axes of embeddings.

    Attributes:
        centre: (d,).
        axes: (2, d) orthonormal rows; an axis without variance is zero.
        variance: (2,) shares of the total variance along the axes.
    """

    centre: np.ndarray
    axes: np.ndarray
    variance: np.ndarray

    def project(self, z: np.ndarray) -> np.ndarray:
        """Coordinates of embeddings (n, d) on the map, (n, 2) float64."""
        places: np.ndarray = (np.asarray(z, dtype=np.float64) - self.centre) @ self.axes.T
        return places


def fit_plane(z: np.ndarray) -> PCA2D:
    """The first two principal axes of embeddings (n, d), in float64, by scikit-learn.

    The sign of an axis is such that its entry of largest size is positive, so that the map does not depend on the
    linear algebra library.

    Raises:
        ValueError: For no rows.
    """
    if z.ndim != 2 or not len(z) or not z.shape[1]:
        raise ValueError(f"a map needs embeddings (n, d) with n, d >= 1, got shape {z.shape}")
    from sklearn.decomposition import PCA

    rows = np.asarray(z, dtype=np.float64)
    axes, variance = np.zeros((2, z.shape[1])), np.zeros(2)
    total = float(((rows - rows.mean(0)) ** 2).sum())
    if total > 0:
        count = min(2, *rows.shape)
        solver = "covariance_eigh" if len(rows) > rows.shape[1] else "full"  # exact both, and fast
        fitted = PCA(count, svd_solver=solver).fit(rows)
        for i, (axis, value) in enumerate(zip(fitted.components_, fitted.singular_values_**2, strict=True)):
            if value > 1e-12 * total:
                axes[i] = axis * np.sign(axis[np.abs(axis).argmax()])
                variance[i] = value / total
    return PCA2D(centre=rows.mean(0), axes=axes, variance=variance)


def explained_displacement(plane: PCA2D, before: np.ndarray, after: np.ndarray) -> float:
    """How much of the squared movement from (n, d) to (n, d) lies in the map, in [0, 1]; NaN where nothing moved."""
    gap = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    total = float((gap**2).sum())
    return float(((gap @ plane.axes.T) ** 2).sum()) / total if total > 0 else float("nan")
