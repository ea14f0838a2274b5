"""What all readers of folders and tables do with their rows before they are a cohort."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from hsat.data.cohort import Cohort, PatchKind
from hsat.data.paths import shorten_names
from hsat.data.readers import probe_kind
from hsat.data.records import PatchRecord, check_records, sorted_classes
from hsat.types.names import DIFFERENCE, alike_names, name_notes

Mixed = Literal["keep", "error", "drop_minority"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
"""Whole slides: pictures of 10,000s of pixels that are cut into patches first."""
TILE_FIRST = (
    "whole slides are cut into patches first, as by CLAM's create_patches_fp.py, TRIDENT, QuPath or"
    " openslide.deepzoom; then read the folder of patches"
)
_TIFF = frozenset({".tif", ".tiff"})
_PROBED = 3


@dataclass
class Rows:
    """Rows on their way to a cohort, and what was left out or found.

    Attributes:
        records: The rows.
        places: Where each stands, for messages.
        notes: For the cohort.
        slide_labels, patient_labels: See `Cohort`.
    """

    records: list[PatchRecord]
    places: list[str]
    notes: list[str] = field(default_factory=list)
    slide_labels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    patient_labels: Mapping[str, str] = field(default_factory=dict)

    def cohort(
        self,
        root: Path,
        *,
        kind: PatchKind | None,
        class_names: Sequence[str] | None,
        mixed: Mixed,
        allow_links: bool,
    ) -> Cohort:
        """The cohort of these rows; ValueError, with the place, for what it refuses."""
        self._settle_mixed(mixed)
        stated = {*self.slide_labels.values(), *self.patient_labels.values()}
        names = tuple(sorted({*sorted_classes(self.records), *stated})) if class_names is None else tuple(class_names)
        check_records(self.records, names, where=self.places.__getitem__)
        self.notes += warn_of_names(self.records)
        kind = self._kind(root, allow_links) if kind is None else kind
        return Cohort(
            root=root,
            records=self.records,
            class_names=names,
            kind=kind,
            notes=self.notes,
            allow_links=allow_links,
            slide_labels=self.slide_labels,
            patient_labels=self.patient_labels,
        )

    def _settle_mixed(self, mixed: Mixed) -> None:
        """Keep or drop patches of patients with several classes, and say so."""
        if mixed not in get_args(Mixed):
            raise ValueError(f"mixed must be one of {', '.join(map(repr, get_args(Mixed)))}; got {mixed!r}")
        counts: dict[str, Counter[str]] = {}
        for row in self.records:
            counts.setdefault(row.patient, Counter())[row.class_name] += 1
        several = [patient for patient, classes in counts.items() if len(classes) > 1]
        if not several:
            return
        if mixed == "keep":
            self.notes.append(
                f"{len(several)} of {len(counts)} patients have patches of several classes, such as {several[0]!r}:"
                " labels belong to patches, and patients stay whole"
            )
            return
        if mixed == "error":
            first: dict[str, str] = {}
            for row, place in zip(self.records, self.places, strict=True):
                if row.patient == several[0]:
                    first.setdefault(row.class_name, place)
            named = " and ".join(f"{name!r} ({place})" for name, place in first.items())
            raise ValueError(
                f"patient {several[0]!r} is in several classes, {named}; {len(several)} patients are."
                " Pass mixed='keep' if labels belong to patches, mixed='drop_minority' to keep each patient's most"
                " frequent class, or rename if they are different patients"
            )
        main = {patient: min(counts[patient], key=lambda name: (-counts[patient][name], name)) for patient in several}
        kept = [i for i, row in enumerate(self.records) if main.get(row.patient, row.class_name) == row.class_name]
        message = (
            f"{len(self.records) - len(kept)} patches of {len(several)} patients with several classes:"
            f" {shorten_names(several)}"
        )
        self.records, self.places = [self.records[i] for i in kept], [self.places[i] for i in kept]
        self.notes.append(f"left out: {message}")
        warnings.warn(f"left out {message}; the patches of each patient's most frequent class are kept", stacklevel=4)

    def _kind(self, root: Path, allow_links: bool) -> PatchKind:
        """What the first TIFF files hold; where they cannot be read, "srh" if all files are TIFF."""
        tiff = [os.path.splitext(row.path)[1].lower() in _TIFF for row in self.records]
        if not any(tiff):
            return "rgb"
        first = [row.path for row, is_tiff in zip(self.records, tiff, strict=True) if is_tiff][:_PROBED]
        kinds = {name: probe_kind(root, name, allow_links=allow_links) for name in first}
        known = {kind for kind in kinds.values() if kind is not None}
        if len(known) > 1:
            raise ValueError(
                f"the first TIFF files are of different kinds: {kinds}; pass kind='rgb' or kind='srh', or keep them in"
                " cohorts of their own"
            )
        kind: PatchKind = known.pop() if known else "srh"
        if kind == "srh" and not all(tiff):
            raise ValueError(
                "some patches are TIFF and some are not, so their kind is not clear;"
                " pass kind='rgb' if all are 8-bit colour, or keep SRH patches in a cohort of their own"
            )
        found = "two 16-bit planes" if kind == "srh" else "8-bit colour"
        if any(kinds.values()):
            self.notes.append(f"kind {kind!r}: the first TIFF files hold {found}")
        return kind


def warn_of_names(records: Sequence[PatchRecord]) -> list[str]:
    """Warn of names that a table may not mean.

    That is ids or classes that differ only in case, spaces, Unicode form or leading zeros, numbers that a program
    turned into decimals ("4.0"), and names that say that they are missing.

    Args:
        records: The rows.

    Returns:
        The warnings, as notes.
    """
    columns: dict[str, dict[str, None]] = {
        "patient": dict.fromkeys(row.patient for row in records),
        "class": dict.fromkeys(row.class_name for row in records),
    }
    notes = [note for name, values in columns.items() for note in name_notes(name, values)]
    slides: dict[str, dict[str, None]] = {}
    for row in records:
        slides.setdefault(row.patient, {})[row.slide] = None
    alike = [(patient, pair) for patient, names in slides.items() for pair in alike_names(names)]
    if alike:
        patient, pair = alike[0]
        notes.append(f"slides {pair[0]!r} and {pair[1]!r} of patient {patient!r} differ only in {DIFFERENCE}")
    for note in notes:
        cure = "; if they are the same, write them alike" if DIFFERENCE in note else ""
        warnings.warn(f"{note}{cure}", stacklevel=5)
    return notes
