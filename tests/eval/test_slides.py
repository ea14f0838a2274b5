"""evaluate_slides: fractions and orders, what its records say, targets without labels, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf, RandomNoise, slide_objective
from hsat.classifiers import MIL, GatedAttention, Head, KNNClassifier, MeanPooling, NearestCentroid
from hsat.data import PatchDataset, patch_loader, read_folders, slide_loader
from hsat.embedding import embed
from hsat.eval import (
    Provenance,
    RunOptions,
    Scoring,
    evaluate_slides,
    evaluate_whitebox,
    pool,
    read_records,
    write_records,
)
from hsat.eval.slide_attacks import SlideBags, patches_within
from hsat.report import markdown_table
from hsat.testing import check_feasible
from hsat.types import AttackResult, HierarchicalBatch

NAMES = ("cyan", "green", "red")
PGD8 = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)
FAST = dict(scoring=Scoring(bootstrap=50), run=RunOptions(noise=False))


class Slides(list):
    """Batches of slides one after another; with the dataset that describes them."""

    class dataset:
        class_names = NAMES
        split = "val"


def toy_slides(toy_batches, *, seed=2, size=72, batch=5, labels=True):
    """The toy patches ordered by slide: 18 slides of 4 patches, 2 per patient."""
    (whole,) = toy_batches(seed=seed, sizes=(size,))
    order = torch.argsort(whole.slide, stable=True)
    columns = [column[order] for column in (whole.images, whole.patch, whole.slide, whole.patient, whole.label)]
    if not labels:
        columns = columns[:4]
    return Slides(HierarchicalBatch(*(c[at : at + batch] for c in columns)) for at in range(0, size, batch))


@pytest.fixture(scope="module")
def loader(toy_batches):
    return toy_slides(toy_batches)


@pytest.fixture
def pooled(toy_encoder, toy_batches):
    bank = embed(toy_encoder, toy_batches(seed=1, sizes=(90,), first_id=1000))
    return MeanPooling(NearestCentroid().fit(bank))


@pytest.fixture
def mil():
    torch.manual_seed(0)
    return MIL(GatedAttention(3, 3, hidden=4), NAMES)


class Contrast(nn.Module):
    """The class of the highest mean of a linear map of the features; attention is the first feature."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def attention(self, bag):
        return bag[:, 0].softmax(0)

    def forward(self, bag):
        return self.linear(bag).mean(0)


def test_clean_numbers_are_those_of_the_white_box_evaluation(toy_encoder, toy_batches, loader):
    bank = toy_batches(seed=1, sizes=(90,), first_id=1000)
    knn = KNNClassifier(k=15)
    scoring = Scoring(bootstrap=50)
    other = evaluate_whitebox(toy_encoder, bank, loader, {}, classifier=knn, scoring=scoring)
    fitted = knn.fit(embed(toy_encoder, bank))
    result = evaluate_slides(toy_encoder, loader, MeanPooling(fitted), {}, **FAST)

    def numbers(records):
        return {(r.level, r.metric): (r.value, r.low, r.high, r.n) for r in records if r.level != "patch"}

    ours, theirs = numbers(result.records), numbers(other.records)
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert row == pytest.approx(theirs[key], abs=1e-6), key
    assert result.records[0].k == 15 and "KNNClassifier" in result.records[0].classifier
    np.testing.assert_allclose(result.clean, pool(other.scores["clean"][15], other.tables["clean"].slide).scores)


def test_more_patches_break_no_less(toy_encoder, loader, pooled):
    result = evaluate_slides(toy_encoder, loader, pooled, {"PGD-8": PGD8}, fractions=(1.0, 0.25, 0.5, 0.25), **FAST)
    assert result.fractions.tolist() == [0.25, 0.5, 1.0]
    curve = [result.accuracy("PGD-8", fraction) for fraction in result.fractions]
    assert result.accuracy("clean", 1) >= curve[0] >= curve[1] >= curve[2]
    assert curve[0] > curve[2] == 0.0, "all patches of a slide fell to PGD in the budget's tests"
    assert result.sizes.tolist() == [4] * 18 and len(result.slide) == 18
    right = result.clean.argmax(1) == result.label
    for number, fraction in enumerate(result.fractions):
        wrong = result.attacked["PGD-8"][number].argmax(1) != result.label
        np.testing.assert_array_equal(wrong, result.smallest_fraction["PGD-8"] <= fraction)
    assert (result.smallest_fraction["PGD-8"][~right] == 0).all()
    assert sum(result.distribution("PGD-8").values()) == 18
    with pytest.raises(ValueError, match=r"fraction 0\.3 was not measured; there are"):
        result.accuracy("PGD-8", 0.3)


