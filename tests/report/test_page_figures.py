"""Charts: positions by hand, text escaped, nothing drawn outside."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hsat.eval.reporting.svg import (
    HEIGHT,
    WIDTH,
    Axis,
    Series,
    axis_over,
    colour_class,
    line_chart,
    marker,
    scatter,
    swatch,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hsat.report import read_artifacts
from hsat.report.page.figures import accuracy_figure, map_figures, thinned, training_figures

X, Y = Axis(0, 10, (0, 5, 10), "x"), Axis(0, 100, (0, 50, 100), "y")


def parsed(svg):
    return ET.fromstring(svg)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.booleans())
@example([0.0, 2.9e-37], False)
@example([0.0, 5e-324], True)
@example([1e6, 1e6 + 1.2e-10], False)
@example([1e299], False)
@example([1e299, -1e299], True)
def test_axes_hold_their_values_with_few_round_ticks(values, fixed):
    axis = axis_over(values, "x", low=min(values) if fixed else None)
    span = axis.high - axis.low
    assert axis.low <= min(values) + 1e-6 * span and axis.high >= max(values) - 1e-6 * span
    assert 2 <= len(axis.ticks) <= 9 and list(axis.ticks) == sorted(axis.ticks)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0, 8], (0, 2, 4, 6, 8)), ([0.0, 1.0], (0, 0.2, 0.4, 0.6, 0.8, 1)), ([3.2, 9.7], (2, 4, 6, 8, 10))],
)
def test_ticks_by_hand(values, ticks):
    assert axis_over(values, "x").ticks == pytest.approx(ticks)


def test_an_axis_over_nothing_finite():
    assert axis_over([math.nan], "x").ticks == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))


def test_points_lines_and_bars_are_where_they_belong():
    one = Series(label="a", x=[0, 10], y=[0, 100], low=[None, 50], high=[None, 100])
    svg = line_chart([one], X, Y, title="t", description="d")
    left, right, top, bottom = 44, WIDTH - 12, 12, HEIGHT - 40
    assert f'd="M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"' in svg
    circles = [e for e in parsed(svg).iter("circle")]
    assert [(float(c.get("cx")), float(c.get("cy"))) for c in circles] == [(left, bottom), (right, top)]
    (bar,) = re.findall(r'class="whisker" d="([^"]+)"', svg)
    middle = (top + bottom) / 2
    caps = f"M{right - 3:.1f} {top:.1f}h6", f"M{right - 3:.1f} {middle:.1f}h6"
    assert bar == f"{caps[0]}M{right:.1f} {top:.1f}V{middle:.1f}{caps[1]}"


def test_what_is_not_finite_is_left_out():
    svg = line_chart([Series(label="a", x=[0, 1, 2], y=[1, math.nan, 3])], X, Y, title="t", description="d")
    assert "nan" not in svg and len(list(parsed(svg).iter("circle"))) == 2


def test_text_is_escaped():
    axis = Axis(0, 1, (0, 1), "<b>&")
    svg = line_chart([], axis, axis, title='"<i>', description="'&")
    assert parsed(svg).get("aria-label") == "\"<i>. '&"
    assert "<b>" not in svg and "<i>" not in svg


def test_styles_differ_in_shape_or_colour():
    drawn = {(colour_class(i), re.sub(r"[\d.-]+", "#", marker(i, 0, 0, size=4))) for i in range(64)}
    shapes = {marker(i, 0, 0, size=4) for i in range(8)}
    assert len(shapes) == 8 and len(drawn) >= 8
    assert len({(colour_class(i), marker(i, 0, 0, size=4)) for i in range(64)}) == 64
    assert all(parsed(swatch(i, dash=i % 4)).get("aria-hidden") == "true" for i in range(9))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6))
def test_scattered_points_stay_in_the_box_at_one_scale(places):
    xs, ys = zip(*places, strict=True)
    bounds = min(xs), max(xs), min(ys), max(ys)
    svg = scatter(places, [0] * len(places), bounds=bounds, title="t", description="d")
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in parsed(svg).iter("circle")]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots)
    (ax, ay), (bx, by) = places[0], places[-1]
    if abs(ax - bx) > 0.1 and abs(ay - by) > 0.1:
        across, up = (dots[0][0] - dots[-1][0]) / (ax - bx), (dots[0][1] - dots[-1][1]) / (ay - by)
        assert across == pytest.approx(-up, rel=0.05)


def test_curve_of_the_strongest_attack_and_of_noise(made_records):
    figure = accuracy_figure(made_records("HSAT", 0.8), {"HSAT": 0}, level="patch", norm="Linf")
    label = parsed(figure.svg).get("aria-label")
    assert "HSAT, strongest attack: 80 % at 0/255, 60 % at 4/255, 40 % at 8/255" in label
    assert "HSAT, random noise: 80 % at 0/255, 76 % at 8/255" in label
    assert figure.svg.count('class="line"') == 2 and figure.svg.count('class="whisker"') == 3
    ticks = re.findall(r'text-anchor="middle">([\d.]+)<', figure.svg)
    assert ticks == ["0", "4", "8"]
    assert accuracy_figure(made_records(), {"HSAT": 0}, level="city", norm="Linf") is None


def test_bars_of_several_runs_are_their_standard_deviation(made_records):
    records = [r for seed, value in enumerate((0.6, 0.8)) for r in made_records("HSAT", value, seed=seed)]
    figure = accuracy_figure(records, {"HSAT": 0}, level="patch", norm="Linf")
    bars = re.findall(r'whisker" d="M[\d.]+ ([\d.]+)h6M[\d.]+ [\d.]+V([\d.]+)M', figure.svg)
    top, end = map(float, bars[0])
    assert (end - top) / (HEIGHT - 52) == pytest.approx(2 * np.std([0.6, 0.8], ddof=1), abs=0.002)


def test_other_norms_have_their_own_axis(made_records):
    records = [
        replace(r, attack=r.attack.replace("Linf", "L2"), eps_value=r.eps_value * 32)
        for r in made_records()
        if r.attack
    ]
    figure = accuracy_figure(records, {"HSAT": 0}, level="patch", norm="L2")
    assert "eps (L2)" in figure.svg
    assert accuracy_figure(records, {"HSAT": 0}, level="patch", norm="Linf") is None


def test_long_trainings_are_averaged():
    x, y = thinned([(i, float(i % 2)) for i in range(2400)])
    assert len(x) == 240 and y == pytest.approx([0.5] * 240) and x[0] == 4.5
    assert thinned([(1.0, 2.0)]) == ([1.0], [2.0])


def test_training_curves():
    columns = {
        "step": [0.0, 1, 2],
        "loss": [3.0, 2, 1],
        "lr": [1.0, 1, 1],
        "adversarial_slide": [1.0, 1, 1],
        "tune_clean_mca": [math.nan, math.nan, 0.5],
    }
    loss, held_out = training_figures(columns, name="run")
    assert [text for _, text in loss.legend] == ["loss", "adversarial slide"]
    assert [text for _, text in held_out.legend] == ["clean mca"]
    assert "loss from 3 to 1" in loss.svg and "clean mca from 50 to 50" in held_out.svg
    assert training_figures({}, name="run") == ()
    assert training_figures({"step": [0.0], "tune_clean_mca": [math.nan]}, name="run") == ()


def test_both_maps_share_one_frame(tmp_path, made_artifacts):
    made_artifacts(tmp_path, "HSAT")
    (evidence,) = read_artifacts(tmp_path)
    clean, attacked = map_figures(evidence, "PGD-8")
    starts = re.findall(r'class="tail s\d" d="M([\d.]+ [\d.]+)L', attacked.svg)
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', clean.svg)
    assert len(starts) == 36 and len(dots) == 12
    assert {" ".join(dot) for dot in dots} <= set(starts)
    assert map_figures(evidence, "none") == ()
