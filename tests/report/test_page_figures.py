"""Figures of the page: positions by hand, text escaped and selectable, colours left to the page, nothing outside."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.report import ConditionArrays, read_artifacts
from hsat.report.page.drawing import HEIGHT, WIDTH, Axis, Series, draw_lines, draw_map, style_of, swatch
from hsat.report.page.figures import accuracy_figure, accuracy_legend, map_figures, thin_out, training_figures

X, Y = Axis("x", (0, 10), (0, 5, 10)), Axis("y", (0, 100), (0, 50, 100))
LEFT, RIGHT, TOP, BOTTOM = 44, WIDTH - 12, 12, HEIGHT - 40


def parsed(svg):
    return ET.fromstring(svg)


def group(svg, name):
    """The elements of the groups of a class."""
    return [path for g in parsed(svg).iter("g") if g.get("class") == name for path in g.iter("path")]


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def marks(svg):
    return [tuple(numbers(path.get("transform"))) for path in group(svg, "mark")]


def test_points_lines_and_bars_are_where_they_belong():
    one = Series(label="a", x=[0, 10], y=[0, 100], low=[None, 50], high=[None, 100])
    svg = draw_lines([one], X, Y, title="t", description="d")
    (line,) = group(svg, "line")
    assert numbers(line.get("d")) == pytest.approx([LEFT, BOTTOM, RIGHT, TOP])
    np.testing.assert_allclose(marks(svg), [(LEFT, BOTTOM), (RIGHT, TOP)])
    (bar,) = group(svg, "whisker")
    assert numbers(bar.get("d")) == pytest.approx([RIGHT, (TOP + BOTTOM) / 2, RIGHT, TOP])
    assert parsed(svg).get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"


def test_what_is_not_finite_is_left_out():
    svg = draw_lines([Series(label="a", x=[0, 1, 2], y=[1, math.nan, 3])], X, Y, title="t", description="d")
    assert "nan" not in svg and len(marks(svg)) == 2


def test_text_is_escaped_and_stays_text():
    axis = Axis("<b>& $a$", (0, 1), (0, 1))
    svg = draw_lines([], axis, axis, title='"<i>', description="'&")
    assert parsed(svg).get("aria-label") == "\"<i>. '&"
    assert "<b>" not in svg and "<i>" not in svg
    assert [element.text for element in parsed(svg).iter("text")].count("<b>& $a$") == 2


def test_colours_are_those_of_the_page_and_nothing_has_an_id():
    svg = draw_lines([Series(label="a", x=[0, 1], y=[1, 3], style=3)], X, Y, title="t", description="d")
    assert "var(--s3)" in svg and "var(--soft)" in svg and "var(--rule)" in svg
    assert not re.search(r"#[0-9a-f]{3,6}|\bid=|url\(|xmlns|font:", svg)
    assert svg == draw_lines([Series(label="a", x=[0, 1], y=[1, 3], style=3)], X, Y, title="t", description="d")


def test_styles_differ_in_shape_or_colour():
    assert len({style_of(index) for index in range(64)}) == 64
    assert len({style_of(index)[1] for index in range(8)}) == len({style_of(index)[0] for index in range(8)}) == 8
    shapes = {path.get("d") for index in range(8) for path in group(swatch(index), "mark")}
    assert len(shapes) == 8
    assert all(parsed(swatch(i, dash=i % 4)).get("aria-hidden") == "true" for i in range(9))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6))
def test_scattered_points_stay_in_the_box_at_one_scale(places):
    array = np.array(places)
    condition = ConditionArrays("clean", {}, {}, array, np.zeros(len(places), dtype=int))
    svg = draw_map(condition, None, bounds=(array.min(0), array.max(0)), title="t", description="d")
    dots = marks(svg)
    assert len(dots) == len(places) and all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots)
    (ax, ay), (bx, by) = places[0], places[-1]
    if abs(ax - bx) > 0.1 and abs(ay - by) > 0.1:
        across, up = (dots[0][0] - dots[-1][0]) / (ax - bx), (dots[0][1] - dots[-1][1]) / (ay - by)
        assert across == pytest.approx(-up, rel=0.05)


def test_curve_of_the_strongest_attack_and_of_noise(made_records):
    figure = accuracy_figure(made_records("HSAT", 0.8), {"HSAT": 0}, level="patch", norm="Linf")
    label = parsed(figure.svg).get("aria-label")
    assert "HSAT, strongest attack: 80 % at 0/255, 60 % at 4/255, 40 % at 8/255" in label
    assert "HSAT, random noise: 80 % at 0/255, 76 % at 8/255" in label
    line, *marks_of_line = group(figure.svg, "line")
    xs, ys = numbers(line.get("d"))[::2], numbers(line.get("d"))[1::2]
    assert len(xs) == len(marks_of_line) == 3 and xs == sorted(xs)
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx(2, abs=0.01)
    assert len(group(figure.svg, "band")) == len(group(figure.svg, "noise")) == len(group(figure.svg, "chance")) == 1
    texts = [element.text for element in parsed(figure.svg).iter("text")]
    axes = ["0", "4", "8", "eps in grey levels (of 255)", "0", "20", "40", "60", "80", "100", "accuracy, %"]
    assert texts[: len(axes)] == axes and sorted(texts[len(axes) :]) == ["HSAT", "chance", "noise"]
    assert figure.named and "var(--t0)" in figure.svg
    assert accuracy_figure(made_records(), {"HSAT": 0}, level="city", norm="Linf") is None


def test_long_names_are_left_to_the_legend(made_records):
    name = "an encoder with a name of many words"
    figure = accuracy_figure(made_records(name), {name: 0}, level="patch", norm="Linf")
    assert not figure.named and name not in [element.text for element in parsed(figure.svg).iter("text")]
    assert [text for _, text in accuracy_legend({name: 0}, noise=True, chance=True)][::2] == [name, "chance level"]


def test_the_band_of_several_runs_is_their_standard_deviation(made_records):
    records = [r for seed, value in enumerate((0.6, 0.8)) for r in made_records("HSAT", value, seed=seed)]
    figure = accuracy_figure(records, {"HSAT": 0}, level="patch", norm="Linf")
    heights = numbers(group(figure.svg, "band")[0].get("d"))[1::2]  # from the clean end down to the attacked one
    spread, fall = 2 * np.std([0.6, 0.8], ddof=1), 0.7 - 0.35
    assert (max(heights) - min(heights)) / (BOTTOM - TOP) * 1.04 == pytest.approx(
        spread / 2 + 0.5 * spread / 2 + fall, abs=0.01
    )


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
    x, y = thin_out([(i, float(i % 2)) for i in range(2400)])
    assert len(x) == 240 and y == pytest.approx([0.5] * 240) and x[0] == 4.5
    assert thin_out([(1.0, 2.0)]) == ([1.0], [2.0])


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


@pytest.mark.parametrize("values", [[0.0, 2.9e-37], [0.0, 5e-324], [1e6, 1e6 + 1.2e-10], [1e299], [1e299, -1e299], [0]])
def test_curves_of_any_size_can_be_drawn(values):
    (figure,) = training_figures({"step": list(range(len(values))), "loss": values}, name="run")
    (line,) = group(figure.svg, "line")
    assert all(math.isfinite(number) and -1 <= number <= WIDTH for number in numbers(line.get("d")))


def test_both_maps_share_one_frame(tmp_path, made_artifacts):
    made_artifacts(tmp_path, "HSAT")
    (artifacts,) = read_artifacts(tmp_path)
    clean, attacked = map_figures(artifacts, "PGD-8")
    starts = [tuple(numbers(path.get("d"))[:2]) for path in group(attacked.svg, "tail")]
    assert len(starts) == 36 and len(marks(clean.svg)) == 36
    np.testing.assert_allclose(sorted(marks(clean.svg)), sorted(starts), atol=0.02)
    assert map_figures(artifacts, "none") == ()
