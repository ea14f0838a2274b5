"""BatchNorm folded away: the same outputs, nothing of it left, and clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hsat.models import build_encoder, convert_to_dual, fold_batchnorm, wrap_encoder


def trained(encoder, side=32):
    """An encoder whose BatchNorm layers have statistics, weights and biases of their own."""
    generator = torch.Generator().manual_seed(3)
    for part in encoder.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value in (part.running_mean, part.weight.data, part.bias.data):
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
            part.eps = 0.01  # so that forgetting it shows
            part.running_var.mul_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return encoder.eval()


def norms(encoder):
    return [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


class Small(nn.Module):
    """BatchNorm after a convolution, after an activation in place, in front of everything, and used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)
        self.norm, self.second = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.after, self.twice = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(self.first(x))).relu()
        x = self.after(self.second(x).relu_())
        return self.twice(self.twice(x)).mean((2, 3))


def small():
    return trained(wrap_encoder(Small(), mean=0.5, std=0.25, head=nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))))


@pytest.mark.parametrize("make", ["small", "resnet18", "test_byobnet"])
def test_the_copy_gives_the_same_without_batchnorm(make):
    encoder = small() if make == "small" else trained(build_encoder(make, embedding_dim=8, seed=0))
    before = copy.deepcopy(encoder.state_dict())
    folded, x = fold_batchnorm(encoder), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scale = encoder.features(x).abs().max()
        torch.testing.assert_close(folded.features(x) / scale, encoder.features(x) / scale, atol=1e-5, rtol=0)
        torch.testing.assert_close(folded(x), encoder(x), atol=1e-5, rtol=0)
    assert norms(encoder) and not norms(folded)
    assert folded.batchnorm_folded and not encoder.batchnorm_folded and folded.spec is None
    assert not any(part.training for part in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_gradients_are_the_same():
    encoder, x = small().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    folded = fold_batchnorm(encoder)
    grads = []
    for each in (encoder, folded):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(each(leaf)[:, 0].sum(), leaf)[0])
    torch.testing.assert_close(*grads)
    layers = dict(folded.backbone.named_children())
    assert layers["conv"].bias is not None and list(layers["norm"].children()) == []  # gone into the convolution
    assert [type(part).__name__ for part in layers["after"]] == ["Scaled"]  # what it reads was changed in between


class Peeking(Small):
    """Reads a convolution also in front of its BatchNorm."""

    def forward(self, x):
        x = self.conv(self.first(x))
        return (self.after(self.second(self.norm(x))) + self.twice(x)).mean((2, 3)) + x.mean((2, 3))


def test_what_cannot_be_folded_is_refused():
    encoder = small()
    with pytest.raises(TypeError, match="takes an Encoder, got Conv2d"):
        fold_batchnorm(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"training mode depends on the batch.*call encoder.eval\(\)"):
        fold_batchnorm(copy.deepcopy(encoder).train())
    with pytest.raises(ValueError, match="no BatchNorm to fold"):
        fold_batchnorm(wrap_encoder(nn.Conv2d(3, 4, 3), mean=None, std=None).eval())
    with pytest.raises(ValueError, match="dual BatchNorm has two functions"):
        fold_batchnorm(convert_to_dual(copy.deepcopy(encoder)))
    loose = copy.deepcopy(encoder)
    loose.backbone.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"backbone\.norm keeps no statistics"):
        fold_batchnorm(loose.eval())
    network = Small()

    def closure(x):  # not copied with the encoder
        return network(x)

    outside = wrap_encoder(network, mean=None, std=None, features=closure).eval()
    with pytest.raises(ValueError, match="was not run; features= may be a function that holds the original"):
        fold_batchnorm(outside)


def test_a_layer_that_is_read_before_its_batchnorm_is_found_by_the_check():
    encoder = trained(wrap_encoder(Peeking(), mean=None, std=None))
    encoder.backbone.twice = nn.Identity()
    with pytest.raises(ValueError, match=r"folding changes the output by .* before its BatchNorm"):
        fold_batchnorm(encoder)
