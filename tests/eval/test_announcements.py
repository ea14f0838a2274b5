"""What evaluations say they will cost, held against the passes that a counting encoder sees."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

from hsat import embed
from hsat.attacks import PGD, AttackEnsemble, Linf, RandomNoise, Square, UniversalPerturbation
from hsat.classifiers import MIL, GatedAttention, KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_folders
from hsat.eval import (
    ExportOptions,
    PatchBudget,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    evaluate_budget,
    evaluate_classifier,
    evaluate_drift,
    evaluate_slides,
    evaluate_transfer,
    evaluate_whitebox,
    save_adversarial,
)
from hsat.eval.announcements import announce_fit
from hsat.types import HierarchicalBatch

PGD8 = PGD(Linf(8 / 255), step_size=2 / 255, steps=3)
FAST = {"classifier": KNNClassifier(k=5), "scoring": Scoring(bootstrap=0)}
SHOWN, SILENT = RunOptions(progress=True, noise=False), RunOptions(noise=False)
LINE = re.compile(r"([\d,]+) patches: at most ([\d,]+) forward and ([\d,]+) backward passes each, about \d+ (s|min)")


class Passes(torch.autograd.Function):
    """Nothing but a count of the images that go through it, and of those whose gradients come back."""

    @staticmethod
    def forward(ctx, images, counter):
        ctx.counter, ctx.n = counter, len(images)
        counter.forwards += len(images)
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient):
        ctx.counter.backwards += ctx.n
        return gradient, None


class Counting(nn.Module):
    """Features: two colour contrasts of the whole image beside a constant."""

    def __init__(self, scale=40.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.forwards = self.backwards = 0

    def forward(self, images):
        mean = Passes.apply(images, self).mean((2, 3))
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((self.scale * contrast, torch.ones_like(contrast[:, :1])), 1)

    def take(self):
        counted, self.forwards, self.backwards = (self.forwards, self.backwards), 0, 0
        return counted


@pytest.fixture
def encoder():
    return Counting()


@pytest.fixture
def said(caplog):
    """said(): the announcement of an evaluation as (patches, forwards, backwards); what else was logged is there."""
    caplog.set_level(logging.INFO, logger="hsat")

    def read():
        (match,) = [match for message in caplog.messages if (match := LINE.match(message))]
        caplog.clear()
        return tuple(int(match[place].replace(",", "")) for place in (1, 2, 3))

    return read


def spent(evaluate, *encoders):
    """Passes of an evaluation that says nothing and measures nothing, of all encoders."""
    for one in encoders:
        one.take()
    evaluate(SILENT)
    return tuple(map(sum, zip(*(one.take() for one in encoders), strict=True)))


def assert_said(said, evaluate, n, *encoders):
    """An evaluation says nothing without progress, and the right number with it."""
    forwards, backwards = spent(evaluate, *encoders)
    evaluate(SHOWN)
    assert said() == (n, round(forwards / n), round(backwards / n))
    assert forwards % n == backwards % n == 0


def test_whitebox(encoder, toy_batches, said):
    bank, queries = embed(encoder, toy_batches(seed=1, sizes=(60,), first_id=1000)), toy_batches(seed=2, sizes=(6, 4))
    attacks = {"PGD-8": PGD8, "restarts": PGD(Linf(4 / 255), step_size=2 / 255, steps=2, restarts=2)}

    def evaluate(run):
        evaluate_whitebox(encoder, bank, queries, attacks, target="features", run=run, **FAST)

    assert_said(said, evaluate, 10, encoder)


def test_a_classifier_without_a_bank(encoder, toy_batches, said):
    queries, names = toy_batches(seed=2, sizes=(6, 4)), ("red", "green", "cyan")
    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=0.0, steps=3, random_start=False)}  # nothing breaks, nothing stops

    def evaluate(run):
        evaluate_classifier(encoder, queries, attacks, class_names=names, scoring=Scoring(bootstrap=0), run=run)

    evaluate(SILENT)
    encoder.take()
    evaluate(SHOWN)
    n, forwards, backwards = said()
    assert n == 10 and backwards == 3 and forwards >= 2 + 3


def test_drift_without_labels_says_its_passes(encoder, caplog):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, logger="hsat"):
        evaluate_drift(encoder, [images], {"PGD-8": PGD8}, scoring=Scoring(bootstrap=0), run=SHOWN)
    (line,) = [message for message in caplog.messages if message.startswith("patches: at most")]
    assert " and 3 backward passes each" in line


def test_budget(encoder, toy_batches, said):
    bank, queries = embed(encoder, toy_batches(seed=1, sizes=(60,), first_id=1000)), toy_batches(seed=2, sizes=(20, 16))

    def evaluate(run):
        evaluate_budget(
            encoder, bank, queries, PGD8, budget=PatchBudget(level="slide"), target="features", run=run, **FAST
        )

    assert_said(said, evaluate, 36, encoder)


def test_transfer_counts_every_encoder(toy_batches, said):
    first, second = Counting(), Counting(20.0)
    bank, queries = toy_batches(seed=1, sizes=(60,), first_id=1000), toy_batches(seed=2, sizes=(6, 4))
    banks = {name: embed(one, bank) for name, one in (("a", first), ("b", second))}
    attacks = {"PGD-8": PGD8, "PGD-4": PGD(Linf(4 / 255), step_size=2 / 255, steps=2)}

    def evaluate(run, pairs=None, target="features"):
        return evaluate_transfer(
            {"a": first, "b": second}, banks, queries, attacks, pairs=pairs, target=target, run=run, **FAST
        )

    assert_said(said, evaluate, 10, first, second)
    assert_said(said, lambda run: evaluate(run, [("a", "b")]), 10, first, second)
    forwards, backwards = spent(lambda run: evaluate(run, [("a", "b")], "decision"), first, second)
    evaluate(SHOWN, [("a", "b")], "decision")
    _, most_forwards, most_backwards = said()
    assert 0 < forwards <= 10 * most_forwards and 0 < backwards <= 10 * most_backwards, "images stop where they fall"


def test_a_resumed_transfer_says_what_is_left(tmp_path, toy_batches, monkeypatch):
    monkeypatch.setattr("hsat.eval.announcements.say_cost", (said := []).append)
    encoders = {"a": Counting(), "b": Counting(20.0)}
    loader = toy_batches(seed=2, sizes=(5, 5))
    loader.batch_size = 5
    banks = {name: embed(one, toy_batches(seed=1, sizes=(60,), first_id=1000)) for name, one in encoders.items()}
    run = RunOptions(progress=True, resume_dir=tmp_path / "state")
    for attacks in ({"PGD-8": PGD8}, {"PGD-8": PGD8}, {"PGD-8": PGD8, "PGD-4": PGD8}):
        evaluate_transfer(encoders, banks, loader, attacks, run=run, **FAST)
    assert said[0].seconds > 0 and said[1].seconds == 0 and said[2].seconds > 0
    assert said[0].forwards == said[1].forwards < said[2].forwards


def test_certificates_take_a_pass_per_draw(encoder, toy_batches, said, half_space):
    bank, queries = embed(encoder, toy_batches(seed=1, sizes=(60,), first_id=1000)), toy_batches(seed=2, sizes=(6, 4))
    smoothing = Smoothing(sigma=0.1, selection=5, samples=12)
    state = torch.get_rng_state()

    def evaluate(run):
        return certify(encoder, bank, queries, smoothing, run=run, **FAST)

    assert_said(said, evaluate, 10, encoder)
    assert evaluate(SHOWN).counts.tolist() == evaluate(SILENT).counts.tolist()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [5, 2])
@pytest.mark.parametrize("order", ["attention", "gradient"])
def test_slides_that_hold_out(encoder, toy_batches, said, batch, order):
    """The decision as it is, in a ball in which it never falls; slides of 4 patches go through whole or in pieces."""
    (whole,) = toy_batches(seed=2, sizes=(72,))
    by_slide = torch.argsort(whole.slide, stable=True)
    columns = [column[by_slide] for column in (whole.images, whole.patch, whole.slide, whole.patient, whole.label)]
    loader = type(toy_batches(seed=2, sizes=(1,)))(
        HierarchicalBatch(*(column[at : at + batch] for column in columns)) for at in range(0, 72, batch)
    )
    torch.manual_seed(0)
    mil = MIL(GatedAttention(3, 3, hidden=4), ("cyan", "green", "red"))
    tiny = PGD(Linf(1e-7), step_size=1e-8, steps=3)

    def evaluate(run):
        evaluate_slides(
            encoder,
            loader,
            mil,
            {"PGD": tiny, "restarts": PGD(Linf(1e-7), step_size=1e-8, steps=2, restarts=2)},
            fractions=(0.5, 1.0),
            order=order,
            target="own_decision",
            scoring=Scoring(bootstrap=0),
            run=run,
        )

    forwards, backwards = spent(evaluate, encoder)
    evaluate(SHOWN)
    assert said() == (72, round(forwards / 72), round(backwards / 72))


def test_export_reads_its_files_again(encoder, colour_root, tmp_path, said):
    cohort = read_folders(colour_root).with_split(val_fraction=0.5, seed=0)
    bank = embed(encoder, patch_loader(PatchDataset(cohort, "train"), batch_size=4))
    names = iter("abcd")

    def evaluate(run):
        options = ExportOptions(name="PGD-8", batch_size=3, bootstrap=0)
        attack, classifier = PGD8, FAST["classifier"]
        save_adversarial(
            tmp_path / next(names),
            encoder,
            bank,
            cohort,
            attack,
            options=options,
            classifier=classifier,
            target="features",
            run=run,
        )

    assert_said(said, evaluate, 8, encoder)


def test_a_universal_perturbation(encoder, toy_batches, said):
    loader = toy_batches(seed=1, sizes=(6, 4))
    settings = UniversalPerturbation(threat=Linf(8 / 255), step_size=2 / 255, epochs=3)
    encoder.requires_grad_(False)
    settings.fit(loader, encoder, generator=torch.Generator().manual_seed(0))
    forwards, backwards = encoder.take()
    announce_fit(encoder, loader, epochs=3)
    assert said() == (10, forwards / 10, backwards / 10) == (10, 6, 3)


def test_banks_of_every_evaluation_are_announced(encoder, toy_batches, monkeypatch, caplog):
    monkeypatch.setattr("hsat.eval.announcements.LONG_BANK", 0.0)
    caplog.set_level(logging.INFO, logger="hsat")
    bank, queries = toy_batches(seed=1, sizes=(60,), first_id=1000), toy_batches(seed=2, sizes=(6,))
    smoothing = Smoothing(sigma=0.1, selection=2, samples=2)
    for evaluate in (
        lambda: evaluate_budget(encoder, bank, queries, PGD8, run=SHOWN, **FAST),
        lambda: certify(encoder, bank, queries, smoothing, run=SHOWN, **FAST),
        lambda: evaluate_transfer({"a": encoder}, bank, queries, {"PGD": PGD8}, run=SHOWN, **FAST),
    ):
        caplog.clear()
        evaluate()
        assert caplog.messages[0].startswith("bank of 60 patches: about ")
        assert any(map(LINE.match, caplog.messages[1:]))


def test_an_encoder_without_gradients_is_timed_as_far_as_it_goes(toy_batches, said):
    def encoder(images):
        mean = images.detach().mean((2, 3))
        return torch.cat((40 * (mean - mean.mean(1, keepdim=True)), torch.ones(len(mean), 1)), 1)

    bank, queries = embed(encoder, toy_batches(seed=1, sizes=(60,), first_id=1000)), toy_batches(seed=2, sizes=(6, 4))
    square = Square(Linf(8 / 255), queries=4)
    for target, attack in (("decision", square), ("features", RandomNoise(Linf(8 / 255)))):
        evaluate_budget(encoder, bank, queries, attack, target=target, run=SHOWN, **FAST)
        assert said()[2] == 0


def test_loaders_that_cannot_be_asked_are_left_alone(encoder, toy_batches, caplog):
    """A stream is read once: its passes are stated, its time is not."""
    caplog.set_level(logging.INFO, logger="hsat")
    bank = embed(encoder, toy_batches(seed=1, sizes=(60,), first_id=1000))
    batches = toy_batches(seed=2, sizes=(6, 4))

    class Stream:
        dataset = type(batches).dataset

        def __iter__(self):
            return iter(batches)

    ensemble = AttackEnsemble(Linf(8 / 255), steps=2, decision_steps=2, restarts=1, queries=3)
    result = evaluate_budget(encoder, bank, Stream(), ensemble, run=SHOWN, **FAST)
    assert len(result.clean) == 10
    assert re.fullmatch(r"patches: at most \d+ forward and \d+ backward passes each", caplog.messages[0])
