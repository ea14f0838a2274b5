"""What a cohort is, as one number."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from hsat.data.files import file_sizes

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort

_CHUNK = 1 << 20


def cohort_fingerprint(cohort: Cohort, *, verify: bool = False) -> str:
    """SHA-256 of a cohort as hex; see `Cohort.fingerprint`."""
    sizes = file_sizes(cohort.root, (row.path for row in cohort.records), map(cohort.path, range(len(cohort))))
    digest = hashlib.sha256()
    head = {"format": 1, "kind": cohort.kind, "class_names": list(cohort.class_names), "contents": verify}
    digest.update(json.dumps(head, sort_keys=True).encode() + b"\n")
    for i in sorted(range(len(cohort)), key=lambda i: cohort.records[i].path):
        # One JSON list per line keeps neighbouring fields apart whatever characters they hold.
        fields: list[object] = [*cohort.records[i], sizes[i], i, int(cohort.slide[i]), int(cohort.patient[i])]
        if verify:
            fields.append(_contents(str(cohort.path(i))))
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def patient_digests(cohort: Cohort) -> dict[str, str]:
    """What each patient has, in order of first appearance: number of patches and a digest of their rows and sizes.

    Ids play no part, so that a patient who is missing leaves the others as they are; the last entry is the order.
    """
    sizes = file_sizes(cohort.root, (row.path for row in cohort.records), map(cohort.path, range(len(cohort))))
    rows_of: dict[str, list[int]] = {}
    for i, record in enumerate(cohort.records):
        rows_of.setdefault(record.patient, []).append(i)
    found = {}
    for patient, rows in rows_of.items():
        lines = sorted(json.dumps([*cohort.records[i], sizes[i]]) for i in rows)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        found[f"patient {patient!r}"] = f"{digest[:12]} ({len(rows)} patches)"
    paths = "\n".join(record.path for record in cohort.records)
    return found | {"the order of the patches": hashlib.sha256(paths.encode()).hexdigest()[:12]}


def _contents(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
