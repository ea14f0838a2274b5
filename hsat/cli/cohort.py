"""From data settings to a cohort with a training and a validation split."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from hsat.cli.data_options import DataSettings, EvaluationDataSettings, SourceSettings
from hsat.cli.failures import as_typed
from hsat.cli.image_size import say_image_size
from hsat.cli.options import say
from hsat.data import (
    Cohort,
    PatchStore,
    find_cohort,
    find_splits,
    read_cohort,
    read_exclusions,
    read_opensrh,
    rename_splits,
    write_patch_store,
    write_synthetic_cohort,
)
from hsat.data.split_names import describe_unused, split_role
from hsat.quantities import LINE_WIDTH

SYNTHETIC = Path("runs/synthetic")


def open_cohort(data: SourceSettings, *, seed: int = 0) -> Cohort:
    """The user's cohort, or the synthetic one where no root is given; split by patient if it has no split of its own.

    Bad data ends the program with the reason: missing folders, unreadable tables, patients in two splits.
    """
    try:
        cohort = split_settings_cohort(read_settings_cohort(data, seed=seed), data)
        cohort.file_sizes()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {as_typed(str(error))}") from None
    evaluated = isinstance(data, EvaluationDataSettings)
    for note in [*cohort.notes, *(describe_unused(cohort, ("train", "val")) if evaluated else [])]:
        say(f"note: {as_typed(note)}")
    if isinstance(data, DataSettings) and data.root is not None:
        say_image_size(cohort, data.image_size)
    return cohort


def read_settings_cohort(data: SourceSettings, *, seed: int = 0) -> Cohort:
    """The cohort as it lies in its folder, without excluded patches; the synthetic one where no root is given.

    Args:
        data: Options.
        seed: Of the synthetic cohort.

    Returns:
        The cohort, with its own splits or none.

    Raises:
        OSError, ValueError: As the reader of the layout does.
    """
    if data.root is None:
        root = write_synthetic_cohort(Path(f"{SYNTHETIC}-{seed}"), seed=seed)
        say(f"no --data.root: using the synthetic cohort in {root}")
        return read_opensrh(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cohort's notes say the same, and are printed
        if data.layout == "found":
            cohort = find_cohort(data.root, options=data.reader_options())
        else:
            cohort = read_cohort(data.root, data.layout, options=data.reader_options())
    return cohort if data.exclude is None else cohort.without(read_exclusions(data.exclude))


def split_settings_cohort(cohort: Cohort, data: SourceSettings) -> Cohort:
    """The cohort with the splits "train" and "val": its own ones, or split by patient where it has none, or one alone.

    Args:
        cohort: As it was read.
        data: Options; splits names those that are meant, or draws anew; else they are found by their names.

    Returns:
        The cohort.

    Raises:
        ValueError: Splits whose names do not say what they are for.
    """
    if isinstance(data.splits, dict):
        cohort = rename_splits(cohort, data.splits)
    if data.splits == "draw":
        return cohort.with_split(val_fraction=data.val_fraction, seed=data.split_seed)
    train, val = find_splits(cohort.splits)
    if train and val:
        found = {"train": train, "val": val}
        return cohort if found == {"train": "train", "val": "val"} else rename_splits(cohort, found)
    if len(cohort.splits) > 1 or any(not split_role(name) for name in cohort.splits):
        have = ", ".join(map(repr, cohort.splits))
        raise ValueError(
            f"the names of the splits do not say which one to train on and which one to attack; there are {have}:"
            " name them with --data.splits train=NAME,val=NAME, or draw patients anew with --data.splits draw"
        )
    drawn = cohort.with_split(val_fraction=data.val_fraction, seed=data.split_seed)
    if not cohort.splits:
        return drawn
    gone = " once the excluded patches are left out" if data.exclude is not None else ""
    note = f"there is the split {cohort.splits[0]!r} alone{gone}, so that patients to attack were drawn from it"
    options = {name: getattr(drawn, name) for name in type(drawn).model_fields}
    return Cohort(**options | {"notes": (*drawn.notes, note)})


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
    """Patients, slides and patches of each split, in a line of at most `LINE_WIDTH` characters each."""
    lines = []
    for split, classes in cohort.summary().items():
        rows = cohort.rows(split) if split else [i for i, row in enumerate(cohort.records) if not row.split]
        patients, slides = (len(np.unique(ids[rows])) for ids in (cohort.patient, cohort.slide))
        start = f"{split or 'no split'}: {patients} patients, {slides} slides, {len(rows)} patches"
        counts = [f"{name} {c['patches']}" for name, c in classes.items()]
        lines.append(f"{start} ({_fitting(counts, LINE_WIDTH - len(start) - 3)})")
    return "\n".join(lines)


def _fitting(parts: list[str], width: int) -> str:
    """As many parts as a line has room for, and how many classes there are beside them."""
    for shown in range(len(parts), 0, -1):
        text = ", ".join(parts[:shown]) + (f" and {len(parts) - shown} more classes" if shown < len(parts) else "")
        if len(text) <= width:
            return text
    return f"{len(parts)} classes"
