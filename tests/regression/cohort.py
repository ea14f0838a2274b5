"""Write the two synthetic cohorts of the comparison below the folder `out`: SRH by hsat, colour patches by numpy.

Run with the Python and the hsat of a checkout: python cohort.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hsat.data import write_synthetic_cohort

SIZE = 32


def write_colour_patches(root: Path) -> None:
    """RGB PNGs as class/patient/slide/patch.png: pink ground, dark nuclei, more of them in one class."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for number in range(8):
        tumour = number % 2
        for patch in range(4):
            pixels = np.full((SIZE, SIZE, 3), (225.0, 170.0, 200.0)) + rng.normal(0, 6, (SIZE, SIZE, 3))
            for _ in range(rng.integers(5, 9) + 6 * tumour):
                row, column = rng.integers(0, SIZE, 2)
                pixels[(rows - row) ** 2 + (columns - column) ** 2 < 6] = (95.0, 60.0, 140.0)
            path = root / ("normal", "tumour")[tumour] / f"p{number}" / "s1" / f"{patch}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    write_synthetic_cohort(
        "out/srh", classes=("hgg", "lgg", "normal"), patients_per_class=4, slides=2, patches=3, size=SIZE, seed=0
    )
    write_colour_patches(Path("out/colour"))
