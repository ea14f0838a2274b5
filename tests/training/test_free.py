"""Free training against a loop written from algorithm 1 of arXiv:1904.12843."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import L2, Linf
from hsat.losses import HiDiscLoss
from hsat.models import convert_to_dual
from hsat.training import free_replays
from hsat.types import HierarchicalBatch

BALL, RATE = Linf(8 / 255), 0.05


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8)).double()


def grid(seed: int = 0) -> HierarchicalBatch:
    generator = torch.Generator().manual_seed(seed)
    return HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 6, 6, generator=generator, dtype=torch.float64))


def by_hand(model: nn.Module, batch: HierarchicalBatch, start: Tensor, replays: int) -> list[Tensor]:
    """Parameters and perturbation from the same two gradients, each asked for on its own."""
    x, eps, delta, seen = batch.images, 8 / 255, start - batch.images, []
    for _ in range(replays):
        images = (x + delta).requires_grad_()
        seen.append(images.detach().clone())
        loss = HiDiscLoss()(model(images), batch).total
        of_images, *of_parameters = torch.autograd.grad(loss, [images, *model.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), of_parameters, strict=True):
                parameter.sub_(RATE * gradient)
        delta = (delta + eps * of_images.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return seen


def replayed(model: nn.Module, batch: HierarchicalBatch, **options) -> list[Tensor]:
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=RATE), []
    for result in free_replays(model, HiDiscLoss(), batch, **options):
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        seen.append(result.x_adv)
    return seen


def test_equals_the_algorithm_written_as_a_loop(model):
    batch, other = grid(), copy.deepcopy(model)
    start = BALL.random_start(batch.images, torch.Generator().manual_seed(1))
    ours = replayed(model, batch, threat=BALL, replays=3, start=start)
    theirs = by_hand(other, batch, start, 3)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("threat", [BALL, L2(0.3)], ids=repr)
def test_every_replay_is_feasible_and_seeded(model, threat):
    batch, other = grid(), copy.deepcopy(model)
    seen, again = (
        replayed(m, batch, threat=threat, replays=3, generator=torch.Generator().manual_seed(2)) for m in (model, other)
    )
    for x_adv, same in zip(seen, again, strict=True):
        assert torch.equal(threat.project(x_adv, batch.images), x_adv)
        assert torch.equal(x_adv, same)


def test_step_size_zero_stays_and_a_pass_per_replay_moves_the_statistics(model):
    seen = replayed(model, grid(), threat=BALL, replays=4, step_size=0.0)
    assert all(torch.equal(seen[0], x_adv) for x_adv in seen[1:])
    assert model[1].num_batches_tracked.item() == 4


def test_dual_norm_uses_the_adversarial_branch(model):
    dual = convert_to_dual(model)
    replayed(dual, grid(), threat=BALL, replays=2)
    assert [part.num_batches_tracked.item() for part in dual[1].bn_list] == [0, 2]


def test_replays_raise_the_loss_when_the_model_stands_still(model):
    batch = grid()
    losses = []
    for result in free_replays(
        model, HiDiscLoss(), batch, threat=BALL, replays=6, step_size=2 / 255, start=batch.images
    ):
        result.loss.backward()
        losses.append(result.loss.item())
    assert losses[-1] > losses[0] + 0.1


def test_forgotten_backward_is_named(model):
    replays = free_replays(model, HiDiscLoss(), grid(), threat=BALL, replays=2)
    next(replays)
    with pytest.raises(RuntimeError, match=r"call result\.loss\.backward\(\) on each result"):
        next(replays)


def test_a_gradient_that_is_not_finite_names_its_images(model):
    def broken(z: Tensor, batch: HierarchicalBatch) -> Tensor:
        return (z[3] * torch.inf).sum() + z.sum()

    replays = free_replays(model.train(), broken, grid(), threat=BALL, replays=2)
    with pytest.raises(FloatingPointError, match="not finite for images"):
        for result in replays:
            result.loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replays": 0}, "replays must be a whole number >= 1, got 0"),
        ({"replays": True}, "replays must be a whole number >= 1, got True"),
        ({"replays": 1, "start": torch.zeros(1, 3, 6, 6)}, "start must have the shape of the images"),
    ],
)
def test_bad_options_are_named_at_the_call(model, options, message):
    with pytest.raises(ValueError, match=message):
        free_replays(model, HiDiscLoss(), grid(), threat=BALL, **options)


def test_model_in_eval_mode(model):
    with pytest.raises(ValueError, match=r"Sequential is in eval mode; call \.train\(\)"):
        free_replays(model.eval(), HiDiscLoss(), grid(), threat=BALL, replays=1)
