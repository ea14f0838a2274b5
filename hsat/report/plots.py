"""Pictures as files: accuracy against eps, certified accuracy, transfer as a heat map, and patches.

Every figure has a canvas of its own: no global state of matplotlib is touched, and no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval import Record
from hsat.eval.tables import ABSENT
from hsat.eval.transfer_drops import OTHERS
from hsat.report.aggregation import CLEAN, format_points
from hsat.report.tables import MEAN_OF_OTHERS, TITLES, list_surrogates
from hsat.types import LEVELS

# Okabe and Ito's palette: told apart with every common form of colour blindness, and in grey by their lightness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")


def plot_accuracy_vs_eps(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    metric: str = "accuracy",
    levels: Sequence[str] = LEVELS,
    k: int | None = None,
) -> Path:
    """One panel per level: a metric against eps in grey levels, one line per model and kind of attack, with intervals.

    The kind of an attack is its name up to the last "-" ("PGD-8" -> "PGD"); clean records are the points at eps 0.
    Several records for one point (seeds) give their mean, with a bar from the lowest to the highest.
    Colour tells models apart, marker and line the attacks.

    Args:
        records: What was measured.
        path: The file; its ending chooses the format.
        metric: Which metric.
        levels: Which levels.
        k: Which of several k to draw; None takes the largest.

    Raises:
        ValueError: When no record fits.
    """
    largest = max((record.k for record in records), default=0) if k is None else k
    chosen = [r for r in records if r.metric == metric and r.level in levels and r.k == largest]
    if not chosen:
        raise ValueError(f"none of the {len(records)} records has metric {metric!r}, k={largest}, a level of {levels}")
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    figure, panels = _figure(len(drawn), size=(4.2 * len(drawn) + 1.6, 3.6))
    for panel, level in zip(panels, drawn, strict=True):
        _draw_lines(panel, [record for record in chosen if record.level == level])
        panel.set_title(f"{level} level")
        panel.set_xlabel("eps (grey levels of 255)")
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    return _save(figure, path)


def _draw_lines(panel: Any, records: Sequence[Record]) -> None:
    rows = list(dict.fromkeys((record.model, record.target) for record in records))
    kinds = list(dict.fromkeys(_kind(record) for record in records if record.attack_name != CLEAN))
    several_targets = len({target for _, target in rows}) > 1
    for i, (model, target) in enumerate(rows):
        mine = [record for record in records if (record.model, record.target) == (model, target)]
        clean = [record for record in mine if record.attack_name == CLEAN]
        for j, kind in enumerate(kinds or [""]):
            line = clean + [record for record in mine if record.attack_name != CLEAN and _kind(record) == kind]
            eps, value, bars = _points(line)
            panel.errorbar(
                # moved aside around the true eps, so that intervals of models and attacks do not hide each other
                255 * eps + 0.18 * (i - (len(rows) - 1) / 2) + 0.05 * (j - (len(kinds) - 1) / 2),
                value,
                yerr=bars,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[j % len(MARKERS)],
                linestyle=LINES[j % len(LINES)],
                markersize=5,
                capsize=2,
                elinewidth=0.8,
                label=" ".join(part for part in (model, kind, f"({target})" if several_targets else "") if part),
            )


def _points(line: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """eps, value and lengths of the bars below and above; no bar is negative (an interval need not hold the value)."""
    eps = sorted({record.eps_value for record in line})
    rows = []
    for radius in eps:
        runs = [record for record in line if record.eps_value == radius]
        values = [record.value for record in runs]
        mean = sum(values) / len(values)
        low, high = (runs[0].low, runs[0].high) if len(runs) == 1 else (min(values), max(values))
        below, above = mean if low is None else low, mean if high is None else high
        rows.append((mean, max(0.0, mean - below), max(0.0, above - mean)))
    value, *bars = np.array(rows).T
    return np.array(eps), value, np.array(bars)


def _kind(record: Record) -> str:
    return record.attack_name.rsplit("-", 1)[0]


def plot_certified_accuracy(
    records: Sequence[Record], path: str | os.PathLike[str], *, levels: Sequence[str] = LEVELS
) -> Path:
    """One panel per level: the certified accuracy against the L2 radius, one line per model and sigma, with intervals.

    The true curve falls in steps between the radii that were asked for; the line joins them.

    Args:
        records: Of `certify`.
        path: The file; its ending chooses the format.
        levels: Which levels.

    Raises:
        ValueError: Where no record is of metric "certified_accuracy".
    """
    chosen = [r for r in records if r.metric == "certified_accuracy" and r.level in levels]
    if not chosen:
        raise ValueError(f"none of the {len(records)} records has metric 'certified_accuracy' at a level of {levels}")
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    figure, panels = _figure(len(drawn), size=(4.2 * len(drawn) + 1.6, 3.6))
    rows = list(dict.fromkeys(_model_and_sigma(record) for record in chosen))
    for panel, level in zip(panels, drawn, strict=True):
        for i, row in enumerate(rows):
            line = sorted(
                (r for r in chosen if (r.level, *_model_and_sigma(r)) == (level, *row)), key=lambda r: r.eps_value
            )
            radius, value = [r.eps_value for r in line], [r.value for r in line]
            colour = COLOURS[i % len(COLOURS)]
            panel.plot(
                radius,
                value,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                linestyle=LINES[i % len(LINES)],
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


def _model_and_sigma(record: Record) -> tuple[str, str]:
    return record.model, f"{record.settings.get('sigma', '?')}"


def plot_transfer(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    attack: str | None = None,
    metric: str = "accuracy_drop",
    levels: Sequence[str] = LEVELS,
    k: int | None = None,
) -> Path:
    """A heat map per level: the drop of each target (columns) under each surrogate's images (rows), in points of %.

    The numbers stand in the cells; dark is a small drop.  A frame marks the white-box cells, and the row below the line
    is the mean over the surrogates other than the target.  The colours can be told apart with every common form of
    colour blindness, and in grey.

    Args:
        records: Of a transfer.
        path: The file; its ending chooses the format.
        attack: The name of one attack; None takes that of the largest eps, the first where several share it.
        metric: Which drop.
        levels: Which levels.
        k: Which of several k; None takes the largest.

    Raises:
        ValueError: If no record fits.
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
    drawn = [level for level in levels if any(record.level == level for record in chosen)]
    targets = list(dict.fromkeys(record.model for record in chosen))
    surrogates = list_surrogates(chosen)
    values = {(r.level, r.surrogate, r.model): 100 * r.value for r in chosen}
    span = (min(0.0, *values.values()), max(1.0, *values.values()))
    width, height = 1.6 + 0.85 * len(targets), 1.5 + 0.6 * len(surrogates)
    figure, panels = _figure(len(drawn), size=(width * len(drawn) + 1.2, height))
    for panel, level in zip(panels, drawn, strict=True):
        grid = [[values.get((level, surrogate, target), np.nan) for target in targets] for surrogate in surrogates]
        image = _draw_matrix(panel, np.array(grid), surrogates, targets, span)
        panel.set_title(f"{level} level", fontsize="medium")
    panels[0].set_ylabel("attacked on (framed: itself)")
    figure.colorbar(image, ax=panels, label=f"{TITLES.get(metric, metric)} under {name} (points of %)")
    return _save(figure, path)


