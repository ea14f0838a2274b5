"""How many neighbours vote where nobody says it."""

from __future__ import annotations

import numpy as np

from hsat.data import Cohort, PatchDataset
from hsat.types import EmbeddingTable

PAPER_K = 200
_SHARE = 20  # of the bank's rows, at least, for each neighbour


def default_k(bank: PatchDataset | EmbeddingTable) -> int:
    """Neighbours where nobody gave a number: 200 for OpenSRH, as published; fewer for other banks.

    A vote of 200 in a small bank is the share of each class in it, whatever the query.  So other banks get
    min(200, smallest class, rows // 20), and at least 1.  The synthetic cohort has the files of OpenSRH and not its
    size, and is one of the others.

    Args:
        bank: The clean training patches, or their table.
    """
    if isinstance(bank, EmbeddingTable):
        label = bank.label
    elif is_opensrh(bank.cohort):
        return PAPER_K
    else:
        label = bank.cohort.label[bank.rows]
    smallest = int(np.unique(label, return_counts=True)[1].min(initial=PAPER_K))
    return min(PAPER_K, smallest, max(1, len(label) // _SHARE))


def explain_default_k(bank: PatchDataset | EmbeddingTable) -> str:
    """The default and where it comes from, in words."""
    k = default_k(bank)
    if isinstance(bank, PatchDataset) and is_opensrh(bank.cohort):
        return f"kNN with k = {k}, as published"
    return f"kNN with k = {k}: one in {_SHARE} of {len(bank)} bank patches, at most the smallest class and {PAPER_K}"


def is_opensrh(cohort: Cohort) -> bool:
    """Whether this is OpenSRH: SRH patches laid out as published, that hsat did not paint."""
    meta = cohort.root / "meta"
    return cohort.kind == "srh" and (meta / "opensrh.json").is_file() and not (meta / "synthetic.json").is_file()
