"""Whether the arrays of an evidence file fit together: files of others may hold anything."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hsat.types import LEVELS


def check_arrays(arrays: Mapping[str, np.ndarray], where: str, *, classes: int) -> None:
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
    for level in LEVELS:
        found = [name for name in arrays if name.startswith((f"{level}_label", f"{level}_prediction_k"))]
        for name in found:
            _check_classes(arrays[name], f"{where}: {name}", rows=arrays[found[0]].size, classes=classes, lowest=0)


def _check_classes(array: np.ndarray, what: str, *, rows: int, classes: int, lowest: int) -> None:
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise ValueError(f"{what} is {array.dtype} of shape {array.shape}; wanted {rows} whole numbers; evaluate again")
    if rows and not lowest <= array.min() <= array.max() < classes:
        raise ValueError(
            f"{what} runs from {array.min()} to {array.max()}, of classes 0 to {classes - 1}; evaluate again"
        )