@pytest.mark.parametrize(
    ("fraction", "patches", "wanted"),
    [(0.001, 10, 1), (0.001, 3000, 3), (0.1, 30, 3), (0.3, 10, 3), (0.29, 10, 2), (1.0, 7, 7), (0.5, 1, 1)],
)
def test_at_least_one_patch_and_no_more_than_the_fraction(fraction, patches, wanted):
    assert patches_within(fraction, patches) == wanted


class Watched:
    """An attack that notes what it is shown, and darkens the images by eps."""

    def __init__(self):
        self.seen, self.threat = [], Linf(4 / 255)

    def __repr__(self):
        return "Watched()"

    def __call__(self, x, objective, **options):
        return self.run(x, objective, **options).x_adv

    def run(self, x, objective, *, start=None, generator=None, ids=None, success=None):
        assert success is None
        self.seen.append(ids.tolist())
        x_adv = (x - 4 / 255).clamp(0, 1)
        check_feasible(x_adv, x, self.threat)
        zero = torch.zeros(len(x), dtype=torch.int64)
        return AttackResult(x_adv, objective(x_adv).detach(), objective(x).detach(), zero, None, 2, 0)


@pytest.mark.parametrize("order", ["attention", "gradient", "random"])
def test_the_order_of_the_patches(order, toy_encoder, loader):
    torch.manual_seed(3)
    module = GatedAttention(3, 3, hidden=4) if order == "gradient" else Contrast()  # the latter's gradients are alike
    classifier, attack = MIL(module, NAMES), Watched()
    toy_encoder.eval()
    run = RunOptions(noise=False, seed=4)
    result = evaluate_slides(
        toy_encoder, loader, classifier, {"w": attack}, fractions=(0.25, 0.5, 1.0), order=order, run=run
    )
    seen = iter(attack.seen)
    for number, slide in enumerate(SlideBags(loader)):
        ids = result.order[int(slide.slide[0])]
        assert sorted(ids.tolist()) == slide.patch.tolist()
        features = toy_encoder.features(slide.images)
        if order == "attention":
            wanted = slide.patch[features[:, 0].argsort(descending=True)]
            assert ids.tolist() == wanted.tolist()
        elif order == "random":
            rng = np.random.default_rng((4, int(slide.slide[0])))
            assert ids.tolist() == slide.patch[torch.from_numpy(rng.permutation(4))].tolist()
        else:
            leaf = slide.images.clone().requires_grad_()
            logits = classifier.logits(toy_encoder.features(leaf))
            label = int(slide.label[0])
            margin = logits[[c for c in range(3) if c != label]].max() - logits[label]
            size = torch.autograd.grad(margin, leaf)[0].flatten(1).norm(dim=1)
            assert len(set(size.tolist())) == 4
            by_id = dict(zip(slide.patch.tolist(), size.tolist(), strict=True))
            sizes = [by_id[one] for one in ids.tolist()]
            assert sizes == pytest.approx(sorted(sizes, reverse=True), rel=1e-5)
        smallest = result.smallest_fraction["w"][number]
        for fraction, count in ((0.25, 1), (0.5, 2), (1.0, 4)):
            if smallest >= fraction:  # it is attacked up to the fraction at which it falls, and no more
                assert next(seen) == sorted(ids[:count].tolist(), key=slide.patch.tolist().index)
    assert next(seen, None) is None
    assert {r.settings["order"] for r in result.records if r.attack_name.startswith("w@")} == {order}


