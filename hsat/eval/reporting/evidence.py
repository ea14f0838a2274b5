"""What the records of an evaluation rest on, as files: predictions, a map of the embeddings, the first patches.

    evidence/<model>/about.json          model, checkpoint, target, class names, what the map shows
    evidence/<model>/<condition>.npz     condition, levels, labels and predictions, map coordinates
    evidence/<model>/<condition>-000.png the first patches under that condition, 8 bits per channel
    evidence/<model>/<condition>-000-perturbation.png   what the attack added, scaled around grey

Folders and files are named after models and conditions; where a name does not fit into a file name, a part of its
digest stands in.  The real names are inside the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval.pooling import How
from hsat.eval.reporting.evidence_arrays import check_arrays
from hsat.eval.reporting.json_fields import TEXT, TEXTS, check_fields, is_number
from hsat.eval.reporting.projection import Plane, fit_plane, share_of_movement
from hsat.eval.scoring import Compat, level_scores
from hsat.files import load_arrays, parse_json, read_text
from hsat.types import LEVELS, EmbeddingTable
from hsat.untrusted import open_regular

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Condition:
    """The queries under one condition ("clean" or the name of an attack).

    label: {level: (n,)} indices into the class names.  prediction: {(level, k): (n,)}, in the same order.
    places: (m, 2) map coordinates of m of the patches, place_label: (m,) their classes; rows agree between conditions.
    movement: share of the squared movement away from the clean embeddings that the map shows, None where nothing moved.
    patches, perturbations: PNG files; scale: what the perturbations were multiplied with.
    """

    name: str
    label: dict[str, np.ndarray]
    prediction: dict[tuple[str, int], np.ndarray]
    places: np.ndarray
    place_label: np.ndarray
    movement: float | None = None
    scale: float = 0.0
    patches: tuple[Path, ...] = ()
    perturbations: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Evidence:
    """One model's conditions, and which records they belong to.

    variance: shares of the clean queries' variance that the two axes of the map show.
    """

    model: str
    checkpoint: str
    target: str
    class_names: tuple[str, ...]
    variance: tuple[float, float]
    conditions: dict[str, Condition] = field(default_factory=dict)


def write_evidence(  # noqa: PLR0913
    folder: str | os.PathLike[str],
    *,
    model: str,
    tables: Mapping[str, EmbeddingTable],
    scores: Mapping[str, Mapping[int, np.ndarray]],
    class_names: tuple[str, ...],
    examples: Mapping[str, Tensor] | None = None,
    target: str = "",
    checkpoint: str = "",
    how: How | None = None,
    compat: Compat | None = None,
    map_rows: int = 200,
) -> Path:
    """Write what a report needs of one model into `folder`/<model>; it replaces an earlier one, whole or not at all.

    tables, scores, examples: embeddings, class scores by k, and the first images (n, c, h, w) in [0, 1] of each
    condition, as in `WhiteboxResult`; "clean" must be among them, and all have the clean queries' rows in their order.
    class_names: of the columns of the scores.  map_rows: so many patches, evenly spread, are placed on the map; its
    axes are the first two principal axes of all clean queries.  target, checkpoint: as in the records, so that a reader
    can tell whether both belong together.  how, compat: pooling, see `score_levels`.

    Raises ValueError without clean queries, and for tables whose patches differ from the clean ones.
    """
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
    place = folder / _file_name(model)
    with tempfile.TemporaryDirectory(prefix=".evidence-", dir=folder) as scratch:
        working = Path(scratch) / "new"
        working.mkdir()
        for name, table in tables.items():
            arrays = _predictions(table, scores[name], class_names, how, compat)
            arrays |= _placed(plane, table, clean, rows, class_names)
            shown = (examples or {}).get(name)
            if shown is not None:
                before = None if name == CLEAN else (examples or {}).get(CLEAN)
                arrays["scale"] = np.float64(_write_patches(working, _file_name(name), shown, before))
            np.savez_compressed(working / f"{_file_name(name)}.npz", name=np.str_(name), **arrays)
        about: dict[str, Any] = {
            "model": model,
            "checkpoint": checkpoint,
            "target": target,
            "class_names": list(class_names),
        }
        about["variance"] = [float(share) for share in plane.variance]
        (working / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if place.exists():
            place.replace(Path(scratch) / "old")
        working.replace(place)
    return place


def read_evidence(folder: str | os.PathLike[str]) -> tuple[Evidence, ...]:
    """Everything that `write_evidence` put into a folder, by the name of the model; nothing where there is no folder.

    Nothing is unpickled, and links that lead out of the folder are refused.  Raises ValueError naming a damaged file.
    """
    folder = Path(folder)
    found = []
    for about in sorted(folder.glob("[!.]*/about.json")):
        try:
            found.append(_read_model(_inside(folder, about)))
        except (KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(f"{about.parent}: not evidence of an evaluation ({error}); evaluate again") from error
    return tuple(sorted(found, key=lambda each: each.model))


def _read_model(about: Path) -> Evidence:
    text = parse_json(read_text(about), str(about))
    shares, names = text["variance"], tuple(text["class_names"])
    check_fields(text, str(about), {"model": TEXT, "checkpoint": TEXT, "target": TEXT, "class_names": TEXTS})
    if len(shares) != 2 or not all(map(is_number, shares)):
        raise ValueError(f"{about}: variance is {shares}; wanted the shares of two axes")
    conditions = {}
    for path in sorted(about.parent.glob("*.npz")):
        condition = _read_condition(_inside(about.parent, path), classes=len(names))
        conditions[condition.name] = condition
    return Evidence(
        model=text["model"],
        checkpoint=text["checkpoint"],
        target=text["target"],
        class_names=names,
        variance=(float(shares[0]), float(shares[1])),
        conditions=conditions,
    )


def _read_condition(path: Path, *, classes: int) -> Condition:
    try:
        with open_regular(path, kind="evidence file") as file:
            arrays = load_arrays(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); evaluate again") from error
    check_arrays(arrays, str(path), classes=classes)
    predictions = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(\w+)_prediction_k(\d+)", name):
            predictions[match[1], int(match[2])] = array
    pictures = [_inside(path.parent, each) for each in sorted(path.parent.glob(f"{path.stem}-[0-9][0-9][0-9].png"))]
    added = sorted(path.parent.glob(f"{path.stem}-[0-9][0-9][0-9]-perturbation.png"))
    return Condition(
        name=str(arrays["name"]),
        label={level: arrays[f"{level}_label"] for level in LEVELS if f"{level}_label" in arrays},
        prediction=predictions,
        places=arrays["places"],
        place_label=arrays["place_label"],
        movement=None if np.isnan(arrays["movement"]) else float(arrays["movement"]),
        scale=float(arrays.get("scale", 0.0)),
        patches=tuple(pictures),
        perturbations=tuple(_inside(path.parent, each) for each in added),
    )


def _predictions(
    table: EmbeddingTable,
    scores: Mapping[int, np.ndarray],
    class_names: tuple[str, ...],
    how: How | None,
    compat: Compat | None,
) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for k, rows in scores.items():
        levels = level_scores(rows, table, class_names=class_names, how=how, compat=compat)
        for level, (pooled, labels, _) in levels.items():
            arrays[f"{level}_label"] = labels.astype(np.int32)
            arrays[f"{level}_prediction_k{k}"] = pooled.argmax(1).astype(np.int32)
    return arrays


def _placed(
    plane: Plane, table: EmbeddingTable, clean: EmbeddingTable, rows: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, Any]:
    position = {name: index for index, name in enumerate(class_names)}
    lookup = np.array([position.get(name, -1) for name in table.class_names], dtype=np.int32)
    return {
        "places": plane.place(table.z[rows]).astype(np.float32),
        "place_label": lookup[table.label[rows]],
        "movement": np.float64(share_of_movement(plane, clean.z, table.z)),
    }


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


def _inside(root: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root}; it is not followed")
    return path
