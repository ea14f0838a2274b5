"""Sentences and flags from records, without HTML."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsat.eval.doubts import cross_attack_flags, record_flags
from hsat.report.summary import chance_line, summarize_model, summary_sentence


def chosen(records, level="patch", metric="accuracy"):
    return [record for record in records if (record.level, record.metric) == (level, metric)]


def test_the_strongest_attack_at_the_largest_eps(made_records):
    summary = summarize_model(chosen(made_records("HSAT", 0.8)))
    assert (summary.clean.estimate.value, summary.noise.estimate.value, summary.worst.estimate.value) == (
        0.8,
        0.76,
        0.4,
    )
    assert (summary.worst.name, summary.worst.eps_text, summary.attacks) == ("PGD-8", "8/255", 2)


def test_the_sentence_names_the_best_first_with_intervals(made_records):
    summaries = [summarize_model(chosen(made_records(*pair))) for pair in (("HiDisc", 0.6), ("HSAT", 0.8))]
    assert summary_sentence(summaries) == (
        "HSAT keeps 40.0 % [30.0, 50.0] of the patches right under the strongest of 2 attacks at eps 8/255"
        " (clean 80.0 %); HiDisc keeps 30.0 % [20.0, 40.0] (clean 60.0 %). Chance is 40.0 %."
    )
    other = summarize_model(chosen(made_records("of another cohort", chance=0.3)))
    unknown = summarize_model(chosen(made_records("of older records", chance=None)))
    assert "Chance" not in summary_sentence([*summaries, other]) + summary_sentence([unknown])
    assert "40.0 % [30.0, 50.0] MCA under" in summary_sentence(summaries, metric="mca")


def test_the_chance_level_in_a_line(made_records):
    assert chance_line(made_records()) == (
        "Chance level: patch accuracy 40.0 %, MCA 33.3 %; slide accuracy 40.0 %, MCA 33.3 %;"
        " patient accuracy 40.0 %, MCA 33.3 %."
    )
    assert chance_line(made_records(chance=None)) == chance_line([]) == ""


def test_without_attacks_the_sentence_says_so(made_records):
    clean = [record for record in chosen(made_records()) if record.attack_name == "clean"]
    assert summary_sentence([summarize_model(clean)]) == (
        "No attack was measured. On clean patches HSAT has 80.0 % [70.0, 90.0] accuracy."
    )
    assert summary_sentence([]) == "Nothing measured."


def test_another_norm_is_not_mixed_in(made_records):
    records = chosen(made_records())
    other = replace(records[-1], attack="PGD(L2(eps=0.5))", attack_name="L2-0.5", eps="0.5", eps_value=0.5, value=0.01)
    assert summarize_model([*records, other]).worst.name == "PGD-8"
    with pytest.raises(ValueError, match=r"got records of \['HSAT', 'x'\]"):
        summarize_model([*records, replace(other, model="x")])


def test_flags_are_gathered_per_model(made_records):
    records = made_records("a", flags=("masked",)) + made_records("b")
    (flag,) = record_flags(records)
    assert (flag.model, flag.reason) == ("a", "masked")
    assert flag.conditions == ("clean", "noise-8", "PGD-4", "PGD-8", "BIM-8")


def with_value(records, name, value):
    return [replace(record, value=value) if record.attack_name == name else record for record in records]


def test_no_signs_without_reason(made_records):
    assert cross_attack_flags(chosen(made_records())) == []


def test_an_attack_that_does_no_more_than_noise(made_records):
    records = with_value(with_value(chosen(made_records()), "PGD-8", 0.76), "BIM-8", 0.77)
    reasons = [flag.reason for flag in cross_attack_flags(records)]
    assert any("no less than random noise of the same size (76.0 % against 76.0 %)" in reason for reason in reasons)


def test_an_attack_that_leaves_nothing_raises_no_doubt(made_records):
    records = chosen(made_records())
    for name in ("noise-8", "PGD-4", "PGD-8", "BIM-8"):
        records = with_value(records, name, 0.0)
    assert cross_attack_flags(records) == []


def test_a_larger_eps_that_leaves_more(made_records):
    records = with_value(chosen(made_records()), "PGD-4", 0.3)
    (flag,) = cross_attack_flags(records)
    assert flag.reason == "a larger eps leaves more than a smaller one (40.0 % at 8/255, 30.0 % before)"
    assert cross_attack_flags(with_value(records, "PGD-4", 0.391)) == []  # less than a point
