"""The table of patients, slides and patches that data comes from: the one source of ids, labels, classes and splits.

It knows no file layout: `hsat.data.opensrh` and `hsat.data.layouts` read folders and return a Cohort.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, SkipValidation

from hsat.data.paths import check_inside, file_sizes, name_example, resolve_root
from hsat.data.records import PatchRecord, check_group_labels, check_records, to_record
from hsat.data.splits import split_by_patient
from hsat.files import digest_file

if TYPE_CHECKING:
    from hsat.data.file_check import FileCheck

__all__ = ["Cohort", "PatchKind", "PatchRecord"]

PatchKind = Literal["srh", "rgb"]
Key = TypeVar("Key", bound=Hashable)


class Cohort(BaseModel):
    """All patches of a study; row i of every array belongs to records[i].  Frozen; checked once, when made.

    Args:
        root: An existing folder; kept absolute.
        records: `PatchRecord` rows, or tuples of their fields.
        class_names: One list for all splits; the position in it is the label.  It is deliberately not made per split:
            the published code numbers the classes that a split happens to hold, and so compares different numbers when
            a class is absent from one of them.
        kind: "srh" (two-plane 16-bit TIFF) or "rgb" (8-bit colour).
        notes: What the reader left out, in words.
        allow_links: A link may lead to a file outside the root; otherwise that is an error where the path is used.
            Pass it only for folders whose links are your own: whatever they point to is read.
        slide_labels: The class of slides, by (patient, slide), where a table says it.  Without it a slide is of the
            class that all its patches share, and of none where they differ.
        patient_labels: The class of patients, by name; likewise.

    Raises:
        FileNotFoundError: The root does not exist.
        NotADirectoryError: The root is a file.
        TypeError: A record is no `PatchRecord`.
        ValueError: Records break a rule of `hsat.data.records.check_records` (unique safe relative paths; one split per
            patient; known classes; nothing empty), or a label is given for a slide or patient that the cohort lacks,
            or is no class of it.  Files are not opened: see `check_files`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    root: Path
    records: Annotated[tuple[PatchRecord, ...], SkipValidation]
    class_names: tuple[str, ...]
    kind: PatchKind
    notes: tuple[str, ...] = ()
    allow_links: bool = False
    slide_labels: Annotated[Mapping[tuple[str, str], str], SkipValidation] = {}
    patient_labels: Annotated[Mapping[str, str], SkipValidation] = {}

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        records: Iterable[PatchRecord],
        class_names: Sequence[str],
        kind: PatchKind,
        notes: Iterable[str] = (),
        allow_links: bool = False,
        slide_labels: Mapping[tuple[str, str], str] = {},
        patient_labels: Mapping[str, str] = {},
    ) -> None:
        folder = resolve_root(root)
        if kind not in ("srh", "rgb"):
            raise ValueError(f"kind must be 'srh' (two-plane 16-bit TIFF) or 'rgb' (8-bit colour), got {kind!r}")
        rows = tuple(map(to_record, records))
        # Before pydantic, so that a caller's mistake is a plain ValueError and not a wrapped one.
        check_records(rows, class_names)
        check_group_labels("slide", slide_labels, {(row.patient, row.slide) for row in rows}, class_names)
        check_group_labels("patient", patient_labels, {row.patient for row in rows}, class_names)
        super().__init__(
            root=folder,
            records=rows,
            class_names=tuple(class_names),
            kind=kind,
            notes=tuple(notes),
            allow_links=allow_links,
            slide_labels=dict(slide_labels),
            patient_labels=dict(patient_labels),
        )

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return (
            f"Cohort(root={str(self.root)!r}, kind={self.kind!r}, patients={len(self.patient_names)},"
            f" slides={len(self.slide_names)}, patches={len(self)}, class_names={self.class_names},"
            f" splits={self.splits})"
        )

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        # pydantic's own comparison would compare cached arrays as well, and numpy has no single answer to that.
        if not isinstance(other, Cohort):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)

    def __hash__(self) -> int:
        return hash((self.root, self.class_names, self.kind, len(self.records), self.records[0], self.records[-1]))

    @cached_property
    def patch(self) -> np.ndarray:
        """(n,) int64 patch ids: patch[i] == i."""
        return _locked(np.arange(len(self.records), dtype=np.int64))

    @cached_property
    def label(self) -> np.ndarray:
        """(n,) int64 positions in class_names."""
        index = {name: i for i, name in enumerate(self.class_names)}
        return _locked(np.fromiter((index[row.class_name] for row in self.records), np.int64, len(self.records)))

    @cached_property
    def slide(self) -> np.ndarray:
        """(n,) int64 slide ids: positions in slide_names."""
        return self._slides[0]

    @cached_property
    def slide_names(self) -> tuple[tuple[str, str], ...]:
        """(patient, slide) of every slide, in order of first appearance."""
        return self._slides[1]

    @cached_property
    def patient(self) -> np.ndarray:
        """(n,) int64 patient ids: positions in patient_names."""
        return self._patients[0]

    @cached_property
    def patient_names(self) -> tuple[str, ...]:
        """Every patient, in order of first appearance."""
        return self._patients[1]

    @cached_property
    def slide_label(self) -> np.ndarray | None:
        """(n,) int64, the class of each patch's slide as `slide_labels` says it, -1 where it does not; None without."""
        return self._group_label(self.slide, [self.slide_labels.get(name) for name in self.slide_names])

    @cached_property
    def patient_label(self) -> np.ndarray | None:
        """(n,) int64, the class of each patch's patient as `patient_labels` says it, -1 where it does not."""
        return self._group_label(self.patient, [self.patient_labels.get(name) for name in self.patient_names])

    def _group_label(self, group: np.ndarray, names: Sequence[str | None]) -> np.ndarray | None:
        if not any(names):
            return None
        index = {name: i for i, name in enumerate(self.class_names)}
        return _locked(np.array([-1 if name is None else index[name] for name in names], dtype=np.int64)[group])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in order of first appearance; empty when no record has one."""
        return tuple(name for name in self._split_codes[1] if name)

    @cached_property
    def _slides(self) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
        return _factorize([(row.patient, row.slide) for row in self.records])

    @cached_property
    def _patients(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return _factorize([row.patient for row in self.records])

    @cached_property
    def _split_codes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return _factorize([row.split for row in self.records])

    @cached_property
    def _checked_folders(self) -> dict[str, None]:
        return {}

    def rows(self, split: str | None = None) -> np.ndarray:
        """Row numbers of a split, (m,) int64 in cohort order; None means every row, also those without a split.

        Args:
            split: Name of the split, or None.

        Returns:
            (m,) int64, rising.

        Raises:
            ValueError: For a split that the cohort has not.
        """
        if split is None:
            return self.patch.copy()
        if split not in self.splits:
            have = (
                f"it has {', '.join(map(repr, self.splits))}" if self.splits else "it has none; call with_split() first"
            )
            raise ValueError(f"split {split!r} is not in this cohort; {have}")
        codes, names = self._split_codes
        return np.flatnonzero(codes == names.index(split)).astype(np.int64)

    def path(self, i: int) -> Path:
        """Absolute path of records[i].

        Raises IndexError, or ValueError when a link leads out of the root and allow_links is False.  The file itself
        need not exist.

        Args:
            i: Row of the cohort.

        Returns:
            The path; the file need not exist.
        """
        if not 0 <= i < len(self.records):
            raise IndexError(f"row {i} is outside this cohort of {len(self.records)} patches")
        name = self.records[i].path
        full = f"{self.root}/{name}"
        if self.allow_links:
            return Path(full)
        folder = os.path.dirname(full)
        if folder not in self._checked_folders:
            check_inside(self.root, folder, name)
            self._checked_folders[folder] = None
        if os.path.islink(full):
            check_inside(self.root, full, name)
        return Path(full)

    def check_files(self, *, workers: int | None = None, progress: Callable[[int], object] | None = None) -> FileCheck:
        """Read every file once, in parallel, and list all that is wrong; `hsat check` is this as a command.

        Found are files that cannot be read; equal files (by content), also with contradicting classes; files that look
        like one of another split, or of another patient where there are no splits (64-bit difference hash, at most 3
        bits apart, and thumbnails that agree); files of another size than most; and blank ones.

        Args:
            workers: Threads that read; None takes one per processor.
            progress: Is called with 1 after each file.

        Returns:
            The problems; `without(check.paths())` is the cohort without the files that should not be used.
        """
        from hsat.data.file_check import check_patches

        return check_patches(
            self.records, self.path, kind=self.kind, workers=workers, progress=progress or (lambda _: None)
        )

    def without(self, paths: Iterable[str]) -> Cohort:
        """The cohort without some patches; ids are numbered anew, and the notes say how many were left out.

        Args:
            paths: Relative paths, as `FileCheck.paths` and `read_exclusions` give them.

        Returns:
            A cohort with the same classes.

        Raises:
            ValueError: None of the paths is in the cohort, or all patches are.
        """
        excluded = set(paths)
        records = [row for row in self.records if row.path not in excluded]
        count = len(self) - len(records)
        if excluded and not count:
            raise ValueError(
                f"none of the {len(excluded)} excluded paths{name_example(excluded)} is in the cohort at"
                f" {self.root}; paths are relative to the root, as in {self.records[0].path!r}"
            )
        if not records:
            raise ValueError(f"all {count} patches of the cohort at {self.root} are excluded")
        slides, patients = {(row.patient, row.slide) for row in records}, {row.patient for row in records}
        changed = {
            "records": records,
            "notes": (*self.notes, *([f"left out: {count} excluded patches"] if count else [])),
            "slide_labels": {key: name for key, name in self.slide_labels.items() if key in slides},
            "patient_labels": {key: name for key, name in self.patient_labels.items() if key in patients},
        }
        return Cohort(**{name: getattr(self, name) for name in type(self).model_fields} | changed)

    def file_sizes(self) -> list[int]:
        """Size in bytes of every file, in cohort order, without opening it; see `check_files` for their contents.

        Raises:
            FileNotFoundError: Files are missing; the first ones are named.
            ValueError: Files are empty, not regular, or lead out of the root.
        """
        return file_sizes(self.root, (row.path for row in self.records), map(self.path, range(len(self))))

    def fingerprint(self, *, verify: bool = False) -> str:
        """SHA-256 (64 hex digits) of what the cohort is; where the root lies plays no part.

        It covers, in order of path: path, size in bytes, class, patient, slide, split and the numeric ids; and the
        class list, the kind, and the labels of slides and patients where there are any.

        Args:
            verify: Read every file and cover its contents too; the result then differs from the one without.

        Returns:
            64 hexadecimal digits.

        Raises:
            FileNotFoundError: Files are missing.
            ValueError: Files are empty, or lead out of the root.
        """
        sizes = self.file_sizes()
        digest = hashlib.sha256()
        head = {"format": 1, "kind": self.kind, "class_names": list(self.class_names), "contents": verify}
        digest.update(json.dumps(head, sort_keys=True).encode() + b"\n")
        if self.slide_labels or self.patient_labels:
            groups: list[object] = [sorted(self.slide_labels.items()), sorted(self.patient_labels.items())]
            digest.update(json.dumps(groups).encode() + b"\n")
        for i in sorted(range(len(self)), key=lambda i: self.records[i].path):
            # One JSON list per line keeps neighbouring fields apart whatever characters they hold.
            fields: list[object] = [*self.records[i], sizes[i], i, int(self.slide[i]), int(self.patient[i])]
            if verify:
                fields.append(digest_file(self.path(i)))
            digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()

    def with_split(
        self,
        *,
        val_fraction: float = 0.3,
        seed: int = 0,
        names: tuple[str, str] = ("train", "val"),
        of: str | None = None,
    ) -> Cohort:
        """The same patches with a fresh patient-disjoint split, stratified by class; any earlier split is replaced.

        Of each class, round(val_fraction * patients) go to names[1], but at least one and at most all but one; the
        draw depends on the seed, the class's name and its patients' names only.  A class with a single patient stays
        in names[0], with a warning.
        Where patches of one patient are of several classes, patients are stratified by their set of classes instead
        (sets that one patient alone has form a stratum together).  Of 100 such draws the one is taken that leaves the
        fewest classes without a patient in one of the splits and then comes nearest to val_fraction of each class's
        patches.

        Args:
            val_fraction: The share of each class's patients that is held out.
            seed: Of the draw.
            names: The names of the larger and of the held-out split.
            of: Divide the patients of this split only, and leave the others where they are; with names=("train",
                "tune") and of="train" some training patients are held out to choose a model by, beside an untouched
                "val".

        Returns:
            A cohort with that split.

        Raises:
            ValueError: The options are out of range, or names[1] has patients already although `of` is given.
        """
        if of is not None:
            self.rows(of)  # an unknown split is an error that lists those there are
            if names[1] != of and names[1] in self.splits:
                raise ValueError(f"split {names[1]!r} has patients already; name another, as in names=({of!r}, 'tune')")
        records = split_by_patient(self.records, val_fraction=val_fraction, seed=seed, names=names, of=of)
        return Cohort(**{name: getattr(self, name) for name in type(self).model_fields} | {"records": records})

    def summary(self) -> dict[str, dict[str, dict[str, int]]]:
        """How many patients, slides and patches each class has in each split.

        Nested as [split][class]["patients" | "slides" | "patches"]; the split "" holds rows without one.  Every class
        of class_names is there, also with zeros.
        """
        members: dict[tuple[str, str], tuple[set[int], set[int], set[int]]] = {
            (split, name): (set(), set(), set())
            for split in dict.fromkeys(row.split for row in self.records)
            for name in self.class_names
        }
        for i, row in enumerate(self.records):
            for group, number in zip(
                members[row.split, row.class_name], (int(self.patient[i]), int(self.slide[i]), i), strict=True
            ):
                group.add(number)
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for (split, name), (patients, slides, patches) in members.items():
            numbers = {"patients": len(patients), "slides": len(slides), "patches": len(patches)}
            counts.setdefault(split, {})[name] = numbers
        return counts


def _factorize(keys: Sequence[Key]) -> tuple[np.ndarray, tuple[Key, ...]]:
    """Numbers in order of first appearance, (n,) int64 and read-only, and what they stand for."""
    codes: dict[Key, int] = {}
    numbers = np.fromiter((codes.setdefault(key, len(codes)) for key in keys), np.int64, len(keys))
    return _locked(numbers), tuple(codes)


def _locked(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
