"""The OpenSRH layout: meta/opensrh.json, meta/train_val_split.json and studies/<patient>/<slide>/patches/*.tif."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hsat.data.cohort import Cohort
from hsat.data.paths import resolve_root, shorten_names
from hsat.data.records import PatchRecord, check_records, sorted_classes
from hsat.data.survey import layout_hint

NORMAL_CLASS = "normal"
PATIENTS_FILE = "meta/opensrh.json"
SPLITS_FILE = "meta/train_val_split.json"
_WORDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def read_opensrh(
    root: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    on_empty: Literal["error", "skip"] = "error",
    unlisted: Literal["skip", "keep", "error"] = "skip",
    allow_links: bool = False,
) -> Cohort:
    """An OpenSRH folder as a Cohort of kind "srh"; rows in order of split file, slide and patch list.

    Of tumour patients the `tumor_patches` are taken, of patients of class "normal" the `normal_patches`;
    `nondiagnostic_patches` never (arXiv:2206.08439 and the published code).  A slide that lists none of the wanted
    kind is left out and stands in the cohort's notes.
    Deliberately unlike the published code: one class list for all splits (there each split numbers its own classes),
    and nothing is dropped in silence.

    Args:
        root: The folder that holds meta/ and studies/.
        class_names: None takes the classes of all splits in alphabetical order.
        on_empty: What to do with a patient without any usable patch: "error", or "skip" with a warning that names them.
        unlisted: What to do with patients whom the split file does not list: "skip" with a warning that names them,
            "keep" without a split, or "error".
        allow_links: See `Cohort`.

    Returns:
        The cohort.

    Raises:
        FileNotFoundError: The root or a meta file is missing.
        ValueError: Malformed JSON, repeated keys, entries of the wrong type, a patient in two splits or listed in the
            split file only (file and place are named), and whatever `Cohort` refuses.
    """
    if on_empty not in ("error", "skip"):
        raise ValueError(f"on_empty must be 'error' or 'skip', got {on_empty!r}")
    if unlisted not in ("skip", "keep", "error"):
        raise ValueError(f"unlisted must be 'skip', 'keep' or 'error', got {unlisted!r}")
    folder = resolve_root(root)
    patients = _Meta(folder / PATIENTS_FILE)
    split_of = _splits(_Meta(folder / SPLITS_FILE), patients)
    notes: list[str] = []
    _add_unlisted(split_of, patients, unlisted, notes)
    records: list[PatchRecord] = []
    empty: list[str] = []
    for patient, split in split_of.items():
        of_patient = list(_patient_records(patients, patient, split, notes))
        records += of_patient
        if not of_patient:
            empty.append(patient)
    _settle_empty(empty, patients.path, on_empty, notes)
    if not records:
        raise ValueError(f"{patients.path} lists no usable patch for any patient of {SPLITS_FILE}")
    names = sorted_classes(records) if class_names is None else tuple(class_names)
    check_records(records, names, where=lambda i: f"{patients.path}, patient {records[i].patient!r}")
    return Cohort(root=folder, records=records, class_names=names, kind="srh", notes=notes, allow_links=allow_links)


@dataclass
class _Meta:
    """A JSON file that must hold an object; look-ups raise errors that name the file and the place."""

    path: Path
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            hint = layout_hint(self.path.parents[1], ("opensrh",))
            raise FileNotFoundError(
                f"{self.path} is missing; an OpenSRH folder has {PATIENTS_FILE} and {SPLITS_FILE}."
                " For class/patient/slide folders call read_folders (layout='folders'), for a manifest read_csv"
                " (layout='csv')" + (f". Here {hint}" if hint else "")
            )
        try:
            content = json.loads(self.path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not valid JSON: {error}") from error
        self.content = self.typed(content, dict, "the whole file")

    def typed(self, value: Any, expected: type, place: str) -> Any:
        if not isinstance(value, expected):
            words = _WORDS[expected]
            raise ValueError(f"{self.path}: {place} must be {words}, got {value!r:.80}")
        return value

    def get(self, entry: Mapping[str, Any], key: str, expected: type, place: str) -> Any:
        if key not in entry:
            raise ValueError(f"{self.path}: {place} has no {key!r}; it has {', '.join(map(repr, entry)) or 'nothing'}")
        return self.typed(entry[key], expected, f"{key!r} of {place}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {twice!r} stands twice in one object, and only one of them could be used")
    return entry


def _splits(meta: _Meta, patients: _Meta) -> dict[str, str]:
    """Patient -> split, in the order of the split file."""
    split_of: dict[str, str] = {}
    for split in meta.content:
        for i, patient in enumerate(meta.get(meta.content, split, list, "the split file")):
            meta.typed(patient, str, f"entry {i} of split {split!r}")
            if patient in split_of:
                where = (
                    f"twice in {split!r}" if split_of[patient] == split else f"in {split_of[patient]!r} and {split!r}"
                )
                raise ValueError(
                    f"{meta.path}: patient {patient!r} is listed {where}; a patient belongs to one split only"
                )
            split_of[patient] = split
    unknown = [patient for patient in split_of if patient not in patients.content]
    if unknown:
        raise ValueError(f"{meta.path} lists patients whom {patients.path} does not have: {shorten_names(unknown)}")
    return split_of


def _add_unlisted(split_of: dict[str, str], patients: _Meta, unlisted: str, notes: list[str]) -> None:
    missing = [patient for patient in patients.content if patient not in split_of]
    if not missing:
        return
    if unlisted == "keep":
        split_of.update(dict.fromkeys(missing, ""))
        return
    message = f"patients of {PATIENTS_FILE} in no split of {SPLITS_FILE}: {', '.join(missing)}"
    if unlisted == "error":
        raise ValueError(f"{message}; list them, or pass unlisted='skip' or unlisted='keep'")
    notes.append(f"left out: {message}")
    warnings.warn(f"{message}; they are left out (unlisted='keep' takes them without a split)", stacklevel=3)


def _settle_empty(empty: list[str], path: Path, on_empty: str, notes: list[str]) -> None:
    if not empty:
        return
    message = f"{path} lists no usable patch for patients {', '.join(empty)}"
    if on_empty == "error":
        raise ValueError(f"{message}; take them out of the meta files, or pass on_empty='skip'")
    notes.append(f"left out: {message}")
    warnings.warn(f"{message}; they are left out", stacklevel=3)


def _patient_records(meta: _Meta, patient: str, split: str, notes: list[str]) -> Iterator[PatchRecord]:
    entry = meta.get(meta.content, patient, dict, "the whole file")
    place = f"patient {patient!r}"
    class_name = meta.get(entry, "class", str, place)
    listed = "normal_patches" if class_name == NORMAL_CLASS else "tumor_patches"
    slides = meta.get(entry, "slides", dict, place)
    for slide in slides:
        here = f"slide {slide!r} of {place}"
        paths = meta.get(meta.get(slides, slide, dict, f"the slides of {place}"), listed, list, here)
        if not paths:
            notes.append(f"left out: {here} lists no {listed}")
        for i, path in enumerate(paths):
            meta.typed(path, str, f"entry {i} of {listed!r} of {here}")
            yield PatchRecord(path, class_name, patient, slide, split)
