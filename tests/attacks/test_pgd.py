"""PGD in few files, and N-FGSM as its paper writes it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hsat
from hsat.attacks import L2, NFGSM, PGD, Linf, RandomNoise, feature_drift

EPS = 8 / 255
BALL = Linf(EPS)
HOME = str(Path(hsat.__file__).parent)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def weights() -> Tensor:
    return torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(9))


def linear(w: Tensor, v: Tensor) -> Tensor:
    return (v * w).flatten(1).sum(1)


def files_entered(call) -> set[str]:
    """The files of hsat in which a function is called."""
    entered = set()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {str(Path(name).relative_to(HOME)) for name in entered if name.startswith(HOME)}


@pytest.mark.parametrize("threat", [BALL, L2(0.5)], ids=repr)
@pytest.mark.parametrize("ids", [None, torch.arange(4)], ids=["no ids", "ids"])
def test_a_pgd_call_enters_at_most_six_files(threat, ids):
    """Who reads PGD opens these; the objective's own file is not counted."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Flatten()).eval()
    x, generator = images(), torch.Generator().manual_seed(0)
    attack, objective = PGD(threat, step_size=2 / 255, steps=2), feature_drift(net, x)
    entered = files_entered(lambda: attack(x, objective, generator=generator, ids=ids)) - {"attacks/objectives.py"}
    assert entered == {f"attacks/{name}.py" for name in "pgd base loop threat projections initialization".split()}


def test_nfgsm_is_noise_plus_a_step_without_clipping_to_the_ball():
    """x + eta + eps * sign(gradient), eta uniform in 2 eps: known exactly for a linear objective."""
    x, w = 0.3 + 0.4 * images(), weights()
    x_adv = NFGSM(BALL)(x, partial(linear, w), generator=torch.Generator().manual_seed(1))
    eta = x_adv - x - EPS * w.sign()
    assert eta.abs().max() <= 2 * EPS + 1e-6
    assert eta.abs().mean() == pytest.approx(EPS, rel=0.15), "a uniform draw in [-2 eps, 2 eps]"
    assert (x_adv - x).abs().max() > EPS, "clipped to the ball"


def test_nfgsm_reads_the_gradient_at_the_noisy_images():
    x, seen = images(), []

    def objective(v: Tensor) -> Tensor:
        seen.append(v.detach().clone())
        return v.square().flatten(1).sum(1)

    x_adv = NFGSM(BALL, step_size=EPS / 2)(x, objective, generator=torch.Generator().manual_seed(1))
    (start,) = seen
    expected = (start + EPS / 2 * start.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)


@settings(max_examples=12, deadline=None)
@given(eps=st.floats(0, 0.5), noise=st.floats(0, 3), seed=st.integers(0, 99))
def test_nfgsm_reach_holds_exactly_and_the_seed_decides(eps, noise, seed):
    attack, x = NFGSM(Linf(eps), noise=noise), images(seed=seed)
    first, again = (attack(x, partial(linear, weights()), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert ((first.double() - x.double()).abs() <= attack.reach.eps).all()
    assert first.min() >= 0 and first.max() <= 1


def test_nfgsm_noise_by_id_does_not_depend_on_the_batch():
    x, ids = images(), torch.tensor([5, 6, 7, 8])
    call = partial(NFGSM(BALL), objective=partial(linear, weights()))
    whole = call(x, generator=torch.Generator().manual_seed(0), ids=ids)
    part = call(x[1:3], generator=torch.Generator().manual_seed(0), ids=ids[1:3])
    assert torch.equal(whole[1:3], part)


def test_nfgsm_run_gives_the_same_images_and_start_replaces_the_noise():
    x, objective = images(), partial(linear, weights())
    attack = NFGSM(BALL)
    result = attack.run(x, objective, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result.x_adv, attack(x, objective, generator=torch.Generator().manual_seed(1)))
    assert (result.value > result.start_value).all()
    torch.testing.assert_close(attack(x, objective, start=x), (x + EPS * weights().sign()).clamp(0, 1))


def test_the_repr_of_nfgsm_is_its_setting():
    assert eval(repr(NFGSM(BALL, noise=1.0))) == NFGSM(BALL, noise=1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NFGSM(L2(1.0)), TypeError, "defined for Linf balls, got L2"),
        (lambda: NFGSM(Linf(torch.tensor([0.1]))), TypeError, r"one eps for all images, such as Linf\(8/255\)"),
        (lambda: NFGSM(BALL, noise=-1.0), ValueError, "noise must be a finite number >= 0, got -1.0"),
        (lambda: NFGSM(BALL, step_size=float("nan")), ValueError, "step_size must be a finite number >= 0, got nan"),
    ],
)
def test_bad_settings_of_nfgsm_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("attack", [NFGSM(Linf(8 / 255)), RandomNoise(Linf(8 / 255))], ids=repr)
def test_starts_with_nan_and_ids_of_another_form_are_refused_as_everywhere(attack):
    x, objective = images(), partial(linear, weights())
    nan = x.clone()
    nan[1, 0, 2, 2] = torch.nan
    for call in (attack, attack.run):
        with pytest.raises(ValueError, match="start holds NaN"):
            call(x, objective, start=nan)
        for start in (None, x):
            with pytest.raises(ValueError, match=r"ids must have shape \(4,\)"):
                call(x, objective, start=start, ids=torch.arange(9))
            with pytest.raises(TypeError, match="ids must be a tensor of integers"):
                call(x, objective, start=start, ids=torch.rand(4))


def test_nfgsm_refuses_images_out_of_range():
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        NFGSM(BALL)(images() * 255, partial(linear, weights()))
