"""check_attack: wrong attacks are caught by the law they break, right ones pass, and the process is set back."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, replace

import pytest
import torch
from own_attacks import (
    BATCH,
    CLIMBS,
    ERRORS,
    FEASIBLE,
    IDS,
    NO_EPS,
    NO_GRAD,
    NON_FINITE,
    OTHER_SEED,
    RANDOM_STATES,
    RANGE,
    RESULT,
    RUN,
    SAME_SEED,
    SETTINGS,
    START,
    SUCCESS,
    UNTOUCHED,
    ZERO,
    Own,
    gradient,
    hold,
    modules_of,
    one_step,
    pgd,
    seeded,
    wrong_attacks,
)
from torch import nn

from hsat.attacks import BIM, FGSM, L2, MIFGSM, PGD, FittedUniversal, Linf, RandomNoise, worst_case
from hsat.testing import LAWS, check_attack
from hsat.testing.snapshot import Snapshot

WRONG, wrong = wrong_attacks()


# ------------------------------------------------------------------------------------------------- what comes back


@wrong(CLIMBS)
def returns_a_copy_of_its_input(threat, x, objective, options):
    return x.detach().clone()


@wrong(RESULT)
def returns_its_input(threat, x, objective, options):
    return x


@wrong(RESULT)
def returns_a_view_of_its_input(threat, x, objective, options):
    return x.detach()[:]


@wrong(RESULT)
def returns_an_array(threat, x, objective, options):
    return pgd(threat, x, objective, options).numpy()


@wrong(FEASIBLE)
def projects_never(threat, x, objective, options):
    return one_step(threat, x, gradient(x, objective), reach=1.5)


@wrong(FEASIBLE)
def leaves_the_ball_by_a_hundred_thousandth(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    return (x + (x_adv - x) * (1 + 1e-5)).clamp(0, 1).to(x.dtype).detach()


@wrong(FEASIBLE)
def leaves_the_pixel_range(threat, x, objective, options):
    return one_step(threat, x, gradient(x, objective), reach=0.9)


@wrong(FEASIBLE)
def forms_bounds_in_the_dtype_of_the_images(threat, x, objective, options):
    v, eps = x.detach(), torch.as_tensor(threat.eps).to(x.dtype)
    return torch.minimum(torch.maximum(v + gradient(x, objective).sign(), v - eps), v + eps).clamp(0, 1)


@wrong(FEASIBLE)
def returns_one_image(threat, x, objective, options):
    return pgd(threat, x, objective, options)[:1]


@wrong(FEASIBLE)
def returns_float32(threat, x, objective, options):
    return pgd(threat, x, objective, options).float()


@wrong(FEASIBLE)
def returns_nan_for_one_image(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    x_adv[2] = torch.nan
    return x_adv


@wrong(RESULT)
def returns_a_result_on_the_graph_of_its_input(threat, x, objective, options):
    return pgd(threat, x, objective, options) + 0 * x


@wrong(RESULT)
def returns_a_result_on_the_graph_of_the_model(threat, x, objective, options):
    return pgd(threat, x, objective, options) + 0 * next(modules_of(objective)[0].parameters()).sum().to(x.dtype)


@wrong(CLIMBS)
def descends(threat, x, objective, options):
    return pgd(threat, x, lambda v: -objective(v), options)


@wrong(CLIMBS)
def moves_the_first_image_only(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    x_adv[1:] = x[1:].detach()
    return x_adv


@wrong(NO_EPS)
def takes_eps_from_elsewhere(threat, x, objective, options):
    return pgd(Linf(8 / 255), x, objective, options)


@wrong(NO_EPS)
def takes_a_small_eps_from_elsewhere(threat, x, objective, options):
    return PGD(Linf(1 / 255), step_size=1 / 255, steps=1)(x, objective, **options)


@wrong(ZERO)
def divides_by_a_zero_gradient(threat, x, objective, options):
    slope = gradient(x, objective)
    if not bool(slope.isfinite().all()):
        raise FloatingPointError("not finite")
    size = slope.double() / slope.double().abs()
    return threat.project((x.detach().double() + threat.eps * size).to(x.dtype), x.detach())


@wrong(NON_FINITE)
def takes_gradients_that_are_not_finite_for_zero(threat, x, objective, options):
    slope = torch.nan_to_num(gradient(x, objective), 0, 0, 0)
    return threat.project(one_step(threat, x, slope), x.detach())


@wrong(NON_FINITE)
def gives_back_the_images_where_gradients_are_not_finite(threat, x, objective, options):
    try:
        return pgd(threat, x, objective, options)
    except FloatingPointError as error:
        if "on purpose" in str(error):
            raise
        return x.detach().clone()


@wrong(NON_FINITE)
def looks_at_the_gradient_of_the_first_image_only(threat, x, objective, options):
    slope = gradient(x, objective)
    if not bool(slope[0].isfinite().all()):
        raise FloatingPointError("not finite")
    return threat.project(one_step(threat, x, torch.nan_to_num(slope, 0, 0, 0)), x.detach())


@wrong(RANGE)
def accepts_images_of_255(threat, x, objective, options):
    if x.max() > 1:
        return x.detach().clone()
    return pgd(threat, x, objective, options)


@wrong(RANGE)
def clamps_images_below_zero(threat, x, objective, options):
    return pgd(threat, x.detach().clamp(min=0), objective, options)


# ------------------------------------------------------------------------------------------------------------ noise


@wrong(SAME_SEED)
def takes_its_seed_from_the_clock(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "generator": seeded(time.perf_counter_ns() % 2**31)})


counter = itertools.count()


@wrong(SAME_SEED)
def takes_another_seed_in_each_call(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "generator": seeded(next(counter))})


@wrong(SAME_SEED)
def draws_from_an_unseeded_generator_where_none_is_given(threat, x, objective, options):
    generator = torch.Generator()
    generator.seed()
    return pgd(threat, x, objective, {**options, "generator": options["generator"] or generator})


@wrong(OTHER_SEED)
def ignores_the_generator(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "generator": seeded()})


@wrong(OTHER_SEED)
def seeds_torch_and_sets_it_back(threat, x, objective, options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pgd(threat, x, objective, {**options, "generator": None})


@wrong(OTHER_SEED)
def ignores_the_generator_where_ids_are_given(threat, x, objective, options):
    generator = options["generator"] if options["ids"] is None else seeded()
    return pgd(threat, x, objective, {**options, "generator": generator})


@wrong(IDS)
def ignores_ids(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "ids": None})


@wrong(IDS)
def advances_the_generator_where_ids_are_given(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    if options["ids"] is not None and options["generator"] is not None:
        torch.rand(1, generator=options["generator"])
    return x_adv


@wrong(IDS)
def gives_all_ids_the_same_noise(threat, x, objective, options):
    ids = options["ids"]
    return pgd(threat, x, objective, {**options, "ids": None if ids is None else torch.zeros_like(ids)})


@wrong(IDS)
def numbers_images_by_their_place(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "ids": None if options["ids"] is None else torch.arange(len(x))})


@wrong(IDS)
def averages_gradients_over_the_batch(threat, x, objective, options):
    slope = gradient(x, objective)
    if not bool(slope.isfinite().all()):
        raise FloatingPointError("not finite")
    return threat.project(one_step(threat, x, slope.mean(0, keepdim=True).expand_as(x)), x.detach())


@wrong(IDS)
def treats_single_images_in_another_way(threat, x, objective, options):
    steps = 1 if len(x) == 1 else 3
    return PGD(threat, step_size=2 / 255, steps=steps)(x, objective, **options)


# -------------------------------------------------------------------------------------- start, success and objective


@wrong(START)
def ignores_start(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "start": None})


@wrong(START)
def begins_at_start_with_the_first_image_only(threat, x, objective, options):
    start = options["start"]
    if start is not None:
        start = torch.cat((start[:1], x.detach()[1:]))
    return pgd(threat, x, objective, {**options, "start": start})


@wrong(START)
def gives_back_the_start_without_projection(threat, x, objective, options):
    if options["start"] is not None:
        return options["start"].clone()
    return pgd(threat, x, objective, options)


@wrong(SUCCESS)
def ignores_success(threat, x, objective, options):
    return pgd(threat, x, objective, {**options, "success": None})


@wrong(SUCCESS)
def asks_success_and_goes_on(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, {**options, "success": None})
    if options["success"] is not None:
        options["success"](x_adv)
    return x_adv


@wrong(SUCCESS)
def moves_images_that_have_succeeded(threat, x, objective, options):
    success = options["success"]
    together = None if success is None else (lambda v: success(v).all().expand(len(v)))
    return pgd(threat, x, objective, {**options, "success": together})


@wrong(SUCCESS)
def asks_success_about_one_image_after_the_other(threat, x, objective, options):
    success = options["success"]
    apart = None if success is None else (lambda v: torch.cat([success(v[i : i + 1]) for i in range(len(v))]))
    return pgd(threat, x, objective, {**options, "success": apart})


@wrong(ERRORS)
def swallows_errors(threat, x, objective, options):
    try:
        return pgd(threat, x, objective, options)
    except Exception:
        return x.detach().clone()


@wrong(ERRORS)
def swallows_errors_after_the_first_step(threat, x, objective, options):
    x_adv = FGSM(threat)(x, objective, **options)
    with contextlib.suppress(LookupError):
        return pgd(threat, x, objective, options)
    return x_adv


@wrong(ERRORS)
def raises_another_error(threat, x, objective, options):
    try:
        return pgd(threat, x, objective, options)
    except TypeError as error:
        raise RuntimeError("the attack failed") from error


@wrong(ERRORS)
def swallows_errors_of_success(threat, x, objective, options):
    try:
        return pgd(threat, x, objective, options)
    except KeyError:
        return pgd(threat, x, objective, {**options, "success": None})


@wrong(BATCH)
def asks_about_half_batches(threat, x, objective, options):
    return pgd(threat, x, lambda v: torch.cat([objective(half) for half in v.split(2)]), options)


@wrong(BATCH)
def asks_in_float64(threat, x, objective, options):
    return pgd(threat, x, lambda v: objective(v.double()).to(v.dtype), options)


@wrong(NO_GRAD)
def needs_the_callers_grad_mode(threat, x, objective, options):
    if not torch.is_grad_enabled():
        return threat.project(x.detach().clone(), x.detach())
    return pgd(threat, x, objective, options)


# -------------------------------------------------------------------------------------------------------------- tests


def test_what_the_wrong_ones_are_made_from_is_right():
    assert check_attack(Own(Linf(8 / 255), pgd)) == tuple(LAWS)


@pytest.mark.parametrize(("search", "law"), WRONG)
def test_a_wrong_attack_is_caught_by_the_law_it_breaks(search, law):
    hold(search, law)


def test_every_law_has_an_attack_that_breaks_it():
    """Those of side effects are tested in test_watched.py, the other two below."""
    broken = {case.values[1] for case in WRONG}
    assert set(LAWS) - broken == {UNTOUCHED, SETTINGS, RANDOM_STATES, "one eps per image", "run and call agree"}


def test_one_eps_for_all_images_is_caught():
    def search(threat, x, objective, options):
        eps = float(torch.as_tensor(threat.eps, dtype=torch.float64).max())
        return pgd(replace(threat, eps=eps), x, objective, options)

    with pytest.raises(AssertionError, match="one eps per image"):
        check_attack(Own(Linf(8 / 255), search))


def test_a_run_that_differs_from_the_call_is_caught():
    @dataclass(frozen=True)
    class Apart(Own):
        def run(self, x, objective, **options):
            return BIM(self.threat, step_size=2 / 255, steps=1).run(x, objective, **options)

    with pytest.raises(AssertionError, match=RUN):
        check_attack(Apart(Linf(8 / 255), pgd))


def test_attacks_that_ask_no_objective_say_so_and_are_held_to_the_other_laws():
    about_the_objective = {CLIMBS, ERRORS, NON_FINITE, SUCCESS}
    assert set(check_attack(RandomNoise(Linf(8 / 255)))) == set(LAWS) - about_the_objective
    delta = 0.2 * torch.randn(1, 3, 5, 4, generator=seeded(4))
    fitted = FittedUniversal(threat=L2(0.5), delta=delta)
    assert set(check_attack(fitted)) == set(LAWS) - about_the_objective - {START}
    assert check_attack(
        worst_case(FittedUniversal(threat=Linf(0.1), delta=delta), PGD(Linf(0.1), step_size=0.05, steps=3))
    )

    @dataclass(frozen=True)
    class Claims(Own):
        uses_objective = False

    with pytest.raises(AssertionError, match=BATCH):
        check_attack(Claims(Linf(8 / 255), pgd))
    with pytest.raises(AssertionError, match="did not move"):
        check_attack(Claims(Linf(8 / 255), returns_a_copy_of_its_input))


def test_right_attacks_of_users_pass():
    def plain_step(threat, x, objective, options):
        """One step, without any noise, and with nothing for `success` to stop."""
        begin = x.detach() if options["start"] is None else threat.project(options["start"], x.detach())
        slope = gradient(begin, objective)
        if not bool(slope.isfinite().all()):
            raise FloatingPointError("not finite")
        eps = torch.as_tensor(threat.eps, dtype=torch.float64)
        eps = eps.view(-1, 1, 1, 1) if eps.ndim == 1 else eps
        return threat.project((begin.double() + eps * slope.sign().double()).to(x.dtype), x.detach())

    def polished(threat, x, objective, options):
        coarse = PGD(threat, step_size=2 / 255, steps=2)(x, objective, **options)
        return MIFGSM(threat, step_size=1 / 255, steps=2)(x, objective, **{**options, "start": coarse})

    for search in (plain_step, polished):
        assert check_attack(Own(Linf(8 / 255), search)) == tuple(LAWS)


def test_check_attack_takes_attacks_without_a_threat_attribute_and_refuses_unknown_laws():
    inner = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)

    def plain(x, objective, **options):
        return inner(x, objective, **options)

    assert check_attack(plain, threat=inner.threat)
    with pytest.raises(ValueError, match="unknown laws"):
        check_attack(inner, skip=("gravity",))


def test_an_attack_that_fails_is_told_by_the_law_it_failed_in():
    def no_ids(threat, x, objective, options):
        if options["ids"] is not None:
            raise NotImplementedError("no ids here")
        return pgd(threat, x, objective, options)

    with pytest.raises(AssertionError, match=r"other noise.*it raised NotImplementedError: no ids here"):
        check_attack(Own(Linf(8 / 255), no_ids))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)])
def test_the_callers_modes_do_not_matter(mode):
    with mode():
        before = Snapshot(nn.Identity(), {})
        assert check_attack(PGD(Linf(8 / 255), step_size=2 / 255, steps=3)) == tuple(LAWS)
        assert before.changed_settings() == before.changed_random_states() == []


def test_the_default_dtype_of_the_caller_does_not_matter():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert check_attack(PGD(L2(0.5), step_size=0.2, steps=3)) == tuple(LAWS)
    finally:
        torch.set_default_dtype(before)