def test_the_default_order_is_attention_where_there_is_some(toy_encoder, loader, mil, pooled):
    for classifier, wanted in ((mil, "attention"), (pooled, "gradient")):
        result = evaluate_slides(toy_encoder, loader, classifier, {"w": Watched()}, fractions=(0.5,), **FAST)
        assert result.records[-1].settings["order"] == wanted
    with pytest.raises(ValueError, match=r"MeanPooling.* has no attention"):
        evaluate_slides(toy_encoder, loader, pooled, {"w": Watched()}, order="attention", **FAST)


def test_a_slide_is_attacked_as_one(toy_encoder, loader, pooled):
    """All patches together leave less than each patch against its own decision, at the same eps and steps."""
    weak = PGD(Linf(3 / 255), step_size=1 / 255, steps=3)
    result = evaluate_slides(toy_encoder, loader, pooled, {"weak": weak}, fractions=(1.0,), **FAST)
    number = int(np.flatnonzero(result.smallest_fraction["weak"] > 0)[0])
    slide = list(SlideBags(loader))[number]
    with torch.no_grad():
        clean = toy_encoder.eval().features(slide.images)
    objective = slide_objective(toy_encoder.features, pooled, clean, label=int(slide.label[0]))
    x_adv = weak(slide.images, objective, generator=torch.Generator().manual_seed(0), ids=slide.patch)
    with torch.no_grad():
        wanted = pooled.scores(toy_encoder.features(x_adv))
    np.testing.assert_allclose(result.attacked["weak"][0, number], wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("target", ["own_decision", "representation"])
def test_attacks_without_labels_never_read_them(target, toy_encoder, toy_batches, mil, loader):
    options = FAST | dict(target=target, fractions=(0.5, 1.0))
    with_labels = evaluate_slides(toy_encoder, loader, mil, {"PGD-8": PGD8}, **options)
    bare = evaluate_slides(toy_encoder, toy_slides(toy_batches, labels=False), mil, {"PGD-8": PGD8}, **options)
    np.testing.assert_array_equal(with_labels.attacked["PGD-8"], bare.attacked["PGD-8"])
    np.testing.assert_array_equal(with_labels.smallest_fraction["PGD-8"], bare.smallest_fraction["PGD-8"])
    np.testing.assert_array_equal(bare.label, bare.clean.argmax(1))
    assert bare.accuracy("clean", 1) == 1.0
    assert all("no labels" in record.flags[0] for record in bare.records)
    assert not any("no labels" in flag for record in with_labels.records for flag in record.flags)
    moved = with_labels.attacked["PGD-8"][-1].argmax(1) != with_labels.clean.argmax(1)
    np.testing.assert_array_equal(moved, with_labels.smallest_fraction["PGD-8"] <= 1)
    assert moved.any() and {record.target for record in with_labels.records} == {target}
    wrong = with_labels.clean.argmax(1) != with_labels.label
    assert wrong.any() and (with_labels.smallest_fraction["PGD-8"] > 0).all(), (
        "to change a wrong decision costs as much"
    )
    assert with_labels.records[-1].settings["already_wrong"] == wrong.sum()


def test_cross_entropy_and_a_head_under_mean_pooling(toy_encoder, loader):
    torch.manual_seed(1)
    head = Head(nn.Linear(3, 3), NAMES)
    before = [p.requires_grad for p in head.parameters()]
    slide = MeanPooling(head)
    result = evaluate_slides(
        toy_encoder, loader, slide, {"PGD-8": PGD8}, target="cross_entropy", fractions=(1.0,), **FAST
    )
    assert result.accuracy("PGD-8", 1.0) <= result.accuracy("clean", 1.0)
    assert [p.requires_grad for p in head.parameters()] == before and all(p.grad is None for p in head.parameters())
    assert toy_encoder.training, "the encoder is given back as it was"


def test_records_say_it_all_and_make_a_table(toy_encoder, loader, pooled, tmp_path):
    result = evaluate_slides(
        toy_encoder,
        loader,
        pooled,
        {"PGD-8": PGD8},
        fractions=(0.25, 1.0),
        scoring=Scoring(bootstrap=50),
        provenance=Provenance(model="toy", checkpoint="abc"),
    )
    assert read_records(write_records(tmp_path / "r.jsonl", result.records)) == result.records
    names = list(dict.fromkeys(record.attack_name for record in result.records))
    assert names == ["clean", "noise-8@25%", "noise-8@100%", "noise-8", "PGD-8@25%", "PGD-8@100%", "PGD-8"]
    assert {record.level for record in result.records} == {"slide", "patient"}
    at = next(r for r in result.records if (r.attack_name, r.level, r.metric) == ("PGD-8@25%", "slide", "accuracy"))
    assert (at.model, at.checkpoint, at.target, at.n, at.eps) == ("toy", "abc", "decision", 18, "8/255")
    assert at.value == result.accuracy("PGD-8", 0.25) and at.low <= at.value <= at.high
    assert at.settings["fraction"] == 0.25 and at.settings["patches_altered"] == 18
    assert at.forwards > 0 and at.backwards > 0
    assert at.classifier == "MeanPooling(NearestCentroid(temperature=0.07))"
    (smallest,) = [r for r in result.records if (r.attack_name, r.metric) == ("PGD-8", "smallest_fraction")]
    assert smallest.value == pytest.approx(np.minimum(result.smallest_fraction["PGD-8"], 1).mean())
    distribution = result.distribution("PGD-8")
    assert smallest.settings["smallest_fractions"] == {f"{100 * f:g}%": distribution[f] for f in (0.0, 0.25, 1.0)}
    assert (smallest.settings["already_wrong"], smallest.settings["never_flipped"]) == (
        distribution[0.0],
        distribution[np.inf],
    )
    assert "PGD-8@25%" in markdown_table(result.records)


def test_slides_of_other_patients_classes_have_no_patient_level(toy_encoder, toy_batches, pooled):
    (whole,) = toy_batches(seed=2, sizes=(36,), patients=9)
    order = torch.argsort(whole.slide, stable=True)
    one = torch.zeros(36, dtype=torch.int64)
    batch = HierarchicalBatch(whole.images[order], whole.patch[order], whole.slide[order], one, whole.label[order])
    result = evaluate_slides(toy_encoder, Slides([batch]), pooled, {}, **FAST)
    assert {record.level for record in result.records} == {"slide"}


def test_batches_make_no_difference_but_rounding(toy_encoder, toy_batches, pooled):
    results = [
        evaluate_slides(
            toy_encoder, toy_slides(toy_batches, batch=batch), pooled, {"PGD-8": PGD8}, fractions=(1.0,), **FAST
        )
        for batch in (1, 5, 72)
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other.attacked["PGD-8"], results[0].attacked["PGD-8"], atol=1e-5)


def test_slides_have_to_follow_one_another(toy_encoder, toy_batches, pooled):
    mixed = toy_batches(seed=2, sizes=(40, 32))
    with pytest.raises(ValueError, match=r"slide \d+ comes again after other slides.*slide_loader"):
        evaluate_slides(toy_encoder, mixed, pooled, {}, **FAST)


@pytest.fixture(scope="module")
def cohort(colour_root):
    return read_folders(colour_root)


def test_a_slide_loader_reads_one_slide_at_a_time(cohort):
    dataset = PatchDataset(cohort)
    shuffled = dataset.subset(np.random.default_rng(0).permutation(len(dataset)))
    for given in (dataset, shuffled):
        loader = slide_loader(given, batch_size=2)
        batches = list(loader)
        assert len(loader) == len(batches) and all(len(set(batch.slide.tolist())) == 1 for batch in batches)
        assert sorted(torch.cat([batch.patch for batch in batches]).tolist()) == list(range(len(dataset)))
        bags = SlideBags(loader)
        assert bags.chunk == 2 and len(bags) == 8 == len(list(bags))
    one = list(SlideBags(patch_loader(dataset, batch_size=3)))
    two = list(SlideBags(slide_loader(shuffled, batch_size=1)))
    for a, b in zip(one, two, strict=True):
        assert int(a.slide[0]) == int(b.slide[0])
        assert sorted(a.patch.tolist()) == sorted(b.patch.tolist())
    with pytest.raises(ValueError, match="at least 1"):
        slide_loader(dataset, batch_size=0)
    with pytest.raises(ValueError, match="no patches"):
        slide_loader(dataset.subset([]))


class NeedsLabels:
    """An attack that asks its objective for labels."""

    threat = Linf(8 / 255)

    def run(self, x, objective, **options):
        return objective.labels


REFUSED = {
    "fraction": (dict(fractions=(0.1, 1.5)), ValueError, r"lie in \(0, 1\]; got 1.5"),
    "no fraction": (dict(fractions=()), ValueError, "no fraction is given"),
    "target": (dict(target="features"), ValueError, "target must be one of.*'own_decision'.*got 'features'"),
    "order": (dict(order="worst"), ValueError, "order must be one of .*got 'worst'"),
    "attack": (dict(attacks={"mine": NeedsLabels()}), ValueError, "attack 'mine' failed on slide .*labels"),
    "attacks": (dict(attacks=[PGD8]), TypeError, "attacks must be a mapping"),
    "patches": (dict(slide_classifier=KNNClassifier()), TypeError, "MeanPooling"),
    "nothing": (dict(slide_classifier=nn.Linear(3, 3)), TypeError, "needs class_names, reads, logits"),
    "one class": (dict(slide_classifier=MIL(Contrast(), ("a",))), ValueError, "one class only"),
    "width": (dict(slide_classifier=MIL(GatedAttention(7, 3), NAMES)), ValueError, "cannot read the encoder's emb"),
    "names": (dict(slide_classifier=MIL(Contrast(), ("x", "y", "z"))), ValueError, "does not know; it knows"),
    "empty": (dict(slide_loader=Slides()), ValueError, "gave no batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, toy_encoder, loader, pooled):
    changes, error, message = REFUSED[name]
    call = dict(slide_loader=loader, slide_classifier=pooled, attacks={"PGD": PGD8}, fractions=(1.0,))
    with pytest.raises(error, match=message):
        evaluate_slides(toy_encoder, **FAST | call | changes)


def test_missing_and_mixed_labels_are_named(toy_encoder, toy_batches, pooled):
    with pytest.raises(ValueError, match=r"slide 0 has no label.*own_decision"):
        evaluate_slides(toy_encoder, toy_slides(toy_batches, labels=False), pooled, {}, **FAST)
    (whole,) = toy_batches(seed=2, sizes=(3,))
    zero = torch.zeros(3, dtype=torch.int64)
    mixed = Slides([HierarchicalBatch(whole.images, whole.patch, zero, zero, torch.tensor([0, 1, 1]))])
    with pytest.raises(ValueError, match=r"slide 0 holds patches with labels \[0, 1\]"):
        evaluate_slides(toy_encoder, mixed, pooled, {}, **FAST)


def test_a_folder_of_other_settings_is_refused(toy_encoder, loader, mil, tmp_path):
    def evaluate(classifier=mil, **changes):
        run = RunOptions(noise=False, resume_dir=tmp_path / "state")
        options = dict(fractions=(0.5,), run=run, scoring=Scoring(bootstrap=20)) | changes
        return evaluate_slides(toy_encoder, loader, classifier, {"PGD": PGD8}, **options)

    first = evaluate()
    before = toy_encoder.forwards
    assert evaluate().records == first.records and toy_encoder.forwards == before, "nothing is computed again"
    torch.manual_seed(5)
    other = MIL(GatedAttention(3, 3, hidden=4), NAMES)
    refused = {
        "fractions": dict(fractions=(1.0,)),
        "order": dict(order="random"),
        "slide_target": dict(target="own_decision"),
        "slide_classifier": dict(classifier=other),
    }
    for name, changes in refused.items():
        with pytest.raises(ValueError, match=f"begun under other settings: .*{name}"):
            evaluate(**changes)


def test_noise_alone_and_one_patch_per_slide(toy_encoder, toy_batches, pooled):
    (whole,) = toy_batches(seed=2, sizes=(6,))
    result = evaluate_slides(
        toy_encoder, Slides([whole]), pooled, {"n": RandomNoise(Linf(1 / 255))}, fractions=(0.001, 1.0), **FAST
    )
    assert result.sizes.tolist() == [1] * 6
    np.testing.assert_array_equal(result.attacked["n"][0], result.attacked["n"][1])
