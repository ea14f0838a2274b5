"""Small charts as SVG text: drawn for a phone's width, coloured by the classes of the page's style sheet.

Nothing here knows what it draws.  Colours are CSS variables (--s0 ... --s7), so that one picture serves light, dark and
printed pages; shapes and dashes tell series apart without colour.  All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40
_SHAPES = 8
DASHES = ("", "6 4", "2 3", "8 3 2 3")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points in data units.  low, high: ends of the bars, None where there are none.

    style chooses colour and shape, dash the stroke; hollow markers are filled with the background; line=False draws
    the markers alone, small.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: int = 0
    dash: int = 0
    hollow: bool = False
    line: bool = True
    markers: bool = True


@dataclass(frozen=True)
class Axis:
    """A linear axis: its ends, its ticks and its name."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str

    def at(self, value: float, start: float, end: float) -> float:
        """The pixel of a value between the pixels of the two ends."""
        span = self.high - self.low or 1.0
        return start + (value - self.low) / span * (end - start)


def axis_over(values: Sequence[float], label: str, *, count: int = 5, low: float | None = None) -> Axis:
    """An axis with round ticks that holds all finite values; low fixes its lower end."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    start, end = (min(finite) if low is None else low), max(finite)
    size = max(abs(start), abs(end))
    if end - start <= max(1e-9 * size, 1e-200):  # one value, but for rounding
        room = max(0.5, 1e-3 * size)
        start, end = (start, start + 2 * room) if low is not None else (start - room, end + room)
    rough = (end - start) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(start / step + 1e-9), math.ceil(end / step - 1e-9)
    digits = max(12, 3 - math.floor(math.log10(step)))  # enough for the smallest step, few enough to look round
    ticks = tuple(round(i * step, digits) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, label)


def colour_class(style: int) -> str:
    """The style sheet's class of a style; after eight of them colours meet other shapes, so that all pairs differ."""
    return f"s{(style + style // _SHAPES) % COLOURS}"


