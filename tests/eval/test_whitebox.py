from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import BIM, L2, PGD, AttackEnsemble, Linf
from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import (
    PAPER,
    EnsembleOutcome,
    Interval,
    Provenance,
    RunOptions,
    Scoring,
    bootstrap_intervals,
    chance_levels,
    evaluate_whitebox,
    metrics_by_level,
    paper_attacks,
    pool_by_level,
    read_records,
    write_records,
)
from hsat.eval.whitebox import black_box_flags
from hsat.types import AttackResult, EmbeddingTable, HierarchicalBatch, MemberStats

PGD8 = PGD(Linf(8 / 255), step_size=2 / 255, steps=6)
QUIET = RunOptions(noise=False)
KEEPING = RunOptions(noise=False, keep_examples=25)
SCORING = Scoring(bootstrap=50)
FAST = dict(classifier=KNNClassifier(k=15), target="features", scoring=SCORING, run=QUIET)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


def value(result, name, *, level="patch", metric="accuracy"):
    (found,) = (r for r in result.records if (r.attack_name, r.level, r.metric) == (name, level, metric))
    return found.value


@pytest.mark.parametrize("target", ["decision", "features", "embedding"])
def test_attacks_lower_accuracy_and_noise_hardly_does(toy_encoder, bank, queries, target):
    attacks = paper_attacks((4 / 255, 8 / 255), steps=6)
    result = evaluate_whitebox(toy_encoder, bank, queries, attacks, **FAST | dict(target=target, run=RunOptions()))
    assert list(result.tables) == ["clean", "noise-4", "noise-8", *attacks]
    assert value(result, "clean") >= 0.95
    assert value(result, "noise-8") >= 0.8
    for name in attacks:
        assert value(result, name) <= 0.4, name
    assert {record.target for record in result.records} == {target}


