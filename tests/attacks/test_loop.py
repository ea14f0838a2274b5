"""The gradient loop: dead ends, restarts, early stop, order-free noise, float16, and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hsat.attacks import (
    BIM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    PGD,
    Linf,
    RandomNoise,
    classification,
    feature_drift,
    hierarchical,
    objective_from,
)
from hsat.testing import check_feasible
from hsat.types import Attack, HierarchicalBatch, ThreatModel

THREAT = Linf(8 / 255)
PGD5 = PGD(THREAT, step_size=2 / 255, steps=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    return torch.rand(4, 3, 6, 6, generator=seeded(9))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).eval().requires_grad_(False)


def bumpy(v):
    return (v * 40).sin().sum((1, 2, 3))


def test_attacks_and_threat_models_satisfy_their_protocols():
    for attack in (PGD5, FGSM(THREAT), FFGSM(THREAT), RandomNoise(THREAT)):
        assert isinstance(attack, Attack)
    assert isinstance(THREAT, ThreatModel) and isinstance(L2(1.0), ThreatModel)


def test_the_record_of_a_run(x):
    result = PGD5.run(x, bumpy, generator=seeded())
    assert torch.equal(result.x_adv, PGD5(x, bumpy, generator=seeded()))
    assert torch.equal(result.value, bumpy(result.x_adv))
    assert torch.equal(result.start_value, bumpy(THREAT.random_start(x, seeded())))
    assert (result.forwards, result.backwards) == (6, 5)
    assert result.success is None and result.zero_gradient.tolist() == [0] * 4


def test_calling_costs_one_forward_and_backward_per_step_and_nothing_more(x):
    calls = []
    PGD5(x, lambda v: calls.append(v.requires_grad) or bumpy(v), generator=seeded())
    assert calls == [True] * 5


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize(
    "attack", [BIM(THREAT, step_size=2 / 255, steps=5), MIFGSM(THREAT, step_size=2 / 255, steps=5), FGSM(THREAT)]
)
def test_drift_without_a_random_start_does_not_stay_at_its_stationary_point(x, encoder, attack, distance):
    result = attack.run(x, feature_drift(encoder, x, distance), generator=seeded())
    assert result.stationary.all()
    assert ((result.x_adv - x).flatten(1).abs().amax(1) > 1 / 255).all()
    assert (result.value > 0).all()


def test_a_vanishing_gradient_at_the_images_gives_that_image_a_random_start(x):
    """x - x_clean squared is flat at the images; declared nowhere, found by the loop."""
    objective = lambda v: (
        (v[:, :, :3] - x[:, :, :3]).square().sum((1, 2, 3)) * torch.tensor([1.0, 0.0, 1.0, 0.0])
        + (v.sum((1, 2, 3)) * torch.tensor([0.0, 1.0, 0.0, 1.0]))
    )
    result = FGSM(THREAT).run(x, objective, generator=seeded())
    assert result.stationary.tolist() == [True, False, True, False]
    assert (result.x_adv != x).flatten(1).any(1).all()
    assert (result.value[[0, 2]] > 0).all()
    assert (result.forwards, result.backwards) == (3, 2)


def test_zero_gradients_leave_the_image_and_are_counted(x):
    flat = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for attack in (PGD5, MIFGSM(THREAT, step_size=2 / 255, steps=5)):
        result = attack.run(x, lambda v: v.sum((1, 2, 3)) * flat, start=x)
        assert result.zero_gradient.tolist() == [5, 0, 5, 0]
        assert torch.equal(result.x_adv[[0, 2]], x[[0, 2]])
        assert (result.x_adv[[1, 3]] >= x[[1, 3]]).all() and result.x_adv.isfinite().all()


def test_momentum_recovers_after_a_zero_gradient(x):
    """The published MI-FGSM divides zero by zero here and never moves the image again."""
    calls = []

    def objective(v):
        calls.append(1)
        return v.sum((1, 2, 3)) * (0.0 if len(calls) == 1 else 1.0)

    x_adv = MIFGSM(THREAT, step_size=8 / 255, steps=2)(x, objective, start=x)
    assert torch.equal(x_adv, THREAT.project(x + 1, x))


def test_restarts_keep_the_worst_per_image(x):
    single = [PGD5]
    many = PGD(THREAT, step_size=2 / 255, steps=5, restarts=4)
    generator, values = seeded(), []
    for _ in range(4):
        values.append(single[0].run(x, bumpy, generator=generator).value)
    result = many.run(x, bumpy, generator=seeded())
    assert torch.equal(result.value, torch.stack(values).amax(0))
    assert len({int(v) for v in torch.stack(values).argmax(0)}) > 1, "this seed should spread the winners"
    assert torch.equal(bumpy(result.x_adv), result.value)


def test_restarts_of_a_scalar_objective_keep_one_batch_whole(x):
    generator = seeded()
    runs = [PGD5.run(x, lambda v: bumpy(v).sum(), generator=generator) for _ in range(4)]
    best = max(runs, key=lambda r: float(r.value))
    result = PGD(THREAT, step_size=2 / 255, steps=5, restarts=4).run(x, lambda v: bumpy(v).sum(), generator=seeded())
    assert torch.equal(result.x_adv, best.x_adv) and result.value == best.value


def test_success_stops_images_early_and_freezes_them(x):
    seen = []

    def objective(v):
        seen.append(v.detach().clone())
        return v.sum((1, 2, 3))

    limit = x.sum((1, 2, 3)) + torch.tensor([0.0, 1.0, 2.0, 1e9])
    attack = PGD(THREAT, step_size=1 / 255, steps=8, random_start=False)
    result = attack.run(x, objective, success=lambda v: v.sum((1, 2, 3)) >= limit)
    assert result.success.tolist() == [True, True, True, False]
    assert torch.equal(result.x_adv[0], x[0])
    assert all(len(v) == 4 for v in seen), "a plain function always sees the whole batch"
    assert torch.equal(result.x_adv[1], seen[-1][1])
    assert float((result.x_adv[1] - x[1]).max()) < float((result.x_adv[2] - x[2]).max())


def test_restarts_leave_images_alone_that_fell_before(x):
    """Image 0 succeeds in the first restart only; later restarts must not take its adversarial image away."""
    rounds = []

    def success(v):
        rounds.append(1)
        return torch.tensor([len(rounds) == 6, False, False, False])

    attack = PGD(THREAT, step_size=2 / 255, steps=5, restarts=3)
    first = PGD5(x, bumpy, generator=seeded())
    result = attack.run(x, bumpy, generator=seeded(), success=success)
    assert result.success.tolist() == [True, False, False, False]
    assert torch.equal(result.x_adv[0], first[0])


def test_objectives_that_can_be_narrowed_see_the_open_images_only(x):
    labels = torch.tensor([0, 1, 2, 3])
    sizes = []

    def model(v):
        sizes.append(len(v))
        return v.flatten(1)[:, :4] * 10

    whole = PGD5(x, classification(model, labels), generator=seeded())
    assert set(sizes) == {4}
    sizes.clear()
    stopped = torch.tensor([False, True, False, True])
    narrowed = PGD5(x, classification(model, labels), generator=seeded(), success=lambda v: stopped)
    assert set(sizes) == {2}
    assert torch.equal(narrowed[~stopped], whole[~stopped])


def test_ids_make_the_noise_the_images_own_and_advance_no_generator(x):
    generator = seeded(4)
    before = generator.get_state()
    whole = PGD5(x, bumpy, generator=generator, ids=torch.arange(4))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(whole, PGD5(x, bumpy, generator=generator, ids=torch.arange(4)))
    assert not torch.equal(whole, PGD5(x, bumpy, generator=seeded(5), ids=torch.arange(4)))
    assert not torch.equal(whole, PGD5(x, bumpy, generator=seeded(4), ids=torch.arange(1, 5)))
    per_image = Linf(torch.tensor([0.0, 0.01, 0.02, 0.03]))
    noisy = RandomNoise(per_image)(x, bumpy, generator=generator, ids=torch.arange(4))
    part = RandomNoise(per_image.select(torch.tensor([2])))(x[2:3], bumpy, generator=generator, ids=torch.tensor([2]))
    assert torch.equal(noisy[2:3], part) and torch.equal(noisy[0], x[0])


def test_without_a_generator_the_global_one_is_used(x):
    torch.manual_seed(1)
    one = PGD5(x, bumpy)
    torch.manual_seed(1)
    assert torch.equal(one, PGD5(x, bumpy))
    assert not torch.equal(one, PGD5(x, bumpy))


def test_start_is_projected_first(x):
    result = PGD5.run(x, bumpy, start=x + 5)
    assert torch.equal(result.start_value, bumpy(THREAT.project(x + 5, x)))


def test_attacks_work_under_no_grad_and_on_images_made_in_inference_mode(x, encoder):
    expected = PGD5(x, bumpy, generator=seeded())
    with torch.no_grad():
        assert torch.equal(PGD5(x, bumpy, generator=seeded()), expected)
    with torch.inference_mode():
        made = x.clone()
    assert torch.equal(PGD5(made, bumpy, generator=seeded()), expected)


def test_channels_last_images_stay_channels_last(x):
    x = x.contiguous(memory_format=torch.channels_last)
    assert PGD5(x, bumpy, generator=seeded()).is_contiguous(memory_format=torch.channels_last)


def test_a_threat_model_of_the_users_own(x):
    class OnlyBrighter(ThreatModel):
        eps = 0.1

        def random_start(self, x, generator=None):
            return x

        def steepest_ascent(self, grad):
            return grad.clamp(min=0).sign()

        def project(self, x_adv, x):
            return torch.minimum(torch.maximum(x_adv, x), (x + self.eps).clamp(max=1))

    x_adv = PGD(OnlyBrighter(), step_size=0.05, steps=3)(x, bumpy, generator=seeded(), ids=torch.arange(4))
    assert (x_adv >= x).all() and not torch.equal(x_adv, x)


class TinyGradient(nn.Module):
    """A linear layer whose gradient underflows float16 unless the objective is scaled up."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(108, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1.0)

    def forward(self, v):
        return self.layer(v.flatten(1)).squeeze(1) * 3e-6


