"""The summary in ten lines: doubts by weight, intervals that are missing or say nothing, drift in one unit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsat.report import plot_accuracy_vs_eps, record_tables, records_latex, short_summary
from hsat.report.short_summary import clip_words

MASKED = "gradient exactly zero in some step for 30.0% of the images"
SHARED = "3 of 9 queries are also in the bank, with the same embedding"
LONG = "no patients are known, so that every patch counts as a slide and a patient of its own: " + "and so on " * 12


def flagged(records, *flags):
    return [replace(record, flags=flags) for record in records]


def checked(lines):
    assert len(lines) <= 9 and all(len(line) <= 100 for line in lines), lines
    return lines


def test_the_weightiest_doubts_are_shown_and_the_rest_counted(made_records):
    lines = checked(short_summary(flagged(made_records(), LONG, SHARED, MASKED)))
    doubts = lines[-3:]
    assert doubts[0] == f"doubt       {MASKED}" and doubts[1] == f"doubt       {SHARED}"
    assert doubts[2].startswith("doubt       no patients are known") and doubts[2].endswith("...")
    many = checked(short_summary(flagged(made_records(), LONG, SHARED, MASKED, "one", "two")))
    assert many[-1].endswith("(and 2 more)") and "and 2 more" not in "".join(many[:-1])


def test_a_single_long_doubt_is_wrapped_between_words(made_records):
    lines = checked(short_summary(flagged(made_records(), LONG[:150].strip())))
    start = next(place for place, line in enumerate(lines) if line.startswith("doubt"))
    assert " ".join(line[12:] for line in lines[start:]) == LONG[:150].strip()


def test_a_classifier_that_was_not_attacked_does_not_speak(made_records):
    other = flagged([replace(one, k=99) for one in made_records()], "the attack was optimised for k=20, but ...")
    assert not any("optimised" in line for line in short_summary([*made_records(), *other]))


def test_missing_and_empty_intervals_are_said_once(made_records):
    records = made_records()
    assert not any(line.startswith(("no interval", "note")) for line in short_summary(records))
    without = [
        replace(one, low=None, high=None, settings={**one.settings, "no_interval": "one patient only"})
        for one in records
    ]
    lines = checked(short_summary(without))
    assert [line for line in lines if "interval " in line and "one patient only" in line] == [lines[-1]]
    assert lines[-1].startswith("no interval one patient only (")
    wide = [replace(one, low=0.0, high=1.0) for one in records]
    assert checked(short_summary(wide))[-1].startswith("note        an interval that spans nearly all from 0 to 100")


@pytest.fixture
def drift(made_records):
    records = [one for one in made_records() if one.attack and (one.level, one.metric) == ("patch", "accuracy")]
    return [
        replace(
            one, metric="drift", value=one.value * 1e-4, low=one.value * 5e-5, high=one.value * 2e-4, chance=None, k=0
        )
        for one in records
    ]


def test_drift_has_one_unit_everywhere_and_tiny_values_digits(drift):
    lines = checked(short_summary([replace(one, model="nine-char") for one in drift]))
    assert lines[0].endswith("without labels: drift of the features, 1 - cos")
    values = [f"{one.value:.3g}" for one in drift if one.attack_name == "PGD-8"]
    for text in ("\n".join(lines), str(record_tables(drift)[0]), records_latex(drift)):
        assert values[0] in text and "%;" not in text
    assert "(drift, 1 - cos; n" in str(record_tables(drift)[0])
    panel = plot_accuracy_vs_eps(drift, metric="drift").axes[0]
    assert panel.get_ylabel() == "drift, 1 - cos" and 0 <= panel.get_ylim()[0] < panel.get_ylim()[1] < 1e-3


def test_words_stay_whole():
    assert clip_words("one two three", 12) == "one two..." and clip_words("one two", 7) == "one two"
