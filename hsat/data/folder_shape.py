"""What folders of patches may mean, by their names at each level: class, patient, slide, or something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hsat.data import folder_names as names_of
from hsat.data.paths import shorten_names
from hsat.data.split_names import split_role
from hsat.data.survey import list_folders

PATIENT_FOLDER = r"^[^/]+/([^/]+)/"
PATIENT_BELOW_SPLIT = r"^[^/]+/[^/]+/([^/]+)/"
PATIENT_FIRST = r"^([^/]+)/"
GIVE = "and give the Cohort that it returns"
_MOST_CLASSES = 20


@dataclass(frozen=True)
class FolderShape:
    """Folders whose images all lie at one depth.

    Attributes:
        folder: The root.
        levels: For each level of folders the names from the root to each of them.
        is_split: The first level are splits.
    """

    folder: Path
    levels: tuple[tuple[tuple[str, ...], ...], ...]
    is_split: bool

    @classmethod
    def of(cls, folder: Path, first: Sequence[str], *, depth: int, is_split: bool) -> FolderShape:
        """The shape of a folder.

        Args:
            folder: The root.
            first: The folders in it that hold images.
            depth: How many folders lead from it to an image.
            is_split: The first level are splits, whatever their names.
        """
        levels: list[tuple[tuple[str, ...], ...]] = [tuple((name,) for name in first)]
        while len(levels) < depth:
            levels.append(tuple((*up, name) for up in levels[-1] for name in list_folders(folder.joinpath(*up))))
        return cls(folder, tuple(levels), is_split or (depth > 1 and all(map(split_role, first))))

    @property
    def below(self) -> int:
        """How many folders lead from the splits to a patch."""
        return len(self.levels) - self.is_split

    def names(self, level: int) -> list[str]:
        """The names at a level below the splits, each once: 0 are classes, 1 patients, 2 slides."""
        return sorted({path[-1] for path in self.levels[level + self.is_split]})

    def within(self, level: int) -> list[list[str]]:
        """The names at a level by the folder that they lie in."""
        inside: dict[tuple[str, ...], list[str]] = {}
        for path in self.levels[level + self.is_split]:
            inside.setdefault(path[:-1], []).append(path[-1])
        return list(inside.values())

    @property
    def starts_with_people(self) -> bool:
        """Whether the folders that would be classes are called as patients or slides are."""
        names = self.names(0)
        if len(names) < 2:
            return False
        if all(map(names_of.is_person, names)):
            return True
        inner = self.levels[1 + self.is_split] if self.below > 1 else ()
        numbered = all(re.search(r"\d", name) for name in names)
        return numbered and bool(inner) and all(path[-1].startswith(path[-2]) for path in inner)

    @property
    def has_classes_of_people(self) -> bool:
        """Whether the folders are patient/class/patch: people first, then a few names that several of them have."""
        if self.below != 2 or self.is_split or not self.starts_with_people or not self._has_few_inner_names():
            return False
        return not any(map(names_of.is_magnification, self.names(1)))

    def _has_few_inner_names(self) -> bool:
        """Whether the second folders are called as classes may be, and several first ones have the same."""
        inner = self.names(1)
        plain = len(inner) <= _MOST_CLASSES and not any(map(names_of.ID.search, inner))
        return plain and bool(names_of.repeated(self.within(1)))

    def problem(self) -> str:
        """Why the folders may mean something else than class and patient, and what to call; "" where they do not."""
        if self.below not in (1, 2, 3):
            return ""
        found = (
            self._masks()
            or self._magnifications()
            or self._no_patients()
            or self._inner_splits()
            or self._people()
            or self._slides()
        )
        if found or self.is_split or self.below == 1 or self.has_classes_of_people:
            return found
        return self._no_classes()

    def _masks(self) -> str:
        """Folders of masks beside folders of images, at any level."""
        for level in range(self.below):
            names = self.names(level)
            masks = [name for name in names if names_of.is_mask_folder(name)]
            images = [name for name in names if names_of.is_generic(name)]
            if masks and images and len(masks) + len(images) == len(names):
                where = (
                    "give the folder of the images" if level == 0 and not self.is_split else "move the masks elsewhere"
                )
                return (
                    f"the folders {shorten_names(masks)} beside {shorten_names(images)} are masks, no patches; {where}"
                )
        return ""

    def _magnifications(self) -> str:
        """Folders of magnifications where classes, patients or slides are looked for."""
        for level, place in enumerate(("classes", "patients", "slides")[: self.below]):
            names = self.names(level)
            if not all(map(names_of.is_magnification, names)):
                continue
            listed = f"the folders {shorten_names(names)} are magnifications, no {place}"
            if level == 0:
                return f"{listed}; give the folder of one of them"
            if level == 2:
                patient = PATIENT_BELOW_SPLIT if self.is_split else PATIENT_FOLDER
                return f"{listed}: call {self._classes(patient=patient)} {GIVE}; or read one magnification alone"
            return f"{listed}: if the files' names hold the patient, {self._by_file_names()}; or read one of them alone"
        return ""

    def _no_patients(self) -> str:
        """Folders between class and patch that are called as what they hold."""
        if self.below < 2 or not all(map(names_of.is_generic, self.names(1))):
            return ""
        listed = shorten_names(self.names(1))
        return (
            f"the folders {listed} between class and patch are no patients: move their files up, for class/patch; if"
            f" the files' names hold the patient, {self._by_file_names()}"
        )

    def _inner_splits(self) -> str:
        """Folders of splits inside those of classes."""
        if self.below < 2 or self.is_split or not all(map(split_role, self.names(1))):
            return ""
        columns = {"path": "file", "class": "label", "split": "split"}
        return (
            f"the folders {shorten_names(self.names(1))} inside {shorten_names(self.names(0))} are splits by their"
            " names: hsat reads split/class/patch, so put them above the classes, or write a table and call"
            f" read_csv({str(self.folder)!r}, 'TABLE.csv', columns={columns!r}) {GIVE}"
        )

    def _by_file_names(self) -> str:
        pattern = "THE_PATIENT_IS_(WHAT_STANDS_IN_BRACKETS)"
        options = ", split_folders=True" if self.is_split else ""
        return (
            f"call read_class_folders({str(self.folder)!r}, patient={pattern!r}{options}) {GIVE}, with your own regular"
            " expression"
        )

    def _people(self) -> str:
        """Patients or slides where classes are looked for."""
        if not self.starts_with_people or self.has_classes_of_people:
            return ""
        split, columns = "{split}/" if self.is_split else "", {"class": "label", "slide": "slide_id"}
        if self.below > 1:
            columns = {"class": "label", "patient": "case_id", "slide": "slide_id"}
        if self.is_split:
            columns["split"] = "split"
        folders = {1: "{slide}", 2: "{patient}/{slide}"}.get(self.below, "{patient}/.../{slide}")
        if self.below == 2 and self._has_few_inner_names():
            columns, folders = {"class": "label", "patient": "patient", "split": "split"}, "{patient}/{class}"
        layout = "folders" if self.below == 3 else "class_folders"
        options = ", split_folders=True" if self.is_split else ""
        if self.below == 2:
            options += f", patient={PATIENT_BELOW_SPLIT if self.is_split else PATIENT_FOLDER!r}"
        text = (
            f"the folders {shorten_names(self.names(0))} {'of patches ' * (self.below == 1)}are named as patients or"
            " slides are, not as classes: write a table with a row for each of them and call"
            f" read_csv({str(self.folder)!r}, 'TABLE.csv', columns={columns!r},"
            f" path_template='{split}{folders}/*.png') {GIVE}"
        )
        if folders.endswith("{class}"):
            return text
        return f"{text}; if they are classes, call read_{layout}({str(self.folder)!r}{options}) {GIVE}"

    def _slides(self) -> str:
        """Several slides of one person where patients are looked for."""
        if self.below < 2 or not (several := names_of.slides_of_one(self.names(1))):
            return ""
        own = PATIENT_BELOW_SPLIT if self.is_split else PATIENT_FOLDER
        as_patients = self._classes(patient=own) if self.below == 2 else self._folders()
        as_slides = self._classes(patient=names_of.person_pattern(several), slide=own)
        return (
            f"the folders {shorten_names(several)}, where patients are looked for, are slides of one person by their"
            f" names: call {as_slides} {GIVE}; if they are different people, call {as_patients} {GIVE}"
        )

    def _classes(self, **options: str) -> str:
        """The call of `read_class_folders` for this folder."""
        listed = "".join(f", {name}={value!r}" for name, value in options.items())
        return f"read_class_folders({str(self.folder)!r}{listed}{', split_folders=True' * self.is_split})"

    def _folders(self) -> str:
        return f"read_folders({str(self.folder)!r}{', split_folders=True' * self.is_split})"

    def _no_classes(self) -> str:
        """First folders that may be splits or collections, and second ones that may be classes."""
        inner = self.names(1)
        listed = f"{shorten_names(self.names(0))} hold the folders {shorten_names(inner)}"
        shared = names_of.repeated(self.within(1))
        if shared and not all(map(names_of.ID.search, shared)):
            return f"{listed}, some of them in several, so that the first level may be splits. {self._choices()}"
        if inner and not any(re.search(r"\d", name) for name in inner):
            no_number = "none of which has a number as patients have, so that these may be classes"
            return f"{listed}, {no_number}. {self._choices()}"
        return ""

    def _choices(self) -> str:
        root = str(self.folder)
        if self.below == 2:
            splits = f"read_class_folders({root!r}, split_folders=True)"
            patients = f"read_class_folders({root!r}, patient={PATIENT_FOLDER!r})"
            order = "collection/class/patch"
        else:
            splits = f"read_class_folders({root!r}, split_folders=True, patient={PATIENT_BELOW_SPLIT!r})"
            patients, order = f"read_folders({root!r})", "collection/class/patient/patch"
        return (
            f"If they are {order}, call {splits} {GIVE}, after .with_split(), or rename the first folders to train and"
            f" val; if they are class and patient, call {patients} {GIVE}"
        )
