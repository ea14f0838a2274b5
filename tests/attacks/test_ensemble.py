"""The ensemble: never weaker than a member, robust images only are attacked again, every pass is counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import L2, MIFGSM, PGD, AttackEnsemble, EnsembleMember, Linf, feature_drift, margin
from hsat.attacks.ensemble_pass import Candidate
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.testing import DTYPES, check_feasible
from hsat.types import AttackResult, EmbeddingTable

EPS = 2.2 / 255
QUICK = dict(steps=4, step_size=1 / 255, decision_steps=5, restarts=2, queries=6)
SMALL = AttackEnsemble(Linf(EPS), **QUICK)
TARGETS = ["APGD target 1", "APGD target 2", "APGD best target"]
ON_DECISION = ["APGD margin 1", "APGD margin 2", "APGD cross-entropy", "APGD dlr", *TARGETS]
TINT = torch.tensor([[-4.0, 2.0, 2.0], [-2.0, 4.0, -2.0], [4.0, -2.0, -2.0]]) / 255


class Colours(nn.Module):
    """Features: two colour contrasts beside a constant; the embedding mixes them.  Counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.tensor([[2.0, 0.5, 0.3], [0.0, 2.0, 0.3], [-1.0, 1.0, 0.2], [0.0, 0.0, 1.0]])
        self.images = 0

    def features(self, images):
        self.images += len(images)
        mean = images.mean((2, 3)) - 0.5
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((40 * contrast, torch.ones_like(contrast[:, :1])), 1)

    def forward(self, images):
        return nn.functional.normalize(self.features(images) @ self.mix.T, dim=1)


class Stepped(Colours):
    """The same behind a staircase of half grey levels: it sees nearly the same, and has no gradients."""

    def features(self, images):
        return super().features((images * 510).round() / 510 + 0 * images)


