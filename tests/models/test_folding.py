"""BatchNorm folded away: the same outputs, nothing of it left, and clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hsat.models import build_encoder, convert_to_dual, fold_batchnorm, wrap_encoder
from hsat.models.dual_norm import BatchNorm


def trained(encoder, side=32):
    """An encoder whose BatchNorm layers have statistics, weights and biases of their own."""
    generator = torch.Generator().manual_seed(3)
    for part in encoder.modules():
        if isinstance(part, BatchNorm):
            for value in (part.running_mean, part.weight.data, part.bias.data):
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
            part.eps = 0.01  # so that forgetting it shows
            part.running_var.mul_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return encoder.eval()


def norms(encoder):
    return [part for part in encoder.modules() if isinstance(part, BatchNorm)]


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
        fold_batchnorm(wrap_encoder(nn.Conv2d(3, 4, 3), norm="none").eval())
    with pytest.raises(ValueError, match="dual BatchNorm has two functions"):
        fold_batchnorm(convert_to_dual(copy.deepcopy(encoder)))
    loose = copy.deepcopy(encoder)
    loose.backbone.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"backbone\.norm keeps no statistics"):
        fold_batchnorm(loose.eval())
    network = Small()

    def closure(x):  # not copied with the encoder
        return network(x)

    outside = wrap_encoder(network, norm="none", features=closure).eval()
    with pytest.raises(ValueError, match="was not run; features= may be a function that holds the original"):
        fold_batchnorm(outside)


def test_a_layer_that_somebody_else_reads_too_is_left_alone():
    encoder, x = trained(wrap_encoder(Peeking(), norm="none")), torch.rand(2, 3, 9, 9)
    encoder.backbone.twice = nn.Identity()
    folded = fold_batchnorm(encoder)
    assert [type(part).__name__ for part in folded.backbone.norm] == ["Scaled"]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), encoder(x))


class TwoWays(Small):
    """The method that gives the features reads what forward, which is traced, does not."""

    def forward_features(self, x):
        x = self.conv(self.first(x))
        return (self.after(self.second(self.norm(x))) + self.twice(x)).mean((2, 3)) + x.mean((2, 3))


def test_a_read_that_the_trace_does_not_show_is_found_by_the_check():
    encoder = trained(wrap_encoder(TwoWays(), norm="none", features="forward_features"))
    with pytest.raises(ValueError, match=r"folding changes the output by .* before its BatchNorm"):
        fold_batchnorm(encoder)


def test_batchnorm_goes_into_every_convolution_of_a_resnet():
    folded = fold_batchnorm(trained(build_encoder("resnet18", embedding_dim=8, seed=0)))
    assert not [name for name, part in folded.named_modules() if type(part).__name__ == "Scaled"]
    assert all(part.bias is not None for part in folded.modules() if isinstance(part, nn.Conv2d))


class Idle(nn.Module):
    """What stands between convolution and BatchNorm may change every value, some of them, or none."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.between, self.norm = nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.between(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize(("between", "absorbed"), [(nn.Identity(), True), (nn.ReLU(inplace=True), False)])
def test_what_stands_between_convolution_and_batchnorm_decides(between, absorbed):
    encoder = trained(wrap_encoder(Idle(between), norm="none"))
    with torch.no_grad():
        encoder.backbone.conv.bias += 9.0  # the ReLU changes no value here, and would elsewhere
    folded = fold_batchnorm(encoder)
    assert [type(part).__name__ for part in folded.backbone.norm.children()] == ([] if absorbed else ["Scaled"])
    x = torch.rand(2, 3, 8, 8) - 40
    with torch.no_grad():
        torch.testing.assert_close(folded(x), encoder(x))


class Written(Small):
    """Changes what the convolution gave in place, in a step of its own."""

    def forward(self, x):
        x = self.conv(self.first(x))
        x.clamp_(min=0)
        return self.twice(self.after(self.second(self.norm(x)))).mean((2, 3))


def test_a_change_in_place_between_convolution_and_batchnorm_is_seen():
    folded = fold_batchnorm(trained(wrap_encoder(Written(), norm="none")))
    assert [type(part).__name__ for part in folded.backbone.norm] == ["Scaled"]
    assert not list(folded.backbone.after.children())


class Deciding(nn.Module):
    """Asks for a value, so that it cannot be traced; its part can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(self.inner(x)))
        return (x if bool((x < 1e9).all()) else -x).mean((2, 3))


def test_what_cannot_be_traced_is_said_and_gives_the_same():
    encoder, x = trained(wrap_encoder(Deciding(), norm="none")), torch.rand(2, 3, 9, 9)
    with pytest.warns(UserWarning, match=r"cannot trace backbone \(.*scale and a shift"):
        folded = fold_batchnorm(encoder)
    assert [type(part).__name__ for part in folded.backbone.norm] == ["Scaled"]
    assert not list(folded.backbone.inner[1].children()) and not norms(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), encoder(x))
