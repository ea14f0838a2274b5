"""A fitted classifier as a folder, so that an index of a large bank is built once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from hsat.eval.banks.indexes import load_faiss
from hsat.eval.banks.knn import FittedKNN, KNNClassifier, check_bank
from hsat.eval.banks.neighbours import blocks
from hsat.files import atomic_folder, digest_file
from hsat.types import EmbeddingTable

_ABOUT, _INDEX = "knn.json", "index.faiss"


def save_knn(path: str | os.PathLike[str], knn: FittedKNN) -> Path:
    """Write settings, the bank's fingerprint and, where there is one, the FAISS index; all of it or nothing.

    The bank itself is not in the folder: save it with `EmbeddingTable.save`.  An older classifier at `path` is
    replaced; FileExistsError where something else is there.
    """
    path = Path(path)
    with atomic_folder(path, marker=_ABOUT, what="a saved classifier") as working:
        about: dict[str, Any] = {"settings": dataclasses.asdict(knn.settings), "k": knn.k, "slack": knn.slack}
        about |= {"rows": len(knn.table), "bank": table_fingerprint(knn.table), "index_sha256": ""}
        if knn._index is not None:
            load_faiss(knn.settings.index).write_index(knn._index, str(working / _INDEX))
            about["index_sha256"] = digest_file(working / _INDEX)
        (working / _ABOUT).write_text(json.dumps(about, indent=1))
    return path


def load_knn(path: str | os.PathLike[str], table: EmbeddingTable) -> FittedKNN:
    """The classifier that was saved to a folder, with the bank that it was fitted on.

    The bank's rows, labels and class names, and the bytes of the index, are checked against SHA-256 sums in the folder.
    That finds stale and damaged files, not malice: whoever can write the folder can write the sums, and FAISS reads its
    files in C++ without guarding against crafted ones.  Load only what you or people you trust have written.
    Raises FileNotFoundError where no classifier is, ValueError for another bank, an index that was changed, or settings
    that cannot be used; TypeError for a bank that is no table.
    """
    check_bank(table)
    path = Path(path)
    if not (path / _ABOUT).is_file():
        raise FileNotFoundError(f"{path} is not a saved classifier: {path / _ABOUT} is missing")
    settings, about = _read_about(path / _ABOUT)
    if len(table) != about["rows"] or table_fingerprint(table) != about["bank"]:
        raise ValueError(
            f"{path} was fitted on another bank of {about['rows']} rows; this one has {len(table)} rows and other"
            " contents.  Fit again: KNNClassifier(...).fit(table)"
        )
    if about["k"] > len(table):
        raise ValueError(f"{path / _ABOUT} is damaged: k is {about['k']} in a bank of {len(table)} rows")
    index = None
    if not settings.exact:
        if not (path / _INDEX).is_file() or digest_file(path / _INDEX) != about["index_sha256"]:
            raise ValueError(f"{path / _INDEX} is missing or was changed after it was saved; fit the classifier again")
        index = load_faiss(settings.index).read_index(str(path / _INDEX))
    return FittedKNN(settings=settings, table=table, k=about["k"], slack=about["slack"], _index=index)


def _read_about(path: Path) -> tuple[KNNClassifier, dict[str, Any]]:
    """The settings and the rest of what `save_knn` wrote, of the kinds that it writes."""
    try:
        about = json.loads(path.read_text())
        settings = KNNClassifier(**about["settings"])
        k, slack = about["k"], about["slack"]
        if type(k) is not int or k < 1 or type(slack) is not float or not 0 <= slack < 1:
            raise ValueError(f"k is {k!r} and slack {slack!r}")
        if not {"rows", "bank", "index_sha256"} <= about.keys() or settings.exact != (about["index_sha256"] == ""):
            raise ValueError("an entry is missing, or not of this index")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of no classifier ({type(error).__name__}: {error})") from error
    return settings, dict(about)


def table_fingerprint(table: EmbeddingTable) -> str:
    """SHA-256 over shape, rows, labels and class names of a table, read in blocks."""
    digest = hashlib.sha256(json.dumps([list(table.z.shape), list(table.class_names)]).encode())
    digest.update(np.ascontiguousarray(table.label, dtype="<i8").tobytes())
    for part in blocks(table.z):
        digest.update(np.ascontiguousarray(table.z[part], dtype="<f4").tobytes())
    return digest.hexdigest()