def tinted(n: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images with a faint tint of their class, and the classes."""
    label = torch.arange(n) % 3
    noise = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 4 / 255
    return (0.5 + TINT[label][:, :, None, None] + noise).clamp(0, 1), label


X, LABEL = tinted(30, seed=2)
IDS = torch.arange(30) + 100


def decision(encoder: nn.Module, labels: torch.Tensor = LABEL):
    images, label = tinted(90, seed=1)
    index = np.arange(90)
    with torch.no_grad():
        bank = EmbeddingTable(encoder.features(images).numpy(), label.numpy(), index, index, index, tuple("abc"))
    encoder.images = 0
    return margin(DecisionModel(encoder, KNNClassifier(k=15).fit(bank)), labels)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def encoder() -> Colours:
    return Colours()


@pytest.fixture
def result(encoder) -> AttackResult:
    return SMALL.run(X, decision(encoder), generator=seeded(), ids=IDS)


def broken_by(result: AttackResult) -> np.ndarray:
    return np.array(result.broken_by)


def test_it_is_never_weaker_than_a_member(encoder, result):
    objective = decision(encoder)
    for layer in (encoder.features, encoder):
        for kind in (PGD, MIFGSM):
            attack = kind(SMALL.threat, step_size=1 / 255, steps=4, random_start=True)
            alone = attack(X, feature_drift(layer, X), generator=seeded(), ids=IDS)
            wrong = objective.success(alone)
            assert 0 < wrong.sum() < result.success.sum() and not (wrong & ~result.success).any()


def test_what_is_reported_is_who_was_broken(encoder, result):
    objective, by = decision(encoder), broken_by(result)
    np.testing.assert_array_equal(by != "", result.success)
    np.testing.assert_array_equal(by == "clean", objective.success(X))
    np.testing.assert_array_equal(result.value > 0, result.success)
    torch.testing.assert_close(objective(result.x_adv).detach(), result.value)
    names = [member.name for member in result.members]
    drifts = ["PGD features", "PGD embedding", "MIFGSM features", "MIFGSM embedding"]
    assert names == ["clean", *drifts, *ON_DECISION, "Square"]
    robust = len(X)
    for member in result.members:
        assert member.seen == robust and member.newly_broken == (by == member.name).sum()
        robust -= member.newly_broken
    assert robust == (by == "").sum() > 0


def test_images_lie_in_the_ball_and_are_the_ones_that_were_judged(encoder, result):
    check_feasible(result.x_adv, X, SMALL.threat)
    torch.testing.assert_close(encoder.features(result.x_adv), result.embedding)
    np.testing.assert_array_equal(decision(encoder).success(result.x_adv), result.success)
    again = SMALL.run(X, decision(encoder), generator=seeded(), ids=IDS)
    assert torch.equal(again.x_adv, result.x_adv) and again.broken_by == result.broken_by


@pytest.mark.parametrize("known", [False, True])
def test_robust_images_only_are_attacked_and_every_pass_is_counted(encoder, known):
    objective = decision(encoder)
    clean = encoder.features(X) if known else None
    encoder.images = 0
    result = SMALL.run(X, objective, generator=seeded(), ids=IDS, clean=clean)
    assert encoder.images == sum(member.forwards for member in result.members)
    assert result.members[0].forwards == (0 if known else len(X))
    passes = {member.name: member.backwards / max(1, member.seen) for member in result.members}
    assert passes["PGD features"] == 4 and 0 < passes["APGD margin 1"] < 5 and passes["Square"] == 0
    assert passes["APGD margin 2"] == 5  # none breaks there, so none stops before


def test_neither_batches_nor_the_broken_matter(encoder, result):
    parts = []
    for rows in (slice(0, 7), slice(7, 30)):
        parts.append(SMALL.run(X[rows], decision(encoder, LABEL[rows]), generator=seeded(), ids=IDS[rows]))
    assert sum((part.broken_by for part in parts), ()) == result.broken_by
    torch.testing.assert_close(torch.cat([part.x_adv for part in parts]), result.x_adv, atol=1e-6, rtol=0)
    wrong = LABEL.clone()
    wrong[::2] = (wrong[::2] + 1) % 3
    spoilt = SMALL.run(X, decision(encoder, wrong), generator=seeded(), ids=IDS)
    np.testing.assert_array_equal(broken_by(spoilt)[1::2], broken_by(result)[1::2])


def test_candidates_count_as_members_and_cost_nothing(encoder, result):
    pgd = PGD(SMALL.threat, step_size=1 / 255, steps=4)
    larger = PGD(Linf(8 / 255), step_size=2 / 255, steps=4)
    candidates = {}
    for name, attack in (("PGD", pgd), ("PGD-8", larger)):
        x_adv = attack(X, feature_drift(encoder.features, X), generator=seeded(), ids=IDS)
        z = encoder.features(x_adv)
        candidates[name] = Candidate(attack, x_adv, "features", follows_gradient=True, embedding=z)
    both = SMALL.run(X, decision(encoder), generator=seeded(), ids=IDS, candidates=candidates)
    members = {member.name: member for member in both.members}
    assert "PGD" in members and "PGD features" not in members and "PGD-8" not in members
    assert members["PGD"].forwards == members["PGD"].backwards == 0
    assert torch.equal(both.success, result.success)


def test_surrogates_uncover_a_model_without_gradients(encoder):
    masked = Stepped()
    ensemble = AttackEnsemble(Linf(3 / 255), steps=4, step_size=1 / 255, decision_steps=3, restarts=1, queries=4)
    alone = ensemble.run(X, decision(masked), generator=seeded(), ids=IDS)
    helped = dataclasses.replace(ensemble, surrogates={"smooth": encoder})
    found = helped.run(X, decision(masked), generator=seeded(), ids=IDS)
    members = {member.name: member for member in found.members}
    assert members["transfer from smooth"].newly_broken >= 5 and members["transfer from smooth"].black_box
    assert found.success.sum() > alone.success.sum()
    assert (found.zero_gradient > 0).any()
    assert "surrogates" not in repr(helped) and repr(helped) == repr(ensemble)


def test_success_and_start_of_the_caller(encoder):
    everything = SMALL.run(
        X, decision(encoder), generator=seeded(), ids=IDS, success=lambda v: torch.ones(len(v), dtype=torch.bool)
    )
    assert set(everything.broken_by) == {"clean"} and torch.equal(everything.x_adv, X)
    nothing = SMALL.run(
        X, decision(encoder), generator=seeded(), ids=IDS, success=lambda v: torch.zeros(len(v), dtype=torch.bool)
    )
    assert set(nothing.broken_by) == {""} and nothing.value.mean() > nothing.start_value.mean()
    start = SMALL.threat.project(X + 1, X)
    there = Chosen(Linf(EPS), given=(PGD(Linf(EPS), step_size=1e-9, steps=1, random_start=False),))
    moved = there.run(X, decision(encoder), start=start, generator=seeded(), ids=IDS)
    kept = ~moved.success & (moved.value > moved.start_value)
    assert kept.any() and (moved.x_adv - start).abs()[kept].max() < 1e-6


def test_a_model_without_layers_is_attacked_on_its_decision(encoder):
    model = decision(encoder).model
    result = SMALL.run(X, margin(model.forward, LABEL), generator=seeded(), ids=IDS)
    assert [member.name for member in result.members] == ["clean", *ON_DECISION, "Square"]
    assert result.embedding is None and result.success.sum() > decision(encoder).success(X).sum()


def test_a_lost_tie_is_a_wrong_decision(encoder):
    def tied(images):
        return images.flatten(1)[:, :3] * 0  # as a network whose units are all dead

    labels = torch.arange(6) % 3
    result = SMALL.run(X[:6], margin(tied, labels), generator=seeded(), ids=IDS[:6])
    assert result.success.tolist() == (result.value > 0).tolist() == [False, True, True] * 2
    assert result.broken_by == ("", "clean", "clean") * 2


def test_each_image_may_have_a_ball_of_its_own(encoder):
    eps = torch.full((30,), EPS)
    eps[::3] = 0
    result = AttackEnsemble(Linf(eps), **QUICK).run(X, decision(encoder), generator=seeded(), ids=IDS)
    assert torch.equal(result.x_adv[::3], X[::3]) and result.success[1::3].any()


@pytest.mark.parametrize("channels", [False, True])
def test_the_default_step_is_a_quarter_of_each_images_own_eps(encoder, channels):
    """So that an image of a small ball fares as alone, whatever balls the others have."""
    eps = torch.tensor([0.5, 8.0, 2.0]).repeat(2)[:, None, None, None] / 255
    eps = eps * torch.tensor([1.0, 0.5, 2.0])[:, None, None] if channels else eps.flatten()
    options = QUICK | {"step_size": None, "surrogates": {"other": Colours()}}
    whole = AttackEnsemble(Linf(eps), **options).run(
        X[:6], decision(encoder, LABEL[:6]), generator=seeded(), ids=IDS[:6]
    )
    for at in range(3):
        one = slice(at, at + 1)
        alone = AttackEnsemble(Linf(eps[one]), **options)
        result = alone.run(X[one], decision(encoder, LABEL[one]), generator=seeded(), ids=IDS[one])
        torch.testing.assert_close(result.x_adv, whole.x_adv[one], rtol=0, atol=1e-6)
        assert result.broken_by[0] == whole.broken_by[at]
    assert "step_size=eps/4" in whole.members[1].attack and whole.members[1].attack.startswith("PGD(")


@dataclass(frozen=True)
class Shift:
    """An attack that adds a constant to every pixel and says that it followed a gradient, or that it did not."""

    threat: Linf
    by: float
    backwards: int = 1

    def run(self, x, objective, *, start, generator, ids, success, score):
        x_adv, none = (x + self.by).clamp(0, 1), torch.zeros(len(x))
        return AttackResult(x_adv, none, none, none.long(), none.bool(), 1, self.backwards)


@dataclass(frozen=True, repr=False)
class Chosen(AttackEnsemble):
    """An ensemble of given members: attacks on the margin, or (attack, objective, target)."""

    given: tuple = ()

    def members(self, layers=(), classes=None):
        given = (one if isinstance(one, tuple) else (one, "margin", 1) for one in self.given)
        return tuple(
            EnsembleMember(name=str(i), attack=attack, objective=objective, target=target)
            for i, (attack, objective, target) in enumerate(given)
        )


@pytest.mark.parametrize(
    ("shifts", "unmoved"),
    [
        ([(0.0, 1)], True),
        ([(0.0, 1), (1e-7, 1)], False),  # too little to be stronger, but it moved
        ([(0.0, 1), (1e-7, 0)], True),  # what is not led by gradients says nothing about them
        ([(1e-7, 0)], False),
    ],
)
def test_never_moved_means_that_every_gradient_left_it_in_place(encoder, shifts, unmoved):
    members = tuple(Shift(Linf(EPS), by, backwards) for by, backwards in shifts)
    result = Chosen(Linf(EPS), given=members).run(X, decision(encoder), generator=seeded(), ids=IDS)
    right = broken_by(result) != "clean"
    np.testing.assert_array_equal(result.never_moved, right & unmoved)


def test_a_candidate_that_moved_counts(encoder):
    still, moves = (Shift(Linf(EPS), by) for by in (0.0, 1e-7))
    for attack, unmoved in ((still, True), (moves, False)):
        shown = {"other": Candidate(attack, (X + attack.by).clamp(0, 1), "features", follows_gradient=True)}
        chosen = Chosen(Linf(EPS), given=(still,))
        result = chosen.run(X, decision(encoder), generator=seeded(), ids=IDS, candidates=shown)
        assert bool(result.never_moved.all()) == unmoved and bool(result.never_moved.any()) == unmoved


@dataclass(frozen=True)
class Spy(Shift):
    """The same, and it keeps the objectives that it was given."""

    kept: list = dataclasses.field(default_factory=list, compare=False)

    def run(self, x, objective, **options):
        self.kept.append(objective)
        return super().run(x, objective, **options)


def test_targeted_members_aim_at_the_nearest_wrong_classes(encoder):
    objective, spy = decision(encoder), Spy(Linf(EPS), 0.0)
    aims = [(spy, "target", rank) for rank in (1, 2)]
    Chosen(Linf(EPS), given=tuple(aims)).run(X, objective, generator=seeded(), ids=IDS)
    first, second = (kept.target for kept in spy.kept)
    right = ~objective.success(X)
    logits = objective.model(X)[right].detach().scatter(1, LABEL[right][:, None], -torch.inf)
    assert torch.equal(first, logits.argmax(1)) and not (first == second).any() and not (second == LABEL[right]).any()


def test_the_best_target_is_the_class_that_was_come_nearest_to(encoder):
    objective, spy = decision(encoder), Spy(Linf(1.0), 0.0)
    moved = PGD(Linf(1.0), step_size=1 / 255, steps=3)  # without .success, so that images stay right while they can
    clean, right = objective.model(X).detach(), ~objective.success(X)
    result = Chosen(Linf(1.0), given=((moved, "target", 2), (spy, "target", 0))).run(
        X, objective, generator=seeded(), ids=IDS
    )
    (kept,) = spy.kept
    still = torch.tensor([by in ("", "1") for by in result.broken_by])
    assert still.any() and (still <= right).all()
    reached = torch.maximum(_gap(clean, LABEL), _gap(objective.model(result.x_adv).detach(), LABEL))[still]
    assert torch.equal(kept.target, reached.argmax(1))


def _gap(logits, labels):
    return (logits - logits.gather(1, labels[:, None])).scatter(1, labels[:, None], -torch.inf)


def blind_alley(images):
    """Class 1 is nearest and never wins; class 2 wins where all pixels go up, and seems far away."""
    share = (images.mean((1, 2, 3)) - 0.5) / EPS
    return 20 * torch.stack((0 * share, -0.1 - 0.05 * share, -1.5 + 1.6 * share), 1)


def test_a_targeted_member_breaks_what_the_margin_does_not():
    x, labels = torch.full((4, 3, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    ensemble = AttackEnsemble.standard(Linf(EPS), steps=12, queries=8)
    found = ensemble.run(x, margin(blind_alley, labels), generator=seeded(), ids=IDS[:4])
    assert set(found.broken_by) == {"APGD target 2"}
    without = dataclasses.replace(ensemble, targets=0).run(x, margin(blind_alley, labels), generator=seeded())
    assert set(without.broken_by) == {""}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.1)])
def test_images_lie_in_the_ball_in_every_dtype(threat, dtype):
    x = X[:6].to(dtype)
    objective = margin(lambda images: blind_alley(images.float()), torch.zeros(6, dtype=torch.int64))
    result = AttackEnsemble.standard(threat, steps=5, queries=6).run(x, objective, generator=seeded(), ids=IDS[:6])
    assert result.x_adv.dtype == dtype and (result.x_adv != x).any()
    check_feasible(result.x_adv, x, threat)
    assert torch.equal(objective.success(result.x_adv), result.success)


def test_with_two_classes_there_is_one_margin_and_no_target():
    two = margin(lambda images: blind_alley(images)[:, ::2], torch.zeros(2, dtype=torch.int64))
    result = SMALL.run(torch.full((2, 3, 6, 6), 0.5), two, generator=seeded())
    names = [member.name for member in result.members]
    assert names == ["clean", "APGD margin 1", "APGD margin 2", "APGD cross-entropy", "Square"]


def test_standard_is_what_the_constructor_gives():
    threat = Linf(EPS)
    assert AttackEnsemble.standard(threat) == AttackEnsemble(threat)
    helped = AttackEnsemble.standard(threat, steps=5, targets=2, queries=7, surrogates={"other": Colours()})
    assert helped == AttackEnsemble(threat, steps=5, decision_steps=5, targets=2, queries=7)
    assert list(helped.surrogates) == ["other"]
    names = [member.name for member in AttackEnsemble(threat).members(classes=12)]
    assert names[-1] == "Square" and "APGD target 9" in names and "APGD target 10" not in names


def test_refusals():
    with pytest.raises(ValueError, match="targets must be a whole number >= 0, got -1"):
        AttackEnsemble(Linf(EPS), targets=-1)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got 0"):
        AttackEnsemble.standard(Linf(EPS), steps=0)
    with pytest.raises(ValueError, match="restarts must be a whole number >= 1, got 0"):
        AttackEnsemble(Linf(EPS), restarts=0)
    with pytest.raises(TypeError, match="threat must be a threat model"):
        AttackEnsemble(8 / 255)
    with pytest.raises(TypeError, match=r"\['b'\]"):
        AttackEnsemble(L2(1.0), surrogates={"b": 3})
