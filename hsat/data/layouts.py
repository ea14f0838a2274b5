"""A cohort from any layout by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hsat.data.assembly import Mixed
from hsat.data.cohort import Cohort, PatchKind
from hsat.data.folders import read_class_folders, read_folders
from hsat.data.opensrh import read_opensrh
from hsat.data.tables import read_csv

Layout = Literal["opensrh", "folders", "classes", "csv"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of the readers; a layout refuses those that it does not know, unless they have their default.

    Attributes:
        manifest, columns, path_template: Of "csv"; see `read_csv`.
        patient, slide: Of "classes"; see `read_class_folders`.
        split_folders, on_empty, mixed, kind: See `read_folders`; on_empty also of `read_opensrh`.
        keep_splits: False reads patients who are in several splits, whose splits are drawn anew; see `read_folders`.
        class_names: None takes all classes that occur, in alphabetical order.
        allow_links: See `Cohort`.
    """

    manifest: str | os.PathLike[str] = "manifest.csv"
    columns: Mapping[str, str] | None = None
    path_template: str | None = None
    patient: str | None = None
    slide: str | None = None
    split_folders: bool = False
    on_empty: Literal["error", "skip"] = "error"
    mixed: Mixed = "keep"
    keep_splits: bool = True
    kind: PatchKind | None = None
    class_names: Sequence[str] | None = None
    allow_links: bool = False


_KNOWN = {
    "opensrh": "on_empty class_names allow_links",
    "folders": "keep_splits split_folders on_empty mixed kind class_names allow_links",
    "classes": "keep_splits patient slide split_folders on_empty kind class_names allow_links",
    "csv": "keep_splits manifest columns path_template mixed kind class_names allow_links",
}


def read_cohort(
    root: str | os.PathLike[str], layout: Layout = "opensrh", *, options: ReadOptions = ReadOptions()
) -> Cohort:
    """A Cohort in a layout that is named by a text: for commands; in Python call the layout's own function.

    Args:
        root: The folder of the cohort.
        layout: "opensrh" (`read_opensrh`), "folders" (`read_folders`), "classes" (`read_class_folders`) or "csv"
            (`read_csv`).
        options: Of the layout's function.

    Returns:
        The cohort.

    Raises:
        ValueError: Another layout, an option that the layout does not have, and whatever its function refuses.
    """
    if layout not in _KNOWN:
        raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(Layout)))}; got {layout!r}")
    known = _KNOWN[layout].split()
    for one in fields(options):
        if one.name not in known and getattr(options, one.name) != one.default:
            having = [name for name, names in _KNOWN.items() if one.name in names.split()]
            raise ValueError(f"layout {layout!r} has no option {one.name}; it belongs to layout {' or '.join(having)}")
    given: dict[str, Any] = {name: getattr(options, name) for name in known}
    readers = {"opensrh": read_opensrh, "folders": read_folders, "classes": read_class_folders, "csv": read_csv}
    cohort: Cohort = readers[layout](root, **given)  # type: ignore[operator]
    return cohort
