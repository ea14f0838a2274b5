"""What lies in a folder: how deep its images are, which other files there are, and which reader fits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsat.data.assembly import IMAGE_SUFFIXES, SLIDE_SUFFIXES, TILE_FIRST
from hsat.data.folder_names import JUNK, is_split_like

LEVELS = ("class", "patient", "slide")
_PICTURES = (".gif", ".webp", ".jp2", ".jxl", ".ppm", ".heic")
DEEPEST = 100  # folders inside each other
SURVEYED = 20_000  # entries that are looked at for a hint


def expected_layout(root: Path, levels: Sequence[str]) -> str:
    """What a reader wanted, and which reader fits the folder."""
    hint = layout_hint(root, levels)
    return f"wanted {'/'.join(levels)}/patch" + (f"; {hint}" if hint else "")


def layout_hint(root: Path, asked: Sequence[str] = ()) -> str:
    """Which reader fits a folder, from the depths at which its images lie and the files beside them.

    Args:
        root: The folder.
        asked: The levels of the reader that was called, which is not named.

    Returns:
        A sentence; "" where nothing fits.
    """
    depths, others = survey_folder(root)
    if (root / "meta" / "opensrh.json").is_file() and tuple(asked) != ("opensrh",):
        return "it is an OpenSRH folder; call read_opensrh (layout='opensrh')"
    slides = sum(others[suffix] for suffix in SLIDE_SUFFIXES)
    if slides and not depths:
        return f"it holds {slides} whole slides; {TILE_FIRST}"
    fits = {
        ("class",): "images lie in class/patch folders; call read_class_folders (layout='classes')",
        LEVELS: "images lie in class/patient/slide/patch folders; call read_folders (layout='folders')",
        ("split", "class"): "if they are split/class/patch, call read_class_folders with split_folders=True"
        " (layout='classes'); if class/patient/patch, put one slide folder in each patient's",
        ("split", *LEVELS): "images lie four folders deep; if they are split/class/patient/slide/patch, call"
        " read_folders with split_folders=True (layout='folders')",
    }
    if tuple(asked[:1]) == ("split",):  # the same reader fits, without its option
        fits[("class",)] += " without split_folders"
        fits[LEVELS] += " without split_folders"
    by_depth = {len(levels): text for levels, text in fits.items() if tuple(levels) != tuple(asked)}
    if (first := list_folders(root)) and all(map(is_split_like, first)):  # splits are no classes
        by_depth = {depth: text for depth, text in by_depth.items() if "split_folders=True" in text}
    if others[".csv"]:
        table = "or, with the table that lies there, read_csv with columns={...} (layout='csv')"
    else:
        table = "for another order of folders write a table of paths and call read_csv (layout='csv')"
    if len(depths) == 1 and (depth := next(iter(depths))) in by_depth:
        return f"{by_depth[depth]}; {table}"
    if not depths:
        return _describe_others(others)
    counts = ", ".join(f"{count} images {depth} folders deep" for depth, count in sorted(depths.items()))
    fit = ", so that no layout of folders fits all" if len(depths) > 1 else ""
    deeper = "call read_class_folders with patient='...', a regular expression, which takes images of any depth"
    return f"there are {counts}{fit}; if their paths hold the patient, {deeper} (layout='classes'); {table}"


def _describe_others(others: Counter[str]) -> str:
    """What to do with files that are no patches; "" where there is nothing to say."""
    arrays = sum(others[suffix] for suffix in (".h5", ".hdf5", ".npy", ".pt", ".npz"))
    pictures = {suffix: others[suffix] for suffix in _PICTURES if others[suffix]}
    if pictures:
        listed = ", ".join(f"{count} ending in {suffix!r}" for suffix, count in pictures.items())
        return f"it holds pictures of a format that is not read, {listed}; store them as PNG"
    if arrays:
        return (
            f"it holds {arrays} files of arrays, which are no images; write patches as PNG, or, if they are embeddings,"
            " read them with hsat.EmbeddingTable.from_h5 or from_arrays and measure them with hsat.eval.score_levels"
        )
    return ""


def walk_folders(root: Path, *, follow_links: bool = False) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, which calls itself for each level, down to folders that lie 100 deep.

    Args:
        root: The folder.
        follow_links: Look into folders that are links, too.

    Yields:
        A folder, the names of its folders, which may be changed, and those of its files.
    """
    above = len(root.parts)
    for folder, folders, files in os.walk(root, followlinks=follow_links):
        if len(Path(folder).parts) - above >= DEEPEST:
            folders.clear()
        yield folder, folders, files


def survey_folder(root: Path, *, follow_links: bool = False) -> tuple[Counter[int], Counter[str]]:
    """Images by depth, and other files by suffix, among the first entries below a folder.

    Args:
        root: The folder.
        follow_links: Look into folders that are links, too.

    Returns:
        Counts of images by the number of folders above them, and of other files by their suffix in small letters.
    """
    depths, others, seen = Counter[int](), Counter[str](), 0
    for folder, folders, files in walk_folders(root, follow_links=follow_links):
        folders[:] = sorted(name for name in folders if name.lower() not in JUNK and not name.startswith("."))
        depth = 0 if folder == str(root) else os.path.relpath(folder, root).count(os.sep) + 1
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or name.lower() in JUNK:
                continue
            if suffix in IMAGE_SUFFIXES:
                depths[depth] += 1
            else:
                others[suffix] += 1
        seen += len(files) + len(folders)
        if seen > SURVEYED:
            break
    return depths, others


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order, without hidden ones and what computers add.

    Args:
        folder: The folder.

    Returns:
        The names.
    """
    with os.scandir(folder) as entries:
        return sorted(
            one.name for one in entries if one.is_dir() and one.name[0] != "." and one.name.lower() not in JUNK
        )


def list_images(root: Path, *, most: int = 12) -> list[str]:
    """Paths of the first images below a folder, a few of each folder.

    Args:
        root: The folder.
        most: How many at most.

    Returns:
        Relative to the folder, in order.
    """
    found: list[str] = []
    for path, folders, files in walk_folders(root):
        folders[:] = sorted(name for name in folders if name[0] not in "._@")
        images = [name for name in sorted(files) if is_image(Path(path, name))]
        found += [os.path.relpath(os.path.join(path, name), root) for name in images[: most // 4]]
        if len(found) >= most:
            break
    return found[:most]


def holds_images(folder: Path) -> bool:
    """Whether an image lies in a folder, at any depth; links to folders are not followed."""
    return any(is_image(Path(path, name)) for path, _, names in walk_folders(folder) for name in names)


def is_image(path: Path) -> bool:
    """Whether a file is called as an image that is read, and is one of its own."""
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