def test_records_are_what_the_parts_give(toy_encoder, bank, queries, tmp_path):
    named = dict(run=RunOptions(noise=False, seed=3), provenance=Provenance(model="toy", checkpoint="abc"))
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | named)
    assert len(result.records) == 2 * 3 * 5
    knn = KNNClassifier(k=15).fit(embed(toy_encoder, bank))
    attacked = embed(toy_encoder, queries, attack=PGD8, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(attacked.z, result.tables["PGD-8"].z)
    expected = metrics_by_level(knn.predict_proba(attacked), attacked)
    for record in result.records:
        if record.attack_name == "PGD-8":
            assert record.value == getattr(expected[record.level], record.metric)
            assert record.n == expected[record.level].n
    record = result.records[-1]
    assert (record.model, record.checkpoint, record.cohort, record.split, record.seed) == (
        "toy",
        "abc",
        "toy",
        "val",
        3,
    )
    assert (record.attack, record.eps, record.eps_value) == (repr(PGD8), "8/255", 8 / 255)
    assert (record.k, record.temperature, record.level, record.metric) == (15, 0.07, "patient", "top3")
    assert (record.classifier, record.schema) == (repr(KNNClassifier(k=15)), 3)
    assert record.backwards == PGD8.steps <= record.forwards
    assert record.settings["random_start"] is True
    assert record.settings["how"] == "mean" and record.settings["bank_rows"] == 90
    assert {"python", "torch", "numpy", "hsat", "faiss"} <= record.versions.keys()
    for record in result.records:
        if record.low is None:  # every query was ranked perfectly: no resample differs
            assert (record.metric, record.value) == ("map", 1.0) and "same value" in record.settings["no_interval"]
        else:
            assert 0 <= record.low <= record.value <= record.high <= 1
    assert result.records[0].attack == "" and result.records[0].eps == "0"
    assert read_records(write_records(tmp_path / "r.jsonl", result.records)) == result.records


def test_eps_zero_is_clean_exactly(toy_encoder, bank, queries):
    nothing = dataclasses.replace(PGD8, threat=Linf(0.0))
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-0": nothing}, **FAST | dict(run=KEEPING))
    np.testing.assert_array_equal(result.tables["PGD-0"].z, result.tables["clean"].z)
    assert torch.equal(result.examples["PGD-0"], result.examples["clean"])
    for clean, attacked in zip(result.records[:15], result.records[15:], strict=True):
        assert (clean.value, clean.low, clean.high) == (attacked.value, attacked.low, attacked.high)
        assert attacked.flags == ()


def test_seeds_and_batches(toy_encoder, bank, queries, toy_batches):
    def run(loader, seed=0):
        attack = dataclasses.replace(PGD8, steps=1)
        options = FAST | dict(run=RunOptions(noise=False, seed=seed))
        return evaluate_whitebox(toy_encoder, bank, loader, {"PGD-8": attack}, **options).tables["PGD-8"].z

    first = run(queries)
    np.testing.assert_array_equal(run(queries), first)
    assert np.abs(run(queries, seed=1) - first).max() > 1e-3
    again = [batch for batch in reversed(queries)]
    loader = type(queries)(again)
    np.testing.assert_allclose(run(loader), np.concatenate((first[20:], first[:20])), atol=1e-5)


def test_one_pass_over_a_loader_that_can_be_read_once(toy_encoder, bank, queries):
    result = evaluate_whitebox(
        toy_encoder,
        embed(toy_encoder, bank),
        iter(queries),
        {"PGD-8": PGD8},
        provenance=Provenance(class_names=("cyan", "green", "red")),
        **FAST,
    )
    assert len(result.tables["PGD-8"]) == 36
    assert result.tables["clean"].cohort == ""


def test_the_clean_embedding_is_computed_once_per_batch(toy_encoder, bank, queries):
    table = embed(toy_encoder, bank)
    attacks = {name: dataclasses.replace(PGD8, random_start=start) for name, start in (("a-8", True), ("b-8", True))}
    costs = []
    for chosen in ({}, dict(list(attacks.items())[:1]), attacks):
        toy_encoder.forwards = 0
        evaluate_whitebox(toy_encoder, table, queries, chosen, **FAST)
        costs.append(toy_encoder.forwards)
    assert costs[0] == len(queries)
    assert costs[2] - costs[1] == costs[1] - costs[0] <= len(queries) * (PGD8.steps + 2)


def test_several_k_from_one_run(toy_encoder, bank, queries):
    several = dict(classifier=[KNNClassifier(k=15), KNNClassifier(k=3)], scoring=Scoring(bootstrap=0))
    one = several | dict(classifier=KNNClassifier(k=3))
    both = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | several)
    alone = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | one)
    assert sorted(both.scores["clean"]) == [3, 15]
    np.testing.assert_allclose(both.scores["PGD-8"][3], alone.scores["PGD-8"][3], atol=1e-12)
    assert [r.value for r in both.records if r.k == 3] == pytest.approx([r.value for r in alone.records])
    assert all(r.low is None and r.settings["no_interval"] == "no resamples" for r in both.records)


def test_k_above_the_bank_warns_and_is_recorded(toy_encoder, bank, queries):
    with pytest.warns(UserWarning, match="k=200 is more than the 90 rows of the bank; using k=90"):
        several = [KNNClassifier(k=200), KNNClassifier(k=20)]
        result = evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST | dict(classifier=several))
    assert {record.k for record in result.records} == {90, 20}


def test_examples_are_the_first_of_each_class(toy_encoder, bank, queries):
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | dict(run=KEEPING))
    rows, labels = list(result.example_rows), result.tables["clean"].label
    assert len(rows) == 25 and rows == sorted(rows)
    for label in np.unique(labels):
        mine = [row for row in rows if labels[row] == label]
        assert mine == np.flatnonzero(labels == label)[: len(mine)].tolist() and len(mine) in (8, 9)
    images = torch.cat([batch.images for batch in queries])[rows]
    assert torch.equal(result.examples["clean"], images)
    gap = (result.examples["PGD-8"].double() - images.double()).abs()
    assert 7.5 / 255 < gap.max() <= 8 / 255
    assert evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST).examples == {}


