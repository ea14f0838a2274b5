"""evaluate_transfer: oracles by loops, what is done how often, resuming, refusals, the table and the heat map."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from hsat.attacks import PGD, AttackEnsemble, FittedUniversal, Linf, RandomNoise, UniversalPerturbation
from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import (
    PAPER,
    Provenance,
    RunOptions,
    Scoring,
    Target,
    evaluate_transfer,
    evaluate_whitebox,
    metrics,
    metrics_by_level,
    read_records,
    write_records,
)
from hsat.eval.evaluation import fit_bank
from hsat.eval.transfer import load_source
from hsat.eval.transfer_drops import transfer_drop
from hsat.models import branch, convert_to_dual, wrap_encoder
from hsat.report import markdown_table, plot_transfer, transfer_markdown
from hsat.types import HierarchicalBatch

PGD8 = PGD(Linf(8 / 255), step_size=4 / 255, steps=2)
ATTACKS = {"PGD-8": PGD8, "PGD-2": dataclasses.replace(PGD8, threat=Linf(2 / 255))}
FAST = dict(classifier=KNNClassifier(k=15), scoring=Scoring(bootstrap=40))
CLASSES = ("cyan", "green", "red")
DOCUMENT = Path(__file__).parents[2] / "docs" / "transfer.md"


class Colours(nn.Module):
    """Features: some contrasts between the mean colours of an image; encoders with other weights see other things."""

    def __init__(self, *rows: tuple[float, float, float]) -> None:
        super().__init__()
        self.mix = nn.Parameter(40 * torch.tensor(rows))
        self.forwards = 0

    def forward(self, images):
        self.forwards += 1
        mean = images.mean((2, 3)) - 0.5
        return torch.cat((mean @ self.mix.T, torch.ones_like(mean[:, :1])), 1)


def colours():
    """Three encoders: two look at one contrast each and so confuse two classes a little, the third at both."""
    return {
        "a": Colours((1.0, -1.0, 0.0), (0.0, 0.3, -0.3)),
        "b": Colours((0.3, -0.3, 0.0), (0.0, 1.0, -1.0)),
        "c": Colours((1.0, -1.0, 0.0), (0.0, 1.0, -1.0)),
    }


class Watched:
    """An attack that notes on how many images it ran."""

    def __init__(self, attack, fails_at=None):
        self.attack, self.threat, self.calls, self.fails_at = attack, attack.threat, [], fails_at
        self.random_start = attack.random_start

    def __repr__(self):
        return repr(self.attack)

    def run(self, x, objective, **options):
        self.calls.append(len(x))
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        return self.attack.run(x, objective, score=False, **options)


class Counted(list):
    """A loader that counts how often it is read."""

    def __init__(self, batches):
        super().__init__(batches)
        self.dataset, self.reads = batches.dataset, 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


@pytest.fixture(scope="module")
def full(bank, queries):
    """All encoders against all, never interrupted."""
    return evaluate_transfer(colours(), bank, queries, ATTACKS, **FAST)


def pick(records, **wanted):
    return [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]


def one(records, **wanted):
    (found,) = pick(records, **wanted)
    return found


def test_it_is_what_embedding_by_hand_gives(full, bank, queries):
    encoders = colours()
    for surrogate, source in encoders.items():
        images = []
        for batch in queries:
            with torch.no_grad():
                reference = source(batch.images)

            def drift(x, source=source, reference=reference):
                return 1 - nn.functional.cosine_similarity(source(x), reference, dim=1)

            generator = torch.Generator().manual_seed(0)
            x_adv = PGD8(batch.images, drift, generator=generator, ids=batch.patch)
            images.append(HierarchicalBatch(x_adv, batch.patch, batch.slide, batch.patient, batch.label))
        for target, encoder in encoders.items():
            table = embed(encoder, images, class_names=("cyan", "green", "red"))
            scores = KNNClassifier(k=15).fit(embed(encoder, bank)).predict_proba(table)
            np.testing.assert_allclose(full.attacked[surrogate, "PGD-8", target][15], scores, atol=1e-9)
            expected = metrics_by_level(scores, table)
            for record in pick(full.records, surrogate=surrogate, model=target, attack_name="PGD-8"):
                if not record.metric.endswith("_drop"):
                    assert record.value == pytest.approx(getattr(expected[record.level], record.metric), abs=1e-12)


def test_the_diagonal_is_the_white_box(full, bank, queries):
    for name, encoder in colours().items():
        options = dict(target="features", run=RunOptions(noise=False), provenance=Provenance(model=name))
        alone = evaluate_whitebox(encoder, bank, queries, ATTACKS, **FAST, **options)
        own = [r for r in full.records if r.model == name and r.surrogate in ("", name) and "_drop" not in r.metric]
        for expected, record in zip(alone.records, own, strict=True):
            settings = {key: value for key, value in record.settings.items() if key != "surrogate_checkpoint"}
            assert dataclasses.replace(record, surrogate="", settings=settings) == expected
        np.testing.assert_array_equal(full.attacked[name, "PGD-8", name][15], alone.scores["PGD-8"][15])


def test_surrogates_and_targets_differ(full):
    """Else the matrix could be one encoder's numbers nine times, or its own transpose."""
    gaps = {
        (r.surrogate, r.model): r.value
        for r in pick(full.records, metric="accuracy_drop", level="patch", attack_name="PGD-8")
    }
    assert gaps["a", "b"] != gaps["b", "a"] and gaps["a", "c"] != gaps["c", "a"]
    assert len(set(gaps.values())) > 4


