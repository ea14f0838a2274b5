from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color

from hsat.report import plot_certified_accuracy, plot_patches, plot_transfer
from hsat.report.panels import GREY


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patches(channels):
    clean = torch.full((2, channels, 4, 4), 0.5)
    adversarial = clean.clone()
    adversarial[0, :, 0, 0] += 0.125
    adversarial[1, :, 1, 1] -= 0.0625
    panels = plot_patches(clean, adversarial, titles=["one", "two"]).axes
    assert [panel.get_ylabel() for panel in panels[::2]] == ["clean", "perturbation\n× 4", "adversarial"]
    assert [panel.get_title() for panel in panels[:2]] == ["one", "two"]
    shown = np.asarray(panels[2].images[0].get_array())
    assert shown[0, 0].max() == 1.0 and shown[1, 1].max() == 0.5
    assert np.asarray(panels[3].images[0].get_array())[1, 1].max() == 0.25


def test_patches_that_did_not_change():
    clean = torch.rand(1, 3, 4, 4)
    assert np.asarray(plot_patches(clean, clean).axes[1].images[0].get_array()).std() == 0


def test_patches_of_different_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"of one shape with n >= 1, got \(1, 3, 4, 4\) and \(2, 3, 4, 4\)"):
        plot_patches(torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4), tmp_path / "patches.png")


def test_titles_of_another_number(tmp_path):
    with pytest.raises(ValueError, match="1 titles for 2 patches"):
        plot_patches(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), tmp_path / "patches.png", titles=["one"])


def test_certified_accuracy_by_radius_in_percent(made_records):
    (clean, *_) = made_records("HSAT", 0.8)
    certified = [
        replace(clean, metric="certified_accuracy", eps_value=radius, value=value, settings={"sigma": 0.25}, low=None)
        for radius, value in ((0.5, 0.4), (0.0, 0.8), (0.25, 0.6))
    ]
    (panel,) = plot_certified_accuracy(certified).axes
    np.testing.assert_allclose(panel.lines[0].get_xydata(), [(0, 80), (0.25, 60), (0.5, 40)])
    assert panel.lines[0].get_label() == "HSAT (sigma 0.25)" and panel.get_ylabel() == "certified accuracy, %"
    assert panel.lines[1].get_ydata()[0] == 40 and same_color(panel.lines[1].get_color(), GREY)
    (legend,) = panel.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["HSAT (sigma 0.25)", "chance"]
    (older,) = plot_certified_accuracy([replace(record, chance=None) for record in certified]).axes
    assert len(older.lines) == len(older.figure.legends[0].get_texts()) == 1


def test_a_transfer_is_a_matrix_of_surrogates_and_targets(made_records):
    attacked = [r for r in made_records("HSAT", 0.8) if (r.attack_name, r.metric) == ("PGD-8", "accuracy")]
    drops = [
        replace(r, metric="accuracy_drop", surrogate=surrogate, value=drop)
        for r in attacked
        for surrogate, drop in (("HSAT", 0.4), ("HiDisc", 0.1))
    ]
    figure = plot_transfer(drops)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[40], [10]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["40.0", "10.0"]
