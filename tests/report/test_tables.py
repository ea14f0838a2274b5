"""Records, artifacts and differences as tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hsat.eval import Difference, TableCell
from hsat.report import markdown_table, read_artifacts, transfer_tables
from hsat.report.aggregation import list_conditions
from hsat.report.page.tables import confusion_table, effort_table, page_differences_table
from hsat.report.summary import transfer_sentence
from hsat.report.tables import drop_table, level_table


def test_markdown_table(made_record):
    records = [
        made_record(model=model, attack_name=name, metric=metric, level=level, value=value, flags=(), settings={})
        for level in ("slide", "patch")
        for model, base in (("hidisc", 0.1), ("hsat", 0.5))
        for name, gain in (("PGD-8", 0.0), ("clean", 0.3))
        for metric, value in (("accuracy", base + gain), ("mca", base), ("map", 0.0))
    ]
    records[0] = made_record(model="hidisc", level="slide", value=0.1, low=None, high=None, flags=("doubtful",))
    text = markdown_table(records, levels=("patch", "slide"))
    assert text.splitlines()[:6] == [
        "**Patch level** (Acc / MCA, %; n = 100)",
        "",
        "| model | target | k | clean | PGD-8 |",
        "| --- | --- | --- | --- | --- |",
        "| hidisc | features | 200 | 40.0 [25.0, 75.0] / 10.0 [25.0, 75.0] | 10.0 [25.0, 75.0] / 10.0 [25.0, 75.0] |",
        "| hsat | features | 200 | 80.0 [25.0, 75.0] / 50.0 [25.0, 75.0] | 50.0 [25.0, 75.0] / 50.0 [25.0, 75.0] |",
    ]
    assert "| hidisc | features | 200 | 40.0 [25.0, 75.0] / 10.0 [25.0, 75.0] | 10.0 / 10.0 [25.0, 75.0] |" in text
    assert text.endswith("- PGD-8: noted\n- hidisc, PGD-8 (features): doubtful\n")


def test_markdown_table_without_intervals_and_with_several_runs(made_record):
    several = [made_record(seed=seed, value=value, flags=(), settings={}) for seed, value in enumerate((0.4, 0.5, 0.6))]
    text = markdown_table(several, levels=("patch",), metrics=("accuracy",))
    assert "| hsat | features | 200 | 50.0 ± 10.0 (3 runs) |" in text
    text = markdown_table(several[:1], levels=("patch",), metrics=("accuracy",), intervals=False)
    assert "| hsat | features | 200 | 40.0 |" in text


def test_markdown_table_marks_what_was_not_measured(made_record):
    other = made_record(model="b", attack_name="BIM-8", target="embedding", k=20)
    text = markdown_table([made_record(), other], metrics=("accuracy",), intervals=False)
    assert "| hsat | features | 200 | 50.0 | – |" in text
    assert "| b | embedding | 20 | – | 50.0 |" in text


def test_the_chance_level_is_the_last_column(made_record):
    """Where any record of the table states it; of runs that differ the mean."""
    records = [made_record(model="a", seed=seed, chance=chance) for seed, chance in enumerate((0.25, 0.35))]
    records += [made_record(model="a", metric="smallest_fraction", chance=None), made_record(model="b", level="slide")]
    text = markdown_table(records, metrics=("accuracy", "smallest_fraction"), intervals=False)
    assert text.count("| model | target | k | PGD-8 | chance |") == 2
    assert "| 30.0 / – |" in text and "| b | features | 200 | 50.0 / – | – |" in text
    assert "chance" not in markdown_table(records[3:])


def test_names_do_not_break_the_markdown_table(made_record):
    table = markdown_table([made_record(model="a|b\nc", attack_name="x|y")], levels=("patch",))
    heads, _, row = (line for line in table.splitlines() if line.startswith("|"))
    assert row.startswith("| a\\|b c | features |") and heads.endswith("| x\\|y |")
    assert len(heads.replace("\\|", "").split("|")) == len(row.replace("\\|", "").split("|"))


def test_markdown_table_of_nothing(made_record):
    with pytest.raises(ValueError, match=r"none of the 1 records is at a level of \['slide'\]"):
        markdown_table([made_record()], levels=("slide",))


def chosen(records, level="patch", metric="accuracy"):
    return [record for record in records if (record.level, record.metric) == (level, metric)]


def test_one_name_for_two_attacks_is_two_conditions(made_records):
    records = chosen(made_records())
    stronger = [replace(r, attack=r.attack.replace("10", "50"), value=0.1) for r in records if r.attack_name == "PGD-8"]
    labels = [column.label for column in list_conditions([*records, *stronger])]
    assert labels == ["clean", "noise-8", "PGD-4", "PGD-8 (1)", "BIM-8", "PGD-8 (2)"]
    table = level_table([*records, *stronger], level="patch", metrics=("accuracy",))
    cells = {label: cells[0].text for label, *cells in table.rows}
    assert (cells["PGD-8 (1)"], cells["PGD-8 (2)"]) == ("40.0", "10.0")
    assert "PGD-8 (2): PGD(Linf(eps=8/255), steps=50)" in table.notes


def test_cells_of_a_level(made_records):
    records = made_records("HiDisc", 0.6) + [r for r in made_records("HSAT", 0.8) if r.attack_name != "BIM-8"]
    table = level_table(records, level="slide", metrics=("accuracy", "mca"))
    assert table.groups == [("HiDisc", 2), ("HSAT", 2)]
    assert table.head == ("condition", "Acc", "MCA", "Acc", "MCA")
    rows = {label: [(cell.text, cell.small) for cell in cells] for label, *cells in table.rows}
    assert next(iter(rows)) == "clean"
    assert rows["PGD-8"][2] == ("40.0", "30.0 to 50.0")
    assert rows["BIM-8"][2:] == [("–", ""), ("–", "")]
    assert rows["chance"] == [("40.0", ""), ("33.3", "")] * 2 and list(rows)[-1] == "chance"
    older = [replace(record, chance=None) for record in records]
    assert "chance" not in [row[0] for row in level_table(older, level="slide", metrics=("accuracy",)).rows]
    assert level_table(records, level="slide", metrics=("top9",)) is None


def test_sizes_that_differ_are_named(made_records):
    records = made_records("a") + [replace(record, n=7) for record in made_records("b")]
    table = level_table(records, level="patch", metrics=("accuracy",))
    assert "n = 7, 36" in table.caption and any("differ between cells" in note for note in table.notes)


def test_confusion_by_counting(tmp_path, made_artifacts):
    made_artifacts(tmp_path, "HSAT")
    (artifacts,) = read_artifacts(tmp_path)
    table = confusion_table(artifacts, "PGD-8", 20)
    truth = artifacts.conditions["PGD-8"].label["patch"]
    taken = artifacts.conditions["PGD-8"].prediction["patch", 20]
    for i, (label, *cells) in enumerate(table.rows):
        mine = [b for a, b in zip(truth, taken, strict=True) if a == i]
        assert label == f"{artifacts.class_names[i]} ({len(mine)})"
        for j, cell in enumerate(cells):
            assert cell.shade == pytest.approx(mine.count(j) / len(mine))
            assert cell.text == f"{100 * mine.count(j) / len(mine):.0f}"
    assert np.mean(truth != taken) > 0.2
    assert confusion_table(artifacts, "PGD-8", 21) is None
    assert confusion_table(artifacts, "none", 20) is None


def test_transfer_matrix(made_records):
    pairs = [("a", "b", 0.3), ("b", "b", 0.5), ("a", "a", 0.4), ("others", "b", 0.3), ("others", "a", -0.05)]
    records = [
        replace(
            chosen(made_records(target, gap))[-1],
            surrogate=surrogate,
            metric="accuracy_drop",
            value=gap,
            low=gap - 0.1,
            high=gap + 0.1,
        )
        for surrogate, target, gap in pairs
    ]
    clean = chosen(made_records("b", 0.9))[0]
    table = drop_table([clean, *records], level="patch", attack="BIM-8")
    assert table.groups == [("b", 1), ("a", 1)] and table.head == ("attack made on", "Acc-D", "Acc-D")
    assert [(label, [cell.text for cell in cells]) for label, *cells in table.rows] == [
        ("(clean)", ["90.0", "–"]),
        ("(chance)", ["40.0", "–"]),
        ("a", ["30.0", "40.0"]),
        ("b", ["50.0", "–"]),
        ("mean of the others", ["30.0", "−5.0"]),
    ]
    assert drop_table([clean], level="patch", attack="BIM-8") is None
    assert transfer_sentence([clean, *records]) == (
        "Attacks at eps 8/255 that were made on other encoders take, on average over these,"
        " -5.0 [-15.0, 5.0] points from a (BIM-8); 30.0 [20.0, 40.0] points from b (BIM-8)."
    )
    assert transfer_sentence([clean]) == ""


def test_a_transfer_has_the_chance_level_below_the_clean_numbers(made_records):
    records = [r for r in made_records("b") if r.attack_name in ("clean", "PGD-8") and r.level == "patch"]
    drops = [replace(r, surrogate="a", metric=f"{r.metric}_drop", chance=None) for r in records if r.attack]
    (table,) = transfer_tables([*(r for r in records if not r.attack), *drops])
    assert [row[:2] for row in table.rows[:2]] == [
        ("clean Acc / MCA", "80.0 / 78.0"),
        ("chance Acc / MCA", "40.0 / 33.3"),
    ]


def test_differences_on_the_same_patients():
    first = Difference(
        model="HSAT",
        against="HiDisc",
        condition="clean",
        k=20,
        level="patch",
        metric="accuracy",
        value=0.5,
        value_against=0.6,
        difference=-0.1,
        low=-0.2,
        high=0.05,
        not_above=0.9,
        n=36,
        patients=6,
    )
    table = page_differences_table([first, replace(first, level="patient", low=None)], metric="accuracy", k=20)
    assert table.groups == [("HSAT − HiDisc", 2)] and table.head == ("condition", "patch", "patient")
    assert table.rows == [("clean", TableCell("−10.0", "−20.0 to +5.0"), TableCell("−10.0"))]
    assert page_differences_table([first], metric="mca", k=20) is None


def test_how_attacks_went(made_records):
    records = [replace(record, forwards=11.0, backwards=10.0) for record in made_records()]
    table = effort_table(records)
    assert len(table.rows) == 4
    assert list(table.rows[0][1:]) == ["–", "11 / 10", "0.0", "0.0", "0.0"]
    assert effort_table([record for record in records if not record.attack]) is None
