"""kNN classifiers that were saved to a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hsat.classifiers.base import check_bank
from hsat.classifiers.faiss_index import load_faiss
from hsat.classifiers.knn import INDEX_FILE, SETTINGS_FILE, FittedKNN, KNNClassifier
from hsat.files import digest_file
from hsat.fingerprints import fingerprint_table
from hsat.types import EmbeddingTable


def load_knn(path: str | os.PathLike[str], table: EmbeddingTable) -> FittedKNN:
    """The classifier that was saved to a folder, with the bank that it was fitted on.

    The bank's rows, labels and class names, and the bytes of the index, are checked against SHA-256 sums in the folder.
    That finds stale and damaged files, not malice: whoever can write the folder can write the sums, and FAISS reads its
    files in C++ without guarding against crafted ones.  Load only what you or people you trust have written.

    Args:
        path: What `FittedKNN.save` wrote.
        table: The bank.

    Returns:
        The classifier, on the CPU.

    Raises:
        FileNotFoundError: If no classifier is there.
        ValueError: For another bank, an index that was changed, or settings that cannot be used.
        TypeError: For a bank that is no table.
    """
    check_bank(table)
    path = Path(path)
    if not (path / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"{path} is not a saved classifier: {path / SETTINGS_FILE} is missing")
    settings, content = _read_settings(path / SETTINGS_FILE)
    if len(table) != content["rows"] or fingerprint_table(table) != content["bank"]:
        raise ValueError(
            f"{path} was fitted on another bank of {content['rows']} rows; this one has {len(table)} rows and other"
            " contents.  Fit again: KNNClassifier(...).fit(table)"
        )
    if content["k"] > len(table):
        raise ValueError(f"{path / SETTINGS_FILE} is damaged: k is {content['k']} in a bank of {len(table)} rows")
    index = None
    if not settings.exact:
        if not (path / INDEX_FILE).is_file() or digest_file(path / INDEX_FILE) != content["index_sha256"]:
            raise ValueError(
                f"{path / INDEX_FILE} is missing or was changed after it was saved; fit the classifier again"
            )
        index = load_faiss(settings.index).read_index(str(path / INDEX_FILE))
    return FittedKNN(settings=settings, table=table, k=content["k"], slack=content["slack"], _index=index)


def _read_settings(path: Path) -> tuple[KNNClassifier, dict[str, Any]]:
    """The settings and the rest of what `FittedKNN.save` wrote, of the kinds that it writes."""
    try:
        content = json.loads(path.read_text())
        settings = KNNClassifier(**content["settings"])
        k, slack = content["k"], content["slack"]
        if type(k) is not int or k < 1 or type(slack) is not float or not 0 <= slack < 1:
            raise ValueError(f"k is {k!r} and slack {slack!r}")
        if not {"rows", "bank", "index_sha256"} <= content.keys() or settings.exact != (content["index_sha256"] == ""):
            raise ValueError("an entry is missing, or not of this index")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of no classifier ({type(error).__name__}: {error})") from error
    return settings, dict(content)
