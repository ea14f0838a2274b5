"""The figure of accuracy against eps: one line per model, with random noise and the chance level in grey.

The page draws the same panels in colours of its style sheet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hsat.eval import Record
from hsat.report.line_labels import LineLabel, labels_fit, place_labels
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
from hsat.report.summary import AccuracyLine, accuracy_lines, eps_ticks, main_norm, norm_of
from hsat.types import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SAME = 5e-4  # lines of attacks that differ by less at every eps are one


@dataclass(frozen=True)
class Palette:
    """The colours and shapes of lines.

    Attributes:
        colours: Of lines and bands.
        inks: The same for text, which needs more contrast.
        markers: Of points.
        grey, grey_ink: Of noise and chance, and of their names.
        background: Fills hollow points.
    """

    colours: Sequence[str]
    inks: Sequence[str]
    markers: Sequence[Any]
    grey: str
    grey_ink: str
    background: str

    def style(self, index: int) -> tuple[str, str, Any]:
        """Colour, ink and marker of a style; after all colours they meet other markers."""
        colour = (index + index // len(self.markers)) % len(self.colours)
        return self.colours[colour], self.inks[colour], self.markers[index % len(self.markers)]


PAPER = Palette(
    colours=COLOURS,
    inks=("#00568A", "#A04600", "#00734F", "#A34D86", "#8A5F00", "#1F77A8", "#000000"),
    markers=MARKERS,
    grey=GREY,
    grey_ink="#606060",
    background="white",
)


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
    the band is its interval.  Noise is grey, and so is the chance level that the records state.  Names stand at the
    ends of the lines where they have room, else in a legend.  Several records for one point (seeds) give their mean,
    with a band of one standard deviation.  Where both norms were measured, Linf is drawn.  Records of a transfer are
    left out; `plot_transfer` shows them.  One level is as wide as a column of a paper, three as both.

    Args:
        records: What was measured.
        path: The file, a .png, .pdf or .svg.
        metric: Which metric.
        levels: Which levels.
        k: Which of several k to draw; None takes the largest.
        kinds: "strongest", or "all" for a line per kind of attack ("PGD" of "PGD-8") with bars instead of bands; kinds
            of one model that leave the same at every eps share a line.
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
    rows = dict.fromkeys((record.model, record.target) for record in chosen)
    styles = {row: index for index, row in enumerate(rows)}
    with figure_style():
        figure, panels = open_panels(len(drawn), path, axes, size=(panels_width(len(drawn)), 2.45))
        named = []
        for panel, level in zip(panels, drawn, strict=True):
            here = [record for record in chosen if record.level == level]
            named.append(draw_accuracy(panel, here, styles, norm=norm, bars=kinds == "all"))
            percent_axis(panel, first=panel is panels[0] or axes is not None)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel(f"{metric}, %")
        name_lines(figure, panels, named, own=axes is None)
        return finish_figure(figure, path)


def draw_accuracy(
    panel: Any,
    records: Sequence[Record],
    styles: Mapping[tuple[str, str], int],
    *,
    norm: str,
    palette: Palette = PAPER,
    bars: bool = False,
) -> list[LineLabel]:
    """Draw the records of one level, metric, k and norm into a panel.

    Args:
        panel: Axes of matplotlib.
        records: What was measured.
        styles: The number of the colour and shape of each (model, target).
        norm: "L2" counts eps as it is, others in grey levels.
        palette: The colours and shapes.
        bars: A line for each kind of attack, with bars, instead of the strongest with its band.

    Returns:
        The names of the lines, at the heights of their ends: models first, then noise and chance.
    """
    unit = 1.0 if norm == "L2" else 255.0
    lines = accuracy_lines(records, every_attack=bars)
    labels = _draw_lines(panel, _merge_twins(lines), styles, unit=unit, bars=bars, palette=palette)
    labels += _draw_noise(panel, lines, {} if bars else styles, unit=unit, palette=palette)
    for height in draw_chance(panel, records, colour=palette.grey)[:1]:
        labels.append(LineLabel("chance", height, palette.grey_ink))
    eps = [unit * record.eps_value for record in records]
    largest = max(eps) or 1.0
    panel.set_xlabel(f"eps ({norm})" if norm == "L2" else "eps in grey levels (of 255)")
    panel.set_xlim(-0.06 * largest, 1.06 * largest)
    if (ticks := eps_ticks(eps)) is not None:
        panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    return labels


def name_lines(figure: Any, panels: Sequence[Any], labels: Sequence[Sequence[LineLabel]], *, own: bool) -> None:
    """Names at the ends of the lines of all panels where they have room in each, else one legend.

    Args:
        figure: The figure of the panels.
        panels: One for each list of labels.
        labels: From `draw_accuracy`.
        own: Whether the figure is ours, so that it may be laid out.
    """
    if all(labels_fit(panel, names) for panel, names in zip(panels, labels, strict=True)):
        for panel, names in zip(panels, labels, strict=True):
            place_labels(panel, names)
        if own:  # the names took room from the panels, so that they stand closer together now
            figure.draw_without_rendering()
            for panel, names in zip(panels, labels, strict=True):
                place_labels(panel, names)
    else:
        fullest = max(zip(panels, labels, strict=True), key=lambda pair: len(pair[1]))[0]
        legend_below(figure, fullest if own else panels[-1], own=own)


def _merge_twins(lines: Sequence[AccuracyLine]) -> list[AccuracyLine]:
    """Attacks on one model that leave the same at every eps as one line with all their names."""
    merged: list[AccuracyLine] = []
    for line in lines:
        for place, other in enumerate(merged):
            if (line.model, line.target, line.kind) == (other.model, other.target, other.kind) and _coincide(
                line, other
            ):
                merged[place] = replace(other, attack=f"{other.attack}, {line.attack}")
                break
        else:
            merged.append(line)
    return merged


def _coincide(one: AccuracyLine, other: AccuracyLine) -> bool:
    pairs = [[(point.eps, point.estimate.value) for point in line.points] for line in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and bool(np.allclose(pairs[0], pairs[1], rtol=0, atol=_SAME))


def _draw_lines(
    panel: Any,
    lines: Sequence[AccuracyLine],
    styles: Mapping[tuple[str, str], int],
    *,
    unit: float,
    bars: bool,
    palette: Palette,
) -> list[LineLabel]:
    """The lines of attacks; returns their labels.  Colour tells models apart, marker and stroke the attacks."""
    shown = [line for line in lines if line.kind != "noise"]
    kinds = list(dict.fromkeys(line.attack for line in shown))
    several_targets = len({target for _, target in styles}) > 1
    places = sorted({styles[line.model, line.target] for line in shown})
    labels = []
    for number, line in enumerate(shown):
        style, kind = styles[line.model, line.target], kinds.index(line.attack)
        colour, ink, marker = palette.style(style)
        if len(kinds) > 1:
            marker = palette.markers[kind % len(palette.markers)]
        name = " ".join(filter(None, (line.model, line.attack, f"({line.target})" if several_targets else "")))
        x, y, low, high = _coordinates(line, unit)
        hides = any(_coincide(line, earlier) for earlier in shown[:number])  # two models: both colours must show
        stroke = {"color": colour, "marker": marker, "linestyle": LINES[(kind + hides) % len(LINES)]}
        stroke |= {"markeredgecolor": palette.background, "markeredgewidth": 0.5}
        if bars:  # moved aside around the true eps, so that intervals of models and attacks do not hide each other
            aside = 0.18 * (places.index(style) - (len(places) - 1) / 2) + 0.05 * (kind - (len(kinds) - 1) / 2)
            ends = np.maximum(0.0, np.nan_to_num([y - low, high - y]))  # an interval need not hold the value
            panel.errorbar(x + aside * x.max() / 8, y, yerr=ends, capsize=1.5, elinewidth=0.7, label=name, **stroke)
        else:
            panel.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, gid="band")
            panel.plot(x, y, label=name, gid="line", **stroke)
        labels.append(LineLabel(name, float(y[-1]), ink))
    return labels


def _draw_noise(
    panel: Any,
    lines: Sequence[AccuracyLine],
    styles: Mapping[tuple[str, str], int],
    *,
    unit: float,
    palette: Palette,
) -> list[LineLabel]:
    """The lines of random noise in grey, with the markers of the models in `styles`; returns their one label."""
    drawn: list[AccuracyLine] = []
    for line in lines:
        if line.kind != "noise" or any(_coincide(line, other) for other in drawn):
            continue
        x, y, _, _ = _coordinates(line, unit)
        label = "_" if drawn else "noise"
        panel.plot(x, y, color=palette.grey, linestyle="--", linewidth=1.0, zorder=1.5, label=label, gid="noise")
        if styles:
            marker = palette.style(styles[line.model, line.target])[2]
            dots = {"color": palette.grey, "markerfacecolor": palette.background, "markeredgewidth": 0.8}
            panel.plot(x[1:], y[1:], linestyle="none", marker=marker, zorder=1.6, gid="mark", **dots)
        drawn.append(line)
    ends = [100 * line.points[-1].estimate.value for line in drawn]
    return [LineLabel("noise", max(ends), palette.grey_ink)] if ends else []


def _coordinates(line: AccuracyLine, unit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """eps, value, and the ends of the interval in percent, NaN where there is none."""
    ends = [point.estimate.interval or (np.nan, np.nan) for point in line.points]
    low, high = np.clip(100 * np.array(ends).T, 0, 100)  # a standard deviation may reach beyond
    return (
        unit * np.array([point.eps for point in line.points]),
        100 * np.array([point.estimate.value for point in line.points]),
        low,
        high,
    )
