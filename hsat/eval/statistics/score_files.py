"""Class scores of patches, model by model and condition by condition: what comparisons of models need, as one file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hsat.eval.pooling import check_scores
from hsat.eval.scoring import match_classes
from hsat.files import atomic_path, load_arrays
from hsat.types import EmbeddingTable
from hsat.untrusted import open_regular

_IDS = ("label", "patch", "slide", "patient")
_TEXT = ("cohort", "split", "model", "condition")


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The class scores that one model gives the patches of a cohort under one condition.

    scores: (n, classes) as `predict_proba` gives them; column i belongs to class_names[i].  label: (n,) indices into
    class_names.  patch, slide, patient: (n,) ids; a patch stands there once.  condition: "clean" or an attack's name.
    k: neighbours.  Raises ValueError or TypeError naming the column that does not fit.
    """

    scores: np.ndarray
    label: np.ndarray
    patch: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    class_names: tuple[str, ...]
    cohort: str = ""
    split: str = ""
    model: str = ""
    condition: str = "clean"
    k: int = 0

    def __post_init__(self) -> None:
        scores = check_scores(self.scores)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if scores.shape[1] != len(self.class_names):
            raise ValueError(f"scores of {scores.shape[1]} classes but {len(self.class_names)} class names")
        for name in _IDS:
            ids = np.asarray(getattr(self, name))
            if ids.shape != (len(scores),):
                raise ValueError(f"{len(scores)} rows of scores but {name} has shape {ids.shape}")
            if not np.issubdtype(ids.dtype, np.integer):
                raise TypeError(f"{name} must hold integers, got {ids.dtype}")
            object.__setattr__(self, name, ids.astype(np.int64))
        if self.label.min() < 0 or self.label.max() >= len(self.class_names):
            raise ValueError(
                f"labels run from {self.label.min()} to {self.label.max()} for {len(self.class_names)} class names"
            )
        found, times = np.unique(self.patch, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"patch {found[times > 1][0]} stands {times.max()} times in the table; wanted once")

    def __len__(self) -> int:
        return len(self.scores)


class _Result(Protocol):
    @property
    def tables(self) -> Mapping[str, EmbeddingTable]: ...
    @property
    def scores(self) -> Mapping[str, Mapping[int | str, np.ndarray]]: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...


def score_tables(result: _Result) -> tuple[ScoreTable, ...]:
    """A WhiteboxResult as score tables, one per condition and k; `model` is what evaluate_whitebox was given."""
    return tuple(
        ScoreTable(
            scores=scores,
            label=match_classes(table, result.class_names),
            patch=table.patch,
            slide=table.slide,
            patient=table.patient,
            class_names=result.class_names,
            cohort=table.cohort,
            split=table.split,
            model=table.encoder,
            condition=condition,
            k=k if isinstance(k, int) else 0,
        )
        for condition, table in result.tables.items()
        for k, scores in result.scores[condition].items()
    )


def save_scores(path: str | os.PathLike[str], tables: Iterable[ScoreTable]) -> Path:
    """Write score tables into one compressed .npz file; it appears whole or not at all."""
    path = Path(path)
    arrays: dict[str, Any] = {}
    about: list[dict[str, Any]] = []
    for number, table in enumerate(tables):
        arrays |= {f"{number}/{name}": getattr(table, name) for name in ("scores", *_IDS)}
        text: dict[str, Any] = {name: getattr(table, name) for name in _TEXT}
        about.append(text | {"k": int(table.k), "class_names": list(table.class_names)})
    with atomic_path(path) as working, working.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
    return path


def load_scores(path: str | os.PathLike[str]) -> tuple[ScoreTable, ...]:
    """Read what `save_scores` wrote; never unpickles.  Raises ValueError for any other or damaged file."""
    try:
        with open_regular(path, kind="file of scores") as file:
            arrays = load_arrays(file)
        about = json.loads(str(arrays["about"]))
        return tuple(_table(arrays, number, text) for number, text in enumerate(about))
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)}: no file of scores as save_scores writes it ({error})") from error


def _table(arrays: Any, number: int, text: dict[str, Any]) -> ScoreTable:
    columns = {name: arrays[f"{number}/{name}"] for name in ("scores", *_IDS)}
    names = tuple(str(name) for name in text["class_names"])
    words: dict[str, Any] = {name: str(text[name]) for name in _TEXT}
    return ScoreTable(**columns, class_names=names, k=int(text["k"]), **words)