def test_float16_autocast_scales_the_objective_and_backs_off_on_overflow(x):
    model = TinyGradient().requires_grad_(False)
    huge = lambda v: model(v) * 1e13
    with torch.autocast("cpu", dtype=torch.float16):
        result = PGD5.run(x, lambda v: model(v) * 1e-3, start=x)
        assert (result.zero_gradient == 0).all()
        assert torch.equal(result.x_adv, THREAT.project(x + 1, x))
        with pytest.raises(FloatingPointError):
            PGD5(x, lambda v: huge(v) * 1e20)


def test_float16_images_do_not_lose_small_gradients(x):
    result = PGD5.run(x.half(), lambda v: v.sum((1, 2, 3)) * 1e-8, start=x.half())
    assert (result.zero_gradient == 0).all()


def test_overflow_under_float16_halves_the_scale(x):
    """Slopes of 40 times the first scale exceed 65504; the attack still climbs."""
    x = x.half()
    assert torch.equal(PGD5(x, lambda v: (v * 40).sum((1, 2, 3)), start=x), THREAT.project(x + 1, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threat", [THREAT, L2(0.3)])
def test_every_image_the_objective_is_shown_is_feasible_in_its_own_dtype(x, dtype, threat):
    x, shown = x.to(dtype), []
    attack = PGD(threat, step_size=threat.eps / 3, steps=6)
    attack.run(x, lambda v: shown.append(v.detach()) or bumpy(v), generator=seeded())
    for v in shown:
        check_feasible(v, x, threat)


def test_inference_mode_is_refused_with_a_way_out(x):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        PGD5(x, bumpy)


def test_an_objective_cut_off_from_the_images_is_named(x):
    with pytest.raises(RuntimeError, match="does not depend on the images"):
        PGD5(x, lambda v: bumpy(v.detach()))
    with pytest.raises(RuntimeError, match="does not use the images"):
        PGD5(x, lambda v: torch.ones(4, requires_grad=True) * 2)


@pytest.mark.parametrize("shape", [(4, 1), (3,), (1,), (2, 2)])
def test_objectives_of_another_shape_are_refused(x, shape):
    with pytest.raises(ValueError, match=r"scalar or one value per image, shape \(4,\); got"):
        PGD5(x, lambda v: v.sum() * torch.ones(shape))
    with pytest.raises(TypeError, match="must return a tensor"):
        PGD5(x, lambda v: 1.0)


def test_non_finite_gradients_name_the_images(x):
    def objective(v):
        return (v.sum((1, 2, 3)) - v.detach().sum((1, 2, 3)) * torch.tensor([0.0, 1.0, 0.0, 1.0])).sqrt()

    with pytest.raises(FloatingPointError, match=r"images \[1, 3\] \(2 of 4\)"):
        PGD5(x, objective)


def test_success_needs_values_per_image_and_must_return_bools(x):
    with pytest.raises(ValueError, match="one value per image"):
        PGD5(x, lambda v: bumpy(v).sum(), success=lambda v: torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"success must return \(4,\) bools"):
        PGD5(x, bumpy, success=lambda v: torch.zeros(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": torch.arange(3)}, r"ids must have shape \(4,\)"),
        ({"start": torch.zeros(4, 3, 5, 5)}, r"start must have the shape of the images, \(4, 3, 6, 6\)"),
        ({"start": torch.full((4, 3, 6, 6), torch.nan)}, "start holds NaN"),
    ],
)
def test_bad_ids_and_starts(x, options, message):
    with pytest.raises(ValueError, match=message):
        PGD5(x, bumpy, **options)
    with pytest.raises(TypeError, match="integers"):
        PGD5(x, bumpy, ids=torch.rand(4))


def test_images_must_be_float_batches(x):
    for bad in (x[0], (x * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"\(n, c, h, w\) floats"):
            PGD5(bad, bumpy)


@pytest.mark.parametrize(
    "numbers", [{"steps": 0}, {"steps": 1.5}, {"step_size": -1}, {"step_size": float("nan")}, {"restarts": 0}]
)
def test_impossible_settings_are_refused(numbers):
    with pytest.raises(ValueError, match=f"{next(iter(numbers))} must be"):
        PGD(THREAT, **{"step_size": 0.01, "steps": 3} | numbers)


def test_restarts_without_a_random_start_go_on_from_random_points(x):
    rugged = lambda v: (v * 300).sin().sum((1, 2, 3))
    once = BIM(THREAT, step_size=1 / 255, steps=3).run(x, rugged)
    often = BIM(THREAT, step_size=1 / 255, steps=3, restarts=6).run(x, rugged, generator=seeded())
    assert torch.equal(often.start_value, rugged(x))
    assert (often.value >= once.value).all() and (often.value > once.value).any()


def test_negative_decay_and_missing_threat_models_are_refused():
    with pytest.raises(ValueError, match="decay"):
        MIFGSM(THREAT, step_size=0.01, steps=3, decay=-1.0)
    for make in (FGSM, FFGSM, RandomNoise, lambda eps: PGD(eps, step_size=2 / 255, steps=5)):
        with pytest.raises(TypeError, match=r"threat must be a threat model such as Linf\(8/255\), got 0\.03"):
            make(0.03)


def test_feature_drift_values_reference_and_errors(x, encoder):
    clean, moved = encoder(x), (x + 0.1).clamp(0, 1)
    gap = encoder(moved) - clean
    values = {d: feature_drift(encoder, x, d)(moved) for d in ("cosine", "l2", "l1")}
    torch.testing.assert_close(values["cosine"], 1 - nn.functional.cosine_similarity(encoder(moved), clean))
    torch.testing.assert_close(values["l2"], gap.square().sum(1))
    torch.testing.assert_close(values["l1"], gap.abs().sum(1))
    assert torch.equal(feature_drift(encoder, x, reference=clean)(moved), values["cosine"])
    calls = []
    feature_drift(lambda v: calls.append(1) or encoder(v), x, reference=clean)
    assert not calls, "with a reference the clean images are not embedded again"
    with pytest.raises(ValueError, match="unknown distance 'cos'"):
        feature_drift(encoder, x, "cos")
    with pytest.raises(ValueError, match=r"must be \(4, d\)"):
        feature_drift(encoder, x, reference=clean[:2])
    with pytest.raises(ValueError, match="the reference has"):
        feature_drift(encoder, x, reference=clean[:, :2])(x)


@pytest.mark.parametrize("power", [-100, -30, 0, 70, 120])
def test_the_cosine_drift_has_no_scale(x, encoder, power):
    moved, scale = (x + 0.1).clamp(0, 1), 2.0**power
    drift = feature_drift(lambda v: scale * encoder(v), x)
    assert drift(x).abs().max() < 1e-6
    assert torch.equal(drift(moved), feature_drift(encoder, x)(moved))


def test_hierarchical_and_objective_from_are_plain_functions(x, encoder):
    class Terms:
        def __init__(self, total):
            self.total = total

    batch = HierarchicalBatch(x, *(torch.tensor(ids) for ids in ([0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0])))
    loss = lambda z, b: Terms(z.square().sum() * getattr(b, "levels", b).anchors["patch"])
    expected = encoder(x).square().sum() * 4
    assert torch.equal(hierarchical(encoder, loss, batch)(x), expected)
    assert torch.equal(hierarchical(encoder, loss, batch.levels)(x), expected)
    own = lambda z, b: z.square().sum() * len(b.images)  # a loss of the user's: a plain tensor, and the whole batch
    labelled = lambda z, b: (z[:, 0] * b.label).sum()
    assert torch.equal(hierarchical(encoder, own, batch)(x), expected)
    with_labels = HierarchicalBatch(x, batch.patch, batch.slide, batch.patient, torch.arange(4))
    assert torch.equal(hierarchical(encoder, labelled, with_labels)(x), (encoder(x)[:, 0] * torch.arange(4)).sum())
    target = torch.ones(4, 5)
    assert torch.equal(
        objective_from(encoder, nn.functional.mse_loss, target)(x), nn.functional.mse_loss(encoder(x), target)
    )


def test_importing_attacks_loads_no_heavy_room():
    heavy = "{'torchvision', 'timm', 'faiss', 'lightning', 'sklearn', 'matplotlib'}"
    code = f"import sys, hsat.attacks, hsat.losses, hsat; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_image_that_succeeds_before_the_first_step_stays_and_reports_its_own_start_value(x):
    """Left out of the first gradient, it must not pass for stationary and be moved to a random point."""
    objective = classification(lambda v: v.flatten(1)[:, :4] * 10, torch.arange(4))
    done = torch.tensor([True, False, True, False])
    attack, generator = BIM(THREAT, step_size=2 / 255, steps=3), seeded()
    before = generator.get_state()
    result = attack.run(x, objective, success=lambda v: done, generator=generator)
    assert torch.equal(result.x_adv[done], x[done])
    assert not result.stationary.any() and torch.equal(generator.get_state(), before)
    torch.testing.assert_close(result.start_value, objective(x))
    plain = attack.run(x, lambda v: v.sum((1, 2, 3)) * ~done, success=lambda v: done, generator=generator)
    assert torch.equal(plain.x_adv[done], x[done]) and not plain.stationary.any()


@pytest.mark.parametrize("threat", [THREAT, L2(0.5)], ids=repr)
def test_images_are_checked_once_per_call_and_not_again_for_the_random_start(x, threat, monkeypatch):
    """The check reads the device, and an attack may do so only once."""
    monkeypatch.setattr("hsat.attacks.threat.require_range", lambda *_: pytest.fail("the range was read again"))
    PGD(threat, step_size=0.01, steps=2, restarts=2)(x, bumpy, generator=seeded())


def test_what_a_subclass_of_a_threat_model_changes_is_respected(x):
    class Everywhere(Linf):
        def project(self, x_adv, x):
            return x_adv

    class FromTheMiddle(Linf):
        def random_start(self, x, generator=None):
            return self.project(torch.full_like(x, 0.5), x)

    brighter = lambda v: v.sum((1, 2, 3))
    far = PGD(Everywhere(0.1), step_size=0.1, steps=5, random_start=False)(x, brighter)
    torch.testing.assert_close(far, x + 0.5)
    result = PGD(FromTheMiddle(0.1), step_size=0.1, steps=1).run(x, brighter)
    torch.testing.assert_close(result.start_value, brighter(Linf(0.1).project(torch.full_like(x, 0.5), x)))
