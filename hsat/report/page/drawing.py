"""Lines and points as SVG that the page can colour, drawn by matplotlib.

Colours are stand-ins that become CSS variables of the page (--s0 ... --s7, --soft ...), so that one picture serves
light, dark and printed pages; shapes and dashes tell series apart without colour.  Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np

from hsat.eval import Record
from hsat.report.accuracy_plot import Palette, draw_accuracy
from hsat.report.artifacts import ConditionArrays
from hsat.report.line_labels import labels_fit, place_labels, text_width
from hsat.report.panels import percent_axis

WIDTH, HEIGHT = 360, 250  # of a phone; one unit is a point
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40
_BAR = ((-1, -0.55), (1, -0.55), (1, 0.55), (-1, 0.55))
_SHAPES: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "h", _BAR)
_DASHES: tuple[Any, ...] = ("-", (0, (6, 4)), (0, (2, 3)), (0, (8, 3, 2, 3)))
_COLOURS = tuple(f"#5e00f{index}" for index in range(8))
_SOFT, _RULE, _BACKGROUND, _PANEL = "#5e00e0", "#5e00e1", "#5e00e2", "#5e00e3"
_INKS = tuple(f"#5e01f{index}" for index in range(8))
_VARIABLES = {colour: f"var(--s{index})" for index, colour in enumerate(_COLOURS)}
_VARIABLES |= {ink: f"var(--t{index})" for index, ink in enumerate(_INKS)}
_VARIABLES |= {_SOFT: "var(--soft)", _RULE: "var(--rule)", _BACKGROUND: "var(--bg)", _PANEL: "var(--panel)"}
_PALETTE = Palette(_COLOURS, _INKS, _SHAPES, _SOFT, _SOFT, _BACKGROUND)
_FONT = 12.0
_LONGEST = 100  # points of the longest name at the end of a line
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hsat",
    "font.size": _FONT,
    "text.color": _SOFT,
    "text.parse_math": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "lines.scale_dashes": False,
    "lines.linewidth": 2,
    "lines.dashed_pattern": (5, 3),
    "lines.dotted_pattern": (1.5, 2.5),
    "lines.markersize": 7,
    "figure.facecolor": "none",
}
_CLASSES = (
    "line",
    "band",
    "noise",
    "chance",
    "whisker",
    "mark",
    "tail",
    "name",
)  # groups that keep their name, as a class


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points in data units.

    Attributes:
        label: What a reader who cannot see it is told.
        x, y: The points.
        low, high: Ends of the bars, None where there are none.
        style: Chooses colour and shape.
        dash: Chooses the stroke.
        hollow: Whether markers are filled with the background.
        markers: Whether there are markers.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: int = 0
    dash: int = 0
    hollow: bool = False
    markers: bool = True


@dataclass(frozen=True)
class Axis:
    """Name, limits and ticks of an axis; None leaves them to matplotlib."""

    label: str
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None


def style_of(index: int) -> tuple[int, int]:
    """(colour, shape) of a style; after eight of them colours meet other shapes, so that 64 pairs differ."""
    return (index + index // len(_SHAPES)) % len(_COLOURS), index % len(_SHAPES)


def draw_accuracy_panel(
    records: Sequence[Record],
    styles: Mapping[tuple[str, str], int],
    *,
    norm: str,
    metric: str,
    title: str,
    description: str,
) -> tuple[str, bool]:
    """The panel of `plot_accuracy_vs_eps`, as SVG.

    Args:
        records: Of one level, metric, k and norm.
        styles: The number of the colour and shape of each (model, target).
        norm: As in `draw_accuracy`.
        metric: Names the axis.
        title, description: Read aloud in place of the picture.

    Returns:
        The picture, and whether its lines bear their names, so that it needs no legend.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM)
        labels = draw_accuracy(axes, records, styles, norm=norm, palette=_PALETTE)
        percent_axis(axes)
        axes.set_ylabel(f"{metric}, %")
        named = labels_fit(axes, labels, room=_LONGEST)
        if named:
            longest = max(text_width(label.text, _FONT) for label in labels)
            axes.set_position(_place(WIDTH, HEIGHT, _LEFT, longest + 8, _TOP, _BOTTOM))
            place_labels(axes, labels)
        return _as_svg(figure, title=title, description=description), named


