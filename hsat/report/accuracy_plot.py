"""The figure of accuracy against eps: one line per model, with random noise and the chance level in grey."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hsat.eval import Record
from hsat.report.panels import COLOURS, GREY, LINES, MARKERS, draw_chance, figure_style, finish_figure, open_panels
from hsat.report.summary import AccuracyLine, accuracy_lines, eps_ticks, main_norm, norm_of
from hsat.types import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 6  # so many lines are named at their ends; more have a legend


def plot_accuracy_vs_eps(
    records: Sequence[Record],
    path: str | os.PathLike[str] | None = None,
    *,
    metric: str = "accuracy",
    levels: Sequence[str] = LEVELS,
    k: int | None = None,
    kinds: Literal["strongest", "all"] = "strongest",
    axes: Axes | Sequence[Axes] | None = None,
) -> Path | Figure:
    """One panel per level: what each model keeps against eps, under random noise, and what knowing nothing gives.

    A line joins the strongest attacks at each eps, which is the ensemble where one was run, from the clean images on;
    the band is its interval.  Noise is grey, and so is the chance level that the records state.  Several records for
    one point (seeds) give their mean, with a band of one standard deviation.  Where both norms were measured, Linf is
    drawn.  Records of a transfer are left out; `plot_transfer` shows them.

    Args:
        records: What was measured.
        path: The file, a .png, .pdf or .svg.
        metric: Which metric.
        levels: Which levels.
        k: Which of several k to draw; None takes the largest.
        kinds: "strongest", or "all" for a line per kind of attack ("PGD" of "PGD-8") with bars instead of bands.
        axes: Where to draw instead of a file, one for each level that was measured.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: When no record fits, for both a path and axes, and for another number of axes than of levels.
    """
    if kinds not in ("strongest", "all"):
        raise ValueError(f"kinds must be 'strongest' or 'all', got {kinds!r}")
    largest = max((record.k for record in records), default=0) if k is None else k
    chosen = [r for r in records if (r.metric, r.k) == (metric, largest) and r.level in levels and not r.surrogate]
    if not chosen:
        raise ValueError(f"none of the {len(records)} records has metric {metric!r}, k={largest}, a level of {levels}")
    if not largest:  # one of several classifiers without neighbours
        chosen = [record for record in chosen if record.classifier == chosen[0].classifier]
    norm = main_norm(chosen)
    chosen = [record for record in chosen if norm_of(record) in (norm, "")]
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    rows = list(dict.fromkeys((record.model, record.target) for record in chosen))
    unit = 1.0 if norm == "L2" else 255.0
    with figure_style():
        figure, panels = open_panels(len(drawn), path, axes, size=(4.1 * len(drawn) + 0.3, 3.4))
        for panel, level in zip(panels, drawn, strict=True):
            here = [record for record in chosen if record.level == level]
            lines = accuracy_lines(here, every_attack=kinds == "all")
            named = _draw_lines(panel, lines, rows, unit=unit, bars=kinds == "all")
            grey = _draw_noise(panel, lines, rows if kinds == "strongest" else (), unit=unit)
            for height in draw_chance(panel, here)[:1]:
                grey.append(("chance", height, GREY))
            _set_accuracy_axes(panel, [unit * record.eps_value for record in here], norm)
            _name_lines(panel, named if len(named) <= MOST_LABELS else [], grey)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel(f"{metric}, %")
        if len(named) > MOST_LABELS:
            panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.25, 1.0), frameon=False)
        return finish_figure(figure, path)


_Label = tuple[str, float, str]  # a text, the height of the end of its line, its colour


def _draw_lines(
    panel: Any, lines: Sequence[AccuracyLine], rows: Sequence[tuple[str, str]], *, unit: float, bars: bool
) -> list[_Label]:
    """The lines of attacks; returns their labels.  Colour tells models apart, marker and stroke the attacks."""
    shown = [line for line in lines if line.kind != "noise"]
    kinds = list(dict.fromkeys(line.attack for line in shown))
    several_targets = len({target for _, target in rows}) > 1
    labels = []
    for line in shown:
        row, kind = rows.index((line.model, line.target)), kinds.index(line.attack)
        colour = COLOURS[(row + row // len(COLOURS)) % len(COLOURS)]  # then with another marker
        sign = kind if len(kinds) > 1 else row
        name = " ".join(filter(None, (line.model, line.attack, f"({line.target})" if several_targets else "")))
        x, y, low, high = _coordinates(line, unit)
        stroke = {"color": colour, "marker": MARKERS[sign % len(MARKERS)], "linestyle": LINES[kind % len(LINES)]}
        if bars:  # moved aside around the true eps, so that intervals of models and attacks do not hide each other
            aside = 0.18 * (row - (len(rows) - 1) / 2) + 0.05 * (kind - (len(kinds) - 1) / 2)
            ends = np.maximum(0.0, np.nan_to_num([y - low, high - y]))  # an interval need not hold the value
            panel.errorbar(
                x + aside * x.max() / 8, y, yerr=ends, capsize=2, elinewidth=0.8, markersize=5, label=name, **stroke
            )
        else:
            panel.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            panel.plot(x, y, markersize=5.5, linewidth=1.8, label=name, **stroke)
        labels.append((name, float(y[-1]), colour))
    return labels


def _draw_noise(
    panel: Any, lines: Sequence[AccuracyLine], rows: Sequence[tuple[str, str]], *, unit: float
) -> list[_Label]:
    """The lines of random noise in grey, with the markers of the models in `rows`; returns their one label."""
    ends = []
    for line in lines:
        if line.kind == "noise":
            x, y, _, _ = _coordinates(line, unit)
            panel.plot(x, y, color=GREY, linestyle="--", linewidth=1.1, zorder=1)
            if rows:
                marker = MARKERS[rows.index((line.model, line.target)) % len(MARKERS)]
                panel.plot(x[1:], y[1:], marker, color=GREY, markersize=4.5, markerfacecolor="white", zorder=1)
            ends.append(float(y[-1]))
    return [("noise", max(ends), GREY)] if ends else []


def _coordinates(line: AccuracyLine, unit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """eps, value, and the ends of the interval in percent, NaN where there is none."""
    ends = [point.estimate.interval or (np.nan, np.nan) for point in line.points]
    low, high = 100 * np.array(ends).T
    return (
        unit * np.array([point.eps for point in line.points]),
        100 * np.array([point.estimate.value for point in line.points]),
        low,
        high,
    )


def _set_accuracy_axes(panel: Any, eps: Sequence[float], norm: str) -> None:
    largest = max(eps) or 1.0
    panel.set_xlabel(f"eps ({norm})" if norm == "L2" else "eps in grey levels (of 255)")
    panel.set_xlim(-0.06 * largest, 1.06 * largest)
    if (ticks := eps_ticks(eps)) is not None:
        panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.set_ylim(-2, 102)
    panel.set_yticks(range(0, 101, 20))
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _name_lines(panel: Any, lines: Sequence[_Label], grey: Sequence[_Label]) -> None:
    """Names at the ends of lines, moved apart where they would overlap, in a darker shade of the line's colour."""
    from matplotlib.colors import to_rgb

    labels = sorted([*lines, *grey], key=lambda label: label[1])
    if not labels:
        return
    box = panel.get_window_extent()
    gap = 104 * 11.5 / (72 * box.height / panel.figure.dpi)  # a line of text, in percent
    heights = spread_heights([height for _, height, _ in labels], gap)
    for (text, _, colour), height in zip(labels, heights, strict=True):
        shade = tuple(0.75 * part for part in to_rgb(colour))
        panel.annotate(
            text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=shade,
            fontsize=9,
            annotation_clip=False,
        )


def spread_heights(heights: Sequence[float], gap: float) -> list[float]:
    """Growing numbers moved so that each is at least `gap` above the last, as little as possible (least squares)."""
    from sklearn.isotonic import isotonic_regression

    steps = gap * np.arange(len(heights))
    return [float(height) for height in isotonic_regression(np.asarray(heights, dtype=np.float64) - steps) + steps]
