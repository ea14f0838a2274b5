"""Reasons for doubt of all records of a result, the weightiest first, and who may say them."""

from __future__ import annotations

from hsat.eval import Record
from hsat.eval.doubts import list_doubts
from hsat.eval.flags import accuracy_flags

NO_PATIENTS = "no patients are known, so that every patch counts as a slide and a patient of its own"
PLAIN = "the loader gives images and labels without slides and patients: only single images are measured"
OTHER = "the attack was optimised for k=1, but this record is for k=3"
SHARED = "3 of 9 queries are also in the bank, with the same embedding"
MASKED = "gradient exactly zero in some step for 30.0% of the images"
UNSTABLE = "the embedding of an image depends on the others of its batch, by 9.0% of its length"
TRAINED = "2 of 4 queries' patients were trained on"


def record(name="clean", value=0.5, *, model="a", attack="", eps=0.0, flags=(), k=1):
    return Record(
        model=model,
        attack=attack,
        attack_name=name,
        eps=f"{255 * eps:.0f}/255",
        eps_value=eps,
        target="decision",
        level="patch",
        metric="accuracy",
        value=value,
        n=10,
        k=k,
        temperature=0.07,
        seed=0,
        flags=flags,
    )


def attacked(value, eps, **options):
    return record(f"PGD-{255 * eps:.0f}", value, attack=f"PGD(threat=Linf(eps={eps}))", eps=eps, **options)


def test_the_weightiest_reason_comes_first_and_each_stands_once():
    below, above = *accuracy_flags(0.3, level="patch", chance=0.5), *accuracy_flags(0.6, level="patch", clean=0.5)
    said = (OTHER, PLAIN, NO_PATIENTS, "something else", SHARED, TRAINED, below, above, MASKED, UNSTABLE)
    found = list_doubts([record(flags=said), record(flags=said[:3])])
    assert found == (UNSTABLE, MASKED, above, below, TRAINED, SHARED, "something else", NO_PATIENTS, PLAIN, OTHER)


def test_what_only_several_records_show_is_among_them():
    noise = record("noise-4", 0.2, attack="RandomNoise(Linf(4/255))", eps=4 / 255)
    found = list_doubts([record(), noise, attacked(0.2, 4 / 255), attacked(0.4, 8 / 255)])
    assert found == (
        "the strongest attack leaves no less than random noise of the same size (20.0 % against 20.0 %)",
        "a larger eps leaves more than a smaller one (40.0 % at 8/255, 20.0 % before)",
    )


def test_classifiers_are_not_mixed_and_models_are_named_where_only_some_are_meant():
    noise = record("noise-4", 0.2, attack="RandomNoise(Linf(4/255))", eps=4 / 255, k=1)
    assert list_doubts([record(), noise, attacked(0.3, 4 / 255, k=3)]) == ()
    both = [record(flags=(SHARED, MASKED)), record(model="b", flags=(SHARED,))]
    assert list_doubts(both) == (f"a: {MASKED}", SHARED)
