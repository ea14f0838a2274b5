"""Whether all ranks of a run have the same data, pixels, weights, settings and software, compared before it begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from hsat.data import BadPatch, Cohort, PatchStore
from hsat.data.readers import read_stored
from hsat.distributed import RanksDisagreeError, gather_objects, world_rank, world_size
from hsat.fingerprints import tensor_bytes

PACKAGES = ("hsat", "torch", "torchvision", "timm", "numpy")
"""Packages whose version decides what a training step computes; other ones show in the pixels that are compared."""

_DIGITS = 12  # of a SHA-256 in a message
_NAMED = 3  # differing entries in a message
_LONGEST = 120  # characters of a value in a message


def assert_same(
    name: str, value: object, *, details: Callable[[], Mapping[str, Any]] | None = None, named: int = _NAMED
) -> None:
    """Raise ValueError, with the same message on every rank, unless all ranks hold an equal value.

    Every rank has to call it, in the same order.  Without several ranks nothing happens.  Only a digest travels while
    the values are equal.

    Args:
        name: what the value is, with its article, for the message: "the step to go on from".
        value: texts, numbers, None, and lists and dicts of them.  Of dicts the entries that differ are named.
        details: makes a finer dict that is compared only where the values differ, to name the first entry that does.
        named: how many differing entries of `value` a message names at most.

    Raises:
        ValueError: the ranks disagree; names them, the thing and both values.
        TypeError: the value holds something else, such as a tensor.
    """
    rank, ranks = world_rank(), world_size()
    text = _text(value, name)
    if ranks == 1:
        return
    digests = gather_objects(hashlib.sha256(text.encode()).hexdigest())
    differing = [other for other in range(ranks) if digests[other] != digests[0]]
    if not differing:
        return
    first = differing[0]
    values = gather_objects(json.loads(json.dumps(value)) if rank in (0, first) else None)
    shown = _difference(values[first], values[0], named=named)
    if details is not None:
        finer = gather_objects(json.loads(json.dumps(details())) if rank in (0, first) else None)
        if difference := _difference(finer[first], finer[0], named=1):
            shown += f"; first difference: {difference}"
    who = f"rank {first}" if len(differing) == 1 else f"ranks {', '.join(map(str, differing))}"
    shown = shown if len(differing) == 1 else f"on rank {first} {shown}"
    verb = "disagrees" if len(differing) == 1 else "disagree"
    raise RanksDisagreeError(
        f"{who} {verb} with rank 0 about {name}: {shown}. All ranks need the same files and options"
    )


def assert_ranks_agree(
    *,
    settings: Mapping[str, Any] | None = None,
    cohort: Cohort | None = None,
    store: PatchStore | None = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    patches: int = 64,
) -> None:
    """Raise ValueError on every rank, naming the first that differs from rank 0 and what differs, unless all agree.

    Call it on every rank with the same arguments before the first step (and before DistributedDataParallel, which
    overwrites the other ranks' weights with those of rank 0).  It may be called several times, as things come to be.
    Without several ranks nothing happens.

    Always compared are the versions of hsat, torch, torchvision, timm and numpy.

    Args:
        settings: texts, numbers, lists and dicts; leave out what may differ, such as paths.
        cohort: its fingerprint (paths, sizes, classes, patients, slides, splits, ids), then the stored pixels of some
            patches, since files of one size may hold different images.  The root may differ.
        store: where the pixels are read in place of the files; what it holds of the cohort is compared as a whole.
        model: every parameter and buffer, bit for bit.
        optimizer: every number in its state, after a resume.
        seed: chooses the patches whose pixels are compared.
        patches: how many of them; 0 compares none.

    Raises:
        ValueError: the ranks disagree.
    """
    if world_size() == 1:
        return
    assert_same("the versions of packages", package_versions(), named=len(PACKAGES))
    if settings is not None:
        assert_same("the settings", dict(settings), named=10)
    if cohort is not None:
        assert_same("the cohort", _summary(cohort), details=lambda: patient_digests(cohort))
        content = "not packed" if store is None else store.content_digest()[:_DIGITS]
        assert_same("the packed patches", content)
        pixels = stored_digests(cohort, store=store, seed=seed, patches=patches)
        assert_same("the pixels of patches", pixels, named=1)
    if model is not None:
        assert_same("the weights", tensor_digests(model.state_dict()), named=1)
    if optimizer is not None:
        assert_same("the state of the optimiser", tensor_digests(optimizer.state_dict()), named=1)


def package_versions() -> dict[str, str]:
    """The versions of `PACKAGES`, as they are installed."""
    versions = dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def stored_digests(cohort: Cohort, *, store: PatchStore | None, seed: int, patches: int) -> dict[str, str]:
    """A digest of the stored integers of some patches, read as training reads them.

    Args:
        cohort: The patches.
        store: Read in place of the files, where given.
        seed: Chooses the patches.
        patches: How many.

    Returns:
        Digests by path.  A patch that cannot be read is "unreadable" here: the training decides what follows.
    """
    count = min(patches, len(cohort))
    rows = np.sort(np.random.default_rng(seed).choice(len(cohort), count, replace=False))
    digests = {}
    for row in map(int, rows):
        path = cohort.records[row].path
        try:
            values = store.stored(row) if store is not None else read_stored(cohort.path(row), kind=cohort.kind)
        except BadPatch:
            digests[path] = "unreadable"
            continue
        digests[path] = _digest(f"{values.dtype.name}{values.shape}".encode(), np.ascontiguousarray(values).data)
    return digests


def tensor_digests(state: object, prefix: str = "") -> dict[str, str]:
    """A digest of every tensor in nested dicts and lists by its dotted name; other values as they are written."""
    if isinstance(state, Mapping):
        entries = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        entries = [(str(number), value) for number, value in enumerate(state)]
    elif isinstance(state, Tensor):
        return {prefix: _digest(f"{state.dtype}{tuple(state.shape)}".encode(), tensor_bytes(state))}
    else:
        return {prefix: repr(state)}
    return {
        name: digest
        for key, value in entries
        for name, digest in tensor_digests(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _summary(cohort: Cohort) -> dict[str, Any]:
    return {
        "patients": len(cohort.patient_names),
        "patches": len(cohort),
        "patches by split": {name: len(cohort.rows(name)) for name in cohort.splits},
        "classes": list(cohort.class_names),
        "kind": cohort.kind,
        "fingerprint": cohort.fingerprint()[:_DIGITS],
    }


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS]


def _text(value: object, name: str) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} cannot be compared between ranks ({error}); give texts, numbers, lists, dicts"
        ) from None


def _difference(value: object, reference: object, *, named: int) -> str:
    """In words what differs, in the order of the reference; "" where nothing does."""
    if not (isinstance(value, dict) and isinstance(reference, dict)):
        return "" if json.dumps(value) == json.dumps(reference) else f"{_shown(value)}, not {_shown(reference)}"
    keys = [
        key
        for key in {**reference, **value}
        if key not in value or key not in reference or json.dumps(value[key]) != json.dumps(reference[key])
    ]
    missing = "absent"
    differences = [
        f"{key} is {_shown(value[key]) if key in value else missing},"
        f" not {_shown(reference[key]) if key in reference else missing}"
        for key in keys[:named]
    ]
    more = [f"and {len(keys) - named} more"] if len(keys) > named else []
    return "; ".join([*differences, *more])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def patient_digests(cohort: Cohort) -> dict[str, str]:
    """What each patient has, in order of first appearance: number of patches and a digest of their rows and sizes.

    Ids play no part, so that a patient who is missing leaves the others as they are; the last entry is the order.
    """
    sizes = cohort.file_sizes()
    rows_of: dict[str, list[int]] = {}
    for i, record in enumerate(cohort.records):
        rows_of.setdefault(record.patient, []).append(i)
    digests = {}
    for patient, rows in rows_of.items():
        lines = sorted(json.dumps([*cohort.records[i], sizes[i]]) for i in rows)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        digests[f"patient {patient!r}"] = f"{digest[:12]} ({len(rows)} patches)"
    paths = "\n".join(record.path for record in cohort.records)
    return digests | {"the order of the patches": hashlib.sha256(paths.encode()).hexdigest()[:12]}
