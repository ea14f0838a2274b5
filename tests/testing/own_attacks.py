"""What the tests of wrong attacks share: attacks as users write them, and the names of the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.testing import LAWS, check_attack
from hsat.testing.snapshot import Snapshot
from hsat.types import ThreatModel

FEASIBLE = "feasible in float16, bfloat16, float32 and float64"
CLIMBS = "the objective grows for every image"
NO_EPS = "eps=0 is the identity"
SAME_SEED = "same seed, same bytes"
OTHER_SEED = "another seed, other noise"
IDS = "with ids, batch size and order do not matter"
NO_GRAD = "under no_grad the same images"
ZERO = "a zero gradient gives no NaN"
ERRORS = "the objective's error arrives"
NON_FINITE = "non-finite gradients are refused"
RANGE = "images outside the pixel range are refused"
BATCH = "the objective sees the whole batch, in its dtype"
RESULT = "the result is a new tensor, outside every graph"
START = "start is obeyed"
SUCCESS = "success stops images"
UNTOUCHED = "nothing but the result changes, also when the objective raises"
SETTINGS = "global settings stay, also when the objective raises"
RANDOM_STATES = "global random states stay, also when the objective raises"
RUN = "run and call agree"


@dataclass(frozen=True)
class Own:
    """An attack as a user would write one: `search` gets the images, the objective, and the options as a dict."""

    threat: ThreatModel
    search: Callable

    def __call__(self, x, objective, *, start=None, generator=None, ids=None, success=None):
        return self.search(
            self.threat, x, objective, {"start": start, "generator": generator, "ids": ids, "success": success}
        )


def wrong_attacks():
    """A list of cases (search, law), and a decorator that adds a search to it which breaks this law."""
    cases = []

    def wrong(law):
        def register(search):
            cases.append(pytest.param(search, law, id=search.__name__))
            return search

        return register

    return cases, wrong


def hold(search, law):
    """Check that the attack is caught by this law, told what to change, and that the process is as it was."""
    before = Snapshot(nn.Identity(), {})
    with pytest.raises(AssertionError) as caught:
        check_attack(Own(Linf(8 / 255), search))
    assert f"breaks the law «{law}»" in str(caught.value)
    assert str(caught.value).endswith(LAWS[law].advice)
    assert before.changed_settings() == before.changed_random_states() == []


def pgd(threat, x, objective, options):
    """What the wrong ones are made from: right in every way."""
    return PGD(threat, step_size=2 / 255, steps=3)(x, objective, **options)


def gradient(x, objective):
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    return slope


def one_step(threat, x, slope, *, reach=1.0):
    """x + reach * eps * sign(slope), not projected."""
    eps = torch.as_tensor(threat.eps, dtype=torch.float64)
    eps = eps.view(-1, 1, 1, 1) if eps.ndim == 1 else eps
    return (x.detach().double() + reach * eps * slope.sign().double()).to(x.dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def modules_of(objective):
    return [cell.cell_contents for cell in objective.__closure__ or () if isinstance(cell.cell_contents, nn.Module)]
