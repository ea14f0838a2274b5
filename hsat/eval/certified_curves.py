"""The picture of certificates: certified accuracy against the radius."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hsat.eval.records import Record
from hsat.eval.reporting.figures import _COLOURS, _LINES, _MARKERS, _figure, _save
from hsat.types import LEVELS


def plot_certified_accuracy(
    records: Sequence[Record], path: str | os.PathLike[str], *, levels: Sequence[str] = LEVELS
) -> Path:
    """One panel per level: the certified accuracy against the L2 radius, one line per model and sigma, with intervals.

    The true curve falls in steps between the radii that were asked for; the line joins them.
    Raises ValueError where no record is of metric "certified_accuracy", ImportError without matplotlib.
    """
    wanted = [r for r in records if r.metric == "certified_accuracy" and r.level in levels]
    if not wanted:
        raise ValueError(f"none of the {len(records)} records has metric 'certified_accuracy' at a level of {levels}")
    drawn = [level for level in levels if any(record.level == level for record in wanted)]
    figure, panels = _figure(len(drawn), size=(4.2 * len(drawn) + 1.6, 3.6))
    rows = list(dict.fromkeys(_row(record) for record in wanted))
    for panel, level in zip(panels, drawn, strict=True):
        for i, row in enumerate(rows):
            line = sorted((r for r in wanted if (r.level, *_row(r)) == (level, *row)), key=lambda r: r.eps_value)
            radius, value = [r.eps_value for r in line], [r.value for r in line]
            colour = _COLOURS[i % len(_COLOURS)]
            panel.plot(
                radius,
                value,
                color=colour,
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=_LINES[i % len(_LINES)],
                markersize=4,
                label=f"{row[0]} (sigma {row[1]})",
            )
            if all(r.low is not None for r in line):
                panel.fill_between(radius, [r.low for r in line], [r.high for r in line], color=colour, alpha=0.15)
        panel.set_title(f"{level} level")
        panel.set_xlabel("L2 radius (pixel range 0 to 1)")
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("certified accuracy")
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    return _save(figure, path)


def _row(record: Record) -> tuple[str, str]:
    return record.model, f"{record.settings.get('sigma', '?')}"
