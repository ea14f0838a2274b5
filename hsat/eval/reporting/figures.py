"""Two pictures: accuracy against the size of the attack, and what an attack does to patches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval.records import Record
from hsat.types import LEVELS

# Okabe and Ito's palette: told apart with every common form of colour blindness, and in grey by their lightness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":", "-.")


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
    Colour tells models apart, marker and line the attacks.  k: which of several k to draw; None takes the largest.
    Raises ValueError when no record fits, ImportError without matplotlib.
    """
    largest = max((record.k for record in records), default=0) if k is None else k
    wanted = [r for r in records if r.metric == metric and r.level in levels and r.k == largest]
    if not wanted:
        raise ValueError(f"none of the {len(records)} records has metric {metric!r}, k={largest}, a level of {levels}")
    drawn = [level for level in levels if any(record.level == level for record in wanted)]
    figure, panels = _figure(len(drawn), size=(4.2 * len(drawn) + 1.6, 3.6))
    for panel, level in zip(panels, drawn, strict=True):
        _draw_lines(panel, [record for record in wanted if record.level == level])
        panel.set_title(f"{level} level")
        panel.set_xlabel("eps (grey levels of 255)")
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(metric)
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    return _save(figure, path)


def _draw_lines(panel: Any, records: Sequence[Record]) -> None:
    rows = list(dict.fromkeys((record.model, record.target) for record in records))
    kinds = list(dict.fromkeys(_kind(record) for record in records if record.attack_name != "clean"))
    several_targets = len({target for _, target in rows}) > 1
    for i, (model, target) in enumerate(rows):
        mine = [record for record in records if (record.model, record.target) == (model, target)]
        clean = [record for record in mine if record.attack_name == "clean"]
        for j, kind in enumerate(kinds or [""]):
            line = clean + [record for record in mine if record.attack_name != "clean" and _kind(record) == kind]
            eps, value, bars = _points(line)
            panel.errorbar(
                # moved aside around the true eps, so that intervals of models and attacks do not hide each other
                255 * eps + 0.18 * (i - (len(rows) - 1) / 2) + 0.05 * (j - (len(kinds) - 1) / 2),
                value,
                yerr=bars,
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[j % len(_MARKERS)],
                linestyle=_LINES[j % len(_LINES)],
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


def plot_patches(
    clean: Tensor, adversarial: Tensor, path: str | os.PathLike[str], *, titles: Sequence[str] = ()
) -> Path:
    """Three rows of patches: clean, perturbation (scaled around grey, the factor is written beside it), adversarial.

    clean, adversarial: (n, c, h, w) in [0, 1]; three channels are shown as red, green, blue, any other number by its
    mean.  titles: one per column.  Raises ValueError for shapes or numbers of titles that differ.
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
    """A figure with its own canvas: no global state, no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "hsat[report]"') from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.ravel())


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
