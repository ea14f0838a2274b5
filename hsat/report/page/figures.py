"""The figures of the page: accuracy against eps, training curves, maps of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsat.attacks.natural_shift import STRENGTHS
from hsat.eval import Record
from hsat.eval.doubts import is_shift, norm_of
from hsat.report.aggregation import CLEAN, aggregate_runs, mean_chance
from hsat.report.artifacts import Artifacts
from hsat.report.natural_shift import shift_place
from hsat.report.page.drawing import Axis, Series, draw_accuracy_panel, draw_lines, draw_map, grey_swatch, swatch
from hsat.report.summary import accuracy_lines

_PERCENT = tuple(range(0, 101, 20))
_MAX_POINTS = 240


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        svg: The picture as markup.
        caption: What stands above it.
        legend: (sign as markup, text) pairs.
        named: Whether names stand at the ends of the lines.
    """

    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()
    named: bool = False


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
    lines = [line for line in accuracy_lines(here) if line.kind != CLEAN]
    if not lines:
        return None
    texts = []
    for line in lines:
        shown = ", ".join(f"{100 * p.estimate.value:.0f} % at {p.eps_text or '0'}" for p in line.points)
        texts.append(f"{line.model}, {'strongest attack' if line.kind == 'attack' else 'random noise'}: {shown}")
    if (chance := mean_chance(here)) is not None:
        texts.append(f"chance: {100 * chance:.0f} %")
    measured = {(line.model, line.target) for line in lines}
    svg, named = draw_accuracy_panel(
        [record for record in here if (record.model, record.target) in measured],
        {(model, target): styles[model] for model, target in measured},
        norm=norm,
        metric=metric,
        title=f"{level} level, {metric} against eps",
        description="; ".join(texts),
    )
    return PageFigure(svg, f"{level.capitalize()} level", named=named)


def accuracy_legend(models: Mapping[str, int], *, noise: bool, chance: bool) -> tuple[tuple[str, str], ...]:
    """What the lines of `accuracy_figure` mean, where names have no room at their ends."""
    items = [(swatch(style), model or "(unnamed model)") for model, style in models.items()]
    if noise:
        items.append((grey_swatch(dashed=True), "random noise of the same size, with the mark of each model"))
    if chance:
        items.append((grey_swatch(dashed=False), "chance level"))
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
