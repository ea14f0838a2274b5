"""The figures of the page: accuracy against eps, training curves, maps of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsat.attacks.natural_shift import STRENGTHS
from hsat.eval import Record
from hsat.report.aggregation import CLEAN, Estimate, aggregate_runs, mean_chance
from hsat.report.artifacts import Artifacts
from hsat.report.natural_shift import shift_place
from hsat.report.page.drawing import Axis, Series, baseline_swatch, draw_lines, draw_map, swatch
from hsat.report.summary import accuracy_lines, eps_ticks, is_shift, norm_of

_PERCENT = tuple(range(0, 101, 20))
_MAX_POINTS = 240


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        svg: The picture as markup.
        caption: What stands above it.
        legend: (sign as markup, text) pairs.
    """

    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


def accuracy_figure(
    records: Sequence[Record], styles: Mapping[str, int], *, level: str, norm: str, metric: str = "accuracy"
) -> PageFigure | None:
    """A metric against eps at one level: per model the strongest attack at each eps, noise, and the chance level.

    Args:
        records: Of one setting and k.
        styles: The colour and shape of each model.
        level: Which level.
        norm: "Linf" (in grey levels) or another.
        metric: Which metric.

    Returns:
        None where there is nothing to draw.
    """
    here = [r for r in records if (r.level, r.metric) == (level, metric) and norm_of(r) in (norm, "")]
    series, texts = [], []
    unit = 255.0 if norm == "Linf" else 1.0
    for line in accuracy_lines(here):
        if line.kind == CLEAN:
            continue
        solid = line.kind == "attack"
        label = f"{line.model}, {'strongest attack' if solid else 'random noise'}"
        largest = max(point.eps for point in line.points) * unit
        # bars of several models beside each other, in shares of the axis
        aside = (styles[line.model] % 4 - 1.5) * 0.012 * largest
        bars = [_bar_ends(point.estimate) for point in line.points] if solid else []
        series.append(
            Series(
                label=label,
                x=[point.eps * unit + aside for point in line.points],
                y=[100 * point.estimate.value for point in line.points],
                low=[low for low, _ in bars],
                high=[high for _, high in bars],
                style=styles[line.model],
                dash=0 if solid else 2,
                hollow=not solid,
            )
        )
        shown = ", ".join(f"{100 * p.estimate.value:.0f} % at {p.eps_text or '0'}" for p in line.points)
        texts.append(f"{label}: {shown}")
    if not series:
        return None
    x_axis = _eps_axis([unit * record.eps_value for record in here], norm)
    y_axis = Axis(f"{metric}, %", (0, 100), _PERCENT)
    title = f"{level} level, {metric} against eps"
    baseline = None
    if (chance := mean_chance(here)) is not None:
        baseline = 100 * chance
        texts.append(f"chance: {baseline:.0f} %")
    svg = draw_lines(series, x_axis, y_axis, title=title, description="; ".join(texts), baseline=baseline)
    return PageFigure(svg, f"{level.capitalize()} level")


def _eps_axis(values: Sequence[float], norm: str) -> Axis:
    """Ticks at the radii that were measured, where they have room; a little space on both sides for the bars."""
    label = "eps in grey levels (of 255)" if norm == "Linf" else f"eps ({norm or 'as recorded'})"
    largest = max(values, default=0.0) or 1.0
    return Axis(label, (-0.05 * largest, 1.05 * largest), eps_ticks(values))


def _bar_ends(estimate: Estimate) -> tuple[float | None, float | None]:
    ends = estimate.interval
    return (None, None) if ends is None else (100 * ends[0], 100 * ends[1])


def accuracy_legend(models: Mapping[str, int], *, noise: bool, chance: bool) -> tuple[tuple[str, str], ...]:
    """What the lines of `accuracy_figure` mean."""
    items = [(swatch(style), f"{model}, strongest attack at each eps") for model, style in models.items()]
    if noise:
        items += [(swatch(style, dash=2, hollow=True), f"{model}, random noise") for model, style in models.items()]
    if chance:
        items.append((baseline_swatch(), "chance level"))
    return tuple(items)


def shift_figures(records: Sequence[Record], *, metric: str) -> tuple[PageFigure, ...]:
    """For each model the metric at patch level against the strength, a line per kind; none without standard shifts.

    Args:
        records: Of one setting and k.
        metric: Which metric.
    """
    here = [record for record in records if (record.level, record.metric) == ("patch", metric)]
    figures = []
    for model in dict.fromkeys(record.model for record in here if is_shift(record)):
        mine = [record for record in here if record.model == model]
        clean = aggregate_runs([record for record in mine if record.attack_name == CLEAN])
        lines: dict[str, list[tuple[int, float]]] = {}
        for label, strength in dict.fromkeys(map(shift_place, filter(is_shift, mine))):
            estimate = aggregate_runs([r for r in mine if is_shift(r) and shift_place(r) == (label, strength)])
            if strength in STRENGTHS and estimate is not None:
                first = [] if clean is None else [(0, 100 * clean.value)]
                lines.setdefault(label, first).append((STRENGTHS.index(strength) + 1, 100 * estimate.value))
        if lines:
            figures.append(_shift_figure(model, lines, metric))
    return tuple(figures)