def draw_lines(series: Sequence[Series], x: Axis, y: Axis, *, title: str, description: str) -> str:
    """Lines with bars and markers over two axes, as SVG.

    Args:
        series: The lines; points that are not finite are left out.
        x, y: The axes.
        title, description: Read aloud in place of the picture.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM)
        for line in series:
            colour = _COLOURS[style_of(line.style)[0]]
            bars = [
                (a, low, high)
                for a, low, high in zip(line.x, line.low, line.high, strict=False)
                if low is not None and high is not None
            ]
            if bars:
                at, low, high = zip(*bars, strict=True)
                axes.vlines(at, low, high, colors=colour, linewidth=1.2, clip_on=False, gid="whisker")
                axes.plot([*at, *at], [*low, *high], "_", color=colour, markersize=6, clip_on=False)
            finite = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
            across, up = [a for a, _ in finite], [b for _, b in finite]
            stroke = _DASHES[line.dash % len(_DASHES)]
            axes.plot(across, up, color=colour, linestyle=stroke, linewidth=2, clip_on=False, gid="line")
            if line.markers:
                _mark(axes, across, up, line.style, size=9, hollow=line.hollow)
        _set_axes(axes, x, y)
        return _as_svg(figure, title=title, description=description)


def _set_axes(axes: Any, x: Axis, y: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    for one, axis, limit in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if one.ticks is not None:
            axis.set_ticks(list(one.ticks))
        if one.limits is not None:
            limit(*one.limits)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_map(
    condition: ConditionArrays,
    before: ConditionArrays | None,
    *,
    bounds: tuple[np.ndarray, np.ndarray],
    title: str,
    description: str,
) -> str:
    """Patches in a box with equal units along both axes, as SVG.

    Args:
        condition: Places and classes of the patches.
        before: Where each patch came from, for tails; None for filled markers without tails.
        bounds: Lowest and highest place (2,) that is shown.
        title, description: Read aloud in place of the picture.
    """
    import matplotlib

    margin = 14
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.facecolor": _PANEL}):
        figure, axes = _figure(WIDTH, HEIGHT, 1, 1, 1, 1)
        low, high = bounds
        span = np.maximum(high - low, 1e-12)
        room = np.array([WIDTH - 2 - 2 * margin, HEIGHT - 2 - 2 * margin], dtype=float)
        scale = (span / room).max()  # data units per point, the same along both axes
        middle, half = (low + high) / 2, (room / 2 + margin) * scale
        axes.set_xlim(middle[0] - half[0], middle[0] + half[0])
        axes.set_ylim(middle[1] - half[1], middle[1] + half[1])
        for spine in axes.spines.values():
            spine.set(visible=True, color=_RULE)
        axes.set_xticks([])
        axes.set_yticks([])
        places, labels = condition.places, condition.place_label
        if before is not None:
            for index, (start, end) in enumerate(zip(before.places, places, strict=True)):
                colour = _COLOURS[style_of(int(labels[index]))[0]]
                axes.plot(*zip(start, end, strict=True), color=colour, linewidth=0.6, alpha=0.45, gid="tail")
        for label in np.unique(labels):
            mine = places[labels == label]
            _mark(axes, mine[:, 0], mine[:, 1], int(label), size=7, hollow=before is not None)
        return _as_svg(figure, title=title, description=description)


@lru_cache(maxsize=256)
def swatch(style: int, *, dash: int = 0, hollow: bool = False, line: bool = True) -> str:
    """The sign of a series for a legend in the page's own text; hidden from screen readers, which read the text."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(28, 14, 0, 0, 0, 0)
        axes.set(xlim=(0, 28), ylim=(0, 14))
        axes.axis("off")
        if line:
            axes.plot([1, 27], [7, 7], color=_COLOURS[style_of(style)[0]], linestyle=_DASHES[dash], linewidth=2)
        _mark(axes, [14], [7], style, size=8, hollow=hollow)
        return _as_svg(figure)


def grey_swatch(*, dashed: bool) -> str:
    """The sign of random noise (dashed) or of the chance level (dotted) for a legend."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(28, 14, 0, 0, 0, 0)
        axes.set(xlim=(0, 28), ylim=(0, 14))
        axes.axis("off")
        axes.plot([1, 27], [7, 7], color=_SOFT, linestyle="--" if dashed else ":", linewidth=1.1)
        return _as_svg(figure)


def _mark(axes: Any, x: Any, y: Any, style: int, *, size: float, hollow: bool) -> None:
    colour, shape = style_of(style)
    face, edge = (_BACKGROUND, _COLOURS[colour]) if hollow else (_COLOURS[colour], _BACKGROUND)
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=_SHAPES[shape],
        markersize=size,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=1.5 if hollow else 0.8,
        clip_on=False,
        gid="mark",
    )


def _figure(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Any, Any]:
    """A figure of so many points, and axes inside its margins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    return figure, figure.add_axes(_place(width, height, left, right, top, bottom))


def _place(
    width: float, height: float, left: float, right: float, top: float, bottom: float
) -> tuple[float, float, float, float]:
    """Axes inside margins of so many points, in shares of the figure."""
    return (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)


def _as_svg(figure: Any, *, title: str = "", description: str = "") -> str:
    """The figure as an element for the page: coloured by its style sheet, without ids, namespaces or clips."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=metadata, dpi=72)
    text = out.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None  # matplotlib writes it
    body = text[text.index(">", view.end()) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>", "", body, flags=re.DOTALL)
    shapes = dict(re.findall(r'<path id="([^"]+)" d="([^"]+)"', body))
    body = re.sub(r"<defs>.*?</defs>", "", body, flags=re.DOTALL)
    body = re.sub(
        r'<use xlink:href="#([^"]+)" x="([^"]+)" y="([^"]+)"',
        lambda use: f'<path d="{shapes[use[1]]}" transform="translate({use[2]} {use[3]})"',
        body,
    )
    body = re.sub(r'<g id="([a-z]+)">', lambda g: f'<g class="{g[1]}">' if g[1] in _CLASSES else "<g>", body)
    body = re.sub(r' (?:id|clip-path|xml:space)="[^"]*"|font: [^;"]*;? ?', "", body)
    body = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"\s*\n\s*", " ", body)
    label = f'role="img" aria-label="{escape(f"{title}. {description}")}"' if title else 'aria-hidden="true"'
    size = 'class="chart"' if title else 'class="swatch" width="28" height="14"'
    return f"<svg {size} {view[0]} {label}>{body}</svg>"