def line_chart(series: Sequence[Series], x: Axis, y: Axis, *, title: str, description: str) -> str:
    """Lines with bars and markers over two axes.  title and description are read aloud in place of the picture."""
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def place(a: float, b: float) -> tuple[float, float]:
        return x.at(a, _LEFT, right), y.at(b, bottom, _TOP)

    parts = [_frame(x, y)]
    for one in series:
        points = [place(a, b) for a, b in zip(one.x, one.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        parts.append(f'<g class="{colour_class(one.style)}">')
        for a, below, above in zip(one.x, one.low, one.high, strict=False):
            if below is not None and above is not None:
                (px, top), (_, end) = place(a, above), place(a, below)
                parts.append(
                    f'<path class="whisker" d="M{px - 3:.1f} {top:.1f}h6M{px:.1f} {top:.1f}V{end:.1f}'
                    f'M{px - 3:.1f} {end:.1f}h6"/>'
                )
        if one.line and len(points) > 1:
            dash = f' stroke-dasharray="{DASHES[one.dash % len(DASHES)]}"' if one.dash % len(DASHES) else ""
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            parts.append(f'<path class="line"{dash} d="M{path}"/>')
        if one.markers:
            size = 4.5 if one.line else 2.5
            parts += [marker(one.style, a, b, size=size, hollow=one.hollow) for a, b in points]
        parts.append("</g>")
    return _svg(parts, title=title, description=description)


def _frame(x: Axis, y: Axis) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = ['<g class="axes">']
    for tick in y.ticks:
        py = y.at(tick, bottom, _TOP)
        parts.append(f'<path class="grid" d="M{_LEFT} {py:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        px = x.at(tick, _LEFT, right)
        parts.append(f'<path class="tick" d="M{px:.1f} {bottom}v4"/>')
        anchor = "end" if px > right - 12 and len(f"{tick:g}") > 3 else "middle"
        parts.append(f'<text x="{px:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{tick:g}</text>')
    parts.append(f'<path class="edge" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>'
        f'<text transform="translate(11 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text></g>"
    )
    return "".join(parts)


def scatter(
    places: Sequence[tuple[float, float]],
    styles: Sequence[int],
    *,
    tails: Sequence[tuple[float, float]] = (),
    bounds: tuple[float, float, float, float],
    title: str,
    description: str,
    hollow: bool = False,
) -> str:
    """Points in a box with equal units along both axes; tails are where each point came from.

    bounds: low x, high x, low y, high y of what is shown.
    """
    low_x, high_x, low_y, high_y = bounds
    margin = 14.0
    span = max(high_x - low_x, 1e-12), max(high_y - low_y, 1e-12)
    unit = min((WIDTH - 2 * margin) / span[0], (HEIGHT - 2 * margin) / span[1])
    middle = (low_x + high_x) / 2, (low_y + high_y) / 2

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return WIDTH / 2 + (point[0] - middle[0]) * unit, HEIGHT / 2 - (point[1] - middle[1]) * unit

    parts = [f'<rect class="box" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="4"/>']
    for begin, end, style in zip(tails, places, styles, strict=False):
        (ax, ay), (bx, by) = place(begin), place(end)
        parts.append(f'<path class="tail {colour_class(style)}" d="M{ax:.1f} {ay:.1f}L{bx:.1f} {by:.1f}"/>')
    for point, style in zip(places, styles, strict=True):
        px, py = place(point)
        parts.append(f'<g class="{colour_class(style)}">{marker(style, px, py, size=3.6, hollow=hollow)}</g>')
    return _svg(parts, title=title, description=description)


def marker(style: int, x: float, y: float, *, size: float, hollow: bool = False) -> str:
    """One of eight shapes around a point."""
    kind = "mark hollow" if hollow else "mark"
    r = size
    shape = style % _SHAPES
    if shape == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    lines = {
        1: f"M{x - r:.1f} {y - r:.1f}h{2 * r:g}v{2 * r:g}h{-2 * r:g}z",  # square
        2: f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:g} {2.1 * r:g}h{-2.4 * r:g}z",  # triangle
        3: f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {1.3 * r:g}l{-1.3 * r:g} {-1.3 * r:g}z",
        4: f"M{x:.1f} {y + 1.2 * r:.1f}l{1.2 * r:g} {-2.1 * r:g}h{-2.4 * r:g}z",  # triangle on its tip
        5: _cross(x, y, r * 1.15, r * 0.4),  # plus
        6: f"M{x - 1.25 * r:.1f} {y:.1f}l{0.6 * r:g} {-1.1 * r:g}h{1.3 * r:g}l{0.6 * r:g} {1.1 * r:g}"
        f"l{-0.6 * r:g} {1.1 * r:g}h{-1.3 * r:g}z",  # hexagon
        7: f"M{x - r:.1f} {y - 0.55 * r:.1f}h{2 * r:g}v{1.1 * r:g}h{-2 * r:g}z",  # bar
    }
    return f'<path class="{kind}" d="{lines[shape]}"/>'


def _cross(x: float, y: float, arm: float, half: float) -> str:
    long = arm - half
    return (
        f"M{x - half:.1f} {y - arm:.1f}h{2 * half:g}v{long:g}h{long:g}v{2 * half:g}h{-long:g}v{long:g}h{-2 * half:g}"
        f"v{-long:g}h{-long:g}v{-2 * half:g}h{long:g}z"
    )


def swatch(style: int, *, dash: int = 0, hollow: bool = False, line: bool = True) -> str:
    """The sign of a series for a legend in the page's own text; hidden from screen readers, which read the text."""
    stroke = f' stroke-dasharray="{DASHES[dash]}"' if dash else ""
    drawn = f'<path class="line"{stroke} d="M1 7H27"/>' if line else ""
    return (
        f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">'
        f'<g class="{colour_class(style)}">{drawn}{marker(style, 14, 7, size=4, hollow=hollow)}</g></svg>'
    )


def _svg(parts: Sequence[str], *, title: str, description: str) -> str:
    label = escape(f"{title}. {description}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