def test_drops_and_their_averages(full):
    for record in full.records:
        if not record.metric.endswith("_drop"):
            continue
        plain = dict(model=record.model, level=record.level, metric=record.metric.removesuffix("_drop"))
        clean = one(full.records, surrogate="", **plain).value
        others = [name for name in "abc" if name != record.model]
        sources = others if record.surrogate == "others" else [record.surrogate]
        same = dict(attack_name=record.attack_name, **plain)
        gaps = [clean - one(full.records, surrogate=name, **same).value for name in sources]
        assert record.value == pytest.approx(np.mean(gaps), abs=1e-12)
        if record.surrogate == "others":
            assert record.settings["surrogates"] == others
            assert record.backwards == 2 * PGD8.steps
        else:
            assert record.backwards == PGD8.steps == record.forwards
    levels, drops = 3, 2
    assert len(full.records) == 3 * (levels * 5 + 3 * 2 * levels * (5 + drops) + 2 * levels * drops)
    assert len(pick(full.records, surrogate="others")) == 3 * 2 * levels * drops


@pytest.mark.parametrize("level", ["patch", "slide"])
def test_intervals_are_paired(level, full, queries):
    """An oracle that builds each resample row by row, the same patients for clean and attacked images."""
    table = full.queries
    groups = {"patch": table.patch, "slide": table.slide}[level]
    names, first = np.unique(groups, return_index=True)
    label, patient = table.label[first], table.patient[first]

    def pooled(scores):
        return np.stack([scores[groups == name].mean(0) for name in names])

    clean = pooled(full.clean["a"][15])
    by = {name: pooled(full.attacked[name, "PGD-8", "a"][15]) for name in "abc"}
    people = np.unique(patient)
    draws = np.random.default_rng(0).multinomial(len(people), np.full(len(people), 1 / len(people)), size=40)
    for metric in ("accuracy", "mca"):
        gaps = {name: [] for name in "abc"}
        for draw in draws:
            rows = np.concatenate(
                [np.repeat(np.flatnonzero(patient == p), c) for p, c in zip(people, draw, strict=True)]
            )
            before = getattr(metrics(clean[rows], label[rows]), metric)
            for name in "abc":
                gaps[name].append(before - getattr(metrics(by[name][rows], label[rows]), metric))
        wanted = {name: np.array(gap) for name, gap in gaps.items()}
        wanted["others"] = (wanted["b"] + wanted["c"]) / 2
        for name, gap in wanted.items():
            record = one(
                full.records, surrogate=name, model="a", attack_name="PGD-8", level=level, metric=f"{metric}_drop"
            )
            reach = gap.std(ddof=1) * np.sqrt(len(people) / (len(people) - 1)) * stats.t.ppf(0.975, len(people) - 1)
            assert record.low == pytest.approx(max(-1, record.value - reach))
            assert record.high == pytest.approx(min(1, record.value + reach))


