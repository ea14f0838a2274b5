"""The contract every attack of hsat keeps, as one list of laws that you can hold your own attack against."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsat.testing import probes
from hsat.testing.probes import DTYPES, check_feasible, expect, images
from hsat.testing.watched import BATCH, IDS, RANDOM_STATES, RESULT, SETTINGS, UNTOUCHED, Watched, WatchedLawBroken
from hsat.types import ThreatModel

CLIMBS = "the objective grows for every image"
ERRORS = "the objective's error arrives"
NON_FINITE = "non-finite gradients are refused"
START = "start is obeyed"
SUCCESS = "success stops images"


def _result_is_new(attack: Watched) -> None:
    leaf = images().requires_grad_()
    for x in (images(), leaf, leaf * 1.0):
        for objective in (probes.linear(), probes.Network()):
            attack(x, objective)


def _feasible_in_every_dtype(attack: Watched) -> None:
    for dtype in DTYPES:
        x = images(dtype=dtype)
        check_feasible(attack(x, probes.linear()), x, attack.threat)


def _climbs(attack: Watched) -> None:
    x, objective = images(dtype=torch.float64), probes.linear()
    gain = (objective(attack(x, objective)) - objective(x)).detach()
    expect(bool((gain > 0).all()), f"it did not grow; gains {gain.tolist()}")


def _zero_eps_is_identity(attack: Watched) -> None:
    still = attack.with_eps(0.0)
    if still is not None:
        for dtype in DTYPES:
            x = images(dtype=dtype)
            expect(torch.equal(still(x, probes.linear()), x), f"eps=0 changed {dtype} images")


def _eps_per_image(attack: Watched) -> None:
    x = images(dtype=torch.float32)
    eps = torch.linspace(0, 1, len(x), dtype=torch.float64) * torch.as_tensor(attack.threat.eps).max()
    own = attack.with_eps(eps)
    if own is not None:
        x_adv = own(x, probes.linear())
        check_feasible(x_adv, x, own.threat)
        expect(torch.equal(x_adv[0], x[0]), "the image with eps=0 moved")
        expect(not torch.equal(x_adv[-1], x[-1]), "the image with the largest eps did not move")


def _same_seed_same_bytes(attack: Watched) -> None:
    x, objective = images(), probes.bumpy()
    first, second = (attack(x, objective) for _ in range(2))
    expect(torch.equal(first, second), "two runs from one seed differ")
    state = torch.Generator().manual_seed(5).get_state()
    results = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.set_rng_state(state)
            results.append(attack(x, objective, seed=None))
    expect(torch.equal(*results), "without a generator, two runs from one state of torch's global generator differ")


def _another_seed_other_noise(attack: Watched) -> None:
    x = images()
    if attack.draws_nothing:
        return
    for ids in (None, torch.arange(len(x))):
        first, second = (_noisy(attack, x, seed=seed, ids=ids) for seed in (3, 4))
        given = "" if ids is None else " (with ids)"
        same = torch.equal(first, second) and not torch.equal(first, torch.cat((x, x)))
        expect(not same, f"it moves images that have no gradient, and in the same way for every seed{given}")


def _noisy(attack: Watched, x: Tensor, *, seed: int, ids: Tensor | None) -> Tensor:
    """Where the attack leaves images that have no gradient: twice, so that no point is preferred both times."""
    return torch.cat([attack(x, probes.lottery(sign), seed=seed, ids=ids) for sign in (1.0, -1.0)])


def _order_free_with_ids(attack: Watched) -> None:
    x, ids, objective = images(8), torch.arange(100, 108), probes.curved()
    whole = attack(x, objective, ids=ids)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = attack(x[order], objective, ids=ids[order])
    expect(torch.equal(whole[order], shuffled), "another order of the images gives another perturbation")
    for size in (1, 3):
        parts = [attack(x[i : i + size], objective, ids=ids[i : i + size]) for i in range(0, len(x), size)]
        expect(torch.equal(whole, torch.cat(parts)), f"batches of {size} give other perturbations")
    copies = x[:1].expand(4, 3, 5, 4).clone()
    noisy = _noisy(attack, copies, seed=3, ids=ids[:4]).reshape(2, *copies.shape)
    same = bool((noisy == noisy[:, :1]).all()) and not torch.equal(noisy, torch.stack((copies, copies)))
    expect(attack.draws_nothing or not same, "copies of an image get the same noise under different ids")


def _same_without_gradients(attack: Watched) -> None:
    x, objective = images(), probes.curved()
    first = attack(x, objective)
    with torch.no_grad():
        second = attack(x, objective)
    expect(torch.equal(first, second), "under no_grad it gives other images")


def _zero_gradient_is_no_nan(attack: Watched) -> None:
    for dtype in DTYPES:
        x = images(dtype=dtype)
        check_feasible(attack(x, probes.flat()), x, attack.threat)


def _errors_arrive(attack: Watched) -> None:
    kinds = (RuntimeError, ValueError, FloatingPointError, LookupError, TypeError)
    for error in (kind(f"raised on purpose as {kind.__name__}") for kind in kinds):
        for first in (1, 2):
            objective = probes.Failing(probes.linear(), error, first)
            _expect_error(attack, objective, objective, None)
    success = probes.Failing(nn.Identity(), KeyError("raised on purpose by success"), 1)
    _expect_error(attack, success, probes.linear(), success)


def _expect_error(
    attack: Watched, source: probes.Failing, objective: nn.Module, success: probes.Failing | None
) -> None:
    error = source.error
    try:
        attack(images(), objective, success=success)
    except WatchedLawBroken:
        raise
    except Exception as arrived:
        if not source.raised:
            raise
        same = type(arrived) is type(error) and str(error) in str(arrived)
        expect(same, f"{error!r} was raised, and {arrived!r} arrived")
    else:
        expect(not source.raised, f"{error!r} was raised, and a result came back")


def _refuses_non_finite_gradients(attack: Watched) -> None:
    for only in (None, 1):
        try:
            attack(images(), probes.infinite(only))
        except (FloatingPointError, ValueError, RuntimeError):
            continue
        raise AssertionError(f"those of {'all images' if only is None else 'one image'} went unnoticed")


def _refuses_images_out_of_range(attack: Watched) -> None:
    for x, what in ((images() * 255, "images in 0 ... 255"), (images() - 0.1, "images below 0")):
        try:
            attack(x, probes.linear())
        except ValueError:
            continue
        raise AssertionError(f"{what} were accepted")


def _sees_the_batch(attack: Watched) -> None:
    for dtype in DTYPES:
        attack(images(dtype=dtype), probes.linear())


def _start_is_obeyed(attack: Watched) -> None:
    x = images()
    same = torch.ones(len(x), dtype=torch.bool)
    for kind in ("peak", "bumpy"):
        results = []
        for start in (torch.ones_like(x), torch.zeros_like(x)):
            objective = probes.bumpy() if kind == "bumpy" else probes.peak(attack.threat.project(start, x))
            results.append(attack(x, objective, start=start))
            check_feasible(results[-1], x, attack.threat)
        same &= (results[0] == results[1]).flatten(1).all(1)
    expect(not bool(same.any()), f"images {same.nonzero().flatten().tolist()} end alike from a white and a black start")


def _success_stops(attack: Watched) -> None:
    x, objective = images(), probes.curved()
    alone = attack(x, objective)
    calls, asked = attack.calls, list[Tensor]()
    if calls <= 1:  # one step: nothing to stop
        return
    first = torch.tensor([True, False, True, False])

    def some(v: Tensor) -> Tensor:
        expect(v.shape == x.shape, f"success was asked about {tuple(v.shape)} for images {tuple(x.shape)}")
        asked.append(v.detach().clone())
        return first & ((v - asked[0]).abs().flatten(1).amax(1) < 1e-6)

    result = attack(x, objective, success=some)
    expect(bool(asked), "it was never asked")
    expect(bool(some(result)[first].all()), "images that had succeeded were moved on")
    result = attack(x, objective, success=lambda v: torch.ones(len(v), dtype=torch.bool))
    stopped = attack.calls < calls or not torch.equal(result, alone)
    expect(stopped, f"all images succeeded at once, and the objective was still asked {attack.calls} times")


def _nothing_else_changes(attack: Watched) -> None:
    attack(images().requires_grad_(), probes.Network())
    for first in (1, 2):
        failing = probes.Failing(probes.Network(), RuntimeError("raised on purpose"), first)
        with contextlib.suppress(RuntimeError):
            attack(images().requires_grad_(), failing)


def _run_agrees(attack: Watched) -> None:
    if not hasattr(attack.attack, "run"):
        return
    x, objective = images(), probes.curved()
    run = attack.attack.run  # it may ask the objective for values, also where the attack asks nothing
    by_run = dataclasses.replace(attack, attack=lambda *images, **options: run(*images, **options).x_adv, earlier={})
    expect(torch.equal(attack(x, objective), by_run(x, objective)), "run(...).x_adv is not what the call returns")


@dataclass(frozen=True)
class Law:
    """check: raises AssertionError, saying what was seen.  advice: what to change then."""

    check: Callable[[Watched], None]
    advice: str


_RESTORE = "Change it in a with block or in try ... finally, or leave it to the caller."

LAWS: dict[str, Law] = {
    "feasible in float16, bfloat16, float32 and float64": Law(
        _feasible_in_every_dtype, "Return threat.project(x_adv.to(x.dtype), x) as the very last step."
    ),
    CLIMBS: Law(_climbs, "Attacks maximise; an attack that asks no objective declares uses_objective = False."),
    "eps=0 is the identity": Law(_zero_eps_is_identity, "Take eps from the threat model alone, and project last."),
    "one eps per image": Law(_eps_per_image, "Take eps from the threat model alone; it may be a tensor (n,)."),
    "same seed, same bytes": Law(_same_seed_same_bytes, "Draw from `generator`, or from torch's global one if None."),
    "another seed, other noise": Law(
        _another_seed_other_noise, "Draw from `generator`; an attack that never draws has random_start = False."
    ),
    IDS: Law(
        _order_free_with_ids, "Seed each image's noise by generator.initial_seed() and its id; average no images."
    ),
    "under no_grad the same images": Law(_same_without_gradients, "Compute gradients under torch.enable_grad()."),
    "a zero gradient gives no NaN": Law(_zero_gradient_is_no_nan, "Floor what you divide by."),
    ERRORS: Law(_errors_arrive, "Let exceptions of the objective and of success pass, as they are."),
    "images outside the pixel range are refused": Law(
        _refuses_images_out_of_range, "Raise ValueError, as threat.project(x, x) does."
    ),
    NON_FINITE: Law(_refuses_non_finite_gradients, "Raise FloatingPointError where a gradient is not finite."),
    BATCH: Law(_sees_the_batch, "Ask with iterate.to(x.dtype), for all images of the batch at once."),
    RESULT: Law(_result_is_new, "Return x_adv.detach(), and a clone where it may be the caller's tensor."),
    START: Law(_start_is_obeyed, "Begin at threat.project(start, x) where start is given."),
    SUCCESS: Law(
        _success_stops, "Ask success(iterate) before every step, keep images that succeed, stop after the last."
    ),
    UNTOUCHED: Law(_nothing_else_changes, f"Work on x.detach().clone() and torch.autograd.grad. {_RESTORE}"),
    SETTINGS: Law(_nothing_else_changes, _RESTORE),
    RANDOM_STATES: Law(_nothing_else_changes, "Draw from `generator` and from nothing else."),
    "run and call agree": Law(_run_agrees, "Let __call__ return run(...).x_adv, or both call one function."),
}

_ABOUT_THE_OBJECTIVE = (CLIMBS, ERRORS, NON_FINITE, SUCCESS)
_OF_HSAT_ALONE = (IDS, BATCH, START, SUCCESS)  # other libraries know no ids, and may ask for parts of the batch


def check_attack(attack: Any, *, threat: ThreatModel | None = None, skip: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Hold an attack against every law of LAWS.

    The error says what was seen and what to change.  State of the process that the attack broke is set back.

    Args:
        attack: An hsat attack or your own with the same call, attack(x, objective, *, start, generator, ids, success),
            for images of shape (n, 3, 5, 4).  What it declares about itself decides which laws apply: with
            uses_objective = False (as of RandomNoise) those about objectives do not; with random_start = False no noise
            is expected, and without either no start.  With needs_decision = True (as of attacks of other libraries) the
            objectives are margins of a model of two logits, and the laws about ids, whole batches, start and stopping
            do not apply.
        threat: Its threat model, when it has no `.threat`; its eps must be above zero and its range [0, 1].
        skip: Names of laws that do not apply.  The two laws about eps need an attack and a threat model that are
            dataclasses.

    Returns:
        The names of the laws that were checked.

    Raises:
        AssertionError: Naming the first law that the attack breaks.
        ValueError: For unknown names in `skip`.
    """
    threat = attack.threat if threat is None else threat
    unknown = set(skip) - set(LAWS)
    if unknown:
        raise ValueError(f"unknown laws {sorted(unknown)}; choose from {tuple(LAWS)}")
    needs_decision = bool(getattr(attack, "needs_decision", False))
    skip = (*skip, *_OF_HSAT_ALONE) if needs_decision else skip
    watched = Watched(attack, threat, frozenset(LAWS) - set(skip), needs_decision)
    if not watched.uses_objective:
        skip = (*skip, *_ABOUT_THE_OBJECTIVE, *((START,) if watched.draws_nothing else ()))
    names = tuple(name for name in LAWS if name not in skip)
    for name in names:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                LAWS[name].check(watched)
        except Exception as error:
            law = error.law if isinstance(error, WatchedLawBroken) else name
            seen = str(error) if isinstance(error, AssertionError) else f"it raised {type(error).__name__}: {error}"
            raise AssertionError(f"{attack!r} breaks the law «{law}»: {seen}. {LAWS[law].advice}") from error
    return names
