"""The folder of a store of results: the settings that it was begun with, and what killed processes left in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from hsat.files import is_partial, read_json_object, remove_partials, write_file

SCRATCH = "scratch"
_SETTINGS = "settings.json"


def open_folder(folder: Path, settings: dict[str, Any], growing: tuple[str, ...]) -> None:
    """Begin the folder of a store, or go on with one.

    Args:
        folder: The folder.
        settings: All that decides the results, by name.
        growing: Beginnings of names of settings that later runs may add or leave out, but not change.

    Raises:
        ValueError: For a folder that was begun under other settings, and for one that holds something else.
    """
    path = folder / _SETTINGS
    if path.exists():
        try:
            before = read_json_object(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete {folder} and begin anew") from error
        _check_same(folder, before, settings, growing)
        settings = before | settings
    elif folder.exists() and (not folder.is_dir() or any(not is_partial(entry) for entry in folder.iterdir())):
        raise ValueError(f"{folder} holds something else than the results of an evaluation; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    write_file(path, json.dumps(settings, indent=1, sort_keys=True))


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any], growing: tuple[str, ...]) -> None:
    differing = []
    for name in sorted(before.keys() | now.keys()):
        may_grow = name.startswith(growing) if growing else False
        if may_grow and not (name in before and name in now):
            continue
        if before.get(name) != now.get(name):
            differing.append(f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}")
    if differing:
        raise ValueError(
            f"{folder} was begun under other settings: {'; '.join(differing)}. Go on with those, or give a new folder"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{32,}", text) else text  # a hash is told apart by its beginning
