"""A plain classifier, attacked by its own logits: the same pass and records as for an encoder with a head."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.classifiers import DecisionModel, Head, KNNClassifier, LinearProbe
from hsat.embedding import embed
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_classifier, evaluate_whitebox
from hsat.eval.classifier import PATCH_ONLY
from hsat.report import markdown_table, write_report
from hsat.types import EmbeddingTable, HierarchicalBatch

PGD8 = PGD(Linf(8 / 255), step_size=2 / 255, steps=4)
ENSEMBLE = AttackEnsemble(Linf(8 / 255), steps=2, decision_steps=2, restarts=1, queries=5)
FAST = dict(scoring=Scoring(bootstrap=20), run=RunOptions(noise=False))


class Network(nn.Module):
    """A classifier of the toy images, whose `features` are no logits."""

    def __init__(self, classes=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), nn.Tanh())
            self.head = nn.Linear(12, classes)

    def features(self, images):
        return self.body(images)

    def forward(self, images):
        return self.head(self.features(images))


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30), first_id=1000)


@pytest.fixture
def trained(bank):
    network = Network()
    images, labels = torch.cat([b.images for b in bank]), torch.cat([b.label for b in bank])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


def accuracy(result, name, level="patch"):
    (value,) = (r.value for r in result.records if (r.attack_name, r.level, r.metric) == (name, level, "accuracy"))
    return value


def numbers(result):
    return [(r.attack_name, r.level, r.metric, r.n, r.value, r.low, r.high) for r in result.records]


@pytest.mark.parametrize("attack", [PGD8, ENSEMBLE], ids=["PGD", "ensemble"])
def test_it_is_what_evaluate_whitebox_says_of_a_head(trained, bank, queries, attack):
    names = queries.dataset.class_names
    assert trained.training
    own = evaluate_classifier(trained, queries, {"attack": attack}, provenance=Provenance(model="m"), **FAST)
    assert trained.training and all(p.grad is not None and p.requires_grad for p in trained.parameters())
    trained.eval()
    head = Head(trained.head, names)
    encoder = nn.Sequential(trained.body)
    whole = evaluate_whitebox(encoder, bank, queries, {"attack": attack}, classifier=head, **FAST)
    same = 15 if attack is ENSEMBLE else None  # an ensemble's drift is that of the features there, of the logits here
    assert numbers(own)[:same] == numbers(whole)[:same] and own.class_names == whole.class_names == names
    for name in ("clean",) if same else ("clean", "attack"):
        (left,), (right,) = own.scores[name].values(), whole.scores[name].values()
        np.testing.assert_allclose(left, right, atol=1e-5)
    assert accuracy(own, "clean") >= 0.9 and accuracy(own, "attack") < accuracy(own, "clean")
    assert {record.target for record in own.records} == {"decision"}
    assert {record.classifier for record in own.records} == {"the model's own logits"}
    assert {record.settings["layer"] for record in own.records} == {"logits"}
    assert not any("bank_rows" in record.settings for record in own.records)
    images = torch.cat([batch.images for batch in queries])
    np.testing.assert_allclose(own.tables["clean"].raw(), trained(images).detach(), atol=1e-5)
    assert (attack is ENSEMBLE) == bool(own.outcomes)


def test_noise_diagnosis_and_examples(trained, queries):
    run = RunOptions(diagnose=6, keep_examples=3)
    result = evaluate_classifier(trained, queries, {"PGD-8": PGD8}, scoring=Scoring(bootstrap=0), run=run)
    assert list(result.tables) == ["clean", "noise-8", "PGD-8"] and len(result.examples["PGD-8"]) == 3
    (record, *_) = (r for r in result.records if r.attack_name == "PGD-8")
    assert record.settings["diagnosis"]["images"] == 6
    assert {record.level for record in result.records} == {"patch", "slide", "patient"}


def test_a_loader_of_images_and_labels(trained, queries):
    images, labels = torch.cat([b.images for b in queries]), torch.cat([b.label for b in queries])
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    plain = evaluate_classifier(trained, loader, {"PGD-8": PGD8}, **FAST)
    assert plain.class_names == ("0", "1", "2")
    assert {record.level for record in plain.records} == {"patch"}
    assert all(PATCH_ONLY in record.flags for record in plain.records)
    again = evaluate_classifier(trained, iter(loader), {"PGD-8": PGD8}, class_names=("x", "y", "z"), **FAST)
    assert numbers(again) == numbers(plain) and again.class_names == ("x", "y", "z")
    whole = evaluate_classifier(trained, queries, {"PGD-8": PGD8}, **FAST)
    assert accuracy(plain, "clean") == accuracy(whole, "clean")
    assert PATCH_ONLY in markdown_table(plain.records)
    named = TensorDataset(images, labels)
    named.classes = ["p", "q", "r"]  # as torchvision's folders say it
    assert evaluate_classifier(trained, DataLoader(named, batch_size=20), {}, **FAST).class_names == ("p", "q", "r")


def test_labels_are_matched_by_name(trained, queries):
    names = queries.dataset.class_names
    turned = Network()
    turned.load_state_dict(trained.state_dict())
    with torch.no_grad():
        turned.head.weight.copy_(trained.head.weight.flip(0))
        turned.head.bias.copy_(trained.head.bias.flip(0))
    other = evaluate_classifier(turned, queries, {}, class_names=names[::-1], **FAST)
    assert accuracy(other, "clean") == accuracy(evaluate_classifier(trained, queries, {}, **FAST), "clean")
    with pytest.raises(ValueError, match="that the bank does not know"):
        evaluate_classifier(trained, queries, {}, class_names=("x", "y", "z"), **FAST)


def test_any_function_and_a_decision_model(toy_encoder, bank, queries, trained, tmp_path):
    trained.eval()
    function = evaluate_classifier(lambda images: 1.0 * trained(images), queries, {"PGD-8": PGD8}, **FAST)
    assert numbers(function) == numbers(evaluate_classifier(trained, queries, {"PGD-8": PGD8}, **FAST))
    table = embed(toy_encoder, bank)
    knn = KNNClassifier(k=15)
    model = DecisionModel(toy_encoder, knn.fit(table), wide=True)
    own = evaluate_classifier(model, queries, {"PGD-8": PGD8}, **FAST)
    whole = evaluate_whitebox(toy_encoder, table, queries, {"PGD-8": PGD8}, classifier=knn, **FAST)
    accuracies = [
        [r.value for r in one.records if r.metric == "accuracy" and r.level == "patch"] for one in (own, whole)
    ]
    assert accuracies[0] == accuracies[1]
    other = DecisionModel(toy_encoder, KNNClassifier(k=14).fit(table))
    assert model.fingerprint() == DecisionModel(toy_encoder, knn.fit(table), wide=True).fingerprint()
    assert len({model.fingerprint(), other.fingerprint()}) == 2
    probe = DecisionModel(toy_encoder, LinearProbe().fit(table))
    assert len({probe.fingerprint(), DecisionModel(toy_encoder, LinearProbe(C=0.1).fit(table)).fingerprint()}) == 2


def test_it_goes_on_with_the_same_model_only(trained, queries, tmp_path):
    attacks, run = {"PGD-8": PGD8}, RunOptions(noise=False, resume_dir=tmp_path)
    options = dict(scoring=Scoring(bootstrap=0), run=run)
    first = evaluate_classifier(trained, queries, attacks, **options)
    seen = []
    trained.register_forward_hook(lambda *_: seen.append(1))
    assert numbers(evaluate_classifier(trained, queries, attacks, **options)) == numbers(first) and not seen
    with torch.no_grad():
        trained.head.bias += 1
    with pytest.raises(ValueError, match="weights"):
        evaluate_classifier(trained, queries, attacks, **options)


def test_a_report_is_made_of_it(trained, queries, tmp_path):
    one = Provenance(model="trained")
    result = evaluate_classifier(trained, queries, {"PGD-8": PGD8}, provenance=one, **FAST)
    page = write_report([result.save(tmp_path / "run")], tmp_path / "page.html").read_text()
    assert "the model&#39;s own logits" in page and "k&nbsp;=&nbsp;0" not in page


def batches(images, labels):
    return [(images, labels)]


IMAGES, LABELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("model", "loader", "names", "error", "message"),
    [
        (
            Network(2),
            batches(IMAGES, LABELS),
            "abc",
            ValueError,
            r"gives 2 logits, and there are 3 classes: \['a', 'b'",
        ),
        (Network(4), batches(IMAGES, LABELS), "abc", ValueError, "gives 4 logits"),
        (Network(1), batches(IMAGES, LABELS), None, ValueError, "one logit per image"),
        (Network(2), batches(IMAGES, LABELS), None, ValueError, "labels run from 0 to 2"),
        (lambda x: x.mean((1, 2, 3)), batches(IMAGES, LABELS), "abc", ValueError, r"the model gave shape \(4,\)"),
        (lambda x: {"logits": x}, batches(IMAGES, LABELS), "abc", TypeError, "got dict.*model.images..logits"),
        (
            lambda x: x.flatten(1)[:, :3] / 0,
            batches(IMAGES, LABELS),
            "abc",
            ValueError,
            "logits are not finite for 4 of 4",
        ),
        (Network(), batches(IMAGES, LABELS.float()), "abc", TypeError, "labels must be integers"),
        (Network(), batches(IMAGES, LABELS - 1), "abc", ValueError, "labels run from -1 to 1"),
        (Network(), [IMAGES], "abc", TypeError, "pairs of tensors .images, labels.; got Tensor"),
        (Network(), [{"image": IMAGES}], "abc", TypeError, "got dict"),
        (Network(), [], "abc", ValueError, "gave no batches"),
        (Network(), batches(IMAGES, LABELS), "aab", ValueError, "class_names must be names that differ"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, loader, names, error, message):
    with pytest.raises(error, match=message):
        evaluate_classifier(model, loader, {"PGD-8": PGD8}, class_names=names and tuple(names), **FAST)


def test_batches_without_labels_and_wrong_attacks_are_refused(queries):
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="without labels"):
        evaluate_classifier(Network(), [HierarchicalBatch(IMAGES, ids, ids, ids)], {}, class_names=tuple("abc"), **FAST)
    with pytest.raises(TypeError, match="attacks must be a mapping"):
        evaluate_classifier(Network(), queries, [PGD8], **FAST)
    with pytest.raises(ValueError, match="cannot be called 'clean'"):
        evaluate_classifier(Network(), queries, {"clean": PGD8}, **FAST)


def test_heads_are_told_apart_and_frozen(trained, bank, queries, tmp_path):
    """A head in training mode is put into evaluation mode meanwhile, and other weights are another evaluation."""
    names, run = queries.dataset.class_names, RunOptions(noise=False, resume_dir=tmp_path)
    encoder, options = nn.Sequential(trained.body).eval(), dict(scoring=Scoring(bootstrap=0), run=run)
    head = Head(nn.Sequential(nn.Dropout(0.9), trained.head), names)
    head.train()
    result = evaluate_whitebox(encoder, bank, queries, {"PGD-8": PGD8}, classifier=head, **options)
    assert head.training and head.module.training
    plain = evaluate_whitebox(encoder, bank, queries, {"PGD-8": PGD8}, classifier=Head(trained.head, names), **FAST)
    assert accuracy(result, "clean") == accuracy(plain, "clean")
    assert accuracy(result, "PGD-8") == accuracy(plain, "PGD-8")
    (key,) = result.scores["clean"]
    assert key == repr(head) == result.records[0].classifier and "\n" not in key
    with torch.no_grad():
        trained.head.bias += 1
    assert repr(head) != key
    with pytest.raises(ValueError, match="classifier"):
        evaluate_whitebox(encoder, bank, queries, {"PGD-8": PGD8}, classifier=head, **options)


def test_a_head_reads_lengths(trained, bank, queries):
    head, encoder = Head(trained.head, queries.dataset.class_names), nn.Sequential(trained.body).eval()
    table = embed(encoder, queries)
    assert table.norm is not None
    np.testing.assert_array_equal(head.predict(table), trained.eval()(torch.cat([b.images for b in queries])).argmax(1))
    with pytest.raises(ValueError, match="does not know their lengths"):
        head.predict_proba(dataclasses.replace(table, norm=None))
    assert isinstance(table, EmbeddingTable)


def test_neighbours_and_a_probe_share_one_pass(toy_encoder, bank, queries):
    several = [KNNClassifier(k=15), LinearProbe(), KNNClassifier(k=5)]
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, classifier=several, **FAST)
    assert list(result.scores["PGD-8"]) == [15, repr(LinearProbe()), 5]
    by_classifier = {(r.k, r.classifier): r for r in result.records if r.attack_name == "PGD-8"}
    assert [key[0] for key in by_classifier] == [15, 0, 5]
    flags = [any("was optimised for k=15" in flag for flag in r.flags) for r in by_classifier.values()]
    assert flags == [False, True, True]
    probe = by_classifier[0, repr(LinearProbe())]
    assert probe.settings["converged"] is True and probe.settings["iterations"] > 0 and probe.temperature == 0
    first = [LinearProbe(), KNNClassifier(k=15)]
    other = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-8": PGD8}, classifier=first, **FAST)
    assert accuracy_of(other, "PGD-8", 0) <= accuracy_of(result, "PGD-8", 0)
    assert accuracy_of(result, "PGD-8", 15) <= accuracy_of(other, "PGD-8", 15)
    assert other.records[0].settings["attacked_classifier"] == repr(LinearProbe())


def accuracy_of(result, name, k):
    place = (name, "patch", "accuracy", k)
    (value,) = (r.value for r in result.records if (r.attack_name, r.level, r.metric, r.k) == place)
    return value


def test_a_probe_that_did_not_converge_is_flagged(toy_encoder, bank, queries):
    with pytest.warns(UserWarning, match="did not converge"):
        result = evaluate_whitebox(toy_encoder, bank, queries, {}, classifier=LinearProbe(max_iter=1), **FAST)
    assert all(any("did not converge" in flag for flag in record.flags) for record in result.records)
