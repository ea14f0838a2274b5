"""What networks of other people give: maps of any axis order, dicts, tuples, output objects; and their habits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from hsat import embed
from hsat.models import build_encoder, frozen, load_checkpoint, load_encoder, save_encoder, wrap_encoder
from hsat.types import HierarchicalBatch


@dataclass
class ModelOutput:
    """As Hugging Face's models give it."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class Giver(nn.Module):
    """A small network whose output has some form; its maps have 5 channels."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.form = form

    def forward(self, x: Tensor) -> object:
        maps = self.convolution(x)
        pooled = maps.mean((2, 3))
        return {
            "nchw": maps,
            "nhwc": maps.permute(0, 2, 3, 1),
            "dict": {"tokens": maps.flatten(2), "pooled": pooled},
            "tuple": (maps.flatten(2), pooled),
            "object": ModelOutput(maps.flatten(2), pooled),
            "tokens": maps.flatten(2).mT,
        }[self.form]


@pytest.mark.parametrize("size", [(16, 16), (10, 10), (16, 24), (12, 8)])
@pytest.mark.parametrize("form", ["nchw", "nhwc"])
def test_maps_of_either_axis_order_are_averaged_over_height_and_width(form, size):
    """10 pixels give 5 x 5 maps of 5 channels, and unequal sides maps whose shape tells nothing: these are probed."""
    network, x = Giver(form), torch.rand(2, 3, *size)
    encoder = wrap_encoder(network, norm="none").eval()
    torch.testing.assert_close(encoder.features(x), network.convolution(x).mean((2, 3)))


def test_channels_last_maps_of_timm():
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=56, window_size=7).eval()
    encoder, x = wrap_encoder(swin, norm="none", features="forward_features"), torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(x), swin.forward_features(x).mean((1, 2)))


def test_maps_that_cannot_be_told_are_refused():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 4, 4, 4)

    with pytest.raises(ValueError, match=r"axis of channels cannot be told; pass features="):
        wrap_encoder(Fixed(), norm="none").features(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("form", "entry"), [("dict", "pooled"), ("tuple", 1), ("tuple", -1), ("object", "pooler_output")]
)
def test_an_entry_of_the_output_is_picked(form, entry):
    network, x = Giver(form), torch.rand(2, 3, 8, 8)
    encoder = wrap_encoder(network, norm="none", features=entry, head=4)
    torch.testing.assert_close(encoder.features(x), network.convolution(x).mean((2, 3)))
    assert encoder(x).shape == (2, 4)


@pytest.mark.parametrize(
    ("form", "entry", "named"),
    [
        ("dict", None, "'tokens', 'pooled'"),
        ("dict", "pooler", "'tokens', 'pooled'"),
        ("tuple", None, "tuple of 2"),
        ("tuple", 2, "tuple of 2"),
        ("object", None, "ModelOutput"),
        ("tokens", None, "tokens"),
    ],
)
def test_other_outputs_are_refused_with_what_they_hold(form, entry, named):
    with pytest.raises((TypeError, ValueError), match=named):
        wrap_encoder(Giver(form), norm="none", features=entry).features(torch.rand(2, 3, 8, 8))
    with pytest.raises((TypeError, ValueError), match=named):
        wrap_encoder(Giver(form), norm="none", features=entry, head=4)  # the probe names the cause, not a size


def test_a_network_that_works_in_place_leaves_the_images_alone():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(0.5).div_(0.25).mean((2, 3))

    ids, x = torch.arange(4), torch.rand(4, 3, 6, 6)
    batch = HierarchicalBatch(x.clone(), ids, ids, ids, label=ids % 2)
    encoder = wrap_encoder(InPlace(), norm="none")
    tables = [embed(encoder, [batch], class_names=("a", "b")) for _ in range(2)]
    assert torch.equal(batch.images, x)
    assert np.array_equal(tables[0].z, tables[1].z)


def test_a_network_of_inference_mode_is_refused_before_anything_changes():
    with torch.inference_mode():
        network = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match=r"inference_mode\(\) \(its parameter weight was\)"), frozen(network):
        pass
    assert network.training and network.weight.requires_grad


@pytest.mark.parametrize("name", ["mixer_s16_224", "visformer_tiny"])
def test_a_size_that_the_backbone_does_not_take_is_named(name):
    with pytest.raises(ValueError, match=r"failed on 96x96 images and was built for 224x224.*input_size=224"):
        build_encoder(name, seed=0).eval()(torch.rand(1, 3, 96, 96))


def test_a_vit_of_another_size_is_written_and_read(tmp_path):
    encoder = build_encoder("vit_tiny_patch16_224", image_size=32, embedding_dim=4, seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    again = load_encoder(save_encoder(encoder, tmp_path / "vit.safetensors"))
    assert torch.equal(again(x), encoder(x))
    plain = build_encoder("test_resnet", embedding_dim=4, seed=0)
    sized = build_encoder("test_resnet", image_size=32, embedding_dim=4, seed=0)
    assert torch.equal(plain.eval()(x), sized.eval()(x))


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_encoders_write_and_read_plain_names(whole, tmp_path):
    encoder = build_encoder("test_resnet", embedding_dim=4, seed=0).eval()
    plain = save_encoder(encoder, tmp_path / "plain.safetensors")
    other = build_encoder("test_resnet", embedding_dim=4, seed=1).eval()
    if whole:
        other = torch.compile(other, backend="eager")
    else:
        other.backbone = torch.compile(other.backbone, backend="eager")
    load_checkpoint(other, plain)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other(x), encoder(x))
    if not whole:
        assert save_encoder(other, tmp_path / "compiled.safetensors").read_bytes() == plain.read_bytes()


def test_weights_of_old_torch_have_no_counts_of_batches(tmp_path):
    source = build_encoder("test_resnet", head=None, norm="none", seed=0)
    state = {name: value for name, value in source.backbone.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    encoder = build_encoder("test_resnet", head=None, norm="none", weights=tmp_path / "old.pth", seed=1)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(encoder.eval()(x), source.eval()(x))
    assert encoder.weights_report.filled and all("num_batches" in name for name in encoder.weights_report.filled)
    short = dict(list(state.items())[1:])
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="1 missing in the file"):
        build_encoder("test_resnet", head=None, norm="none", weights=tmp_path / "short.pth", seed=1)


def test_arrays_are_no_images():
    encoder = build_encoder("test_resnet", head=None, seed=0)
    with pytest.raises(TypeError, match=r"got ndarray; write torch\.as_tensor"):
        encoder(np.zeros((1, 3, 8, 8), dtype=np.float32))


def test_an_error_that_is_not_about_the_size_stays_what_it_is():
    encoder = build_encoder("test_resnet", head=None, seed=0).eval()
    x = torch.rand(1, 3, 32, 32)
    encoder(x)  # so this size is one that it takes

    def fail(*_):
        raise RuntimeError("a worker has died")

    with (
        encoder.backbone.conv1.register_forward_pre_hook(fail),
        pytest.raises(RuntimeError, match=r"^a worker has died$"),
    ):
        encoder(x)
    fresh = build_encoder("test_resnet", head=None, seed=0).eval()

    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with fresh.backbone.conv1.register_forward_pre_hook(exhaust), pytest.raises(torch.OutOfMemoryError):
        fresh(x)
