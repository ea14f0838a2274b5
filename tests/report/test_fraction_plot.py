from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsat.eval import write_records
from hsat.report import markdown_table, plot_accuracy_vs_fraction, write_report


@pytest.fixture
def slides(made_records):
    """Slide and patient accuracies of two attacks and noise at three fractions, and on clean slides."""
    records = []
    for record in made_records("HSAT", 0.8):
        if record.metric != "accuracy" or record.level == "patch":
            continue
        if record.attack_name == "clean":
            records.append(record)
            continue
        for fraction, share in ((0.1, 0.9), (0.001, 1.0), (1.0, 0.5)):
            name = f"{record.attack_name}@{100 * fraction:g}%"
            settings = record.settings | {"fraction": fraction}
            value = round(share * record.value, 6)
            records.append(replace(record, attack_name=name, settings=settings, value=value, low=0.0, high=1.0))
    return records


def test_a_line_per_attack_on_a_logarithmic_axis(slides, tmp_path):
    figure = plot_accuracy_vs_fraction(slides)
    assert [panel.get_title() for panel in figure.axes] == ["slide level", "patient level"]
    panel = figure.axes[0]
    assert panel.get_xscale() == "log" and panel.get_ylabel() == "accuracy, %"
    lines = {line.get_label(): line for line in panel.lines}
    pgd = next(r for r in slides if r.attack_name == "PGD-8@0.1%" and r.level == "slide")
    shown = lines["HSAT PGD-8 (features)"].get_xydata()
    np.testing.assert_allclose(shown, [(0.1, 100 * pgd.value), (10, 90 * pgd.value), (100, 50 * pgd.value)], atol=1e-3)
    assert lines["HSAT noise-8 (features)"].get_color() == "#808080"
    clean = next(r for r in slides if (r.attack_name, r.level) == ("clean", "slide"))
    assert any(np.allclose(line.get_ydata(), 100 * clean.value) and line.get_linestyle() == ":" for line in panel.lines)
    for ending in ("png", "svg", "pdf"):
        path = plot_accuracy_vs_fraction(slides, tmp_path / f"fractions.{ending}")
        assert path.stat().st_size > 1000
    twice = plot_accuracy_vs_fraction(slides, tmp_path / "again.svg").read_bytes()
    assert twice == (tmp_path / "fractions.svg").read_bytes()


def test_records_of_a_budget_and_seeds(slides):
    budget = [
        replace(r, settings={**r.settings, "budget_fraction": r.settings.get("fraction"), "fraction": None}, seed=seed)
        for r in slides
        for seed in (0, 1)
        if r.level == "patient"
    ]
    for record in budget:
        record.settings.pop("fraction")
    (panel,) = plot_accuracy_vs_fraction(budget).axes
    assert len(panel.lines[0].get_xdata()) == 3


def test_nothing_to_draw(made_records):
    with pytest.raises(ValueError, match=r"none of the 45 records .*a fraction of the patches"):
        plot_accuracy_vs_fraction(made_records())


def test_slides_have_tables_and_a_page(slides, tmp_path):
    """Without a number of patches: the page says what was attacked, and shows each fraction in a column."""
    records = [replace(record, target="own_decision", k=0, classifier="MIL(GatedAttention)") for record in slides]
    table = markdown_table(records)
    assert "PGD-8@0.1%" in table and "**Slide level**" in table and "Patch level" not in table
    write_records(tmp_path / "run" / "records.jsonl", records)
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "without labels" in page and "PGD-8@100%" in page and "MIL(GatedAttention)" in page
