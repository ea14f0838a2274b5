"""Names at the ends of lines, instead of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_LABELS = 8
_ROOM = 0.36  # of the width of a panel, for the longest name
_NAME = "line-label"  # the group of a name, by which an earlier one is found again


@dataclass(frozen=True)
class LineLabel:
    """The name of a line.

    Attributes:
        text: The name.
        height: Of the end of the line, in units of the axis.
        ink: The colour of the name.
    """

    text: str
    height: float
    ink: str


def labels_fit(panel: Any, labels: Sequence[LineLabel], *, room: float | None = None) -> bool:
    """Whether names have room beside a panel: above each other, and none longer than about a third of its width.

    Args:
        panel: Axes of matplotlib, as wide as they would be without names.
        labels: The names.
        room: Points for the longest name instead of a third of the panel.
    """
    box = panel.get_window_extent()
    points = 72 / panel.figure.dpi
    across = _ROOM * box.width * points if room is None else room
    size = _font_size()
    longest = max((text_width(label.text, size) for label in labels), default=0.0)
    return len(labels) <= MOST_LABELS and longest <= across and 1.2 * size * len(labels) <= box.height * points


def place_labels(panel: Any, labels: Sequence[LineLabel]) -> None:
    """Write names at the right edge, moved apart where they would overlap; names from an earlier call are moved.

    Args:
        panel: Axes of matplotlib with their final limits.
        labels: The names.
    """
    for text in [text for text in panel.texts if text.get_gid() == _NAME]:
        text.remove()
    if not labels:
        return
    ordered = sorted(labels, key=lambda label: label.height)
    size = _font_size()
    low, high = panel.get_ylim()
    gap = (high - low) * 1.2 * size / (72 * panel.get_window_extent().height / panel.figure.dpi)
    heights = spread_heights([label.height for label in ordered], gap, low=low, high=high)
    for label, height in zip(ordered, heights, strict=True):
        panel.annotate(
            label.text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=label.ink,
            fontsize=size,
            annotation_clip=False,
            gid=_NAME,
        )


def spread_heights(
    heights: Sequence[float], gap: float, *, low: float | None = None, high: float | None = None
) -> list[float]:
    """Growing numbers moved so that each is at least `gap` above the last, as little as possible (least squares).

    Args:
        heights: In growing order.
        gap: The least distance of neighbours.
        low, high: Where the first and the last may be at most; without room between them `low` counts.

    Returns:
        As many numbers.
    """
    from sklearn.isotonic import isotonic_regression

    steps = gap * np.arange(len(heights))
    top = None if high is None else high - gap * (len(heights) - 1)
    if top is not None and low is not None:
        top = max(top, low)
    moved = isotonic_regression(np.asarray(heights, dtype=np.float64) - steps, y_min=low, y_max=top)
    return [float(height) for height in moved + steps]


def text_width(text: str, size: float) -> float:
    """The width of a text in points, in matplotlib's own font, which is among the wide ones."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size, prop=FontProperties()).get_extents().width) if text.strip() else 0.0


def _font_size() -> float:
    import matplotlib

    return float(matplotlib.rcParams["font.size"])