def test_drops_have_no_chance_level_and_the_rest_has_one(full):
    assert all((record.chance is None) == record.metric.endswith("_drop") for record in full.records)


def test_an_attack_from_elsewhere_that_helps_beyond_luck_is_flagged(full, bank, toy_encoder):
    """Clean and attacked change their parts; the encoder itself is held against its clean numbers elsewhere."""
    table = embed(toy_encoder, bank)
    chosen = dict(model="a", level="patch", metric="accuracy")
    before = one(full.records, surrogate="b", attack_name="PGD-8", **chosen)
    after = one(full.records, surrogate="", **chosen)
    place, spread = (15, "patch", "accuracy"), np.linspace(-0.01, 0.01, 40)
    for surrogate, gain, flagged in (("b", 0.3, True), ("b", 0.001, False), ("a", 0.3, False)):
        drop = transfer_drop(
            [before],
            [dataclasses.replace(after, surrogate=surrogate, value=before.value + gain)],
            clean_resampled={place: before.value + spread},
            attacked_resampled={place: before.value + gain - spread},
            classifiers=fit_bank(FAST["classifier"], table),
            table=table,
        ).records[place]
        assert drop.value == pytest.approx(-gain)
        assert (drop.flags == (*after.flags, "patch accuracy above that of the clean images, beyond luck")) == flagged


def test_without_resamples_or_spread_there_is_no_interval_but_a_reason(bank, queries):
    nothing = {"PGD-0": dataclasses.replace(PGD8, threat=Linf(0.0))}
    for options, reason in (
        (FAST, "every resample gives the same value"),
        (FAST | dict(scoring=Scoring(bootstrap=0)), "no resamples"),
    ):
        found = evaluate_transfer(colours(), bank, queries, nothing, **options).records
        drops = [record for record in found if record.metric.endswith("_drop")]
        assert len(drops) == 3 * 4 * 3 * 2
        assert {(r.value, r.low, r.high, r.settings["no_interval"]) for r in drops} == {(0.0, None, None, reason)}


PAIRS = (("a", "b"), ("a", "c"), ("b", "b"), ("b", "c"))


def test_each_thing_is_done_once(bank, queries):
    encoders, attacks = colours(), {name: Watched(attack) for name, attack in ATTACKS.items()}
    bank, queries = Counted(bank), Counted(queries)
    result = evaluate_transfer(encoders, bank, queries, attacks, pairs=PAIRS, **FAST)
    assert [attack.calls for attack in attacks.values()] == [[20, 16] * 2] * 2, "once per surrogate, batch and attack"
    assert bank.reads == 2, "once per target"
    assert queries.reads == 2 + 2 * 2, "once per target, and once per surrogate and attack"
    embedded = 3 + 2 + 4 * 2  # bank, clean queries, four attacked versions of them: what a target costs in batches
    passes = one(result.records, surrogate="a", model="c", attack_name="PGD-8", level="patch", metric="mca").forwards
    attacked = 4 * (1 + int(passes))  # two attacks on two batches, each with one look at the clean images
    assert encoders["c"].forwards == embedded
    assert encoders["a"].forwards == attacked
    assert encoders["b"].forwards == embedded + attacked
    assert result.made == (("a", "PGD-8"), ("a", "PGD-2"), ("b", "PGD-8"), ("b", "PGD-2"))
    assert {(r.surrogate, r.model) for r in result.records if r.surrogate not in ("", "others")} == {
        (s, t) for s in "ab" for t in "bc"
    }
    assert one(
        result.records, surrogate="others", model="b", attack_name="PGD-8", level="patch", metric="mca_drop"
    ).settings["surrogates"] == ["a"]


