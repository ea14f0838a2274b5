"""Checks of paths: the root exists, files are there and not empty, and no link leads out of the root."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_NAMED_AT_MOST = 5
_SHOWN_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_SHOWN_LENGTH = 200


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """The root as an absolute path.  Raises FileNotFoundError or NotADirectoryError naming it."""
    folder = Path(os.path.abspath(os.path.expanduser(root)))
    if not folder.exists():
        raise FileNotFoundError(f"cohort root {folder} does not exist; give the folder that holds the patches")
    if not folder.is_dir():
        raise NotADirectoryError(f"cohort root {folder} is not a folder; give the folder that holds the patches")
    return folder


def check_inside(root: Path, full: str, name: str) -> None:
    """Raise ValueError when `full`, with all links followed, lies outside the root; `name` is for the message."""
    base, target = os.path.realpath(root), os.path.realpath(full)
    if target != base and not target.startswith(base.rstrip("/") + "/"):
        raise ValueError(
            f"path {name!r} leads out of the cohort's root {base} through a link, to {target};"
            " copy or hard-link the files into the root, read the cohort from where they lie, or, where the links are"
            " your own, pass allow_links=True"
        )


def file_sizes(root: Path, names: Iterable[str], paths: Iterable[Path]) -> list[int]:
    """Size in bytes of every file, in the order given; names are for the messages.

    Raises:
        FileNotFoundError: Files are missing; up to five are named, and how many there are.
        ValueError: Files are empty, not regular, or reached through a link out of the root.
        OSError: Files may not be looked at.
    """
    sizes: list[int] = []
    missing: list[str] = []
    empty: list[str] = []
    for name, path in zip(names, paths, strict=True):
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
            continue
        except OSError as error:
            raise OSError(
                error.errno, f"patch {name!r} of the cohort at {root}: {error.strerror}", str(path)
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"patch {name!r} of the cohort at {root} is not a regular file")
        if not status.st_size:
            empty.append(name)
        sizes.append(status.st_size)
    if missing:
        raise FileNotFoundError(f"files missing from the cohort at {root}: {shorten_names(missing)}")
    if empty:
        raise ValueError(
            f"empty files in the cohort at {root}: {shorten_names(empty)}; hsat check {root} lists all bad files"
        )
    return sizes


def shorten_names(names: Iterable[str]) -> str:
    """The first few names, quoted, for a message."""
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > _NAMED_AT_MOST else ""
    return ", ".join(map(repr, listed[:_NAMED_AT_MOST])) + more


def name_example(paths: Iterable[str]) -> str:
    """An example for a message, between commas; empty where no path ends as a patch does.

    A file that was taken for a list of patches may be anything, and messages do not show its lines.
    """
    patches = sorted(path for path in paths if path.lower().endswith(_SHOWN_SUFFIXES))
    return f", such as {patches[0][-_SHOWN_LENGTH:]!r}," if patches else ""
