"""worst_case: the strongest per image, the judge, who is left out, counts, and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hsat.attacks import BIM, FGSM, L2, MIFGSM, PGD, Linf, RandomNoise, classification, feature_drift, worst_case
from hsat.testing import LAWS, check_attack, check_feasible
from hsat.types import Attack, AttackResult

THREAT = Linf(8 / 255)
PGD3 = PGD(THREAT, step_size=3 / 255, steps=3)
MIM3 = MIFGSM(THREAT, step_size=3 / 255, steps=3)
IDS = torch.arange(6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    return torch.rand(6, 3, 5, 4, generator=seeded(9))


def bumpy(v):
    return (v * 200).sin().sum((1, 2, 3))


def make_bumpy(x):
    return lambda v: -(v * 60).cos().sum((1, 2, 3))


@pytest.mark.parametrize(
    "attack",
    [worst_case(PGD3, MIM3), worst_case(FGSM(L2(0.5)), PGD(L2(0.5), step_size=0.2, steps=4, restarts=2))],
    ids=repr,
)
def test_contract(attack):
    assert isinstance(attack, Attack)
    assert check_attack(attack) == tuple(LAWS)


def test_contract_with_an_objective_of_a_parts_own():
    climbs = "the objective grows for every image"  # the other objective may be any
    assert check_attack(worst_case(PGD3, (MIM3, make_bumpy)), skip=(climbs,))


def test_each_image_keeps_its_strongest(x):
    parts = (FGSM(THREAT), PGD3, BIM(THREAT, step_size=3 / 255, steps=3))
    alone = [attack.run(x, bumpy, generator=seeded(), ids=IDS) for attack in parts]
    result = worst_case(*parts).run(x, bumpy, generator=seeded(), ids=IDS)
    values = torch.stack([r.value for r in alone])
    winner = values.argmax(0)
    assert len(set(winner.tolist())) > 1, "this seed should spread the winners"
    assert torch.equal(result.value, values.amax(0))
    assert torch.equal(result.x_adv, torch.stack([r.x_adv for r in alone])[winner, torch.arange(6)])
    assert torch.equal(bumpy(result.x_adv), result.value)
    assert torch.equal(result.start_value, alone[0].start_value)
    assert (result.forwards, result.backwards) == tuple(
        sum(getattr(r, name) for r in alone) for name in ("forwards", "backwards")
    )
    assert result.success is None


def test_zero_gradients_add_up(x):
    flat = lambda v: v.sum((1, 2, 3)) * torch.tensor([0.0, 1, 1, 1, 1, 1])
    result = worst_case(PGD3, MIM3, FGSM(THREAT)).run(x, flat, generator=seeded())
    assert result.zero_gradient.tolist() == [3 + 3 + 1, 0, 0, 0, 0, 0]
    assert result.stationary.tolist() == [True] + [False] * 5  # MI-FGSM and FGSM begin at the images


def test_the_objective_of_the_call_judges(x):
    drift = lambda v: feature_drift(lambda u: u.flatten(1), v)
    both = worst_case(PGD3, (PGD3, drift), (MIM3, make_bumpy))
    result = both.run(x, bumpy, generator=seeded(), ids=IDS)
    alone = [
        PGD3(x, bumpy, generator=seeded(), ids=IDS),
        PGD3(x, drift(x), generator=seeded(), ids=IDS),
        MIM3(x, make_bumpy(x), generator=seeded(), ids=IDS),
    ]
    judged = torch.stack([bumpy(v) for v in alone])
    assert torch.equal(result.value, judged.amax(0))
    assert torch.equal(result.x_adv, torch.stack(alone)[judged.argmax(0), torch.arange(6)])
    assert (result.forwards, result.backwards) == (3 * 4 + 2, 9)
    first = worst_case((PGD3, make_bumpy)).run(x, bumpy, generator=seeded(), ids=IDS)
    assert torch.equal(first.start_value, bumpy(x)) and first.forwards == 4 + 2


def test_a_scalar_objective_keeps_one_batch_whole(x):
    total = lambda v: bumpy(v).sum()
    alone = [a.run(x, total, generator=seeded(), ids=IDS) for a in (FGSM(THREAT), PGD3, MIM3)]
    best = max(alone, key=lambda r: float(r.value))
    result = worst_case(FGSM(THREAT), PGD3, MIM3).run(x, total, generator=seeded(), ids=IDS)
    assert torch.equal(result.x_adv, best.x_adv) and result.value == best.value


class Linear:
    """Three logits that are sums of pixels; counts the images it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, v):
        self.seen.append(len(v))
        return torch.stack([v[:, c].sum((1, 2)) for c in range(3)], 1)