def test_compat_repeats_the_published_arithmetic(toy_encoder, bank, queries):
    columns = ("images", "patch", "slide", "patient", "label")
    queries = type(queries)(  # without one class, which the attack makes the classifier predict
        HierarchicalBatch(*(getattr(batch, name)[batch.label < 2] for name in columns)) for batch in queries
    )
    scoring = dataclasses.replace(PAPER.scoring, bootstrap=50)
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | dict(scoring=scoring))
    table, scores = result.tables["PGD-8"], result.scores["PGD-8"][15]
    expected = metrics_by_level(scores, table, scoring=PAPER.scoring)
    assert expected["slide"].mca < metrics_by_level(scores, table)["slide"].mca
    assert expected["patch"].map != metrics_by_level(scores, table)["patch"].map
    for record in result.records[15:]:
        assert record.value == getattr(expected[record.level], record.metric)
        assert (record.settings["how"], record.settings["compat"]) == ("paper", "paper")
    rows, labels, patients = pool_by_level(
        scores, table, pooling=PAPER.scoring.pooling, group_by=PAPER.scoring.group_by
    )["slide"]
    options = dict(generator=np.random.default_rng(0), resamples=50, absent_classes="zero")
    intervals = bootstrap_intervals(rows, labels, patients, **options)
    found = {
        r.metric: Interval(r.low, r.high, r.settings.get("interval", r.settings.get("no_interval", "")))
        for r in result.records[15:]
        if r.level == "slide"
    }
    assert found == intervals


def test_bim_with_a_random_start_says_what_it_is(toy_encoder, bank, queries):
    attacks = {
        name: BIM(Linf(8 / 255), step_size=2 / 255, steps=2, random_start=r) for name, r in (("r", True), ("c", False))
    }
    result = evaluate_whitebox(toy_encoder, bank, queries, attacks, **FAST)
    notes = {r.attack_name: (r.settings.get("random_start"), r.settings.get("note")) for r in result.records}
    assert notes == {"clean": (None, None), "r": (True, "BIM with a random start is PGD"), "c": (False, None)}


def test_masked_gradients_are_flagged(bank, queries):
    def quantised(images):
        return (images - images.detach()) * 0 + (images.detach() * 255).round() / 255

    def encode(images):
        mean = quantised(images).mean((2, 3)) - 0.5
        return torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1) * 40

    still = dataclasses.replace(PGD8, random_start=False)
    result = evaluate_whitebox(encode, bank, queries, {"PGD-8": PGD8, "still-8": still}, **FAST)
    flags = {record.attack_name: record.flags for record in result.records}
    assert flags["clean"] == ()
    assert flags["PGD-8"] == ("gradient exactly zero in some step for 100.0% of the images",)
    shares = {r.attack_name: r.settings.get("zero_gradient_share") for r in result.records}
    assert shares["PGD-8"] == 1.0


def test_images_that_never_move_are_flagged(toy_encoder, bank, queries):
    class Asleep:
        threat = Linf(8 / 255)

        def run(self, x, objective, **_):
            n = len(x)
            return AttackResult(x, torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.int64), None, 1, 0)

    result = evaluate_whitebox(toy_encoder, bank, queries, {"asleep": Asleep()}, **FAST)
    assert result.records[-1].flags == ("100.0% of the images never moved",)
    assert result.records[0].flags == ()


def test_every_record_has_its_chance_level(toy_encoder, bank, queries):
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST | dict(run=RunOptions()))
    table = result.tables["clean"]
    levels = pool_by_level(result.scores["clean"][15], table, class_names=result.class_names)
    for record in result.records:
        assert record.chance == chance_levels(levels[record.level].labels)[record.metric]
    assert {r.chance for r in result.records if (r.level, r.metric) == ("patch", "accuracy")} == {12 / 36}


def test_an_attack_that_helps_is_flagged(toy_encoder, bank, queries):
    """The labels of the bank are turned, so that clean queries are wrong; an image of another class is then right."""
    of_class = {int(label): image for batch in bank for label, image in zip(batch.label, batch.images, strict=True)}
    wanted = {int(i): of_class[(int(c) - 1) % 3] for q in queries for i, c in zip(q.patch, q.label, strict=True)}

    class Helpful:
        threat = Linf(1.0)

        def run(self, x, objective, *, ids, **_):
            n = len(x)
            images = torch.stack([wanted[number] for number in ids.tolist()])
            return AttackResult(images, torch.zeros(n), torch.ones(n), torch.zeros(n, dtype=torch.int64), None, 1, 0)

    table = embed(toy_encoder, bank)
    turned = dataclasses.replace(table, label=(table.label + 1) % 3)
    result = evaluate_whitebox(toy_encoder, turned, queries, {"helpful": Helpful(), "PGD-8": PGD8}, **FAST)
    flags = {(r.attack_name, r.level, r.metric): r.flags for r in result.records}
    assert value(result, "clean") == 0.0 and value(result, "helpful") == 1.0
    for name, reason in (("clean", "below chance: 0.0 %"), ("helpful", "under attack above that of the clean images")):
        for level in ("patch", "slide", "patient"):
            assert any(f"{level} accuracy {reason}" in flag for flag in flags[name, level, "accuracy"])
            assert not any(reason in flag for flag in flags[name, level, "mca"]), "once is enough"
    assert not any("below chance" in flag for flag in flags["PGD-8", "patch", "accuracy"]), "attacks are for that"