def test_encoders_may_be_loaded_when_they_are_needed(full, bank, queries):
    loaded = []

    def load(name):
        loaded.append(name)
        return colours()[name]

    encoders = {name: partial(load, name) for name in "abc"}
    provenance = {name: Provenance(checkpoint=f"hash of {name}") for name in "abc"}
    result = evaluate_transfer(encoders, bank, queries, ATTACKS, provenance=provenance, **FAST)
    assert loaded == ["a", "b", "c"]
    assert [(r.value, r.low, r.high) for r in result.records] == [(r.value, r.low, r.high) for r in full.records]
    assert {record.checkpoint for record in pick(result.records, model="b")} == {"hash of b"}
    crossed = one(result.records, surrogate="c", model="b", attack_name="PGD-2", level="slide", metric="map")
    assert crossed.settings["surrogate_checkpoint"] == "hash of c"


def test_an_interrupted_run_goes_on_from_the_finished_batches(full, bank, queries, tmp_path):
    options = dict(run=RunOptions(resume_dir=tmp_path / "state"), **FAST)
    with pytest.raises(KeyboardInterrupt):
        evaluate_transfer(colours(), bank, queries, {**ATTACKS, "PGD-2": Watched(ATTACKS["PGD-2"], 4)}, **options)
    again, attacks = Counted(bank), {name: Watched(attack) for name, attack in ATTACKS.items()}
    result = evaluate_transfer(colours(), again, queries, attacks, **options)
    assert result.made == (("b", "PGD-2"), ("c", "PGD-8"), ("c", "PGD-2"))
    assert attacks["PGD-2"].calls == [16, 20, 16], "of the pair that was begun only the second batch is left"
    assert result.records == full.records
    assert again.reads == 0, "the banks were kept"
    attacks = {name: Watched(attack) for name, attack in ATTACKS.items()}
    nothing_new = evaluate_transfer(colours(), again, queries, attacks, **options)
    assert nothing_new.made == () and nothing_new.records == full.records
    assert not any(attack.calls for attack in attacks.values())
    assert not list((tmp_path / "state").rglob(".*"))


def test_decisions_are_those_of_the_surrogates_own_bank(bank, queries):
    """Also of an ensemble, whatever the other attacks maximise; other surrogates need no bank."""
    encoders = colours()
    ensemble = AttackEnsemble(Linf(2 / 255), steps=2, decision_steps=2, restarts=1, queries=2)
    tables = {name: embed(encoder, bank) for name, encoder in encoders.items()}
    for target, attacks in (("decision", {"PGD": ATTACKS["PGD-2"]}), ("features", {"ensemble": ensemble})):
        options = dict(FAST, target=target, pairs=[("a", "b"), ("b", "b")])
        result = evaluate_transfer(encoders, tables, queries, attacks, **options)
        (name,) = attacks
        alone = evaluate_whitebox(
            encoders["b"], tables["b"], queries, attacks, **FAST, target=target, run=RunOptions(noise=False)
        )
        np.testing.assert_array_equal(result.attacked["b", name, "b"][15], alone.scores[name][15])
        crossed = one(result.records, surrogate="a", model="b", attack_name=name, level="patch", metric="accuracy")
        assert crossed.settings["attacked_classifier"] == repr(FAST["classifier"])
        with pytest.raises(ValueError, match=r"no table for \['a'\]"):
            evaluate_transfer(encoders, {"b": tables["b"]}, queries, attacks, **options)
    drift = evaluate_transfer(encoders, {"b": tables["b"]}, queries, {"PGD-8": PGD8}, **options)
    assert drift.made == (("a", "PGD-8"), ("b", "PGD-8"))


def test_a_state_serves_other_arithmetic_and_grows(full, bank, queries, tmp_path):
    options = dict(run=RunOptions(resume_dir=tmp_path / "state"), **FAST)
    small = {name: encoder for name, encoder in colours().items() if name != "c"}
    evaluate_transfer(small, bank, queries, {"PGD-8": PGD8}, **options)
    scoring = Scoring(pooling="paper", bootstrap=40)
    paper = evaluate_transfer(small, bank, queries, {"PGD-8": PGD8}, **options | dict(scoring=scoring))
    assert paper.made == ()
    assert {record.settings["how"] for record in paper.records} == {"paper"}
    grown = evaluate_transfer(colours(), bank, queries, ATTACKS, **options)
    assert grown.records == full.records
    assert set(grown.made) == set(full.made), "the new target has to see the old pairs as well"
    fewer = evaluate_transfer({"a": colours()["a"]}, bank, queries, {"PGD-2": ATTACKS["PGD-2"]}, **options)
    assert fewer.made == () and {record.model for record in fewer.records} == {"a"}


