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


def _contents(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
