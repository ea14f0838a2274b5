"""How large the patches of a cohort are, from the heads of their files."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np

from hsat.data.cohort import Cohort
from hsat.data.readers import FORMATS, MAX_PIXELS
from hsat.untrusted import open_regular

_ORIENTATION = 0x0112  # the tag that says how a camera was held
_ON_ITS_SIDE = (5, 6, 7, 8)


def count_sizes(cohort: Cohort, *, most: int | None = None) -> Counter[tuple[int, int]]:
    """How many patches have each size, turned as they are read; files that cannot be read are left to those who do.

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
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for row in rows:
            try:
                with (
                    open_regular(cohort.path(int(row)), kind="patch") as file,
                    Image.open(file, formats=FORMATS) as image,
                ):
                    if image.height * image.width > MAX_PIXELS:
                        continue
                    turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE and image.format != "TIFF"
                    sizes[(image.width, image.height) if turned else (image.height, image.width)] += 1
            except Exception:  # decoders raise anything on damaged files; reading the patch says what is wrong
                continue
    return sizes
