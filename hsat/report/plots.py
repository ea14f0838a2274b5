"""Figures of certified accuracy, of transfer as a heat map, and of patches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hsat.eval import Record
from hsat.eval.tables import ABSENT
from hsat.eval.transfer_drops import OTHERS
from hsat.report.accuracy_plot import PAPER
from hsat.report.aggregation import TITLES, format_points
from hsat.report.panels import (
    COLUMN,
    LINES,
    TEXT_WIDTH,
    draw_chance,
    figure_style,
    finish_figure,
    legend_below,
    open_panels,
    panels_width,
    percent_axis,
)
from hsat.report.tables import MEAN_OF_OTHERS, list_surrogates
from hsat.types import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_certified_accuracy(
    records: Sequence[Record],
    path: str | os.PathLike[str] | None = None,
    *,
    levels: Sequence[str] = LEVELS,
    axes: Axes | Sequence[Axes] | None = None,
) -> Path | Figure:
    """One panel per level: the certified accuracy against the L2 radius, one line per model and sigma, with intervals.

    The true curve falls in steps between the radii that were asked for; the line joins them.  The chance level, what a
    constant decision keeps at every radius, is a dotted grey line.

    Args:
        records: Of `certify`.
        path: The file, a .png, .pdf or .svg.
        levels: Which levels.
        axes: Where to draw instead of a file, one for each level that was measured.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: Where no record is of metric "certified_accuracy", for both a path and axes, and for another number
            of axes than of levels.
    """
    chosen = [r for r in records if r.metric == "certified_accuracy" and r.level in levels]
    if not chosen:
        raise ValueError(f"none of the {len(records)} records has metric 'certified_accuracy' at a level of {levels}")
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    rows = list(dict.fromkeys(_model_and_sigma(record) for record in chosen))
    with figure_style():
        figure, panels = open_panels(len(drawn), path, axes, size=(panels_width(len(drawn)), 2.6))
        for panel, level in zip(panels, drawn, strict=True):
            _draw_certificates(panel, [record for record in chosen if record.level == level], rows)
            percent_axis(panel, first=panel is panels[0] or axes is not None)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel("certified accuracy, %")
        legend_below(figure, panels, own=axes is None)
        return finish_figure(figure, path)


def _draw_certificates(panel: Any, records: Sequence[Record], rows: Sequence[tuple[str, str]]) -> None:
    """Colour and marker tell models apart, the stroke their noise."""
    models, sigmas = ([*dict.fromkeys(row[place] for row in rows)] for place in (0, 1))
    for model, sigma in rows:
        line = sorted((r for r in records if _model_and_sigma(r) == (model, sigma)), key=lambda r: r.eps_value)
        radius, (colour, _, marker) = [r.eps_value for r in line], PAPER.style(models.index(model))
        panel.plot(
            radius,
            [100 * r.value for r in line],
            color=colour,
            marker=marker,
            linestyle=LINES[sigmas.index(sigma) % len(LINES)],
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=f"{model} (sigma {sigma})",
        )
        ends = [(100 * r.low, 100 * r.high) for r in line if r.low is not None and r.high is not None]
        if line and len(ends) == len(line):
            panel.fill_between(radius, *np.array(ends).T, color=colour, alpha=0.13, linewidth=0)
    draw_chance(panel, records)
    panel.set_xlabel("L2 radius (pixel range 0 to 1)")


def _model_and_sigma(record: Record) -> tuple[str, str]:
    return record.model, f"{record.settings.get('sigma', '?')}"


def plot_transfer(
    records: Sequence[Record],
    path: str | os.PathLike[str] | None = None,
    *,
    attack: str | None = None,
    metric: str = "accuracy_drop",
    levels: Sequence[str] = LEVELS,
    k: int | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Path | Figure:
    """A heat map per level: the drop of each target (columns) under each surrogate's images (rows), in points of %.

    The numbers stand in the cells; dark is a small drop.  A frame marks the white-box cells, and the row below the line
    is the mean over the surrogates other than the target.  The colours can be told apart with every common form of
    colour blindness, and in grey.

    Args:
        records: Of a transfer.
        path: The file, a .png, .pdf or .svg.
        attack: The name of one attack; None takes that of the largest eps, the first where several share it.
        metric: Which drop.
        levels: Which levels.
        k: Which of several k; None takes the largest.
        axes: Where to draw instead of a file, one for each level that was measured; a colour bar takes room from them.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: If no record fits, for both a path and axes, and for another number of axes than of levels.
    """
    chosen = [r for r in records if r.metric == metric and r.surrogate and r.level in levels]
    largest = max((record.k for record in chosen), default=0) if k is None else k
    strongest = max(chosen, key=lambda record: record.eps_value, default=None)
    name = attack if attack is not None or strongest is None else strongest.attack_name
    chosen = [record for record in chosen if record.k == largest and record.attack_name == name]
    if not chosen:
        raise ValueError(
            f"none of the {len(records)} records is a transfer with {metric!r}, k={largest}, attack {name!r}"
        )
    if not largest:  # one of several classifiers without neighbours
        chosen = [record for record in chosen if record.classifier == chosen[0].classifier]
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    targets = list(dict.fromkeys(record.model for record in chosen))
    surrogates = list_surrogates(chosen)
    values = {(r.level, r.surrogate, r.model): 100 * r.value for r in chosen}
    span = (min(0.0, *values.values()), max(1.0, *values.values()))
    width = max(panels_width(len(drawn)), 1.1 + len(drawn) * (0.4 + 0.42 * len(targets)))
    height = 1.0 + 0.28 * len(surrogates)
    with figure_style():
        figure, panels = open_panels(len(drawn), path, axes, size=(width, height))
        for panel, level in zip(panels, drawn, strict=True):
            grid = [[values.get((level, surrogate, target), np.nan) for target in targets] for surrogate in surrogates]
            image = _draw_matrix(panel, np.array(grid), surrogates, targets, span)
            panel.set_title(f"{level} level")
        panels[0].set_ylabel("attacked on (framed: itself)")
        bar = figure.colorbar(image, ax=panels, fraction=0.06, pad=0.02)
        bar.set_label(f"{TITLES.get(metric, metric)} under {name}\n(points of %)")
        bar.outline.set_visible(False)
        return finish_figure(figure, path)


def _draw_matrix(
    panel: Any, grid: np.ndarray, surrogates: Sequence[str], targets: Sequence[str], span: tuple[float, float]
) -> Any:
    from matplotlib.patches import Rectangle

    image = panel.imshow(grid, cmap="cividis", vmin=span[0], vmax=span[1], aspect="auto")
    middle = (span[0] + span[1]) / 2
    for (i, j), value in np.ndenumerate(grid):
        text = ABSENT if np.isnan(value) else format_points(value / 100)
        panel.text(j, i, text, ha="center", va="center", color="black" if value >= middle else "white", fontsize=7.5)
        if surrogates[i] == targets[j]:
            panel.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=1.5))
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, targets)) > 8 else {}
    panel.set_xticks(range(len(targets)), targets, **tilt)
    panel.set_yticks(range(len(surrogates)), [MEAN_OF_OTHERS if name == OTHERS else name for name in surrogates])
    if OTHERS in surrogates:
        panel.axhline(len(surrogates) - 1.5, color="white", linewidth=4)
    panel.set_xlabel("measured on")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.label_outer()  # the rows are named once, at the left
    return image


def plot_patches(
    clean: Tensor,
    adversarial: Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    titles: Sequence[str] = (),
    axes: Sequence[Axes] | None = None,
) -> Path | Figure:
    """Three rows of patches: clean, perturbation (scaled around grey, the factor is written beside it), adversarial.

    Args:
        clean, adversarial: (n, c, h, w) in [0, 1]; three channels are shown as red, green, blue, any other number by
            its mean.
        path: The file, a .png, .pdf or .svg.
        titles: One per column.
        axes: Where to draw instead of a file: 3 n, row by row.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: For shapes or numbers of titles that differ, for both a path and axes, and for another number of
            axes than of patches.
    """
    if clean.ndim != 4 or clean.shape != adversarial.shape or not len(clean):
        raise ValueError(
            f"clean and adversarial must be (n, c, h, w) of one shape with n >= 1,"
            f" got {tuple(clean.shape)} and {tuple(adversarial.shape)}"
        )
    if titles and len(titles) != len(clean):
        raise ValueError(f"{len(titles)} titles for {len(clean)} patches; give one per patch or none")
    before, after = (images.detach().cpu().float() for images in (clean, adversarial))
    gap = after - before
    largest = float(gap.abs().max())
    scale = 0.5 / largest if largest > 0 else 1.0
    rows = (("clean", before), (f"perturbation\n× {scale:.3g}", 0.5 + gap * scale), ("adversarial", after))
    with figure_style():
        side = min(1.15, (TEXT_WIDTH - 0.3) / len(clean)) if len(clean) > 2 else (COLUMN - 0.3) / 3
        lines = max((title.count("\n") + 1 for title in titles), default=0)
        size = (side * len(clean) + 0.3, 3 * side + 0.14 * lines + 0.1)
        figure, panels = open_panels(len(clean), path, axes, size=size, rows=3)
        for i, (name, images) in enumerate(rows):
            for j, image in enumerate(images):
                panel = panels[i * len(clean) + j]
                panel.imshow(patch_picture(image), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
                panel.set_xticks([])
                panel.set_yticks([])
                panel.spines[:].set_visible(False)
                if j == 0:
                    panel.set_ylabel(name)
                if i == 0 and titles:
                    panel.set_title(titles[j], fontsize=7)
        return finish_figure(figure, path)


def patch_picture(image: Tensor) -> np.ndarray:
    """An image (c, h, w) in [0, 1] as matplotlib shows it: (h, w, 3), or (h, w), the mean of other channels."""
    shown = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    array: np.ndarray = shown.clamp(0, 1).numpy()
    return array
