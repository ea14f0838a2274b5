"""The figure of accuracy against eps: one line per model, with random noise and the chance level in grey.

The page draws the same panels in colours of its style sheet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hsat.eval import Record
from hsat.eval.doubts import norm_of
from hsat.report.aggregation import PLAIN_METRICS, metrics_unit
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
    number_axis,
    open_panels,
    panels_width,
    percent_axis,
)
from hsat.report.summary import AccuracyLine, accuracy_lines, eps_ticks, main_norm
from hsat.types import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Units(NamedTuple):
    """What eps and the values of a metric are multiplied by."""

    eps: float
    value: float


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
        here = [[record for record in chosen if record.level == level] for level in drawn]
        names = _name_twins([accuracy_lines(rows, every_attack=True) for rows in here]) if kinds == "all" else None
        named = []
        for panel, level, rows_here in zip(panels, drawn, here, strict=True):
            named.append(draw_accuracy(panel, rows_here, styles, norm=norm, attacks=names))
            first = panel is panels[0] or axes is not None
            (number_axis if metric in PLAIN_METRICS else percent_axis)(panel, first=first)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel(f"{metric}, {metrics_unit([metric])}")
        name_lines(figure, panels, named, own=axes is None)
        return finish_figure(figure, path)


def draw_accuracy(
    panel: Any,
    records: Sequence[Record],
    styles: Mapping[tuple[str, str], int],
    *,
    norm: str,
    palette: Palette = PAPER,
    attacks: Mapping[tuple[str, str, str], str] | None = None,
) -> list[LineLabel]:
    """Draw the records of one level, metric, k and norm into a panel.

    Args:
        panel: Axes of matplotlib.
        records: What was measured.
        styles: The number of the colour and shape of each (model, target).
        norm: "L2" counts eps as it is, others in grey levels.
        palette: The colours and shapes.
        attacks: Names by (model, target, kind of attack), for a line with bars for each name instead of the strongest
            attack with its band.

    Returns:
        The names of the lines, at the heights of their ends: models first, then noise and chance.
    """
    plain = any(record.metric in PLAIN_METRICS for record in records)
    units = _Units(1.0 if norm == "L2" else 255.0, 1.0 if plain else 100.0)
    lines = accuracy_lines(records, every_attack=attacks is not None)
    if attacks is None:
        labels = _draw_strongest(panel, lines, styles, units=units, palette=palette)
    else:
        labels = _draw_kinds(panel, lines, styles, attacks, units=units, palette=palette)
    labels += _draw_noise(panel, lines, {} if attacks else styles, units=units, palette=palette)
    for height in draw_chance(panel, records, colour=palette.grey)[:1]:
        labels.append(LineLabel("chance", height, palette.grey_ink))
    eps = [units.eps * record.eps_value for record in records]
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
        legend_below(figure, panels, own=own)


_Attacked = tuple[str, str, str]  # model, target, kind of attack


def _name_twins(panels: Sequence[Sequence[AccuracyLine]]) -> dict[_Attacked, str]:
    """Names of the lines of attacks: kinds that leave a model the same at every eps in all panels share one."""
    lines: dict[_Attacked, list[AccuracyLine | None]] = {}
    for number, panel in enumerate(panels):
        for line in panel:
            if line.kind != "noise":
                places = lines.setdefault((line.model, line.target, line.attack), [None] * len(panels))
                places[number] = line
    groups: list[list[_Attacked]] = []
    for key, mine in lines.items():
        for group in groups:
            pairs = zip(mine, lines[group[0]], strict=True)
            if key[:2] == group[0][:2] and all(one and other and _coincide(one, other) for one, other in pairs):
                group.append(key)
                break
        else:
            groups.append([key])
    return {key: ", ".join(attack for _, _, attack in group) for group in groups for key in group}


def _coincide(one: AccuracyLine, other: AccuracyLine) -> bool:
    pairs = [[(point.eps, point.estimate.value) for point in line.points] for line in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and bool(np.allclose(pairs[0], pairs[1], rtol=0, atol=_SAME))


def _draw_strongest(
    panel: Any, lines: Sequence[AccuracyLine], styles: Mapping[tuple[str, str], int], *, units: _Units, palette: Palette
) -> list[LineLabel]:
    """A line with a band for each model and target; returns the labels."""
    shown = [line for line in lines if line.kind != "noise"]
    labels = []
    for number, line in enumerate(shown):
        colour, ink, marker = palette.style(styles[line.model, line.target])
        hides = any(_coincide(line, earlier) for earlier in shown[:number])  # both colours must show
        x, y, low, high = _coordinates(line, units)
        name = _line_name(line, styles)
        panel.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, gid="band")
        stroke = {"color": colour, "marker": marker, "linestyle": LINES[hides]}
        edge = {"markeredgecolor": palette.background, "markeredgewidth": 0.5}
        panel.plot(x, y, label=name, gid="line", **stroke, **edge)
        labels.append(LineLabel(name, float(y[-1]), ink))
    return labels


def _draw_kinds(
    panel: Any,
    lines: Sequence[AccuracyLine],
    styles: Mapping[tuple[str, str], int],
    attacks: Mapping[_Attacked, str],
    *,
    units: _Units,
    palette: Palette,
) -> list[LineLabel]:
    """A line with bars for each name of attacks; colour tells models apart, marker and stroke the attacks."""
    kinds = list(dict.fromkeys(attacks.values()))
    shown = {
        (line.model, line.target, attacks[line.model, line.target, line.attack]): line
        for line in reversed(lines)
        if line.kind != "noise"
    }
    labels = []
    for (model, target, attack), line in reversed(shown.items()):
        style, kind = styles[model, target], kinds.index(attack)
        colour, ink, marker = palette.style(style)
        marker = palette.markers[kind % len(palette.markers)] if len(kinds) > 1 else marker
        x, y, low, high = _coordinates(line, units)
        # moved aside around the true eps, so that intervals of models and attacks do not hide each other
        aside = 0.18 * (style - (len(styles) - 1) / 2) + 0.05 * (kind - (len(kinds) - 1) / 2)
        ends = np.maximum(0.0, np.nan_to_num([y - low, high - y]))  # an interval need not hold the value
        name = _line_name(line, styles, attack)
        stroke = {"color": colour, "marker": marker, "linestyle": LINES[kind % len(LINES)]}
        bars = {"yerr": ends, "capsize": 1.5, "capthick": 0.7, "elinewidth": 0.7}
        panel.errorbar(x + aside * x.max() / 8, y, label=name, **bars, **stroke)
        labels.append(LineLabel(name, float(y[-1]), ink))
    return labels


def _line_name(line: AccuracyLine, styles: Mapping[tuple[str, str], int], attack: str = "") -> str:
    """Model, attack, and the target where there are several."""
    several = len({target for _, target in styles}) > 1
    return " ".join(filter(None, (line.model, attack, f"({line.target})" if several else "")))


def _draw_noise(
    panel: Any,
    lines: Sequence[AccuracyLine],
    styles: Mapping[tuple[str, str], int],
    *,
    units: _Units,
    palette: Palette,
) -> list[LineLabel]:
    """The lines of random noise in grey, with the markers of the models in `styles`; returns their one label."""
    drawn: list[AccuracyLine] = []
    for line in lines:
        if line.kind != "noise" or any(_coincide(line, other) for other in drawn):
            continue
        x, y, _, _ = _coordinates(line, units)
        label = "_" if drawn else "noise"
        panel.plot(x, y, color=palette.grey, linestyle="--", linewidth=1.0, zorder=1.5, label=label, gid="noise")
        if styles:
            marker = palette.style(styles[line.model, line.target])[2]
            dots = {"color": palette.grey, "markerfacecolor": palette.background, "markeredgewidth": 0.8}
            panel.plot(x[1:], y[1:], linestyle="none", marker=marker, zorder=1.6, gid="mark", **dots)
        drawn.append(line)
    ends = [units.value * line.points[-1].estimate.value for line in drawn]
    return [LineLabel("noise", max(ends), palette.grey_ink)] if ends else []


def _coordinates(line: AccuracyLine, units: _Units) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """eps, value, and the ends of the interval in their units, NaN where there is none."""
    ends = [point.estimate.interval or (np.nan, np.nan) for point in line.points]
    low, high = np.clip(units.value * np.array(ends).T, 0, max(units.value, 2.0))  # a deviation may reach beyond
    return (
        units.eps * np.array([point.eps for point in line.points]),
        units.value * np.array([point.estimate.value for point in line.points]),
        low,
        high,
    )
