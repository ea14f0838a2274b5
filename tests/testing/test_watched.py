"""Side effects of attacks: each is caught by the law it breaks, in whatever call it happens, and is set back."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from own_attacks import RANDOM_STATES, RESULT, SETTINGS, UNTOUCHED, Own, hold, modules_of, pgd, wrong_attacks

from hsat.attacks import Linf
from hsat.testing import check_attack

WRONG, wrong = wrong_attacks()

# ------------------------------------------------------------------------------------------------------ side effects


@wrong(UNTOUCHED)
def writes_its_result_into_its_input(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    x.data.copy_(x_adv)
    return x_adv


@wrong(UNTOUCHED)
def turns_on_gradients_of_its_input(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    x.requires_grad_()
    return x_adv


@wrong(UNTOUCHED)
def projects_the_start_in_place(threat, x, objective, options):
    if options["start"] is not None:
        options["start"].copy_(threat.project(options["start"], x.detach()))
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def sorts_the_ids_in_place(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    if options["ids"] is not None:
        options["ids"].add_(1)
    return x_adv


kept = []


@wrong(UNTOUCHED)
def writes_into_the_images_of_an_earlier_call(threat, x, objective, options):
    for earlier in kept:
        earlier.data.zero_()
    kept[:] = [x]
    return pgd(threat, x, objective, options)


buffers = {}


@wrong(RESULT)
def returns_the_same_memory_in_every_call(threat, x, objective, options):
    x_adv = pgd(threat, x, objective, options)
    return buffers.setdefault((x.shape, x.dtype), torch.empty_like(x_adv)).copy_(x_adv)


@wrong(UNTOUCHED)
def adds_to_the_gradients_of_parameters(threat, x, objective, options):
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        objective(leaf).sum().backward()
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def fills_the_gradient_of_its_input(threat, x, objective, options):
    if x.requires_grad and x.is_leaf:
        with torch.enable_grad():
            (x.grad,) = torch.autograd.grad(objective(x).sum(), x)
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def clears_the_gradients_of_parameters(threat, x, objective, options):
    for module in modules_of(objective):
        module.zero_grad()
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def leaves_the_model_in_train_mode(threat, x, objective, options):
    for module in modules_of(objective):
        module.train()
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def leaves_the_model_in_eval_mode(threat, x, objective, options):
    for module in modules_of(objective):
        module.eval()
    return pgd(threat, x, objective, options)


@wrong(UNTOUCHED)
def leaves_eval_mode_where_the_objective_raises(threat, x, objective, options):
    modes = [(module, module.training) for root in modules_of(objective) for module in root.modules()]
    for module, _ in modes:
        module.training = False
    x_adv = pgd(threat, x, objective, options)
    for module, training in modes:
        module.training = training
    return x_adv


@wrong(UNTOUCHED)
def leaves_parameters_frozen_where_the_objective_raises(threat, x, objective, options):
    flags = [(p, p.requires_grad) for module in modules_of(objective) for p in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    x_adv = pgd(threat, x, objective, options)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
    return x_adv


@wrong(UNTOUCHED)
def counts_its_calls_in_a_buffer(threat, x, objective, options):
    for module in modules_of(objective):
        for buffer in module.buffers():
            buffer.add_(1)
    return pgd(threat, x, objective, options)


@wrong(RANDOM_STATES)
def draws_from_torchs_global_generator(threat, x, objective, options):
    torch.rand(3)
    return pgd(threat, x, objective, {**options, "generator": None})


@wrong(RANDOM_STATES)
def draws_from_numpy(threat, x, objective, options):
    np.random.rand(3)
    return pgd(threat, x, objective, options)


@wrong(RANDOM_STATES)
def seeds_numpy(threat, x, objective, options):
    np.random.seed(0)
    return pgd(threat, x, objective, options)


@wrong(RANDOM_STATES)
def draws_from_python(threat, x, objective, options):
    random.random()
    return pgd(threat, x, objective, options)


@wrong(RANDOM_STATES)
def seeds_torch_and_lets_errors_keep_it(threat, x, objective, options):
    state = torch.get_rng_state()
    torch.manual_seed(1)
    x_adv = pgd(threat, x, objective, options)
    torch.set_rng_state(state)
    return x_adv


def sets(name, change):
    """A wrong attack that changes a setting of the process and leaves it so."""

    def search(threat, x, objective, options):
        x_adv = pgd(threat, x, objective, options)
        change()
        return x_adv

    search.__name__ = name
    return wrong(SETTINGS)(search)


entered = []


def enter(context):
    entered.append(context)  # kept, since some end when they are collected
    context.__enter__()


sets("leaves_gradients_off", lambda: torch.set_grad_enabled(False))
sets("leaves_inference_mode_on", lambda: enter(torch.inference_mode()))
sets("leaves_autocast_on", lambda: enter(torch.autocast("cpu", dtype=torch.bfloat16)))
sets("leaves_anomaly_detection_on", lambda: torch.autograd.set_detect_anomaly(True))
sets("sets_deterministic_algorithms", lambda: torch.use_deterministic_algorithms(True))
sets("sets_cudnn_benchmark", lambda: setattr(torch.backends.cudnn, "benchmark", True))
sets("sets_the_default_dtype", lambda: torch.set_default_dtype(torch.float64))
sets("sets_the_default_device", lambda: torch.set_default_device("meta"))
sets("sets_the_number_of_threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1))
silences_numpy = sets("silences_numpy", lambda: np.seterr(all="ignore"))
sets("silences_warnings", lambda: warnings.simplefilter("ignore"))


@wrong(SETTINGS)
def leaves_gradients_off_where_the_objective_raises(threat, x, objective, options):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    x_adv = pgd(threat, x, objective, options)
    torch.set_grad_enabled(before)
    return x_adv


@pytest.mark.parametrize(("search", "law"), WRONG)
def test_a_wrong_attack_is_caught_by_the_law_it_breaks(search, law):
    hold(search, law)


def test_each_side_effect_is_here():
    assert {case.values[1] for case in WRONG} == {RESULT, UNTOUCHED, SETTINGS, RANDOM_STATES}


def test_a_law_that_is_skipped_is_not_watched_either():
    for search, law in (
        (draws_from_numpy, RANDOM_STATES),
        (adds_to_the_gradients_of_parameters, UNTOUCHED),
        (silences_numpy, SETTINGS),
    ):
        assert law not in check_attack(Own(Linf(8 / 255), search), skip=(law,))


@pytest.mark.gpu
def test_draws_from_the_global_generator_of_a_gpu_are_seen_and_set_back():
    def search(threat, x, objective, options):
        torch.rand(1, device="cuda")
        return pgd(threat, x, objective, options)

    torch.rand(1, device="cuda")
    hold(search, RANDOM_STATES)
