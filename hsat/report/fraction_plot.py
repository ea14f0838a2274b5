"""The figure of accuracy against the share of a slide's patches that an attack may alter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hsat.eval import Record
from hsat.eval.doubts import is_noise
from hsat.report.aggregation import CLEAN, aggregate_runs
from hsat.report.panels import (
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    draw_chance,
    figure_style,
    finish_figure,
    legend_below,
    open_panels,
    panels_width,
    percent_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LineKey = tuple[str, str, str]  # model, attack without its fraction, target


def plot_accuracy_vs_fraction(
    records: Sequence[Record],
    path: str | os.PathLike[str] | None = None,
    *,
    metric: str = "accuracy",
    levels: Sequence[str] = ("slide", "patient"),
    axes: Axes | Sequence[Axes] | None = None,
) -> Path | Figure:
    """One panel per level: what is left when a fraction of each slide's patches may be altered, a line per attack.

    Fractions stand on a logarithmic axis.  A short dotted line at the left is the value without an attack; noise and
    the chance level, where the records state it, are grey.  Bands are intervals; several records for one point (seeds)
    give their mean, with a band of one standard deviation.

    Args:
        records: Of `evaluate_slides` or `evaluate_budget`; others are left out.
        path: The file, a .png, .pdf or .svg.
        metric: Which metric.
        levels: Which levels.
        axes: Where to draw instead of a file, one for each level that was measured.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: When no record fits, for both a path and axes, and for another number of axes than of levels.
    """
    chosen = [r for r in records if r.metric == metric and r.level in levels and fraction_of(r) is not None]
    if not chosen:
        raise ValueError(
            f"none of the {len(records)} records has metric {metric!r}, a level of {tuple(levels)} and a fraction of"
            " the patches, as those of evaluate_slides have"
        )
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    keys = list(dict.fromkeys(_key(record) for record in chosen))
    with figure_style():
        figure, panels = open_panels(len(drawn), path, axes, size=(panels_width(len(drawn)), 2.7))
        for panel, level in zip(panels, drawn, strict=True):
            here = [record for record in chosen if record.level == level]
            for key in keys:
                clean = [
                    record
                    for record in records
                    if (record.level, record.metric, record.attack_name) == (level, metric, CLEAN)
                    and (record.model, record.target) == (key[0], key[2])
                ]
                _draw_line(panel, [record for record in here if _key(record) == key], clean, keys.index(key))
            draw_chance(panel, here)
            panel.set_xscale("log")
            panel.set_xlabel("patches that may be altered, % of a slide")
            ticks = sorted({100 * (fraction_of(record) or 0.0) for record in here})
            if len(ticks) <= 8:
                panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                panel.minorticks_off()
            percent_axis(panel, first=panel is panels[0] or axes is not None)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel(f"{metric}, %")
        legend_below(figure, panels, own=axes is None)
        return finish_figure(figure, path)


def fraction_of(record: Record) -> float | None:
    """The share of the patches that the attack of a record may alter; None where it does not say."""
    value = record.settings.get("fraction", record.settings.get("budget_fraction"))
    return float(value) if isinstance(value, int | float) else None


def _key(record: Record) -> _LineKey:
    return record.model, record.attack_name.rpartition("@")[0], record.target


def _draw_line(panel: Any, records: Sequence[Record], clean: Sequence[Record], number: int) -> None:
    if not records:
        return
    model, attack, target = _key(records[0])
    fractions = sorted({fraction_of(record) or 0.0 for record in records})
    estimates = [aggregate_runs([record for record in records if fraction_of(record) == one]) for one in fractions]
    points = [estimate for estimate in estimates if estimate is not None]
    x, y = 100 * np.array(fractions), 100 * np.array([point.value for point in points])
    noise = is_noise(records[0])
    colour = GREY if noise else COLOURS[number % len(COLOURS)]
    panel.plot(
        x,
        y,
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        linestyle="--" if noise else LINES[0],
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=" ".join(filter(None, (model, attack, f"({target})"))),
    )
    ends = [point.interval for point in points]
    if not noise and all(end is not None for end in ends):
        low, high = 100 * np.array([end for end in ends if end is not None]).T
        panel.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    before = aggregate_runs(clean)
    if before is not None and not noise:
        panel.plot([x[0] / 2, x[0]], [100 * before.value] * 2, color=colour, linestyle=":", linewidth=1.2)