def test_a_bank_with_the_queries_patients_is_flagged(toy_encoder, queries):
    result = evaluate_whitebox(toy_encoder, queries, queries, {}, **FAST)
    again = "36 of 36 queries are also in the bank, with the same embedding"
    assert result.records[0].flags == ("bank and queries share 9 patients", again)


def test_a_bank_of_another_cohort_works_by_class_name(toy_encoder, bank, queries):
    table = embed(toy_encoder, bank)
    turned = dataclasses.replace(
        table, label=(table.label + 1) % 3, class_names=("red", "cyan", "green"), cohort="another"
    )
    result = evaluate_whitebox(toy_encoder, turned, queries, {}, **FAST)
    assert result.class_names == ("red", "cyan", "green")
    assert value(result, "clean") == value(evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST), "clean")


def test_the_encoder_comes_back_as_it_was(toy_encoder, bank, queries):
    toy_encoder.train()
    before = {name: tensor.clone() for name, tensor in toy_encoder.state_dict().items()}
    evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, **FAST)
    assert toy_encoder.training and toy_encoder.norm.training and toy_encoder.norm.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy_encoder.state_dict().items())


class Never:
    threat = Linf(8 / 255)

    def run(self, *_, **__):
        raise AssertionError("the attack ran")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target="pixels"), "target .*'decision', 'features', 'embedding'; got 'pixels'"),
        (dict(attacks={"clean": PGD8}), "called 'clean'"),
        (dict(classifier=()), "no classifier.*KNNClassifier"),
        (dict(provenance=Provenance(class_names=("cyan", "green", "blue"))), r"\['blue'\]"),
    ],
)
def test_errors_come_before_the_attacks(toy_encoder, bank, queries, options, message):
    arguments = FAST | dict(attacks={"never": Never()}) | options
    with pytest.raises(ValueError, match=message):
        evaluate_whitebox(toy_encoder, embed(toy_encoder, bank), queries, **arguments)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([PGD8], r"mapping such as \{'PGD-8': PGD\(\.\.\.\)\}.* list"),
        (PGD8, "mapping .* PGD"),
        ({"mine": lambda x, objective: x}, "'mine' has no method run"),
    ],
)
def test_attacks_that_are_no_mapping_of_attacks(toy_encoder, bank, queries, attacks, message):
    with pytest.raises(TypeError, match=message):
        evaluate_whitebox(toy_encoder, bank, queries, attacks, **FAST)


def test_a_classifier_that_is_none(toy_encoder, bank, queries):
    with pytest.raises(TypeError, match="got 20"):
        evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST | dict(classifier=20))


def test_noise_of_two_norms_with_one_eps_is_kept_apart(toy_encoder, bank, queries):
    attacks = {"linf": PGD(Linf(0.5), step_size=0.1, steps=1), "l2": PGD(L2(0.5), step_size=0.1, steps=1)}
    result = evaluate_whitebox(toy_encoder, bank, queries, attacks, **FAST | dict(run=RunOptions()))
    assert list(result.tables) == ["clean", "noise-0.5", "noise-L2-0.5", "linf", "l2"]
    noise = {record.attack_name: record.attack for record in result.records}
    assert noise["noise-0.5"].startswith("RandomNoise(threat=Li")
    assert noise["noise-L2-0.5"].startswith("RandomNoise(threat=L2")


def test_the_bank_of_another_encoder(toy_encoder, bank, queries):
    table = embed(toy_encoder, bank, layer="embedding")
    for target in ("features", "decision"):
        with pytest.raises(ValueError, match=r"width 3.*4.*another encoder or layer"):
            evaluate_whitebox(toy_encoder, table, queries, {"never": Never()}, **FAST | dict(target=target))


