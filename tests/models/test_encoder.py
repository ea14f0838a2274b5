from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hsat.models import Encoder, HeadSpec, build_encoder, frozen, wrap_encoder


def tiny(out: int = 5, channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, out)
    )


@settings(max_examples=20, deadline=None)
@given(
    mean=st.lists(st.floats(0.0, 1.0, width=32), min_size=3, max_size=3),
    std=st.lists(st.floats(0.125, 2.0, width=32), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_normalisation_is_the_formula(mean, std, dtype):
    module = tiny().to(dtype)
    x = torch.rand(2, 3, 9, 9, dtype=dtype)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    features = wrap_encoder(module, mean=mean, std=std).features(x)
    torch.testing.assert_close(features, module(by_hand), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_float64_normalisation_uses_the_exact_constants():
    encoder = wrap_encoder(nn.Identity(), mean=0.485, std=0.229, feature_dim=3).double()
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(encoder.features(x), ((x - 0.485) / 0.229).mean((2, 3)), rtol=1e-14, atol=1e-14)


def test_embeddings_are_unit_rows_of_the_head():
    encoder = wrap_encoder(tiny(), head=7, norm="none")
    x = torch.rand(3, 3, 8, 8)
    features = encoder.features(x)
    assert features.shape == (3, encoder.feature_dim) == (3, 5)
    expected = F.normalize(encoder.head.layers[0](features), dim=1)
    torch.testing.assert_close(encoder(x), expected)
    torch.testing.assert_close(encoder(x).norm(dim=1), torch.ones(3))
    assert encoder.embedding_dim == 7


def test_without_a_head_the_features_are_normalised():
    encoder = wrap_encoder(tiny(), norm="none")
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(encoder(x), F.normalize(encoder.features(x), dim=1))
    assert encoder.embedding_dim == encoder.feature_dim == 5


def test_resizing_is_inside_and_differentiable():
    module = tiny()
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    encoder = wrap_encoder(module, mean=0.5, std=0.5, input_size=(6, 12), head=4).double()
    x = torch.rand(1, 3, 10, 7, dtype=torch.float64, requires_grad=True)
    with frozen(encoder):
        assert torch.autograd.gradcheck(lambda v: encoder(v)[0, :2], x)
    assert set(seen) - {torch.Size((1, 3, 6, 12))} == set()


def test_images_of_the_right_size_are_not_touched():
    module = tiny()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(wrap_encoder(module, input_size=8, norm="none").features(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_other_dtypes_meet_a_float32_encoder(dtype):
    encoder = wrap_encoder(tiny(), mean=0.5, std=0.25, input_size=6, head=4)
    x = torch.rand(2, 3, 9, 9, dtype=dtype, requires_grad=True)
    z = encoder(x)
    assert z.dtype == torch.float32
    z[:, 0].sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.abs().sum() > 0
    torch.testing.assert_close(z, encoder(x.float()), atol=1e-6, rtol=1e-5)


def test_half_precision_encoder_gives_float32_unit_rows():
    encoder = wrap_encoder(tiny(), head=4, norm="none").to(torch.bfloat16)
    z = encoder(torch.rand(2, 3, 8, 8))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def test_maps_are_averaged():
    module = nn.Conv2d(3, 6, 3)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(wrap_encoder(module, norm="none").features(x), module(x).mean((2, 3)))


def test_features_by_name_function_method_and_submodule():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = tiny()
            self.classifier = nn.Linear(5, 2)

        def forward(self, x):
            return self.classifier(self.trunk(x))

        def encode(self, x):
            return 2 * self.trunk(x)

    model, x = Model(), torch.rand(2, 3, 8, 8)
    trunk = model.trunk(x)
    assert torch.equal(wrap_encoder(model, norm="none").features(x), model(x))
    assert torch.equal(wrap_encoder(model, features="encode", norm="none").features(x), 2 * trunk)
    assert torch.equal(wrap_encoder(model, features=model.encode, norm="none").features(x), 2 * trunk)
    assert torch.equal(wrap_encoder(model, features=lambda v: 3 * model.trunk(v), norm="none").features(x), 3 * trunk)
    assert torch.equal(wrap_encoder(model, features="trunk", norm="none").features(x), trunk)
    assert wrap_encoder(model, features=model.trunk, norm="none").backbone is model.trunk
    follows = copy.deepcopy(wrap_encoder(model, features=model.encode, norm="none"))
    with torch.no_grad():
        follows.backbone.trunk[0].weight.zero_()
    assert not torch.equal(follows.features(x), 2 * trunk)
    assert torch.equal(model.trunk(x), trunk)


def test_probing_leaves_the_module_and_random_numbers_alone():
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    module[2].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    random = torch.get_rng_state()
    encoder = wrap_encoder(module, norm="none")
    assert encoder.feature_dim == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes


def test_a_module_head_is_measured():
    assert wrap_encoder(tiny(), head=nn.Linear(5, 9), norm="none").embedding_dim == 9


def test_normalisation_is_no_part_of_the_state_dict_but_follows_the_encoder():
    encoder = wrap_encoder(tiny(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), head=3)
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"backbone", "head"}
    assert encoder.to("meta").pixel_mean.device.type == "meta"


def test_copies_and_pickles():
    encoder = build_encoder("test_resnet", embedding_dim=8, seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(encoder)(x), encoder(x))
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(x), encoder(x))


def test_autocast():
    encoder = build_encoder("test_resnet", seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = encoder(torch.rand(2, 3, 32, 32))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


X = torch.zeros(2, 3, 8, 8)
MODULE = tiny()
ERRORS = {
    "integers": (TypeError, "got torch.uint8; divide", lambda: wrap_encoder(MODULE, norm="none")(X.byte())),
    "one image": (ValueError, r"write x\[None\]", lambda: wrap_encoder(MODULE, norm="none")(X[0])),
    "channels": (
        ValueError,
        "images have 2 channels, but mean and std have 3",
        lambda: wrap_encoder(MODULE, mean=[0.5] * 3, std=[1] * 3)(X[:, :2]),
    ),
    "tokens": (ValueError, "pass features=", lambda: wrap_encoder(Returns(torch.zeros(2, 7, 5)), norm="none")(X)),
    "dict": (TypeError, "got dict; pass features=", lambda: wrap_encoder(Returns({"z": X}), norm="none")(X)),
    "rows": (
        ValueError,
        r"for 2 images, got \(3, 5\)",
        lambda: wrap_encoder(Returns(torch.zeros(3, 5)), norm="none")(X),
    ),
    "width": (ValueError, "width 5, expected 6", lambda: wrap_encoder(MODULE, feature_dim=6, norm="none")(X)),
    "no std": (ValueError, "std is missing", lambda: wrap_encoder(MODULE, mean=0.5)),
    "no mean": (ValueError, "mean is missing", lambda: wrap_encoder(MODULE, std=0.5, norm="none")),
    "lengths": (ValueError, "mean has 3 values and std has 1", lambda: wrap_encoder(MODULE, mean=[0.5] * 3, std=1)),
    "zero std": (ValueError, "std must be positive", lambda: wrap_encoder(MODULE, mean=0, std=0)),
    "scale": (ValueError, "divide mean and std by 255", lambda: wrap_encoder(MODULE, mean=123.7, std=58.4)),
    "size": (ValueError, "input_size must be", lambda: wrap_encoder(MODULE, input_size=0, norm="none")),
    "no module": (TypeError, "got function; for a function", lambda: wrap_encoder(lambda x: x, norm="none")),
    "no attribute": (
        ValueError,
        "no attribute 'trunk'.*submodules",
        lambda: wrap_encoder(MODULE, features="trunk", norm="none"),
    ),
    "no method": (TypeError, "a bool, not a method", lambda: wrap_encoder(MODULE, features="training", norm="none")),
    "no function": (TypeError, "features must be a name", lambda: wrap_encoder(MODULE, features=3, norm="none")),
    "probe": (ValueError, "tokens", lambda: wrap_encoder(nn.Flatten(2), head=4, norm="none")),
    "two widths": (
        ValueError,
        "head=4 and embedding_dim=5",
        lambda: wrap_encoder(MODULE, head=4, embedding_dim=5, norm="none"),
    ),
    "no head": (ValueError, "embedding_dim=9 needs a head", lambda: wrap_encoder(MODULE, embedding_dim=9, norm="none")),
    "hidden": (
        ValueError,
        "no hidden layers",
        lambda: wrap_encoder(MODULE, head=HeadSpec("linear", hidden=(3,)), norm="none"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    kind, message, call = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_repr_shows_what_happens_to_pixels():
    assert "mean=(0.5,), std=(0.25,), input_size=(8, 8)" in repr(wrap_encoder(MODULE, mean=0.5, std=0.25, input_size=8))


def test_is_a_module():
    assert isinstance(wrap_encoder(MODULE, norm="none"), Encoder) and isinstance(
        wrap_encoder(MODULE, norm="none"), nn.Module
    )
