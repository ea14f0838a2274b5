"""What the names of folders and files say: splits, masks, magnifications, patients and slides."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from hsat.data.split_names import split_role

GENERIC = frozenset(
    "patches patch images image imgs img tiles tile data dataset files png jpg jpeg tif tiff all_patches".split()
)
"""Names of folders that are no class, in small letters, where no other folder stands beside them."""
JUNK = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini", "lost+found"})
"""Names of files and folders that computers add, in small letters."""
ID = re.compile(r"\d\d")  # "004", "TCGA-A1-0021", "patient_12": of a patient or slide rather than of a class
NUMBERED = re.compile(r"(?=.*\d).{3}")  # "s_1" may be a slide, "0" a class
_LONG_ID = re.compile(
    r"\d{3}|^(?:patient|case|subject|slide|wsi|participant)s?[-_ ]?\w*\d|^(?:p|pt|pat|s|id)[-_ ]?\d\d", re.IGNORECASE
)
_CASES = tuple(map(re.compile, (r"TCGA-\w\w-\w{4}", r"C3[LN]-\d{5}", r"GTEX-\w{4,5}(?=-)")))  # people in three archives
_ORDINAL = re.compile(r"^\d{1,2}[-_. ]+(?=[^\W\d_]{3})")  # "01_TUMOR"
_SLIDE = re.compile(
    r"(?P<person>.*\w)(?P<word>[-_ .](?:slide|sl|s|wsi|dx|ts|bs|block|section)[-_ ]?)\d+\w?", re.IGNORECASE
)
_POWERS = r"(?:2|2\.5|4|5|10|20|40|50|60|63|80|100|200|400)"
_MAGNIFICATION = re.compile(rf"{_POWERS}x|x{_POWERS}", re.IGNORECASE)
_MASK_WORDS = (
    r"masks?|label(?:l?ed|s)?|seg(?:mentations?|s)?|anno(?:tations?|tated|s)?|gt|ground[-_ ]?truths?|overlays?"
)
_MASK_FOLDER = re.compile(rf"(?:.*[-_ ])?(?:{_MASK_WORDS})", re.IGNORECASE)
_MASK_FILE = re.compile(rf"(.+?)[-_. ](?:{_MASK_WORDS})", re.IGNORECASE)
_OF_SPLIT = re.compile(r"[-_ ]?(?:images?|imgs?|patches|tiles|data|folder)$", re.IGNORECASE)


def is_generic(name: str) -> bool:
    """Whether a folder is called as what it holds, images of any kind."""
    return name.casefold() in GENERIC


def is_split_like(name: str) -> bool:
    """Whether a folder is called as a split is, or as the images of one: train, Testing, test_images."""
    return bool(split_role(name) or split_role(_OF_SPLIT.sub("", name)))


def is_mask_folder(name: str) -> bool:
    """Whether a folder is called as masks or labels of images are."""
    return bool(_MASK_FOLDER.fullmatch(name))


def is_magnification(name: str) -> bool:
    """Whether a folder is called as a magnification is: 40X, x20, 2.5x."""
    return bool(_MAGNIFICATION.fullmatch(name))


def is_person(name: str) -> bool:
    """Whether a folder is called as a patient or slide is: three digits in a row, patient_1, case 7, slide-2, P01."""
    return bool(_LONG_ID.search(name))


def are_class_names(names: Sequence[str]) -> bool:
    """Whether names may well be all classes: two or more without two digits in a row, but for 01_TUMOR, 02_STROMA."""
    plain = [_ORDINAL.sub("", name) for name in names]
    return len(names) > 1 and not any(ID.search(name) or is_person(name) for name in plain)


def case_of(name: str) -> str:
    """The person in a barcode of TCGA, CPTAC or GTEx; "" in any other name.

    Args:
        name: Of a folder or file.

    Returns:
        The part of the name that says who it is.

    Example:
        >>> case_of("TCGA-AA-3556-01Z-00-DX1"), case_of("patient_7")
        ('TCGA-AA-3556', '')
    """
    return next((found[0] for pattern in _CASES if (found := pattern.search(name))), "")


def slides_of_one(names: Iterable[str]) -> tuple[str, ...]:
    """Names among these that are slides of one person: of one barcode, or P001_S1 and P001_S2.

    Args:
        names: Of folders.

    Returns:
        The names of the first such person; empty where there is none.
    """
    people: dict[str, list[str]] = {}
    for name in names:
        slide = _SLIDE.fullmatch(name)
        person = case_of(name) or (slide["person"] if slide and re.search(r"\d", slide["person"]) else "")
        if person:
            people.setdefault(person, []).append(name)
    return next((tuple(several) for several in people.values() if len(several) > 1), ())


def person_pattern(names: Sequence[str]) -> str:
    """The regular expression that finds the person in names that `slides_of_one` gave."""
    for pattern in _CASES:
        if all(map(pattern.search, names)):
            return f"({pattern.pattern})"
    slide = _SLIDE.fullmatch(names[0])
    assert slide is not None
    return rf"([^/]+){re.escape(slide['word'])}\d+\w?/"


def name_masks(paths: Iterable[str]) -> list[str]:
    """The images among these that are called as masks or labels of another one: x_mask.png beside x.png.

    Args:
        paths: Of images.

    Returns:
        In the same order.
    """
    stems = {os.path.splitext(path)[0]: path for path in paths}
    return [path for stem, path in stems.items() if (match := _MASK_FILE.fullmatch(stem)) and match[1] in stems]


def repeated(groups: Iterable[Iterable[str]]) -> list[str]:
    """Names that stand in several of the groups, in order."""
    counts = Counter(name for names in groups for name in set(names))
    return sorted(name for name, count in counts.items() if count > 1)
