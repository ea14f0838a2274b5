"""The charts of the report: accuracy against eps, training curves, maps of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hsat.eval.records import Record
from hsat.eval.reporting.evidence import CLEAN, Condition, Evidence
from hsat.eval.reporting.findings import norm_of, points, worst_per_eps
from hsat.eval.reporting.svg import Axis, Series, axis_over, line_chart, scatter, swatch

_PERCENT = tuple(float(tick) for tick in range(0, 101, 20))
_MAX_POINTS = 240


@dataclass(frozen=True)
class Figure:
    """svg: the picture as markup.  caption: what stands below it.  legend: (sign as markup, text) pairs."""

    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


def accuracy_figure(
    records: Sequence[Record], styles: Mapping[str, int], *, level: str, norm: str, metric: str = "accuracy"
) -> Figure | None:
    """A metric against eps at one level: per model the strongest attack at each eps, noise, and the single attacks.

    records: of one setting and k.  styles: the colour and shape of each model.  None where there is nothing to draw.
    """
    here = [r for r in records if (r.level, r.metric) == (level, metric) and norm_of(r) in (norm, "")]
    series, told = [], []
    unit = 255.0 if norm == "Linf" else 1.0
    for model in dict.fromkeys(record.model for record in here):
        mine = [record for record in here if record.model == model]
        clean, attacks, noise = (points(mine, kind=kind) for kind in (CLEAN, "attack", "noise"))
        aside = (styles[model] % 4 - 1.5) * 0.012  # bars of several models beside each other, in shares of the axis
        for name, line in (("strongest attack", worst_per_eps(attacks)), ("random noise", noise)):
            if not line:
                continue
            drawn = [*clean[:1], *line]
            solid = line is not noise
            largest = max(point.eps for point in drawn) * unit
            x = [point.eps * unit + aside * largest for point in drawn]
            bars = [_ends(point.cell) for point in drawn] if solid else []
            series.append(
                Series(
                    label=f"{model}, {name}",
                    x=x,
                    y=[100 * point.cell.value for point in drawn],
                    low=[low for low, _ in bars],
                    high=[high for _, high in bars],
                    style=styles[model],
                    dash=0 if solid else 2,
                    hollow=not solid,
                )
            )
            shown = ", ".join(f"{100 * p.cell.value:.0f} % at {p.eps_text or '0'}" for p in drawn)
            told.append(f"{model}, {name}: {shown}")
    if not series:
        return None
    x_axis = _eps_axis([255 * r.eps_value if norm == "Linf" else r.eps_value for r in here], norm)
    y_axis = Axis(0.0, 100.0, _PERCENT, f"{metric}, %")
    svg = line_chart(series, x_axis, y_axis, title=f"{level} level, {metric} against eps", description="; ".join(told))
    return Figure(svg, f"{level.capitalize()} level")


def _eps_axis(values: Sequence[float], norm: str) -> Axis:
    """Ticks at the radii that were measured, where they have room; a little space on both sides for the bars."""
    label = "eps in grey levels (of 255)" if norm == "Linf" else f"eps ({norm or 'as recorded'})"
    round_axis = axis_over(values, label, count=4, low=0.0)
    radii = tuple(sorted({round(value, 4) for value in values} | {0.0}))
    largest = radii[-1] or 1.0
    fits = len(radii) <= 7 and all(b - a > 0.08 * largest for a, b in pairwise(radii))
    return Axis(-0.05 * largest, 1.05 * largest, radii if fits else round_axis.ticks[:-1], label)


def accuracy_legend(models: Mapping[str, int], *, noise: bool) -> tuple[tuple[str, str], ...]:
    """What the lines of `accuracy_figure` mean."""
    found = [(swatch(style), f"{model}, strongest attack at each eps") for model, style in models.items()]
    if noise:
        found += [(swatch(style, dash=2, hollow=True), f"{model}, random noise") for model, style in models.items()]
    return tuple(found)


def _ends(cell: object) -> tuple[float | None, float | None]:
    low, high, sd, value = (getattr(cell, name) for name in ("low", "high", "sd", "value"))
    if sd is not None:
        return 100 * (value - sd), 100 * (value + sd)
    return (None, None) if low is None or high is None else (100 * low, 100 * high)


def training_figures(columns: Mapping[str, Sequence[float]], *, name: str) -> tuple[Figure, ...]:
    """The loss and its terms over the steps, and the held-out accuracies where the training measured them."""
    steps = columns.get("step", ())
    found = []
    terms = [key for key in columns if key.startswith(("adversarial_", "clean_"))]
    losses = [key for key in ("loss", *terms) if key in columns]
    if losses:
        found.append(_curves(steps, columns, losses, y_label="loss", title=f"Training loss of {name}"))
    held_out = [key for key in columns if key.startswith("tune_")]
    if held_out:
        shares = {key: [100 * value for value in columns[key]] for key in held_out}
        title = f"Held-out patients during the training of {name}"
        found.append(_curves(steps, shares, held_out, y_label="held-out patches, %", title=title, percent=True))
    return tuple(figure for figure in found if figure is not None)


def _curves(
    steps: Sequence[float],
    columns: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    y_label: str,
    title: str,
    percent: bool = False,
) -> Figure | None:
    series, legend, told = [], [], []
    for style, key in enumerate(names):
        measured = [(x, y) for x, y in zip(steps, columns[key], strict=True) if math.isfinite(y) and math.isfinite(x)]
        if not measured:
            continue
        x, y = thinned(measured)
        label = key.removeprefix("tune_").replace("_", " ")
        sparse = len(x) <= 30
        series.append(Series(label=label, x=x, y=y, style=style, dash=min(style, 3), markers=sparse))
        legend.append((swatch(style, dash=min(style, 3)), label))
        told.append(f"{label} from {y[0]:.3g} to {y[-1]:.3g}")
    if not series:
        return None
    everything = [value for one in series for value in one.y]
    y_axis = Axis(0.0, 100.0, _PERCENT, y_label) if percent else axis_over(everything, y_label)
    x_axis = axis_over([value for one in series for value in one.x], "step", count=4, low=0.0)
    thin = max(len(columns[key]) for key in names) > _MAX_POINTS
    caption = f"{title}." + (f" Each point is a mean over 1/{_MAX_POINTS} of the run." if thin else "")
    return Figure(
        line_chart(series, x_axis, y_axis, title=title, description="; ".join(told)), caption, legend=tuple(legend)
    )


def thinned(measured: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most 240 points, each the mean of as many neighbouring ones."""
    parts = np.array_split(np.asarray(measured, dtype=np.float64), min(len(measured), _MAX_POINTS))
    means = [part.mean(0) for part in parts]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


