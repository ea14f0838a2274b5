"""Where figures are drawn, and the files that they become: the same for every plot function."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from hsat.report import plot_accuracy_vs_eps, plot_certified_accuracy, plot_patches, plot_transfer


@pytest.fixture
def plots(made_records):
    """Every plot function with something to draw, and the number of its panels."""
    records = made_records("a $model$", 0.8)
    certified = [replace(r, metric="certified_accuracy") for r in records if r.metric == "accuracy"]
    drops = [replace(r, metric="accuracy_drop", surrogate="b") for r in records if r.attack and r.metric == "accuracy"]
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return {
        "accuracy": (lambda *path, **axes: plot_accuracy_vs_eps(records, *path, **axes), 3),
        "certified": (lambda *path, **axes: plot_certified_accuracy(certified, *path, **axes), 3),
        "transfer": (lambda *path, **axes: plot_transfer(drops, *path, **axes), 3),
        "patches": (lambda *path, **axes: plot_patches(images, images / 2, *path, **axes), 6),
    }


NAMES = ("accuracy", "certified", "transfer", "patches")
BEGINNINGS = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", BEGINNINGS)
def test_a_file_has_the_format_of_its_ending_and_always_the_same_bytes(plots, name, ending, tmp_path):
    plot, _ = plots[name]
    path = tmp_path / "new" / f"figure.{ending}"
    assert plot(path) == path
    assert path.read_bytes().startswith(BEGINNINGS[ending])
    assert plot(tmp_path / f"again.{ending}").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize("ending", ["jpg", "eps", "PNGG", ""])
def test_other_formats_are_refused_before_anything_is_drawn(plots, ending, tmp_path):
    plot, _ = plots["accuracy"]
    with pytest.raises(ValueError, match=re.escape(f"a figure is a .png, .pdf, .svg file, got '{tmp_path}")):
        plot(tmp_path / f"figure.{ending}")
    assert not list(tmp_path.iterdir())


def test_text_of_a_drawing_stays_text(plots, tmp_path):
    plot, _ = plots["accuracy"]
    svg = plot(tmp_path / "figure.svg").read_text()
    assert ">a $model$</text>" in svg and ">accuracy, %</text>" in svg and "dc:date" not in svg
    pdf = plot(tmp_path / "figure.pdf").read_bytes()
    assert b"/TrueType" in pdf or b"/Type0" in pdf  # fonttype 42
    assert b"/Type3" not in pdf and b"CreationDate" not in pdf


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_drawn_into_axes_of_the_caller(plots, name):
    plot, count = plots[name]
    figure = Figure(figsize=(12, 6))
    axes = figure.subplots(1, count)
    assert plot(axes=axes) is figure
    assert all(panel.has_data() for panel in axes)
    with pytest.raises(ValueError, match=f"the figure has {count} panels, got 1 axes"):
        plot(axes=axes[0])


def test_one_panel_takes_one_axes(made_records):
    panel = Figure().subplots()
    plot_accuracy_vs_eps(made_records(), levels=("patch",), axes=panel)
    assert panel.get_title() == "patch level"


@pytest.mark.parametrize("name", NAMES)
def test_without_a_path_the_figure_is_returned(plots, name):
    plot, count = plots[name]
    assert isinstance(plot(), Figure) and len(plot().axes) >= count


def test_a_path_and_axes_are_one_too_many(plots, tmp_path):
    plot, count = plots["patches"]
    with pytest.raises(ValueError, match="give a path or axes"):
        plot(tmp_path / "figure.png", axes=Figure().subplots(1, count))


def test_neither_pyplot_nor_settings_of_matplotlib_are_touched(plots, tmp_path):
    def settings():  # asking for the backend imports pyplot
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    had, before = "matplotlib.pyplot" in sys.modules, settings()
    for plot, _ in plots.values():
        plot(tmp_path / "figure.svg")
    assert ("matplotlib.pyplot" in sys.modules) == had
    assert settings() == before