def test_a_bank_on_disk_in_float16_can_be_attacked(toy_encoder, bank, queries, tmp_path):
    table = embed(toy_encoder, bank)
    table.save(tmp_path / "half", dtype="float16")
    mapped = EmbeddingTable.load(tmp_path / "half", memory_map=True)
    options = FAST | dict(target="decision")
    results = [evaluate_whitebox(toy_encoder, table, queries, {"PGD-8": PGD8}, **options)]
    with pytest.warns(UserWarning, match="the bank is a file"):  # what that costs is said before
        results.append(evaluate_whitebox(toy_encoder, mapped, queries, {"PGD-8": PGD8}, **options))
    values = [[record.value for record in result.records] for result in results]
    assert np.isfinite(values).all()
    np.testing.assert_allclose(*values, atol=0.2)


def test_records_say_how_good_an_approximate_index_was(toy_encoder, bank, queries):
    table = embed(toy_encoder, bank)
    approximate = KNNClassifier(k=9, index="IVF8,Flat;nprobe=2")
    result = evaluate_whitebox(toy_encoder, table, queries, {"PGD-8": PGD8}, **FAST | dict(classifier=approximate))
    knn = approximate.fit(table)
    for record in result.records:
        z = result.tables[record.attack_name].z
        assert record.settings["index_recall"] == knn.recall(z) < 1
        assert record.settings["index_agreement"] == knn.agreement(z)
        assert record.settings["index_queries"] == 36
    exact = evaluate_whitebox(toy_encoder, table, queries, {}, **FAST)
    assert not any("index_recall" in record.settings for record in exact.records)


# --- ensembles ----------------------------------------------------------------------------------------------------

EPS = 2.2 / 255
SMALL = AttackEnsemble(Linf(EPS), steps=4, step_size=1 / 255, decision_steps=5, restarts=2, queries=6)
BARE = FAST | dict(scoring=Scoring(bootstrap=0))


def right(result, name, k=15):
    """(n,) bool: patches that are classified as what they are."""
    return result.scores[name][k].argmax(1) == result.tables[name].label


@pytest.fixture
def ensemble(toy_encoder, bank, queries):
    run = RunOptions(noise=False, keep_examples=36)
    return evaluate_whitebox(toy_encoder, bank, queries, {"ensemble": SMALL}, **BARE | dict(run=run))


def test_no_image_is_robust_that_a_paper_attack_breaks(toy_encoder, bank, queries, ensemble):
    ours = right(ensemble, "ensemble")
    for target in ("features", "embedding"):
        attacks = paper_attacks((EPS,), steps=4, step_size=1 / 255)
        single = evaluate_whitebox(toy_encoder, bank, queries, attacks, **BARE | dict(target=target))
        for name in attacks:
            assert not (ours & ~right(single, name)).any(), (target, name)
            assert ours.mean() < right(single, name).mean() < right(ensemble, "clean").mean()


def test_outcomes_are_those_of_the_scores(toy_encoder, bank, ensemble):
    outcome = ensemble.outcomes["ensemble"]
    np.testing.assert_array_equal(outcome.robust, right(ensemble, "ensemble"))
    np.testing.assert_array_equal(outcome.broken_by == "clean", ~right(ensemble, "clean"))
    np.testing.assert_array_equal(outcome.margin > 0, ~outcome.robust)
    np.testing.assert_array_equal(outcome.patch, ensemble.tables["ensemble"].patch)
    assert outcome.members[0].seen == 36 and sum(one.newly_broken for one in outcome.members) == (~outcome.robust).sum()
    toy_encoder.eval()
    z = toy_encoder.features(ensemble.examples["ensemble"]).detach()
    knn = KNNClassifier(k=15).fit(embed(toy_encoder, bank))
    np.testing.assert_array_equal(knn.predict(z) == ensemble.tables["ensemble"].label, outcome.robust)


