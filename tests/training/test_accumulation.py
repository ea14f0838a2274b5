"""Parts of a batch give the loss, the gradients and the BatchNorm statistics that their definition says."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import PGD, Linf, RandomNoise
from hsat.losses import HiDiscLoss
from hsat.models import branch, convert_to_dual
from hsat.training import SplitBatch, accumulated_step, adversarial_step, split_batch
from hsat.types import HierarchicalBatch

LOSS = HiDiscLoss(slide=2.0, temperature=0.5)


def network(*norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), *norm, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*layers).double()


def grid(patients: int = 4) -> HierarchicalBatch:
    images = torch.rand(patients, 2, 1, 2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return HierarchicalBatch.from_grid(images, torch.zeros(patients, dtype=torch.int64))


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


class Shift:
    """A stand-in for an attack whose result does not depend on the other images of the batch."""

    def __call__(self, x, objective, **_):
        return (x + 0.01).clamp(0, 1)

    run = None


@pytest.mark.parametrize("clean_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_loss_and_gradients_are_those_of_the_whole_batch(parts, clean_weight):
    model, batch = network(), grid()
    whole = copy.deepcopy(model)
    wanted = adversarial_step(whole, LOSS, Shift(), batch, clean_weight=clean_weight)
    wanted.loss.backward()
    got = accumulated_step(model, LOSS, Shift(), split_batch(batch, parts), clean_weight=clean_weight)
    torch.testing.assert_close(got.loss, wanted.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-10, atol=1e-12)
    for name in ("clean", "adversarial"):
        assert (getattr(got, name) is None) == (getattr(wanted, name) is None)
    if wanted.adversarial is not None:
        torch.testing.assert_close(list(got.adversarial), [t.detach() for t in wanted.adversarial])
    assert sum(g.abs().sum() for g in gradients(model)) > 0


def test_baseline_scale_and_gradients_that_are_there_already():
    model, batch = network(), grid()
    whole = copy.deepcopy(model)
    adversarial_step(whole, LOSS, None, batch).loss.backward()
    for _ in range(2):
        got = accumulated_step(model, LOSS, None, split_batch(batch, 2), scale=lambda loss: loss * 8)
    assert got.x_adv is None and got.adversarial is None and not got.loss.requires_grad
    torch.testing.assert_close(gradients(model), [16 * g for g in gradients(whole)], rtol=1e-10, atol=1e-12)


def test_each_part_is_attacked_by_itself_with_noise_by_image():
    model, batch = network(), grid()
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    split, ids = split_batch(batch, 2), torch.arange(16)
    options = {"generator": torch.Generator().manual_seed(3)}
    got = accumulated_step(copy.deepcopy(model), LOSS, attack, split, ids=ids, **options)
    alone = [
        adversarial_step(copy.deepcopy(model), LOSS, attack, part, ids=mine, **options).x_adv
        for part, mine in zip(split.parts, ids.split(8), strict=True)
    ]
    assert torch.equal(got.x_adv, torch.cat(alone))
    noise = partial(accumulated_step, model, LOSS, RandomNoise(Linf(8 / 255)), ids=ids, **options)
    assert torch.equal(noise(split).x_adv, noise(split_batch(batch, 4)).x_adv)


def test_dropout_draws_the_same_in_both_passes():
    """Only then is the gradient that of a loss that was computed: its finite difference says so."""
    model, batch = network(nn.Dropout(0.5)), grid()
    weight = model[-1].weight  # its gradient depends on what was dropped; that of the bias would not

    def loss_at(value: float) -> float:
        with torch.no_grad():
            weight[0, 0] = value
        torch.manual_seed(5)
        model.zero_grad()
        return float(accumulated_step(model, LOSS, None, split_batch(batch, 2)).loss)

    at, step = float(weight.detach()[0, 0]), 1e-5
    slope = (loss_at(at + step) - loss_at(at - step)) / (2 * step)
    loss_at(at)
    assert float(weight.grad[0, 0]) == pytest.approx(slope, rel=1e-5)


def test_running_statistics_move_once_by_the_mean_of_the_parts():
    model, batch = network(nn.BatchNorm2d(6)), grid()
    model[1].running_mean.fill_(0.3)
    before = copy.deepcopy(model)
    accumulated_step(model, LOSS, None, split_batch(batch, 2))
    moved = []
    for part in split_batch(batch, 2).parts:
        one = copy.deepcopy(before)
        one(part.images)
        moved.append(one[1])
    for name in ("running_mean", "running_var"):
        mean = (getattr(moved[0], name) + getattr(moved[1], name)) / 2
        torch.testing.assert_close(getattr(model[1], name), mean)
    assert int(model[1].num_batches_tracked) == 1


def test_dual_norm_uses_its_branches():
    batch = grid()
    model = convert_to_dual(network(nn.BatchNorm2d(6)))
    accumulated_step(model, LOSS, Shift(), split_batch(batch, 2))
    normal, pgd = model[1].bn_list
    assert int(normal.num_batches_tracked) == 0 and int(pgd.num_batches_tracked) == 1
    assert normal.weight.grad is None and pgd.weight.grad.abs().sum() > 0
    whole = convert_to_dual(network(nn.BatchNorm2d(6)))
    accumulated_step(whole, LOSS, Shift(), SplitBatch(batch, (batch,)))
    direct = convert_to_dual(network(nn.BatchNorm2d(6)))
    with branch(direct, "pgd"):
        LOSS(direct((batch.images + 0.01).clamp(0, 1)), batch).total.backward()
    torch.testing.assert_close(gradients(whole), gradients(direct), rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_is_refused():
    model, batch = network(), grid(3)
    with pytest.raises(ValueError, match="12 images cannot be split into 5"):
        split_batch(batch, 5)
    with pytest.raises(ValueError, match="hold 8 images and the batch 12"):
        SplitBatch(batch, split_batch(batch, 3).parts[:2])
    with pytest.raises(ValueError, match="eval mode"):
        accumulated_step(model.eval(), LOSS, None, split_batch(batch, 1))
    with pytest.raises(ValueError, match="clean_weight"):
        accumulated_step(model.train(), LOSS, None, split_batch(batch, 1), clean_weight=2.0)


def test_parts_keep_order_ids_and_labels():
    batch = grid()
    split = split_batch(batch, 4)
    assert split.whole is batch
    parts = split.to("cpu").parts
    for name in ("images", "patch", "slide", "patient", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(part.levels.anchors["patch"] == 4 for part in parts)


def test_the_page_on_devices_runs():
    import re
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "devices.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    with torch.random.fork_rng(devices=[]):
        for code in blocks:
            exec(compile(code, str(page), "exec"), {})
