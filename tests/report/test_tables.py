"""Records as Markdown tables."""

from __future__ import annotations

import pytest

from hsat.eval import Record
from hsat.report import markdown_table


def record(**changes) -> Record:
    values = dict(
        model="hsat",
        attack="PGD(...)",
        attack_name="PGD-8",
        eps="8/255",
        eps_value=8 / 255,
        target="features",
        level="patch",
        metric="accuracy",
        value=0.5,
        low=0.25,
        high=0.75,
        n=100,
        k=200,
        temperature=0.07,
        seed=0,
        versions={"torch": "2"},
        flags=("doubtful",),
        settings={"random_start": True, "note": "noted"},
    )
    return Record(**(values | changes))


def test_markdown_table():
    records = [
        record(model=model, attack_name=name, metric=metric, level=level, value=value, flags=(), settings={})
        for level in ("slide", "patch")
        for model, base in (("hidisc", 0.1), ("hsat", 0.5))
        for name, gain in (("PGD-8", 0.0), ("clean", 0.3))
        for metric, value in (("accuracy", base + gain), ("mca", base), ("map", 0.0))
    ]
    records[0] = record(model="hidisc", level="slide", value=0.1, low=None, high=None, flags=("doubtful",))
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


def test_markdown_table_without_intervals_and_with_several_runs():
    several = [record(seed=seed, value=value, flags=(), settings={}) for seed, value in enumerate((0.4, 0.5, 0.6))]
    text = markdown_table(several, levels=("patch",), metrics=("accuracy",))
    assert "| hsat | features | 200 | 50.0 ± 10.0 (3 runs) |" in text
    text = markdown_table(several[:1], levels=("patch",), metrics=("accuracy",), intervals=False)
    assert "| hsat | features | 200 | 40.0 |" in text


def test_markdown_table_marks_what_was_not_measured():
    other = record(model="b", attack_name="BIM-8", target="embedding", k=20)
    text = markdown_table([record(), other], metrics=("accuracy",), intervals=False)
    assert "| hsat | features | 200 | 50.0 | – |" in text
    assert "| b | embedding | 20 | – | 50.0 |" in text


def test_names_do_not_break_the_markdown_table():
    table = markdown_table([record(model="a|b\nc", attack_name="x|y")], levels=("patch",))
    heads, _, row = (line for line in table.splitlines() if line.startswith("|"))
    assert row.startswith("| a\\|b c | features |") and heads.endswith("| x\\|y |")
    assert len(heads.replace("\\|", "").split("|")) == len(row.replace("\\|", "").split("|"))


def test_markdown_table_of_nothing():
    with pytest.raises(ValueError, match=r"none of the 1 records is at a level of \['slide'\]"):
        markdown_table([record()], levels=("slide",))
