"""Reads what the records of an evaluation rest on: predictions, a map of the embeddings, the first patches.

`hsat.eval.artifact_files` writes these files, and says what they are.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from hsat.files import STRICT, load_arrays, parse_json, read_fields, read_text
from hsat.types import LEVELS
from hsat.untrusted import open_regular

CLEAN = "clean"
MOST_BYTES = 1 << 30  # of all arrays in a folder together
_NUMBER = re.compile(r"-(\d{3})(-perturbation)?\.png\Z")


@dataclass(frozen=True, eq=False)
class ConditionArrays:
    """The queries under one condition.

    Attributes:
        name: "clean" or the name of an attack.
        label: {level: (n,)} indices into the class names.
        prediction: {(level, k): (n,)}, in the same order.
        places: (m, 2) map coordinates of m of the patches; rows agree between conditions.
        place_label: (m,) their classes.
        movement: Share of the squared movement away from the clean embeddings that the map shows, None where nothing
            moved.
        scale: What the perturbations were multiplied with.
        patches, perturbations: PNG files, in the order of the numbers in their names (see `picture_number`).
        patch_rows: By that number, rows of the patches among the labels at patch level.
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
    patch_rows: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Artifacts:
    """One model's conditions, and which records they belong to.

    Attributes:
        model, checkpoint, target: As in the records.
        class_names: Names of the classes.
        variance: Shares of the clean queries' variance that the two axes of the map show.
        conditions: By name.
    """

    model: str
    checkpoint: str
    target: str
    class_names: tuple[str, ...]
    variance: tuple[float, float]
    conditions: dict[str, ConditionArrays] = field(default_factory=dict)


@dataclass(frozen=True)
class _About:
    """The fields of about.json."""

    model: str
    checkpoint: str
    target: str
    class_names: tuple[str, ...]
    variance: tuple[float, float]

    __pydantic_config__: ClassVar[ConfigDict] = STRICT | {"extra": "ignore"}


