"""A synthetic cohort on disk: tissue-like two-channel patches in the OpenSRH folder layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsat.data.textures import TISSUES, draw_variation, paint_patch

VERSION = 1  # of the pictures: raise it whenever the same settings would give other bytes
SETTINGS = Path("meta", "synthetic.json")
CLASSES = ("hgg", "lgg", "mening", "metast", "normal")
PATIENTS = {"hgg": 12, "lgg": 9, "mening": 8, "metast": 6, "normal": 10, "pituitary": 7, "schwannoma": 6}
PATIENT_STRENGTH, SLIDE_STRENGTH = 1.0, 0.6  # of the variation from patient to patient, and between their slides


class _Patient(NamedTuple):
    name: str
    class_name: str
    number: int  # within the class, from 0
    split: str


def write_synthetic_cohort(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    patients_per_class: int | Mapping[str, int] | None = None,
    slides: int = 2,
    patches: int = 8,
    size: int = 48,
    val_fraction: float = 0.3,
) -> Path:
    """Write a cohort of painted tissue as an OpenSRH folder, and return its root.

    The folder holds meta/opensrh.json, meta/train_val_split.json, meta/synthetic.json (these settings) and
    studies/<patient>/<slide>/patches/<patient>-<slide>-<r0>_<r1>_<c0>_<c1>.tif with uint16 planes (2, size, size),
    CH2 and CH3.  Nothing real is in it: it is for demonstrations and tests, where classes differ by marks that an
    attack of 8 grey levels cannot wipe out (density, size and shape of cells, fibres, brightness of the ground) and
    by a faint fine texture that it can; patients and slides differ by stain, gain, light and density.

    The same settings give the same bytes (on one version of numpy); a patient's pictures depend on seed, class and
    number alone, not on how many others there are.  The folder appears whole or not at all; when `root` already holds
    the cohort of the same settings it is kept.

    Args:
        root: The folder to write.
        seed: Of all pictures.
        classes: Names among TISSUES (hsat.data.textures).
        patients_per_class: One number for all, or a mapping that names every class; None takes unequal numbers of ours.
        slides: Per patient.
        patches: Per slide.
        size: Side of a patch in pixels, at least 16; the field of view does not change with it.
        val_fraction: The share of each class's patients held out, rounded, yet at least one patient on either side; 0
            holds out none.

    Returns:
        The root.

    Raises:
        ValueError: Impossible settings, or a cohort of other settings in `root`.
        FileExistsError: Something else is in `root`.
    """
    root = Path(root)
    counts = _patient_counts(classes, patients_per_class)
    _check_numbers(seed=seed, slides=slides, patches=patches, size=size, val_fraction=val_fraction, counts=counts)
    settings: dict[str, Any] = {
        "generator": "hsat.data.write_synthetic_cohort",
        "version": VERSION,
        "seed": int(seed),
        "patients_per_class": counts,
        "slides": slides,
        "patches": patches,
        "size": size,
        "val_fraction": val_fraction,
    }
    if _is_there(root, settings):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        # One level below: mkdtemp makes a private folder, the cohort should have the user's ordinary permissions.
        _write(working / "cohort", settings)
        try:
            (working / "cohort").replace(root)
        except OSError:
            if not _is_there(root, settings):  # else another process wrote the same cohort meanwhile
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return root


def _patient_counts(classes: Sequence[str], patients: int | Mapping[str, int] | None) -> dict[str, int]:
    """Patients of each class, in the order of `classes`."""
    if isinstance(classes, str):
        raise TypeError(f"classes must be a sequence of names, got the text {classes!r}; write ({classes!r},)")
    unknown = [name for name in classes if name not in TISSUES]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be different names out of {', '.join(TISSUES)}; got {tuple(classes)}")
    if isinstance(patients, Mapping):
        if set(patients) != set(classes):
            raise ValueError(
                f"patients_per_class names {sorted(patients)} but classes are {sorted(classes)};"
                " give a number of patients to each class"
            )
        return {name: patients[name] for name in classes}
    return {name: PATIENTS[name] if patients is None else patients for name in classes}


def _check_numbers(
    *, seed: int, slides: int, patches: int, size: int, val_fraction: float, counts: Mapping[str, int]
) -> None:
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction must lie in [0, 1), the share of held-out patients; got {val_fraction}")
    least = 2 if val_fraction else 1
    per_class = {f"patients_per_class[{name!r}]": (count, least) for name, count in counts.items()}
    for name, (value, low) in {
        "seed": (seed, 0),
        "slides": (slides, 1),
        "patches": (patches, 1),
        "size": (size, 16),
        **per_class,
    }.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < low:
            why = f", one to train on and one to hold out (val_fraction={val_fraction})" if name in per_class else ""
            raise ValueError(f"{name} must be at least {low}{why if low == 2 else ''}; got {value}")


def _is_there(root: Path, settings: Mapping[str, Any]) -> bool:
    """Whether root holds the whole cohort of these settings; False when nothing is there; errors for all else."""
    if not root.exists() and not root.is_symlink():
        return False
    if not root.is_dir():
        raise FileExistsError(f"{root} exists and is not a folder; it is left untouched")
    if not (root / SETTINGS).is_file():
        if any(root.iterdir()):
            raise FileExistsError(
                f"{root} holds other files and no {SETTINGS.as_posix()}; it is left untouched, choose another root"
            )
        return False
    present = _read_settings(root / SETTINGS)
    if present != settings:
        differing = sorted(key for key in {*present, *settings} if present.get(key) != settings.get(key))
        listed = "; ".join(f"{key} {present.get(key)!r} there, {settings.get(key)!r} wanted" for key in differing)
        raise ValueError(
            f"{root} holds a synthetic cohort of other settings ({listed}); remove it or choose another root"
        )
    missing = [
        path for patient in _patients(settings) for path in _paths(patient, settings) if not (root / path).is_file()
    ]
    if missing:
        raise ValueError(
            f"the synthetic cohort in {root} lacks {len(missing)} of its files, first {missing[0]};"
            " remove the folder and it will be written anew"
        )
    return True


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        settings = error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not the settings of a synthetic cohort ({settings}); remove the folder")
    return settings


def synthetic_patient_name(number: int) -> str:
    """The name of a patient of any synthetic cohort, counted from 1."""
    return f"SYN_{number:03d}"


def _patients(settings: Mapping[str, Any]) -> Iterator[_Patient]:
    """All patients in order; of each class the last ones are held out."""
    total = 0
    for class_name, count in settings["patients_per_class"].items():
        held_out = round(settings["val_fraction"] * count)
        if settings["val_fraction"]:
            held_out = min(max(held_out, 1), count - 1)
        for number in range(count):
            total += 1
            yield _Patient(
                synthetic_patient_name(total), class_name, number, "train" if number < count - held_out else "val"
            )


def _paths(patient: _Patient, settings: Mapping[str, Any]) -> Iterator[str]:
    for slide in range(settings["slides"]):
        for patch in range(settings["patches"]):
            yield _path(patient, slide, patch, settings)


def _path(patient: _Patient, slide: int, patch: int, settings: Mapping[str, Any]) -> str:
    """Where a patch lies below the root; patches of a slide stand in rows of four."""
    size = settings["size"]
    top, left = size * (patch // 4), size * (patch % 4)
    place = f"{top}_{top + size}_{left}_{left + size}"
    return f"studies/{patient.name}/{slide + 1}/patches/{patient.name}-{slide + 1}-{place}.tif"


def _write(root: Path, settings: Mapping[str, Any]) -> None:
    meta: dict[str, Any] = {}
    split: dict[str, list[str]] = {"train": [], "val": []}
    for patient in _patients(settings):
        listed = "normal_patches" if patient.class_name == "normal" else "tumor_patches"
        slides: dict[str, Any] = {}
        for slide in range(settings["slides"]):
            kinds: dict[str, Any] = {"tumor_patches": [], "normal_patches": [], "nondiagnostic_patches": []}
            kinds[listed] = [_path(patient, slide, patch, settings) for patch in range(settings["patches"])]
            slides[str(slide + 1)] = {"slide_id": f"{patient.name}-{slide + 1}", **kinds}
        meta[patient.name] = {"patient_id": patient.name, "class": patient.class_name, "slides": slides}
        split[patient.split].append(patient.name)
        _paint_patient(root, patient, settings)
    for name, content in (("opensrh", meta), ("train_val_split", split), ("synthetic", settings)):
        path = root / "meta" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def _paint_patient(root: Path, patient: _Patient, settings: Mapping[str, Any]) -> None:
    import tifffile

    def rng(slide: int = 0, patch: int = 0) -> np.random.Generator:
        # Five words always: numpy pads short seeds with zeros, so (a, b) and (a, b, 0) would be one stream.
        return np.random.default_rng((class_index, patient.number, slide, patch, settings["seed"]))

    class_index = tuple(TISSUES).index(patient.class_name)
    of_patient = draw_variation(rng(), strength=PATIENT_STRENGTH)
    for slide in range(settings["slides"]):
        of_slide = draw_variation(rng(slide + 1), strength=SLIDE_STRENGTH)
        for patch in range(settings["patches"]):
            of_patch = rng(slide + 1, patch + 1)
            planes = paint_patch(TISSUES[patient.class_name], of_patient, of_slide, of_patch, size=settings["size"])
            path = root / _path(patient, slide, patch, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, planes, photometric="minisblack", metadata=None, software=False)
