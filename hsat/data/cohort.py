"""The table of patients, slides and patches that data comes from: the one source of ids, labels, classes and splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, SkipValidation

from hsat.data.files import check_inside, existing_root, file_sizes
from hsat.data.numbering import numbered, read_only
from hsat.data.records import PatchRecord, as_record, check_records

__all__ = ["Cohort", "PatchRecord"]

Layout = Literal["opensrh", "folders", "csv"]


class Cohort(BaseModel):
    """All patches of a study; row i of every array belongs to records[i].  Frozen; checked once, when made.

    root: an existing folder; kept absolute.  records: PatchRecord rows, or tuples of their fields.
    class_names: one list for all splits; the position in it is the label.  It is deliberately not made per split: the
    published code numbers the classes that a split happens to hold, and so compares different numbers when a class is
    absent from one of them.
    kind: "srh" (two-plane 16-bit TIFF) or "rgb" (8-bit colour).  notes: what the reader left out, in words.
    allow_links: a link may lead to a file outside the root; otherwise that is an error where the path is used.  Pass it
    only for folders whose links are your own: whatever they point to is read.

    Raises FileNotFoundError or NotADirectoryError for the root, ValueError or TypeError for records that break a
    rule of `hsat.data.records.check_records` (unique safe relative paths; one split and one class per patient; known
    classes; nothing empty).  Files are not opened: see `check_files`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    root: Path
    records: Annotated[tuple[PatchRecord, ...], SkipValidation]
    class_names: tuple[str, ...]
    kind: Literal["srh", "rgb"]
    notes: tuple[str, ...] = ()
    allow_links: bool = False

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        records: Iterable[PatchRecord],
        class_names: Sequence[str],
        kind: Literal["srh", "rgb"],
        notes: Iterable[str] = (),
        allow_links: bool = False,
    ) -> None:
        folder = existing_root(root)
        if kind not in ("srh", "rgb"):
            raise ValueError(f"kind must be 'srh' (two-plane 16-bit TIFF) or 'rgb' (8-bit colour), got {kind!r}")
        rows = tuple(map(as_record, records))
        # Before pydantic, so that a caller's mistake is a plain ValueError and not a wrapped one.
        check_records(rows, class_names)
        super().__init__(
            root=folder,
            records=rows,
            class_names=tuple(class_names),
            kind=kind,
            notes=tuple(notes),
            allow_links=allow_links,
        )

    @classmethod
    def from_opensrh(cls, root: str | os.PathLike[str], **options: Any) -> Cohort:
        """Read an OpenSRH folder; options as in `hsat.data.opensrh.read_opensrh`."""
        from hsat.data.opensrh import read_opensrh

        return read_opensrh(root, **options)

    @classmethod
    def from_folders(cls, root: str | os.PathLike[str], **options: Any) -> Cohort:
        """Read class/patient/slide/patch folders; options as in `hsat.data.layouts.read_folders`."""
        from hsat.data.layouts import read_folders

        return read_folders(root, **options)

    @classmethod
    def from_csv(
        cls, root: str | os.PathLike[str], manifest: str | os.PathLike[str] = "manifest.csv", **options: Any
    ) -> Cohort:
        """Read a CSV manifest (path, class, patient, slide[, split]); options as in `hsat.data.layouts.read_csv`."""
        from hsat.data.layouts import read_csv

        return read_csv(root, manifest, **options)

    @classmethod
    def read(cls, root: str | os.PathLike[str], layout: Layout = "opensrh", **options: Any) -> Cohort:
        """Read a cohort in any of the layouts; the options are those of the layout's own reader."""
        readers = {"opensrh": cls.from_opensrh, "folders": cls.from_folders, "csv": cls.from_csv}
        if layout not in readers:
            raise ValueError(f"layout must be one of {', '.join(map(repr, readers))}; got {layout!r}")
        return readers[layout](root, **options)

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
        return read_only(np.arange(len(self.records), dtype=np.int64))

    @cached_property
    def label(self) -> np.ndarray:
        """(n,) int64 positions in class_names."""
        index = {name: i for i, name in enumerate(self.class_names)}
        return read_only(np.fromiter((index[row.class_name] for row in self.records), np.int64, len(self.records)))

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
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in order of first appearance; empty when no record has one."""
        return tuple(name for name in self._split_codes[1] if name)

    @cached_property
    def _slides(self) -> tuple[np.ndarray, tuple[tuple[str, str], ...]]:
        return numbered([(row.patient, row.slide) for row in self.records])

    @cached_property
    def _patients(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return numbered([row.patient for row in self.records])

    @cached_property
    def _split_codes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        return numbered([row.split for row in self.records])

    @cached_property
    def _checked_folders(self) -> dict[str, None]:
        return {}

    def rows(self, split: str | None = None) -> np.ndarray:
        """Row numbers of a split, (m,) int64 in cohort order; None means every row, also those without a split."""
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

    def check_files(self) -> None:
        """Look at every file once.  Raises FileNotFoundError or ValueError naming the first missing or empty ones."""
        file_sizes(self.root, (row.path for row in self.records), map(self.path, range(len(self))))

    def fingerprint(self, *, verify: bool = False) -> str:
        """SHA-256 (64 hex digits) of what the cohort is; where the root lies plays no part.

        Covers, in order of path: path, size in bytes, class, patient, slide, split and the numeric ids; and the class
        list and the kind.  verify=True reads every file and covers its contents too (the result then differs from
        the one without).  Raises as `check_files` does.
        """
        from hsat.data.fingerprint import cohort_fingerprint

        return cohort_fingerprint(self, verify=verify)

    def with_split(
        self,
        *,
        val_fraction: float = 0.3,
        seed: int = 0,
        names: tuple[str, str] = ("train", "val"),
        of: str | None = None,
    ) -> Cohort:
        """The same patches with a fresh patient-disjoint split, stratified by class; any earlier split is replaced.

        of: divide the patients of this split only, and leave the others where they are; with names=("train", "tune")
        and of="train" some training patients are held out to choose a model by, beside an untouched "val".  It is an
        error then if names[1] has patients already.

        Of each class, round(val_fraction * patients) go to names[1], but at least one and at most all but one; the
        draw depends on the seed, the class's name and its patients' names only.  A class with a single patient stays
        in names[0], with a warning.
        """
        from hsat.data.splitting import split_by_patient

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
        from hsat.data.counts import cohort_counts

        return cohort_counts(self)
