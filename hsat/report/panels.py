"""The panels that figures are drawn into, and the files that figures become.

A figure becomes a file (PNG, PDF or SVG), is drawn into axes of the caller, or is returned as it is.  It has a canvas
of its own: pyplot and the settings of matplotlib stay as they are, and no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hsat.eval import Record
from hsat.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common form of colour blindness, and in grey by their lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
GREY = "#808080"
COLUMN, TEXT_WIDTH = 3.4, 7.1
"""Inches: one column of a paper, and both."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "hsat",
    "text.parse_math": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "grid.linewidth": 0.5,
    "grid.color": "#d9d9d9",
    "axes.axisbelow": True,
}
FORMATS = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""Endings of files, and the metadata that would make each file differ from the last."""


def figure_style() -> AbstractContextManager[object]:
    """The block in which a figure is drawn and saved: text stays text, and a "$" in a name is no formula.

    Sizes are those of print: 8 points beside the text of a paper, for figures as wide as a column or both.
    """
    import matplotlib

    context: AbstractContextManager[object] = matplotlib.rc_context(_STYLE)
    return context


def open_panels(
    columns: int,
    path: str | os.PathLike[str] | None,
    axes: Axes | Sequence[Axes] | None,
    *,
    size: tuple[float, float],
    rows: int = 1,
) -> tuple[Any, list[Any]]:
    """The caller's axes and their figure, or those of a new figure with its own canvas.

    Raises:
        ValueError: For both a path and axes, for a path of another format, and for another number of axes.
    """
    if axes is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if path is not None and Path(path).suffix.lower() not in FORMATS:
            raise ValueError(f"a figure is a {', '.join(FORMATS)} file, got {os.fspath(path)!r}")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())
    if path is not None:
        raise ValueError("give a path or axes; a figure with your axes is yours to save")
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(panels) != rows * columns:
        raise ValueError(f"the figure has {rows * columns} panels, got {len(panels)} axes")
    return panels[0].figure, panels


def draw_chance(panel: Any, records: Iterable[Record], *, colour: str = GREY) -> list[float]:
    """A dotted grey line at each chance level that records of one panel state; returns the heights in percent."""
    heights = sorted({100 * record.chance for record in records if record.chance is not None}, reverse=True)
    for number, height in enumerate(heights):
        label = "_" if number else "chance"
        panel.axhline(height, color=colour, linestyle=":", linewidth=1.1, zorder=1, label=label, gid="chance")
    return heights


def finish_figure(figure: Any, path: str | os.PathLike[str] | None) -> Path | Figure:
    """Write the figure and return the path, or return the figure."""
    if path is None:
        mine: Figure = figure
        return mine
    ending = Path(path).suffix.lower()
    with atomic_path(path) as working:
        figure.savefig(working, dpi=300, format=ending[1:], metadata=FORMATS[ending])
    return Path(path)


def panels_width(count: int) -> float:
    """The width in inches of a figure with so many panels beside each other: a column for one, else both."""
    return COLUMN if count == 1 else TEXT_WIDTH * min(1.0, 0.4 + 0.2 * count)


def percent_axis(panel: Any, *, first: bool = True) -> None:
    """0 to 100 % upwards, with faint lines across; panels beside the first one leave the numbers to it."""
    panel.set_ylim(-2, 102)
    panel.set_yticks(range(0, 101, 20))
    _plain_frame(panel, first=first)


def number_axis(panel: Any, *, first: bool = True) -> None:
    """Numbers from 0 upwards that fit what is drawn, with faint lines across, for what is no share."""
    panel.set_ylim(bottom=0)
    _plain_frame(panel, first=first)


def _plain_frame(panel: Any, *, first: bool) -> None:
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if not first:
        panel.tick_params(labelleft=False)


def legend_below(figure: Any, panels: Sequence[Any], *, own: bool) -> None:
    """One legend of all panels: below those of a figure of ours, inside the last one of a figure of the caller's."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for label in [label for label in ("noise", "chance") if label in entries]:  # to the end
        entries[label] = entries.pop(label)
    if not own:
        panels[-1].legend(entries.values(), entries.keys(), loc="best")
        return
    longest = max(map(len, entries), default=1)
    columns = max(1, min(len(entries), int(figure.get_figwidth() * 72 / (4.4 * longest + 34))))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
