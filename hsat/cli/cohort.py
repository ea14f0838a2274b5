"""From data settings to a cohort with a training and a validation split."""

from __future__ import annotations

from pathlib import Path

from hsat.cli.options import DataSettings, EvaluationDataSettings, say
from hsat.data import Cohort, PatchStore, read_cohort, read_opensrh, write_patch_store, write_synthetic_cohort

SYNTHETIC = Path("runs/synthetic")


def open_cohort(data: DataSettings | EvaluationDataSettings, *, seed: int = 0) -> Cohort:
    """The user's cohort, or the synthetic one where no root is given; split by patient if it has no split of its own.

    Bad data ends the program with the reason: missing folders, unreadable tables, patients in two splits.
    """
    try:
        cohort = _read(data, seed)
        if not cohort.splits:
            cohort = cohort.with_split(val_fraction=data.val_fraction, seed=data.split_seed)
        for split in ("train", "val"):
            cohort.rows(split)
        cohort.check_files()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    for note in cohort.notes:
        say(f"note: {note}")
    return cohort


def _read(data: DataSettings | EvaluationDataSettings, seed: int) -> Cohort:
    if data.root is None:
        root = write_synthetic_cohort(Path(f"{SYNTHETIC}-{seed}"), seed=seed)
        say(f"no --data.root: using the synthetic cohort in {root}")
        return read_opensrh(root)
    return read_cohort(data.root, data.layout, manifest=data.manifest)


def open_store(cohort: Cohort, data: DataSettings, *, out: Path) -> PatchStore | None:
    """The cohort packed in --data.packed, made where it is not there yet.

    "auto" is a folder beside the run, named by paths and sizes of the cohort's files: runs of one cohort share it, also
    under other splits.

    Args:
        cohort: The patches.
        data: Options.
        out: The run folder.

    Returns:
        The store; None where --data.packed is not given.
    """
    if data.packed is None:
        return None
    folder = data.packed
    if folder == "auto":
        folder = out.parent / f"packed-{_files_named(cohort)}"
    return write_patch_store(cohort, folder, on_bad="raise" if data.on_bad == "raise" else "record", wait=True)


def _files_named(cohort: Cohort) -> str:
    """The beginning of the fingerprint that the cohort has without its splits."""
    records = [record._replace(split="") for record in cohort.records]
    plain = Cohort(root=cohort.root, records=records, class_names=cohort.class_names, kind=cohort.kind)
    return plain.fingerprint()[:12]


def describe(cohort: Cohort) -> str:
    """Patients, slides and patches of each split, in a line each."""
    lines = []
    for split, classes in cohort.summary().items():
        counts = {unit: sum(c[unit] for c in classes.values()) for unit in ("patients", "slides", "patches")}
        per_class = ", ".join(f"{name} {c['patches']}" for name, c in classes.items())
        lines.append(
            f"{split or 'no split'}: {counts['patients']} patients, {counts['slides']} slides,"
            f" {counts['patches']} patches ({per_class})"
        )
    return "\n".join(lines)