def test_every_pass_of_an_ensemble_is_counted(toy_encoder, bank, queries, monkeypatch):
    table, images, plain = embed(toy_encoder, bank), [], toy_encoder.features
    monkeypatch.setattr(toy_encoder, "features", lambda x: images.append(len(x)) or plain(x))
    result = evaluate_whitebox(toy_encoder, table, queries, {"ensemble": SMALL}, **BARE)
    outcome, record = result.outcomes["ensemble"], result.records[-1]
    spent = sum(member.forwards for member in outcome.members)
    assert sum(images) - len(outcome.patch) == spent  # the clean batch is what is measured, not what is attacked
    assert record.forwards == pytest.approx(spent / 36)
    assert record.settings["members"]["Square"]["seen"] == outcome.members[-1].seen
    assert record.settings["robust"] == outcome.robust.sum()


def test_attacks_of_the_same_call_are_members(toy_encoder, bank, queries, ensemble):
    pgd = PGD(SMALL.threat, step_size=1 / 255, steps=4)
    attacks = {"s": SMALL, "PGD": pgd, "PGD-8": PGD8}
    both = evaluate_whitebox(toy_encoder, bank, queries, attacks, **BARE | dict(run=RunOptions()))
    members = {member.name: member for member in both.outcomes["s"].members}
    assert list(both.tables)[-3:] == ["s", "PGD", "PGD-8"]  # the order that was asked for
    assert "PGD" in members and "PGD features" not in members and "PGD-8" not in members
    assert members["PGD"].forwards == members["PGD"].backwards == 0
    assert not (right(both, "s") & ~right(both, "PGD")).any()
    assert right(both, "s").sum() == right(ensemble, "ensemble").sum()


class Stepped(nn.Module):
    """The toy encoder behind a staircase of half grey levels: it sees nearly the same, and has no gradients."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def features(self, images):
        flat = (images * 510).round() / 510
        return self.inner.features(flat + 0 * images)

    def forward(self, images):
        return self.features(images)


def test_masked_gradients_are_found_by_transfer_and_flagged(toy_encoder, bank, queries):
    masked = Stepped(toy_encoder)
    attacks = {"s": AttackEnsemble(Linf(3 / 255), steps=4, step_size=1 / 255, decision_steps=3, restarts=1, queries=4)}
    alone = evaluate_whitebox(masked, bank, queries, attacks, **BARE)
    helped = evaluate_whitebox(masked, bank, queries, attacks, surrogates={"smooth": toy_encoder}, **BARE)
    broken = {member.name: member.newly_broken for member in helped.outcomes["s"].members}
    assert broken["transfer from smooth"] >= 5
    assert right(helped, "s").mean() < right(alone, "s").mean()
    flags = [flag for record in helped.records if record.attack_name == "s" for flag in record.flags]
    assert any("black box beats white box" in flag for flag in flags)
    assert any("gradient exactly zero" in flag for flag in flags)
    with pytest.raises(TypeError, match=r"\['b'\]"):
        evaluate_whitebox(masked, bank, queries, attacks, surrogates={"b": 3}, **BARE)


def test_a_sound_encoder_gets_no_flag_and_a_note_that_pools_are_bounds(ensemble):
    ours = [record for record in ensemble.records if record.attack_name == "ensemble"]
    assert all(record.flags == () for record in ours)
    assert all("an attack on the pool may do more" in record.settings["note"] for record in ours)
    assert all(record.attack == repr(SMALL) and "APGD margin 1" in record.settings["member_attacks"] for record in ours)


@pytest.mark.parametrize(
    ("broken", "reached", "flagged"), [(0, 0, False), (1, 3, False), (5, 100, False), (5, 9, True)]
)
def test_the_flag_wants_more_than_luck(broken, reached, flagged):
    square = MemberStats(name="Square", attack="Square()", black_box=True, seen=reached, newly_broken=broken)
    outcome = EnsembleOutcome(np.arange(2), np.array(["", "Square"]), np.zeros(2), (square,))
    assert bool(black_box_flags(outcome)) == flagged


def test_several_classifiers_are_flagged_and_the_first_decides(toy_encoder, bank, queries):
    several = [KNNClassifier(k=15), KNNClassifier(k=3)]
    result = evaluate_whitebox(toy_encoder, bank, queries, {"s": SMALL}, **BARE | dict(classifier=several))
    np.testing.assert_array_equal(result.outcomes["s"].robust, right(result, "s", 15))
    flags = {record.k: record.flags for record in result.records if record.attack_name == "s"}
    assert any("k=15" in flag and "k=3" in flag for flag in flags[3])