@pytest.fixture(scope="module")
def begun(bank, queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "state"
    evaluate_transfer({"a": colours()["a"]}, bank, queries, {"PGD-8": PGD8}, run=RunOptions(resume_dir=folder), **FAST)
    return folder


def grey(loader):
    return type(loader)(batch.replace(images=batch.images * 0.9) for batch in loader)


@pytest.mark.parametrize(
    ("change", "count", "named"),
    [
        (dict(run=dict(seed=1)), 1, ["seed was 0, now 1"]),
        (dict(classifier=KNNClassifier(k=3, temperature=0.1)), 1, ["classifier was", "k=15", "k=3, temperature=0.1"]),
        (dict(target="embedding"), 1, ["target was features, now embedding"]),
        (dict(attacks={"PGD-8": dataclasses.replace(PGD8, steps=3)}), 1, ["attack.PGD-8 was PGD", "steps=3"]),
        (dict(encoders={"a": colours()["b"]}), 1, ["encoder.a.weights was"]),
        (dict(provenance={"a": Provenance(class_names=("cyan", "green", "blue"))}), 1, ["encoder.a.classes"]),
    ],
)
def test_a_state_of_other_settings_is_refused_by_name(change, count, named, begun, bank, queries):
    arguments = dict(encoders={"a": colours()["a"]}, attacks={"PGD-8": Watched(PGD8)}, run={}, **FAST) | change
    encoders, attacks = arguments.pop("encoders"), arguments.pop("attacks")
    run = RunOptions(resume_dir=begun, **arguments.pop("run"))
    with pytest.raises(ValueError, match="was begun under other settings") as caught:
        evaluate_transfer(encoders, bank, queries, attacks, run=run, **arguments)
    message = str(caught.value)
    assert str(begun) in message and all(part in message for part in named), message
    assert message.count(" was ") == 1 + count, message


def test_other_images_of_the_same_description_are_refused(begun, bank, queries):
    watched, run = {"PGD-4": Watched(PGD8)}, RunOptions(resume_dir=begun)
    with pytest.raises(ValueError, match="batch 0 of the queries is not the one"):
        evaluate_transfer({"a": colours()["a"]}, bank, grey(queries), watched, run=run, **FAST)
    assert watched["PGD-4"].calls == []


def test_a_loader_that_shuffles_is_refused(bank, queries):
    class Shuffled(type(queries)):
        turn = 0

        def __iter__(self):
            type(self).turn += 1
            return iter(list(self[:]) if self.turn == 1 else list(reversed(self[:])))

    watched = {"PGD-8": Watched(PGD8)}
    with pytest.raises(ValueError, match=r"batch 0 of the queries.*no shuffling, no augmentation"):
        evaluate_transfer(colours(), bank, Shuffled(queries), watched, **FAST)
    assert watched["PGD-8"].calls == []


def test_a_loader_that_runs_dry_is_noticed(bank, queries):
    class Dry(type(queries)):
        turn = 0

        def __iter__(self):
            type(self).turn += 1
            return iter(self[:] if self.turn == 1 else self[:1])

    with pytest.raises(ValueError, match="the queries had 2 batches at the first reading and have 1 now"):
        evaluate_transfer(colours(), bank, Dry(queries), ATTACKS, **FAST)


def test_a_folder_of_something_else_and_damaged_files_are_named(bank, queries, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    call = partial(evaluate_transfer, {"a": colours()["a"]}, bank, queries, {"PGD-8": PGD8}, **FAST)
    with pytest.raises(ValueError, match="photos holds something else"):
        call(run=RunOptions(resume_dir=tmp_path / "photos"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    run = RunOptions(resume_dir=tmp_path / "state")
    first = call(run=run)
    for victim in (tmp_path / "state").glob("*-a-*batch-000001-*"):
        victim.write_bytes(victim.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"(clean|attacked)-a-.*computing it anew"):
        assert call(run=run).records == first.records
    (tmp_path / "state" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json"):
        call(run=run)


def test_names_are_never_paths(bank, queries, tmp_path):
    name = "../../x/y"
    run = RunOptions(resume_dir=tmp_path / "in" / "state")
    result = evaluate_transfer({name: colours()["a"]}, bank, queries, {"../PGD": PGD8}, run=run, **FAST)
    assert result.made == ((name, "../PGD"),)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["state"]


def test_tables_as_banks_and_classes_by_name(full, bank, queries):
    encoders = colours()
    banks = {name: embed(encoder, bank) for name, encoder in encoders.items()}
    banks["b"] = dataclasses.replace(
        banks["b"], label=(banks["b"].label + 1) % 3, class_names=("red", "cyan", "green"), cohort="another"
    )
    result = evaluate_transfer(encoders, banks, queries, ATTACKS, **FAST)
    assert result.class_names["b"] == ("red", "cyan", "green")
    assert {record.settings["bank_cohort"] for record in pick(result.records, model="b")} == {"another"}
    for (surrogate, attack, target), scores in full.attacked.items():  # scores, because ties go to the first class
        order = [1, 2, 0] if target == "b" else [0, 1, 2]
        np.testing.assert_array_equal(result.attacked[surrogate, attack, target][15][:, order], scores[15])


def test_encoders_of_other_sizes_and_pixels(bank, queries):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoders = {"plain": colours()["c"], "large": wrap_encoder(net, mean=0.5, std=0.1, head=2, input_size=12)}
    result = evaluate_transfer(encoders, bank, queries, {"PGD-8": PGD8}, target="embedding", **FAST)
    assert {(r.surrogate, r.model) for r in result.records if r.metric == "mca_drop"} == {
        (s, t) for s in ("plain", "large", "others") for t in encoders
    }
    assert {record.target for record in result.records} == {"embedding"}


def test_k_above_the_bank_is_said_once_per_target(bank, queries):
    several = [KNNClassifier(k=200), KNNClassifier(k=9)]
    with pytest.warns(UserWarning, match="k=200 is more than the 90 rows of the bank") as caught:
        result = evaluate_transfer(colours(), bank, queries, ATTACKS, **FAST | dict(classifier=several))
    assert len(caught) == 3
    assert {record.k for record in result.records} == {90, 9}


def test_the_paper_attacks_the_embedding(toy_encoder, bank, queries):
    options = FAST | dict(target=PAPER.target, scoring=dataclasses.replace(PAPER.scoring, bootstrap=40))
    result = evaluate_transfer({"a": toy_encoder}, bank, queries, {"PGD-8": PGD8}, **options)
    alone = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, run=RunOptions(noise=False), **options)
    own = [(r.value, r.target) for r in result.records if "_drop" not in r.metric]
    assert own == [(r.value, "embedding") for r in alone.records]


def test_the_paper_attacks_one_branch_of_a_dual_norm(bank, queries):
    """As evaluate_whitebox does: through "pgd", while the active branch is scored."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = convert_to_dual(wrap_encoder(net, mean=0.5, std=0.1, head=2))
    with torch.no_grad(), branch(encoder, "pgd"):
        encoder.train()(queries[0].images)  # the two branches have other statistics now
    results = {}
    for target in (PAPER.target, Target("embedding")):
        options = FAST | dict(target=target)
        found = evaluate_transfer({"a": encoder}, bank, queries, {"PGD-8": PGD8}, **options)
        alone = evaluate_whitebox(encoder, bank, queries, {"PGD-8": PGD8}, **options)
        results[target] = found.attacked["a", "PGD-8", "a"][15]
        np.testing.assert_array_equal(results[target], alone.scores["PGD-8"][15])
        branches = {record.settings.get("attack_branch") for record in found.records}
        assert branches == {"pgd" if target == PAPER.target else None}
    assert np.abs(results[PAPER.target] - results[Target("embedding")]).max() > 1e-6


ENCODER = colours()["a"]


@pytest.mark.parametrize("source", [lambda: ENCODER, lambda file="x": ENCODER, partial({"a": ENCODER}.get, "a")])
def test_a_function_that_takes_no_images_loads_an_encoder(source):
    assert load_source("a", source) is ENCODER


@pytest.mark.parametrize(
    "source", [lambda images: images, lambda *images: images, ENCODER, ENCODER.forward, torch.relu]
)
def test_what_takes_images_is_an_encoder(source):
    assert load_source("a", source) is source


class Never:
    threat = Linf(8 / 255)

    def run(self, *_, **__):
        raise AssertionError("the attack ran")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(encoders={}), TypeError, "encoders must be a mapping"),
        (dict(encoders={"a": 3}), TypeError, "encoders must map names to encoders.*'a': 3"),
        (dict(encoders={"a": lambda: 3}), TypeError, "the function for encoder 'a' gave a int"),
        (dict(encoders={"others": colours()["a"]}), ValueError, "an encoder cannot be called 'others'"),
        (dict(pairs=[("d", "a")]), ValueError, r"\['d'\].*\['a', 'b', 'c'\]"),
        (dict(pairs=[]), TypeError, "pairs must hold"),
        (dict(pairs=[("a", "b"), ("a", "b")]), ValueError, "twice"),
        (dict(pairs="ab"), TypeError, r"\(\('a', 'b'\),\); got 'ab'"),
        (dict(provenance={"z": Provenance()}), ValueError, r"\['z'\]"),
        (dict(banks={}), ValueError, r"no table for \['a', 'b', 'c'\]"),
        (dict(banks={"a": 1, "b": 2, "c": 3}), TypeError, r"\['a', 'b', 'c'\] are no EmbeddingTables"),
        (dict(banks=iter(())), ValueError, "the bank is read once per encoder"),
        (dict(queries=iter(())), ValueError, "the queries are read once per target and per attack"),
        (dict(target="pixels"), ValueError, "target .*got 'pixels'"),
        (dict(attacks={"clean": Never()}), ValueError, "an attack cannot be called 'clean'"),
        (dict(classifier=[]), ValueError, "no classifier"),
    ],
)
def test_mistakes_are_named_before_anything_is_attacked(options, error, message, bank, queries):
    arguments = dict(encoders=colours(), banks=bank, queries=queries, attacks={"never": Never()}) | FAST
    with pytest.raises(error, match=message):
        evaluate_transfer(**arguments | options)


def test_the_table_holds_the_matrix(full):
    table = transfer_markdown(full.records, levels=("slide",))
    parts = table.split("**Slide level, ")
    assert [part.partition(",")[0] for part in parts[1:]] == ["PGD-8", "PGD-2"]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in parts[1].splitlines() if "|" in line]
    assert rows[0][1:] == ["a", "b", "c"]
    named = ["clean Acc / MCA", "chance Acc / MCA", "a", "b", "c", "mean of the others"]
    assert [row[0] for row in rows[2:]] == named and rows[3][1:] == ["33.3 / 33.3"] * 3
    for row, surrogate in zip(rows[4:], ("a", "b", "c", "others"), strict=True):
        for cell, model in zip(row[1:], "abc", strict=True):
            same = dict(surrogate=surrogate, model=model, level="slide", attack_name="PGD-8")
            shown = " / ".join(
                f"{100 * one(full.records, metric=m, **same).value:.1f}" for m in ("accuracy_drop", "mca_drop")
            )
            assert cell == (f"*{shown}*" if surrogate == model else shown)
    record = one(full.records, surrogate="others", model="b", level="slide", attack_name="PGD-2", metric="mca_drop")
    interval = f"{100 * record.value:.1f} [{100 * record.low:.1f}, {100 * record.high:.1f}]"
    assert interval in transfer_markdown(full.records, levels=("slide",), intervals=True)
    with pytest.raises(ValueError, match=r"none of the .* records is a transfer at a level of"):
        transfer_markdown(pick(full.records, surrogate=""))


def test_flags_and_notes_stand_below_the_table(full):
    marked = [dataclasses.replace(r, flags=("odd",), settings={**r.settings, "note": "known"}) for r in full.records]
    lines = transfer_markdown(marked).splitlines()
    assert lines.count("- a → b, PGD-8: odd") == 1 and lines.count("- PGD-8: known") == 1


def test_other_tables_keep_pairs_apart(full):
    table = markdown_table(full.records, levels=("patch",))
    assert "| a → b | features | 15 |" in table and "runs)" not in table


def test_records_can_be_written_and_old_ones_read(full, tmp_path):
    path = write_records(tmp_path / "r.jsonl", full.records)
    assert read_records(path) == full.records
    path.write_text("".join(line.replace('"surrogate": "", ', "") + "\n" for line in path.read_text().splitlines()))
    assert '"surrogate": ""' not in path.read_text()
    assert read_records(path) == full.records


def test_the_heat_map_is_drawn(full, tmp_path):
    for options in ({}, dict(attack="PGD-2", metric="mca_drop", levels=("patch",), k=15)):
        with Image.open(plot_transfer(full.records, tmp_path / "map.png", **options)) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("RGB").resize((200, 100)).tobytes())) > 100
    with pytest.raises(ValueError, match="attack 'PGD-3'"):
        plot_transfer(full.records, tmp_path / "map.png", attack="PGD-3")


def test_the_document_runs(tmp_path, monkeypatch):
    text = DOCUMENT.read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, str(DOCUMENT), "exec", dont_inherit=True), names)
    assert names["result"].records == read_records(tmp_path / "transfer.jsonl")
    assert "| mean of the others |" in names["table"] and (tmp_path / "transfer.png").exists()
    assert len(names["first"].made) == 3 and names["again"].made == ()
    assert names["first"].records == names["again"].records == names["result"].records


# --- a universal perturbation across encoders: fitted on one, without labels, and measured on the others ---

EPS = 12 / 255


class Contrasts(nn.Module):
    """Two colour contrasts and a constant, the contrasts mixed by a small matrix of the encoder's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        mix = torch.eye(2) + 0.2 * torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))
        self.mix = nn.Parameter(mix)

    def features(self, images):
        mean = images.mean((2, 3)) - 0.5
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((40 * contrast @ self.mix, torch.ones_like(contrast[:, :1])), 1)

    def forward(self, images):
        return nn.functional.normalize(self.features(images), dim=1)


def fitted_on(encoder: nn.Module, bank) -> FittedUniversal:
    unlabelled = [HierarchicalBatch(b.images, b.patch, b.slide, b.patient) for b in bank]
    settings = UniversalPerturbation(threat=Linf(EPS), step_size=2 / 255, epochs=4)
    return settings.fit(unlabelled, encoder.features, generator=torch.Generator().manual_seed(0), note="toy bank")


def test_one_perturbation_lowers_every_encoder_and_the_matrix_says_so(bank, queries, tmp_path):
    encoders = {name: Contrasts(seed).requires_grad_(False) for seed, name in enumerate("ab")}
    delta = FittedUniversal.load(fitted_on(encoders["a"], bank).save(tmp_path / "u.safetensors"))
    attacks = {"universal-12": delta, "noise-12": RandomNoise(Linf(EPS))}
    found = evaluate_transfer(encoders, bank, queries, attacks, pairs=[("a", "a"), ("a", "b")], **FAST)
    wanted = {"metric": "accuracy", "level": "patch"}

    def value(model: str, attack: str) -> float:
        (record,) = [
            r for r in found.records if (r.model, r.attack_name, r.metric, r.level) == (model, attack, *wanted.values())
        ]
        return record.value

    for name, encoder in encoders.items():
        clean, noisy = value(name, "clean"), value(name, "noise-12")
        assert value(name, "universal-12") < noisy - 0.15 <= clean - 0.1
        alone = evaluate_whitebox(encoder, bank, queries, attacks, **FAST, run=RunOptions(noise=False, diagnose=32))
        (same,) = [r for r in alone.records if (r.attack_name, r.metric, r.level) == ("universal-12", *wanted.values())]
        assert same.value == value(name, "universal-12"), "nothing of it depends on the surrogate that is asked"
        assert "FittedUniversal" in same.attack and "toy bank" in same.attack
        assert not same.flags and "diagnosis" not in same.settings, "it follows no gradient that could be masked"
    moved = np.concatenate([delta(b.images, None).sub(b.images).abs().flatten().numpy() for b in queries])
    assert moved.max() <= EPS + 1e-7 and (moved > 0.9 * EPS).mean() > 0.3