def map_figures(evidence: Evidence, attack: str) -> tuple[Figure, ...]:
    """The clean queries on two principal axes, and the same patches under an attack with tails to where they were.

    Both maps have the same frame.  Nothing without the two conditions.
    """
    clean, attacked = evidence.conditions.get(CLEAN), evidence.conditions.get(attack)
    if clean is None or attacked is None or len(clean.places) != len(attacked.places) or not len(clean.places):
        return ()
    both = np.concatenate((clean.places, attacked.places))
    (low_x, low_y), (high_x, high_y) = both.min(0), both.max(0)
    bounds = float(low_x), float(high_x), float(low_y), float(high_y)
    figures = []
    for condition, tails in ((clean, None), (attacked, clean)):
        svg = scatter(
            _pairs(condition),
            [int(label) for label in condition.place_label],
            tails=[] if tails is None else _pairs(tails),
            bounds=bounds,
            hollow=tails is not None,
            title=f"Map of {evidence.model}, {condition.name}",
            description=f"{len(condition.places)} patches on two principal axes of the clean queries",
        )
        caption = "Clean" if tails is None else f"{condition.name}, with lines from where each patch was"
        figures.append(Figure(svg, caption))
    return tuple(figures)


def class_legend(class_names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The signs of the classes on the maps."""
    return tuple((swatch(index, line=False), name) for index, name in enumerate(class_names))


def _pairs(condition: Condition) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in condition.places]