def read_artifacts(folder: str | os.PathLike[str]) -> tuple[Artifacts, ...]:
    """Everything that `write_artifacts` put into a folder, by the name of the model; nothing where there is no folder.

    Nothing is unpickled, and links that lead out of the folder are refused.

    Args:
        folder: "evidence" in the folder of a run.

    Returns:
        One entry per model.

    Raises:
        ValueError: Naming a damaged file.
    """
    folder = Path(folder)
    models: list[Artifacts] = []
    size = 0
    for about in sorted(folder.glob("[!.]*/about.json")):
        try:
            one, size = _read_model(_inside(folder, about), size)
            models.append(one)
        except (KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(f"{about.parent}: not artifacts of an evaluation ({error}); evaluate again") from error
    return tuple(sorted(models, key=lambda artifacts: artifacts.model))


def picture_number(path: Path) -> int:
    """The number of a patch in the name of its picture, which is the same in every condition."""
    match = _NUMBER.search(path.name)
    if match is None:
        raise ValueError(f"{path} has no number; evaluate again")
    return int(match[1])


def missing_pictures(artifacts: Artifacts) -> list[str]:
    """Names of pictures that are absent although others of the same patch are there."""
    shown = {name: one for name, one in artifacts.conditions.items() if one.patches or one.perturbations}
    numbers = {picture_number(path) for one in shown.values() for path in (*one.patches, *one.perturbations)}
    missing = []
    for name, one in shown.items():
        kinds = [("", one.patches)] if name == CLEAN else [("-perturbation", one.perturbations), ("", one.patches)]
        for ending, paths in kinds:
            absent = numbers - set(map(picture_number, paths))
            missing += [f"{name}-{number:03}{ending}.png" for number in sorted(absent)]
    return missing


def _read_model(path: Path, size: int) -> tuple[Artifacts, int]:
    """What is in the folder of about.json, and the bytes of arrays in this folder and those before it."""
    about = read_fields(_About, parse_json(read_text(path), str(path)), str(path))
    conditions = {}
    for arrays_path in sorted(path.parent.glob("*.npz")):
        condition = _read_condition(_inside(path.parent, arrays_path), classes=len(about.class_names))
        conditions[condition.name] = condition
        arrays = (*condition.label.values(), *condition.prediction.values(), condition.places, condition.place_label)
        size += sum(array.nbytes for array in arrays)
        if size > MOST_BYTES:
            raise ValueError(f"{arrays_path}: with it, the arrays of evidence have more than {MOST_BYTES} bytes")
    return Artifacts(about.model, about.checkpoint, about.target, about.class_names, about.variance, conditions), size


def _read_condition(path: Path, *, classes: int) -> ConditionArrays:
    try:
        with open_regular(path, kind="file of artifacts") as file:
            arrays = load_arrays(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); evaluate again") from error
    _check_arrays(arrays, str(path), classes=classes)
    predictions = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(\w+)_prediction_k(\d+)", name):
            predictions[match[1], int(match[2])] = array
    stem = f"{glob.escape(path.stem)}-[0-9][0-9][0-9]"
    pictures, added = (
        tuple(_inside(path.parent, picture) for picture in sorted(path.parent.glob(f"{stem}{ending}")))
        for ending in (".png", "-perturbation.png")
    )
    count = 1 + max(map(picture_number, pictures), default=-1)
    return ConditionArrays(
        name=str(arrays["name"]),
        label={level: arrays[f"{level}_label"] for level in LEVELS if f"{level}_label" in arrays},
        prediction=predictions,
        places=arrays["places"],
        place_label=arrays["place_label"],
        movement=None if np.isnan(arrays["movement"]) else float(arrays["movement"]),
        scale=float(arrays.get("scale", 0.0)),
        patches=pictures,
        perturbations=added,
        patch_rows=tuple(arrays.get("patch_rows", np.arange(count)).tolist()),
    )


def _check_arrays(arrays: Mapping[str, np.ndarray], where: str, *, classes: int) -> None:
    """ValueError beginning with `where` and naming the array that does not fit.

    name: a text.  places: (m, 2) finite numbers; place_label: (m,) whole numbers.  movement, scale: one number each;
    movement is NaN where nothing moved.
    <level>_label and <level>_prediction_k<k>: (n,) whole numbers from 0 to classes - 1, n the same for a level.
    """
    if missing := [name for name in ("name", "places", "place_label", "movement") if name not in arrays]:
        raise ValueError(f"{where}: {missing} are missing; evaluate again")
    places = arrays["places"]
    if places.ndim != 2 or places.shape[1] != 2 or places.dtype.kind != "f" or not np.isfinite(places).all():
        raise ValueError(f"{where}: places of shape {places.shape} are not finite points of a plane; evaluate again")
    _check_classes(arrays["place_label"], f"{where}: place_label", rows=len(places), classes=classes, lowest=-1)
    for name in ("movement", "scale"):
        if name in arrays and (arrays[name].shape != () or arrays[name].dtype.kind not in "fiu"):
            raise ValueError(f"{where}: {name} is not one number; evaluate again")
    if not np.isfinite(arrays.get("scale", 0.0)):
        raise ValueError(f"{where}: scale is {arrays['scale']}; evaluate again")
    if "patch_rows" in arrays:
        rows, count = arrays["patch_rows"], arrays.get("patch_label", np.empty(0)).size
        _check_classes(rows, f"{where}: patch_rows", rows=rows.size, classes=count, lowest=0)
    for level in LEVELS:
        names = [name for name in arrays if name.startswith((f"{level}_label", f"{level}_prediction_k"))]
        for name in names:
            _check_classes(arrays[name], f"{where}: {name}", rows=arrays[names[0]].size, classes=classes, lowest=0)


def _check_classes(array: np.ndarray, what: str, *, rows: int, classes: int, lowest: int) -> None:
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"{what} is {array.dtype} of shape {array.shape}; wanted {rows} whole numbers; evaluate again")
    if rows and not lowest <= array.min() <= array.max() < classes:
        raise ValueError(
            f"{what} runs from {array.min()} to {array.max()}, of classes 0 to {classes - 1}; evaluate again"
        )


def _inside(root: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root}; it is not followed")
    return path