def _shift_figure(model: str, lines: Mapping[str, Sequence[tuple[int, float]]], metric: str) -> PageFigure:
    series = [
        Series(label=label, x=[x for x, _ in points], y=[y for _, y in points], style=style, dash=style % 4)
        for style, (label, points) in enumerate(lines.items())
    ]
    said = "; ".join(f"{label}: {', '.join(f'{y:.0f} %' for _, y in points)}" for label, points in lines.items())
    x_axis = Axis("strength (0 clean, 1 mild, 2 medium, 3 strong)", (-0.15, 3.15), (0, 1, 2, 3))
    name = model or "(unnamed model)"
    svg = draw_lines(
        series,
        x_axis,
        Axis(f"{metric}, %", (0, 100), _PERCENT),
        title=f"Natural shift, {name}",
        description=said,
    )
    legend = tuple((swatch(style, dash=style % 4), label) for style, label in enumerate(lines))
    return PageFigure(svg, name, legend)


def training_figures(columns: Mapping[str, Sequence[float]], *, name: str) -> tuple[PageFigure, ...]:
    """The loss and its terms over the steps, and the held-out accuracies where the training measured them."""
    steps = columns.get("step", ())
    terms = [key for key in columns if key.startswith(("adversarial_", "clean_"))]
    losses = [key for key in ("loss", *terms) if key in columns]
    held_out = [key for key in columns if key.startswith("tune_")]
    shares = {key: [100 * value for value in columns[key]] for key in held_out}
    figures = [
        _curves(steps, {key: columns[key] for key in losses}, Axis("loss"), f"Training loss of {name}"),
        _curves(
            steps,
            shares,
            Axis("held-out patches, %", (0, 100), _PERCENT),
            f"Held-out patients during the training of {name}",
        ),
    ]
    return tuple(figure for figure in figures if figure is not None)


def _curves(
    steps: Sequence[float], columns: Mapping[str, Sequence[float]], y_axis: Axis, title: str
) -> PageFigure | None:
    series, legend = [], []
    for style, (key, values) in enumerate(columns.items()):
        measured = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y) and math.isfinite(x)]
        if measured:
            x, y = thin_out(measured)
            dash = min(style, 3)
            label = key.removeprefix("tune_").replace("_", " ")
            series.append(Series(label=label, x=x, y=y, style=style, dash=dash, markers=len(x) <= 30))
            legend.append((swatch(style, dash=dash), label))
    if not series:
        return None
    thin = any(len(values) > _MAX_POINTS for values in columns.values())
    caption = f"{title}." + (f" Each point is a mean over 1/{_MAX_POINTS} of the run." if thin else "")
    description = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in series)
    svg = draw_lines(series, Axis("step"), y_axis, title=title, description=description)
    return PageFigure(svg, caption, tuple(legend))


def thin_out(measured: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most 240 points, each the mean of as many neighbouring ones."""
    parts = np.array_split(np.asarray(measured, dtype=np.float64), min(len(measured), _MAX_POINTS))
    means = [part.mean(0) for part in parts]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


def map_figures(artifacts: Artifacts, attack: str) -> tuple[PageFigure, ...]:
    """The clean queries on two principal axes, and the same patches under an attack with tails to where they were.

    Both maps have the same frame.  Nothing without the two conditions.
    """
    clean, attacked = artifacts.conditions.get(CLEAN), artifacts.conditions.get(attack)
    if clean is None or attacked is None or len(clean.places) != len(attacked.places) or not len(clean.places):
        return ()
    both = np.concatenate((clean.places, attacked.places)).astype(np.float64)
    figures = []
    for condition, before in ((clean, None), (attacked, clean)):
        svg = draw_map(
            condition,
            before,
            bounds=(both.min(0), both.max(0)),
            title=f"Map of {artifacts.model}, {condition.name}",
            description=f"{len(condition.places)} patches on two principal axes of the clean queries",
        )
        caption = "Clean" if before is None else f"{condition.name}, with lines from where each patch was"
        figures.append(PageFigure(svg, caption))
    return tuple(figures)


def class_legend(class_names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The signs of the classes on the maps."""
    return tuple((swatch(index, line=False), name) for index, name in enumerate(class_names))