def test_images_that_have_fallen_are_left_out_and_kept(x):
    model, label = Linear(), torch.zeros(6, dtype=torch.int64)
    x = x.clone()
    x[:, 0] = 0.5
    x[:, 1:] = 0.5 - torch.tensor([0.0, 0.01, 0.02, 0.045, 0.055, 0.2])[:, None, None, None]
    success = lambda v: torch.stack([v[:, c].sum((1, 2)) for c in range(3)], 1).argmax(1) != label
    weak, strong = FGSM(Linf(8 / 255)), PGD(Linf(8 / 255), step_size=8 / 255, steps=3, random_start=False)
    first = weak.run(x, classification(model, label), success=success)
    fallen = first.success
    assert 0 < fallen.sum() < 6
    model.seen.clear()
    result = worst_case(weak, strong).run(x, classification(model, label), success=success)
    assert torch.equal(result.x_adv[fallen], first.x_adv[fallen])
    assert set(model.seen) == {6, int((~fallen).sum())}, "the second attack saw the standing images only"
    assert torch.equal(result.success, success(result.x_adv))
    whole = strong.run(x, classification(model, label), success=success)
    assert torch.equal(result.x_adv[~fallen], whole.x_adv[~fallen])
    per_image = Linf(torch.linspace(0.01, 8 / 255, 6))
    mixed = worst_case(weak, strong)
    narrowed = dataclasses.replace(mixed, threat=per_image).run(x, classification(model, label), success=success)
    check_feasible(narrowed.x_adv, x, per_image)
    plain = dataclasses.replace(mixed, threat=per_image).run(
        x, lambda v: classification(model, label)(v) * 1, success=success
    )
    assert torch.equal(narrowed.x_adv, plain.x_adv), "a plain function sees all images, with the same outcome"


def test_success_comes_before_value(x):
    """The first part makes image 0 fall at a low value; the second reaches a higher one without a fall."""

    class Fixed:
        threat = THREAT

        def __init__(self, value, fell):
            self.outcome = value, fell

        def run(self, x, objective, **_):
            n, (value, fell) = len(x), self.outcome
            zeros = torch.zeros(n, dtype=torch.int64)
            return AttackResult(x, torch.full((n,), value), torch.zeros(n), zeros, torch.full((n,), fell), 1, 1)

    never = lambda v: torch.zeros(len(v), dtype=torch.bool)
    low_but_fallen, high = Fixed(1.0, True), Fixed(2.0, False)
    for parts in ((low_but_fallen, high), (high, low_but_fallen)):
        result = worst_case(*parts).run(x, bumpy, success=never)
        assert result.value.tolist() == [1.0] * 6 and result.success.all()


def test_an_attack_that_does_not_report_success_is_asked_about_it(x):
    label = torch.zeros(6, dtype=torch.int64)
    success = lambda v: Linear()(v).argmax(1) != label

    class Silent:
        threat = THREAT

        def run(self, x, objective, **options):
            return dataclasses.replace(PGD3.run(x, objective, **options), success=None)

    result = worst_case(Silent(), MIM3).run(x, classification(Linear(), label), success=success, generator=seeded())
    assert torch.equal(result.success, success(result.x_adv))


def test_nothing_more_is_run_when_all_have_fallen(x):
    result = worst_case(PGD3, MIM3).run(
        x, bumpy, success=lambda v: torch.ones(len(v), dtype=torch.bool), generator=seeded()
    )
    assert result.backwards == 0 and result.success.all()


def test_settings_are_frozen_complete_and_replaceable():
    attack = worst_case(PGD3, MIM3)
    assert eval(repr(attack)) == attack and hash(attack) == hash(eval(repr(attack)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat = Linf(0.1)
    larger = dataclasses.replace(attack, threat=Linf(0.1))
    assert larger == worst_case(*(dataclasses.replace(a, threat=Linf(0.1)) for a in (PGD3, MIM3)))
    assert repr(worst_case(PGD3, (MIM3, make_bumpy))) == f"worst_case({PGD3!r}, ({MIM3!r}, make_bumpy))"
    assert attack.random_start and not worst_case(MIM3).random_start
    assert check_attack(worst_case(RandomNoise(THREAT), PGD3))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "needs at least one attack"),
        ((PGD3, FGSM(Linf(0.1))), ValueError, r"none is the strongest: Linf\(eps=8/255.*and Linf\(eps=0\.1"),
        ((PGD3, FGSM(L2(8 / 255))), ValueError, "none is the strongest"),
        ((lambda x, objective: x,), TypeError, r"must be an attack with \.run and \.threat"),
        (((PGD3, 3),), TypeError, "must be a function of the images that makes it, got 3"),
    ],
)
def test_parts_that_do_not_fit(parts, error, message):
    with pytest.raises(error, match=message):
        worst_case(*parts)
