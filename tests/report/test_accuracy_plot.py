"""The figure of accuracy against eps: what stands where, and what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import same_color

from hsat.eval import Record
from hsat.report import plot_accuracy_vs_eps
from hsat.report.line_labels import spread_heights
from hsat.report.panels import GREY


def records() -> list[Record]:
    return [
        Record(
            model=model,
            attack="",
            attack_name=name,
            eps="",
            eps_value=eps / 255,
            target="features",
            level=level,
            metric="accuracy",
            value=value - eps / 20,
            low=None if level == "patient" else value - eps / 20 - 0.05,
            high=None if level == "patient" else value - eps / 20 + 0.05,
            n=10,
            k=k,
            temperature=0.07,
            seed=0,
        )
        for model, value in (("hidisc", 0.6), ("hsat", 0.8))
        for level in ("patch", "patient")
        for name, eps in (("PGD-8", 8), ("clean", 0), ("PGD-4", 4), ("BIM-4", 4))
        for k in (20, 200)
    ]


def lines_of(panel) -> dict:
    """The named lines of a panel, by name."""
    return {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}


def texts_of(panel) -> dict[str, float]:
    """The names at the ends of lines, with their heights."""
    return {text.get_text(): text.xy[1] for text in panel.texts}


def test_one_line_per_model_joins_its_strongest_attacks():
    weaker = [replace(r, attack_name="MIFGSM-8", value=r.value + 0.1) for r in records() if r.attack_name == "PGD-8"]
    patch, patient = plot_accuracy_vs_eps([*weaker, *records()]).axes
    assert [patch.get_title(), patient.get_title()] == ["patch level", "patient level"]
    lines = lines_of(patch)
    assert list(lines) == ["hidisc", "hsat"] and patch.get_legend() is None
    np.testing.assert_allclose(lines["hsat"].get_xydata(), [(0, 80), (4, 60), (8, 40)])
    assert lines["hsat"].get_color() != lines["hidisc"].get_color()
    assert list(patch.get_xticks()) == [0, 4, 8] and list(patch.get_yticks()) == [0, 20, 40, 60, 80, 100]
    assert patch.get_xlabel() == "eps in grey levels (of 255)" and patch.get_ylabel() == "accuracy, %"
    assert texts_of(patch) == pytest.approx({"hidisc": 20, "hsat": 40})


def test_the_interval_is_a_band():
    patch, patient = plot_accuracy_vs_eps(records()).axes
    corners = patch.collections[1].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(35) and corners[:, 1].max() == pytest.approx(85)
    assert not [path for band in patient.collections for path in band.get_paths()]  # no interval was measured


def test_noise_and_chance_are_grey(made_records):
    panel, *_ = plot_accuracy_vs_eps(made_records("HSAT", 0.8, chance=0.3)).axes
    grey = [line for line in panel.lines if same_color(line.get_color(), GREY)]
    np.testing.assert_allclose(grey[0].get_xydata(), [(0, 80), (8, 76)])
    np.testing.assert_allclose(grey[-1].get_ydata(), [30, 30])
    assert texts_of(panel) == pytest.approx({"HSAT": 40, "noise": 76, "chance": 30}, abs=0.01)


def test_every_chance_level_that_records_state_is_drawn(made_records):
    """That of the drawn metric; of two cohorts both; none of records that state none."""
    panel, *_ = plot_accuracy_vs_eps(made_records(), metric="mca").axes
    assert panel.lines[-1].get_ydata() == pytest.approx([100 / 3, 100 / 3])
    two = [*made_records("a", chance=0.3), *made_records("b", chance=0.25)]
    assert [line.get_ydata()[0] for line in plot_accuracy_vs_eps(two).axes[0].lines[-2:]] == [30, 25]
    assert "chance" not in texts_of(plot_accuracy_vs_eps(made_records(chance=None)).axes[0])


def test_all_kinds_of_attacks_have_a_line_and_bars():
    panel, _ = plot_accuracy_vs_eps(records(), kinds="all").axes
    lines = {bars.get_label(): bars for bars in panel.containers}
    assert list(lines) == ["hidisc PGD", "hidisc BIM", "hsat PGD", "hsat BIM"]
    x, y = np.array(lines["hsat PGD"].lines[0].get_data(), dtype=float)
    np.testing.assert_allclose(x, [0, 4, 8], atol=0.5)
    np.testing.assert_allclose(y, [80, 60, 40])
    segments = lines["hsat PGD"].lines[2][0].get_segments()
    np.testing.assert_allclose(np.array(segments[2], dtype=float)[:, 1], [35, 45])
    colours = {label: bars.lines[0].get_color() for label, bars in lines.items()}
    assert colours["hsat PGD"] == colours["hsat BIM"] != colours["hidisc PGD"]
    with pytest.raises(ValueError, match="kinds must be 'strongest' or 'all', got 'PGD'"):
        plot_accuracy_vs_eps(records(), kinds="PGD")


def test_several_seeds_are_one_line_with_their_standard_deviation():
    twice = [replace(r, seed=seed, value=r.value + shift) for r in records() for seed, shift in ((0, 0.0), (1, 0.02))]
    (panel,) = plot_accuracy_vs_eps(twice, levels=("patch",)).axes
    np.testing.assert_allclose(lines_of(panel)["hsat"].get_ydata(), [81, 61, 41])
    heights = panel.collections[1].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [41 - 2**0.5, 81 + 2**0.5])


def test_more_lines_than_fit_have_a_legend_and_signs_of_their_own():
    many = [replace(record, model=f"m{i}") for i in range(9) for record in records()[:8] if record.model == "hidisc"]
    (panel,) = plot_accuracy_vs_eps(many, levels=("patch",)).axes
    (legend,) = panel.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"m{i}" for i in range(9)]
    assert not panel.texts
    assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == 9


def test_only_one_k_and_no_transfer_is_drawn():
    few = [record for record in records() if record.k == 20]
    moved = [replace(record, model="other", surrogate="hsat") for record in few]
    (panel,) = plot_accuracy_vs_eps([*few, *records(), *moved], k=20, levels=("patch",)).axes
    assert list(lines_of(panel)) == ["hidisc", "hsat"]


def test_targets_have_lines_of_their_own():
    both = [replace(record, target=target) for target in ("features", "decision") for record in records()]
    names = [f"{model} ({target})" for target in ("features", "decision") for model in ("hidisc", "hsat")]
    assert list(lines_of(plot_accuracy_vs_eps(both).axes[0])) == names


def test_an_l2_ball_has_the_axis_of_its_norm(made_records):
    of_l2 = [
        replace(r, attack=r.attack.replace("Linf", "L2"), eps_value=255 * r.eps_value) for r in made_records("a", 0.8)
    ]
    (panel, *_) = plot_accuracy_vs_eps(of_l2).axes
    assert panel.get_xlabel() == "eps (L2)"
    np.testing.assert_allclose(lines_of(panel)["a"].get_xdata(), [0, 4, 8])
    (panel, *_) = plot_accuracy_vs_eps([*of_l2, *made_records("a", 0.6)]).axes
    assert panel.get_xlabel() == "eps in grey levels (of 255)"
    np.testing.assert_allclose(lines_of(panel)["a"].get_xdata(), [0, 4, 8])


def test_clean_images_alone_are_points():
    clean = [record for record in records() if record.attack_name == "clean"]
    panel, _ = plot_accuracy_vs_eps(clean).axes
    np.testing.assert_allclose(lines_of(panel)["hsat"].get_xydata(), [(0, 80)])


def test_noise_alone_is_drawn(made_records):
    panel, *_ = plot_accuracy_vs_eps([r for r in made_records() if r.attack_name in ("clean", "noise-8")]).axes
    assert set(texts_of(panel)) == {"chance", "noise"}


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="none of the 32 records has metric 'recall', k=200"):
        plot_accuracy_vs_eps(records(), tmp_path / "plot.png", metric="recall")
    assert not (tmp_path / "plot.png").exists()


def test_names_at_the_ends_of_lines_are_moved_apart_as_little_as_possible():
    assert spread_heights([0, 50, 51, 90], 5) == pytest.approx([0, 48, 53, 90])
    assert spread_heights([10, 10, 10], 4) == pytest.approx([6, 10, 14])
    assert spread_heights([0, 1, 99], 5, low=0, high=100) == pytest.approx([0, 5, 99])
    assert spread_heights([98, 99, 100], 5, low=0, high=100) == pytest.approx([90, 95, 100])


def boxes(panel):
    """The boxes of the names at the ends of lines, in pixels."""
    panel.figure.draw_without_rendering()
    return [text.get_window_extent() for text in panel.texts]


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("levels", [("patch",), ("patch", "patient")])
def test_names_overlap_neither_each_other_nor_a_panel(made_records, count, levels):
    many = [record for i in range(count) for record in made_records(f"model {i}", 0.45 + 0.002 * i)]
    figure = plot_accuracy_vs_eps(many, levels=levels)
    assert not figure.legends
    for panel in figure.axes:
        found = boxes(panel)
        assert len(found) == count + 2  # noise and chance
        assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
        assert not any(box.overlaps(other.get_window_extent()) for box in found for other in figure.axes)
        assert all(box.x1 <= figure.bbox.x1 + 1 for box in found)


def test_names_that_are_too_long_go_into_one_legend_below(made_records):
    long = [r for i in range(2) for r in made_records(f"an encoder with a name of more than a line {i}", 0.8)]
    figure = plot_accuracy_vs_eps(long)
    (legend,) = figure.legends
    assert [text.get_text()[-1] for text in legend.get_texts()] == ["0", "1", "e", "e"]
    assert not any(panel.texts for panel in figure.axes)
    figure.draw_without_rendering()
    assert not any(legend.get_window_extent().overlaps(panel.get_window_extent()) for panel in figure.axes)


def test_attacks_that_coincide_at_all_levels_are_one_line():
    twins = [
        replace(r, attack_name=r.attack_name.replace("PGD", "ensemble")) for r in records() if "PGD" in r.attack_name
    ]
    own = [r for r in records() if not r.attack_name.startswith("BIM")]
    patch, patient = plot_accuracy_vs_eps([*own, *twins], kinds="all").axes
    assert [bars.get_label() for bars in patch.containers] == ["hidisc PGD, ensemble", "hsat PGD, ensemble"]
    other = [replace(r, value=r.value - 0.1) if (r.level, r.model) == ("patient", "hsat") else r for r in twins]
    patch, patient = plot_accuracy_vs_eps([*own, *other], kinds="all").axes
    names = ["hidisc PGD, ensemble", "hsat PGD", "hsat ensemble"]
    assert [bars.get_label() for bars in patch.containers] == [bars.get_label() for bars in patient.containers] == names
    markers = [
        {bars.get_label(): bars.lines[0].get_marker() for bars in panel.containers} for panel in (patch, patient)
    ]
    assert markers[0] == markers[1]


def test_models_that_coincide_are_both_seen(made_records):
    panel, *_ = plot_accuracy_vs_eps([*made_records("a", 0.8), *made_records("b", 0.8)]).axes
    lines = lines_of(panel)
    assert lines["a"].get_linestyle() == "-" and lines["b"].get_linestyle() == "--"
    noise = [line for line in panel.lines if line.get_gid() == "noise"]
    assert len(noise) == 1


def test_a_figure_is_as_wide_as_one_column_or_two(made_records):
    assert plot_accuracy_vs_eps(made_records(), levels=("patch",)).get_figwidth() == pytest.approx(3.4)
    assert plot_accuracy_vs_eps(made_records()).get_figwidth() == pytest.approx(7.1)
