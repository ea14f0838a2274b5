"""The files that a command wrote, as named values: {file: {entry: {field: value}}}.

A value is a number, text, True, False, None, or an array.  Names are those of the first edition.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from editions import Edition, Ignored
from PIL import Image

Fields = dict[str, Any]
Content = dict[str, Fields]  # by record, row or other entry; "" for files that are one entry
RECORD_KEY = ("model", "surrogate", "attack_name", "target", "k", "level", "metric", "seed")


def read_results(folder: Path, edition: Edition, ignored: Ignored) -> dict[str, Content]:
    """All files below a folder that are compared.  Raises ValueError naming a file that cannot be read."""
    results: dict[str, Content] = {}
    for path in sorted(folder.rglob("*")):
        written = path.relative_to(folder).as_posix()
        name = edition.old_file(written)
        if not path.is_file() or ignored.file(name):
            continue
        try:
            results[name] = _content(path, name, edition)
        except Exception as error:
            raise ValueError(f"{written}: {type(error).__name__}: {error}") from error
    return results


def _content(path: Path, name: str, edition: Edition) -> Content:
    suffix = path.suffix
    if suffix == ".jsonl":
        return _records(path.read_text().splitlines(), name, edition)
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return {f"row {number}": _renamed(row, name, edition) for number, row in enumerate(rows, start=1)}
    if suffix == ".json":
        return {"": _renamed(flat(json.loads(path.read_text())), name, edition)}
    if suffix == ".md":
        return _tables(path.read_text(), name, edition)
    if suffix in (".npz", ".npy"):
        return {"": _renamed(_numpy_arrays(path), name, edition)}
    if suffix == ".safetensors":
        return {"": _renamed(_tensors(path), name, edition)}
    digest = {"bytes": hashlib.sha256(path.read_bytes()).hexdigest()}
    if suffix in (".png", ".tif", ".tiff"):
        return {"": digest | {"pixels": _pixels(path)}}
    return {"": digest}


def flat(value: Any, prefix: str = "") -> Fields:
    """Nested dictionaries and lists with dotted names; empty ones stay as their text."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return {prefix: value}
    if not value:
        return {prefix: json.dumps(value)}
    fields: Fields = {}
    for key, item in inner:
        fields |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return fields


def _renamed(fields: Fields, file: str, edition: Edition) -> Fields:
    renamed: Fields = {}
    for name, value in fields.items():
        old = edition.old_field(str(name), file)
        renamed[old] = edition.old_value(value, old, file)
    return renamed


def _records(lines: list[str], file: str, edition: Edition) -> Content:
    content: Content = {}
    seen: Counter[str] = Counter()
    for line in lines:
        fields = _renamed(flat(json.loads(line)), file, edition)
        key = " ".join(f"{name}={fields[name]}" for name in RECORD_KEY if fields.get(name, "") != "")
        seen[key] += 1
        content[key if seen[key] == 1 else f"{key} ({seen[key]})"] = fields
    return content


def _tables(text: str, file: str, edition: Edition) -> Content:
    """Cells of Markdown tables by heading and row (what stands before the numbers); other lines in their order."""
    content: Content = {"": {}}
    heading = ""
    columns: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = []
            if line.strip():
                content[""][f"line {len(content['']) + 1}"] = said = edition.old_value(line, "", file)
                heading = said if line.startswith(("**", "#")) else heading
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not columns:
            columns = [edition.old_field(cell, file) for cell in cells]
        elif set(line) - set("|- :"):
            fields = {
                column: edition.old_value(cell, column, file) for column, cell in zip(columns, cells, strict=False)
            }
            name = f"{heading} {' '.join(_before_the_numbers(fields.values()))}".strip()
            same = sum(entry == name or entry.startswith(f"{name} (") for entry in content)
            content[f"{name} ({same + 1})" if same else name] = fields
    return content


def _before_the_numbers(cells: Iterable[str]) -> Iterator[str]:
    for cell in cells:
        if re.search(r"\d\.\d|%|–", cell):
            return
        yield cell


def _numpy_arrays(path: Path) -> Fields:
    loaded = np.load(path, allow_pickle=False)
    arrays: Fields = (
        {path.stem: loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    )
    return _with_text_unpacked(arrays)


def _tensors(path: Path) -> Fields:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        fields: Fields = {f"metadata.{key}": text for key, text in (file.metadata() or {}).items()}
        fields |= {key: file.get_tensor(key) for key in file.keys()}
    return _with_text_unpacked(fields)


def _with_text_unpacked(fields: Fields) -> Fields:
    """Text that holds JSON as its parts, other text arrays as text."""
    unpacked: Fields = {}
    for key, value in fields.items():
        text = value.item() if isinstance(value, np.ndarray) and value.dtype.kind == "U" and not value.ndim else value
        if isinstance(text, str) and text[:1] in ("{", "["):
            unpacked |= flat(json.loads(text), key)
        else:
            unpacked[key] = text
    return unpacked


def _pixels(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)
    import tifffile

    return np.asarray(tifffile.imread(path))
