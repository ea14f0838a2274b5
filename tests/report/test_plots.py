from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsat.eval import Record
from hsat.report import plot_accuracy_vs_eps, plot_patches
from hsat.report import plots as module


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


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were before they became files."""
    kept = []
    save = module._save
    monkeypatch.setattr(module, "_save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def test_lines_panels_and_intervals(tmp_path, drawn):
    path = plot_accuracy_vs_eps(records(), tmp_path / "new" / "plot.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["patch level", "patient level"]
    lines = {bars.get_label(): bars for bars in panels[0].containers}
    assert list(lines) == ["hidisc PGD", "hidisc BIM", "hsat PGD", "hsat BIM"]
    x, y = np.array(lines["hsat PGD"].lines[0].get_data(), dtype=float)
    np.testing.assert_allclose(x, [0, 4, 8], atol=0.5)
    np.testing.assert_allclose(y, [0.8, 0.6, 0.4])
    segments = lines["hsat PGD"].lines[2][0].get_segments()
    np.testing.assert_allclose(np.array(segments[2], dtype=float)[:, 1], [0.35, 0.45])
    colours = {label: bars.lines[0].get_color() for label, bars in lines.items()}
    assert colours["hsat PGD"] == colours["hsat BIM"] != colours["hidisc PGD"]


def test_several_seeds_are_one_line(tmp_path, drawn):
    twice = [replace(r, seed=seed, value=r.value + shift) for r in records() for seed, shift in ((0, 0.0), (1, 0.02))]
    plot_accuracy_vs_eps(twice, tmp_path / "plot.png", levels=("patch",))
    lines = {bars.get_label(): bars for bars in drawn[0].axes[0].containers}
    np.testing.assert_allclose(np.array(lines["hsat PGD"].lines[0].get_data(), dtype=float)[1], [0.81, 0.61, 0.41])
    segment = np.array(lines["hsat PGD"].lines[2][0].get_segments()[2], dtype=float)
    np.testing.assert_allclose(segment[:, 1], [0.4, 0.42])


def test_only_one_k_is_drawn(tmp_path, drawn):
    few = [record for record in records() if record.k == 20]
    plot_accuracy_vs_eps(few + records(), tmp_path / "plot.pdf", k=20, levels=("patch",))
    assert len(drawn[0].axes[0].containers) == 4
    assert (tmp_path / "plot.pdf").read_bytes()[:4] == b"%PDF"


def test_no_state_of_pyplot_is_touched(tmp_path):
    had = "matplotlib.pyplot" in sys.modules
    plot_accuracy_vs_eps(records(), tmp_path / "plot.png")
    assert ("matplotlib.pyplot" in sys.modules) == had


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="none of the 32 records has metric 'recall', k=200"):
        plot_accuracy_vs_eps(records(), tmp_path / "plot.png", metric="recall")
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patches(tmp_path, drawn, channels):
    clean = torch.full((2, channels, 4, 4), 0.5)
    adversarial = clean.clone()
    adversarial[0, :, 0, 0] += 0.125
    adversarial[1, :, 1, 1] -= 0.0625
    path = plot_patches(clean, adversarial, tmp_path / "patches.png", titles=["one", "two"])
    assert path.exists()
    panels = drawn[0].axes
    assert [panel.get_ylabel() for panel in panels[::2]] == ["clean", "perturbation\n× 4", "adversarial"]
    assert [panel.get_title() for panel in panels[:2]] == ["one", "two"]
    shown = np.asarray(panels[2].images[0].get_array())
    assert shown[0, 0].max() == 1.0 and shown[1, 1].max() == 0.5
    assert np.asarray(panels[3].images[0].get_array())[1, 1].max() == 0.25


def test_patches_that_did_not_change(tmp_path, drawn):
    clean = torch.rand(1, 3, 4, 4)
    plot_patches(clean, clean, tmp_path / "patches.png")
    assert np.asarray(drawn[0].axes[1].images[0].get_array()).std() == 0


def test_patches_of_different_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"of one shape with n >= 1, got \(1, 3, 4, 4\) and \(2, 3, 4, 4\)"):
        plot_patches(torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4), tmp_path / "patches.png")


def test_titles_of_another_number(tmp_path):
    with pytest.raises(ValueError, match="1 titles for 2 patches"):
        plot_patches(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), tmp_path / "patches.png", titles=["one"])
