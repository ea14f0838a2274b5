"""Layers of a frozen model on the CPU: the same function in less time, and the usual one wherever that is not sure."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder, frozen
from hsat.models.constant.convolutions import PackedConvolution, torch_lays_out
from hsat.models.constant.layer import ConstantLayer
from hsat.models.constant.norms import ScalingNorm
from hsat.models.constant.stems import StemConvolution, dense_kernel, image_gradient
from hsat.training import adversarial_step
from hsat.types import HierarchicalBatch

pytestmark = pytest.mark.skipif(not torch_lays_out(), reason="this torch has no oneDNN to lay weights out for")
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch_lays_out() else False
LAST = torch.channels_last


@pytest.fixture
def counted(monkeypatch):
    """How often each faster forward was run."""
    counts = dict.fromkeys((PackedConvolution, StemConvolution, ScalingNorm), 0)
    for kind in counts:

        def run(self, x, kind=kind, real=kind.run):
            counts[kind] += 1
            return real(self, x)

        monkeypatch.setattr(kind, "run", run)
    return counts


def network(*, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 128, 3, 1, 1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def images(n=16, side=16, *, layout=LAST):
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=layout).requires_grad_()


def both(model, x, **how):
    """(output, gradient) of the frozen model on images."""
    with frozen(model, **how):
        y = model(x)
        (gradient,) = torch.autograd.grad(y.float().pow(2).sum(), x)
    return y.detach(), gradient


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_packed_convolutions_give_the_same_bits(data):
    k = data.draw(st.sampled_from([1, 3, 5]))
    stride, padding, dilation = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(0, 2)),
        data.draw(st.integers(1, 2)),
    )
    ic, oc = data.draw(st.sampled_from([(128, 128), (48, 200), (256, 64)]))
    height, width = data.draw(st.integers(9, 12)), data.draw(st.integers(9, 12))
    torch.manual_seed(0)
    conv = nn.Conv2d(ic, oc, k, stride, padding, dilation, bias=data.draw(st.booleans()))
    x = torch.randn(16, ic, height, width).contiguous(memory_format=LAST).requires_grad_()
    with frozen(conv):
        assert isinstance(conv.forward, PackedConvolution) == (ic * oc * k * k >= 2**14)
    plain, packed = both(conv, x, layers="plain"), both(conv, x)
    for wanted, got in zip(plain, packed, strict=True):
        assert torch.equal(wanted, got)
        assert wanted.stride() == got.stride()


@pytest.mark.skipif(not BFLOAT16, reason="this processor does not compute in bfloat16")
def test_packed_convolutions_give_the_same_bits_under_autocast(counted):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, 3, 1, 1)
    x = torch.randn(16, 128, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        plain, packed = both(conv, x, layers="plain"), both(conv, x)
    assert counted[PackedConvolution] == 1
    assert packed[0].dtype == torch.bfloat16 and packed[1].dtype == torch.float32
    assert all(map(torch.equal, plain, packed))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_gradient_of_a_stem_is_one_dense_convolution(data):
    k, stride = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    padding = data.draw(st.integers(0, k - 1))
    size = data.draw(st.integers(k, 17)), data.draw(st.integers(k, 17))
    torch.manual_seed(0)
    weight = torch.randn(5, 3, k, k, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding)
    above = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, above)
    got = image_gradient(above, dense_kernel(weight, stride=stride, padding=padding), size)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_fast_layers_are_the_same_function(counted, layout):
    model, x = network(), images(layout=layout)
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model = model.to(memory_format=layout)
    plain, fast = both(model, x, layers="plain"), both(model, x, layers="fast")
    for wanted, got in zip(plain, fast, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert got.stride() == wanted.stride()
    assert counted == {PackedConvolution: 2 if layout == LAST else 0, StemConvolution: 1, ScalingNorm: 2}


def test_exact_layers_keep_every_bit(counted):
    model, x = network().to(memory_format=LAST), images()
    plain, exact = both(model, x, layers="plain"), both(model, x)
    assert all(map(torch.equal, plain, exact))
    assert counted == {PackedConvolution: 2, StemConvolution: 0, ScalingNorm: 0}


def test_the_training_attack_uses_them(counted):
    encoder = build_encoder("resnet18", embedding_dim=8, seed=0).to(memory_format=LAST).train()
    grid = torch.rand(2, 2, 2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = HierarchicalBatch.from_grid(grid)
    batch = batch.replace(images=batch.images.contiguous(memory_format=LAST))
    attack = PGD(Linf(8 / 255), step_size=4 / 255, steps=1)
    adversarial_step(encoder, HiDiscLoss(), attack, batch).loss.backward()
    assert counted[StemConvolution] == 1 and counted[ScalingNorm] == 20
    assert counted[PackedConvolution] >= 10  # those whose maps have more than one pixel


@pytest.mark.parametrize("layers", ["exact", "fast"])
def test_changed_weights_are_noticed(layers):
    model, x, other = network().to(memory_format=LAST), images(), network(seed=5).to(memory_format=LAST)
    with frozen(model, layers=layers):
        model(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other.eval()(x), rtol=1e-4, atol=1e-6)
        model[3].weight = nn.Parameter(torch.zeros_like(model[3].weight), requires_grad=False)
        model[4].running_mean = torch.zeros(128)
        changed = model(x)
    torch.testing.assert_close(changed, model.eval()(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", ["exact", "fast"])
def test_second_derivatives_go_through(layers):
    model, x = network().to(memory_format=LAST), images(side=8)

    def twice(**how):
        with frozen(model, **how):
            (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
            return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(twice(layers=layers), twice(layers="plain"), rtol=1e-3, atol=1e-6)


def test_copies_and_pickles_of_a_frozen_model_are_usual():
    model, x = network().to(memory_format=LAST), images()
    with frozen(model, layers="fast"):
        model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert not any(isinstance(part.forward, ConstantLayer) for part in twin.modules())
        with torch.no_grad():
            twin[3].weight.zero_()
            twin[3].bias.zero_()
        assert torch.equal(twin.eval()[:4](x), torch.zeros(16, 128, 8, 8))
    assert model.eval()[:4](x).any()


def test_forwards_are_given_back():
    model = network()
    own = model[6].forward = lambda x: x[:, :, ::2, ::2]  # somebody's
    with pytest.raises(KeyError), frozen(model, layers="fast"):
        assert model[6].forward is own
        assert isinstance(model[3].forward, PackedConvolution)
        outer = model[3].forward
        with frozen(model):
            assert model[3].forward is outer
        assert model[3].forward is outer
        raise KeyError
    assert "forward" not in model[3].__dict__ and model[6].forward is own


def test_who_is_left_alone(counted):
    x = images(8)
    for model in (network().double(), network().train()):
        y = model(x.to(model[0].weight.dtype))  # not frozen
        assert y.shape == (8, 128)
    compiled = network()
    compiled._compiled_call_impl = lambda x: x  # as nn.Module.compile leaves it
    with frozen(compiled, layers="fast"):
        assert not any("forward" in part.__dict__ for part in compiled.modules())
    with frozen(network().double(), layers="fast") as _:
        pass
    model = network().to(memory_format=LAST)
    with frozen(model, layers="fast"):
        model[3].weight.requires_grad_(True)  # somebody wants its gradient after all
        model(x).sum().backward()
        assert model[3].weight.grad is not None
        torch.func.vmap(model[:4])(x.detach()[None])
    assert counted[PackedConvolution] <= 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_small_batches_keep_every_bit_on_any_number_of_threads(n, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for conv, side in ((nn.Conv2d(128, 128, 3, padding=1), 6), (nn.Conv2d(256, 64, 1), 4)):
            x = torch.randn(n, conv.in_channels, side, side).contiguous(memory_format=LAST).requires_grad_()
            assert all(map(torch.equal, both(conv, x, layers="plain"), both(conv, x)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(16, 64, 8, 8), (16, 128, 3, 3)])
def test_images_that_do_not_fit_get_the_usual_words(shape):
    conv = nn.Conv2d(128, 128, 5)
    x = torch.randn(shape).contiguous(memory_format=LAST)
    with pytest.raises(RuntimeError) as wanted:
        conv(x)
    with frozen(conv), pytest.raises(RuntimeError) as found:
        conv(x)
    assert str(found.value) == str(wanted.value)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_made_anew_in_each_pass(counted):
    conv = torch.nn.utils.weight_norm(nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(16, 64, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    assert all(map(torch.equal, both(conv, x, layers="plain"), both(conv, x)))
    with frozen(conv), torch.inference_mode():
        assert torch.equal(conv(x), conv.eval()(x))
    other = {name: torch.randn_like(value) for name, value in conv.state_dict().items()}
    with frozen(conv):
        swapped = torch.func.functional_call(conv, other, (x,))
        conv.load_state_dict(other)
        assert torch.equal(swapped, conv(x))
    with frozen(plain := nn.Conv2d(64, 64, 3, bias=False)), pytest.raises(RuntimeError, match="type"):
        torch.func.functional_call(plain, {"weight": plain.weight.double()}, (x,))


@pytest.mark.skipif(not BFLOAT16, reason="this processor does not compute in bfloat16")
def test_a_pass_in_inference_mode_spoils_no_later_gradient(counted):
    conv = nn.Conv2d(128, 128, 3, padding=1)
    x = torch.randn(16, 128, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    with frozen(conv), torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            conv(x)
        (first,) = torch.autograd.grad(conv(x).float().pow(2).sum(), x, create_graph=True)
        assert torch.autograd.grad(first.pow(2).sum(), x)[0].any()
    assert counted[PackedConvolution] == 2


@pytest.mark.skipif(not BFLOAT16, reason="this processor does not compute in bfloat16")
def test_autocast_around_the_backward_pass_alone_changes_nothing(counted):
    model, x = network(), images(4)
    found = []
    for around in (False, True):
        with frozen(model, layers="fast"):
            y = model(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                found += torch.autograd.grad(y.pow(2).sum(), x)
    assert torch.equal(*found)
    assert counted[StemConvolution] == 2


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning")  # torch's own
@pytest.mark.parametrize("layers", ["exact", "fast"])
def test_forward_derivatives_are_left_to_torch(layers):
    model, x = network().to(memory_format=LAST), images()
    found = []
    for how in ("plain", layers):
        with frozen(model, layers=how), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            found.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    assert torch.equal(*found)


def test_layers_are_called_as_ever_and_copies_are_as_fast():
    conv = nn.Conv2d(128, 128, 3)
    x = torch.randn(16, 128, 6, 6).contiguous(memory_format=LAST)
    with frozen(conv):
        assert torch.equal(conv(input=x), conv(x))
        twin = copy.deepcopy(conv)
    with frozen(twin):
        assert isinstance(twin.forward, PackedConvolution)
    assert "forward" not in twin.__dict__


def test_one_model_in_several_threads():
    model, found = network().to(memory_format=LAST), {}
    xs = [images(side=side) for side in (8, 12, 16)]

    def work(name):
        found[name] = [model(x).detach() for _ in range(2) for x in xs]

    with frozen(model):
        threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with frozen(model, layers="plain"):
        work("plain")
    assert len(found) == 4
    assert all(torch.equal(a, b) for each in found.values() for a, b in zip(each, found["plain"], strict=True))


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="'exact', 'fast' or 'plain', got 'quick'"), frozen(network(), layers="quick"):
        pass


@pytest.mark.parametrize("lost", ["_OPERATIONS", "_STATE"])
def test_a_torch_without_a_private_name_computes_as_ever(monkeypatch, counted, lost):
    from hsat.models.constant import convolutions

    monkeypatch.setattr(convolutions, lost, (*getattr(convolutions, lost), "renamed_some_day"))
    model, x = network().to(memory_format=LAST), images()
    assert all(map(torch.equal, both(model, x, layers="plain"), both(model, x, layers="fast")))
    assert not any(counted.values())