def _draw_matrix(
    panel: Any, grid: np.ndarray, surrogates: Sequence[str], targets: Sequence[str], span: tuple[float, float]
) -> Any:
    from matplotlib.patches import Rectangle

    image = panel.imshow(grid, cmap="cividis", vmin=span[0], vmax=span[1], aspect="auto")
    middle = (span[0] + span[1]) / 2
    for (i, j), value in np.ndenumerate(grid):
        text = ABSENT if np.isnan(value) else format_points(value / 100)
        panel.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black")
        if surrogates[i] == targets[j]:
            panel.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=2))
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, targets)) > 8 else {}
    panel.set_xticks(range(len(targets)), targets, **tilt)
    panel.set_yticks(range(len(surrogates)), [MEAN_OF_OTHERS if name == OTHERS else name for name in surrogates])
    if OTHERS in surrogates:
        panel.axhline(len(surrogates) - 1.5, color="white", linewidth=4)
    panel.set_xlabel("measured on")
    panel.label_outer()  # the rows are named once, at the left
    return image


def plot_patches(
    clean: Tensor, adversarial: Tensor, path: str | os.PathLike[str], *, titles: Sequence[str] = ()
) -> Path:
    """Three rows of patches: clean, perturbation (scaled around grey, the factor is written beside it), adversarial.

    Args:
        clean, adversarial: (n, c, h, w) in [0, 1]; three channels are shown as red, green, blue, any other number by
            its mean.
        path: The file; its ending chooses the format.
        titles: One per column.

    Raises:
        ValueError: For shapes or numbers of titles that differ.
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
    figure, panels = _figure(len(clean), size=(1.7 * len(clean) + 1.2, 5.4), rows=3)
    rows = (("clean", before), (f"perturbation\n× {scale:.3g}", 0.5 + gap * scale), ("adversarial", after))
    for i, (name, images) in enumerate(rows):
        for j, image in enumerate(images):
            panel = panels[i * len(clean) + j]
            panel.imshow(_picture(image), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            if j == 0:
                panel.set_ylabel(name)
            if i == 0 and titles:
                panel.set_title(titles[j], fontsize="small")
    return _save(figure, path)


def _picture(image: Tensor) -> np.ndarray:
    shown = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    array: np.ndarray = shown.clamp(0, 1).numpy()
    return array


def _figure(columns: int, *, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with its own canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.ravel())


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
