"""A pass of one image through BatchNorm in train mode: refused with the cause, allowed where there is no BatchNorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder
from hsat.training import accumulated_step, adversarial_step, free_replays, split_batch
from hsat.types import HierarchicalBatch

THREAT = Linf(8 / 255)
ATTACK = PGD(THREAT, step_size=4 / 255, steps=1)
CAUSE = r"BatchNorm \({}.* is in train mode .* 1 image\(s\).*at least two images"


def batch_of(n):
    index = torch.arange(n)
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return HierarchicalBatch(images, index // 2, index // 4, index // 8)


def length(z, batch):
    return z.abs().sum()


def mlp():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attack"])
@pytest.mark.parametrize(
    ("make", "layer"),
    [(mlp, "3"), (lambda: build_encoder("test_resnet", embedding_dim=8, seed=0), "backbone.")],
    ids=["head", "backbone"],
)
def test_batchnorm_names_itself(make, layer, attack):
    model = make().train()
    with pytest.raises(ValueError, match=CAUSE.format(layer)):
        adversarial_step(model, length, attack, batch_of(1))
    with pytest.raises(ValueError, match=CAUSE.format(layer)):
        list(free_replays(model, length, batch_of(1), threat=THREAT, replays=1))
    with pytest.raises(ValueError, match=CAUSE.format(layer)):
        accumulated_step(model, HiDiscLoss(), None, split_batch(batch_of(4), 4))
    assert adversarial_step(model, length, attack, batch_of(2)).loss.isfinite()


def test_one_image_is_enough_where_batchnorm_rests_or_is_absent():
    model = mlp().train()
    model[3].eval()
    assert adversarial_step(model, length, ATTACK, batch_of(1)).loss.isfinite()
    assert adversarial_step(model[:3].train(), length, ATTACK, batch_of(1)).loss.isfinite()


def test_other_errors_of_a_model_are_its_own():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            raise ValueError("only on Mondays")

    with pytest.raises(ValueError, match="only on Mondays"):
        adversarial_step(Refuses().train(), length, None, batch_of(1))


def test_the_hierarchical_loss_of_one_image_says_what_it_needs():
    model = mlp()[:3].train()
    with pytest.raises(ValueError, match=r"the patch term .* at least two images per patch, or set patch=0"):
        adversarial_step(model, HiDiscLoss(), None, batch_of(1))
