"""How large the patches of a cohort are, from the heads of their files."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np

from hsat.data.cohort import Cohort


def count_sizes(cohort: Cohort, *, most: int | None = None) -> Counter[tuple[int, int]]:
    """How many patches have each size; files that cannot be read are left to those who read them.

    Args:
        cohort: The patches.
        most: Look at this many files, evenly spread; at all by default.

    Returns:
        Counts by (height, width).
    """
    from PIL import Image

    rows = range(len(cohort)) if most is None or most >= len(cohort) else np.linspace(0, len(cohort) - 1, most)
    sizes = Counter[tuple[int, int]]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of damaged files, too
        for row in rows:
            try:
                with Image.open(cohort.path(int(row))) as image:
                    sizes[image.height, image.width] += 1
            except (OSError, ValueError, SyntaxError):
                continue
    return sizes
