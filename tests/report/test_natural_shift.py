"""Natural shifts in tables and on the page: apart from attacks, which they never pass for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hsat.attacks import NaturalShift
from hsat.eval import write_records
from hsat.eval.doubts import cross_attack_flags, is_shift
from hsat.report import accuracy_tables, markdown_table, records_csv, records_latex, write_report
from hsat.report.natural_shift import shift_table
from hsat.report.page.figures import shift_figures
from hsat.report.page.tables import effort_table
from hsat.report.summary import accuracy_points, summarize_model


def with_shifts(records, *, value=0.5, extra=()):
    """The records, and shifts of the clean ones that lose 0.05 per strength."""
    clean = [record for record in records if record.attack_name == "clean"]
    shifts = [*NaturalShift.standard(stained=False).items(), *extra]
    for name, shift in shifts:
        about = {"kind": shift.kind, "strength": shift.strength, "text": shift.text}
        lost = 0.05 * (("mild", "medium", "strong").index(shift.strength) + 1) if shift.strength else 0.3
        for record in clean:
            settings = {**record.settings, "natural_shift": about, "zero_gradient_share": 0.0}
            records = [
                *records,
                replace(
                    record,
                    attack=repr(shift),
                    attack_name=name,
                    value=record.value - lost,
                    low=None,
                    high=None,
                    settings=settings,
                ),
            ]
    return records


@pytest.fixture(scope="module")
def records(made_records):
    return with_shifts(made_records("HSAT", 0.9))


def test_a_row_per_kind_and_a_column_per_strength(records):
    table = shift_table([r for r in records if r.k == records[0].k], level="patch", metric="accuracy")
    assert table.head == ("shift", "clean", "mild", "medium", "strong")
    assert [str(row[0]) for row in table.rows] == ["blur", "jpeg", "brightness", "resampling"]
    clean = next(r.value for r in records if (r.attack_name, r.level, r.metric) == ("clean", "patch", "accuracy"))
    shown = [float(cell.text) for cell in table.rows[0][1:]]
    assert shown == pytest.approx([100 * clean - 5 * step for step in range(4)], abs=0.051)
    assert "sigma 2 pixels" in table.notes[0]


def test_an_amount_of_ones_own_has_a_row_and_a_column(made_records):
    mine = with_shifts(made_records("HSAT", 0.9), extra=[("faint blur", NaturalShift("blur", 0.3))])
    table = shift_table(mine, level="patch", metric="accuracy")
    assert table.head[-1] == "own" and table.rows[-1][0] == "faint blur"


def test_tables_of_attacks_do_not_hold_them(records):
    for table in accuracy_tables(records):
        assert not any("blur" in label for label in table.head)
    text = markdown_table(records)
    assert "**Natural shift, patient level, MCA in %" in text
    assert text.index("**Patch level**") < text.index("**Natural shift, patch level")
    assert "NaturalShift" not in str(effort_table(records))
    assert "blur 2" in records_csv(records) and "blur" not in records_latex(records)


def test_they_are_no_attacks(records):
    mine = [r for r in records if (r.level, r.metric, r.k) == ("patch", "accuracy", records[0].k)]
    without = [r for r in mine if not is_shift(r)]
    assert len(mine) == len(without) + 12
    assert summarize_model(mine) == summarize_model(without)
    assert cross_attack_flags(mine) == cross_attack_flags(without)
    assert len(accuracy_points(mine, kind="shift")) == 12
    assert accuracy_points(mine, kind="attack") == accuracy_points(without, kind="attack")


def test_figure_and_table_on_the_page(records, made_records, tmp_path):
    (figure,) = shift_figures([r for r in records if r.k == records[0].k], metric="accuracy")
    assert [text for _, text in figure.legend] == ["blur", "jpeg", "brightness", "resampling"]
    assert figure.svg.startswith("<svg") and "strength" in figure.svg
    (tmp_path / "run").mkdir()
    write_records(tmp_path / "run" / "records.jsonl", records)
    page = write_report([tmp_path / "run"], tmp_path / "with.html").read_text()
    assert "<h3>Natural shift</h3>" in page and "Natural shift, patch level" in page
    (tmp_path / "plain").mkdir()
    write_records(tmp_path / "plain" / "records.jsonl", made_records("HSAT", 0.9))
    plain = write_report([tmp_path / "plain"], tmp_path / "without.html").read_text()
    assert "Natural shift" not in plain

    def lead(text):
        return re.findall(r'<p class="lead">(.*?)</p>', text)

    assert lead(page) == lead(plain)


def test_settings_of_a_file_that_say_nonsense_do_no_harm(records):
    damaged = [replace(r, settings={**r.settings, "natural_shift": "<b>"}) if is_shift(r) else r for r in records]
    table = shift_table(damaged, level="patch", metric="accuracy")
    assert table.head == ("shift", "clean", "own") and "blur 2" in [row[0] for row in table.rows]
    assert shift_figures(damaged, metric="accuracy") == ()
