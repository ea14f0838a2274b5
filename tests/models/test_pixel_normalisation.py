"""Pixel normalisation is stated by the file, by a name, or by the caller; nobody's guess enters a number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hsat.eval.inputs import open_encoder
from hsat.fingerprints import fingerprint_weights
from hsat.models import (
    build_encoder,
    load_checkpoint,
    load_encoder,
    normalisation_of,
    save_encoder,
    standardise_images,
    wrap_encoder,
)
from hsat.models.encoder import Encoder

NAME, IMAGENET = "test_byobnet", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def backbone_file(path, seed=1):
    """A plain state dict of the backbone, of somebody else."""
    torch.save(build_encoder(NAME, head=None, seed=seed).backbone.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"norm": "imagenet"}, IMAGENET),
        ({"norm": "none"}, (None, None)),
        ({"norm": "0.5/0.25"}, ((0.5,), (0.25,))),
        ({"norm": "0.5,0.4,0.3/0.2,0.2,0.1"}, ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))),
        ({"mean": (0.5, 0.5, 0.5), "std": 0.5 * torch.ones(3)}, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    ],
)
def test_every_way_of_stating_it(options, values, tmp_path):
    options = {name: list(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    path = backbone_file(tmp_path / "b.pth")
    for encoder in (
        wrap_encoder(build_encoder(NAME, head=None, seed=1).backbone, **options),
        build_encoder(NAME, head=None, weights=path, **options),
        load_encoder(path, NAME, **options),
    ):
        assert encoder.pixels.values == values
        about = normalisation_of(encoder)
        assert about["stated_by"] == "the caller"
        assert about["mean"] == (None if values[0] is None else list(values[0]))


def test_timm_states_it_for_its_models_only():
    timm_model = build_encoder(NAME, head=None, seed=1).backbone
    cfg = timm_model.pretrained_cfg
    assert wrap_encoder(timm_model, norm="timm").pixels.values == (tuple(cfg["mean"]), tuple(cfg["std"]))
    with pytest.raises(ValueError, match="Flatten is none"):
        wrap_encoder(nn.Flatten(), norm="timm")


def test_where_nobody_states_it_nothing_is_loaded(tmp_path):
    path = backbone_file(tmp_path / "b.pth")
    target = build_encoder(NAME, head=None, seed=2)
    before = [value.clone() for value in target.state_dict().values()]
    for load in (
        lambda: wrap_encoder(target.backbone),
        lambda: load_encoder(path, NAME),
        lambda: build_encoder(NAME, head=None, weights=path),
        lambda: load_checkpoint(target, path),
    ):
        with pytest.raises(ValueError, match=r"norm='imagenet'.*norm='none'"):
            load()
    assert all(torch.equal(*pair) for pair in zip(before, target.state_dict().values(), strict=True))
    assert load_checkpoint(build_encoder(NAME, head=None, norm="none", seed=2), path).loaded == len(before)


def test_our_own_file_states_it_and_is_not_contradicted(tmp_path):
    encoder = build_encoder(NAME, head=None, norm="imagenet", seed=1)
    path = save_encoder(encoder, tmp_path / "e.safetensors")
    again = load_encoder(path)
    assert (again.pixels.values, again.pixels.stated_by) == (IMAGENET, "its file")
    assert load_encoder(path, norm="imagenet").pixels.values == IMAGENET
    with pytest.raises(ValueError, match=r"e\.safetensors states pixels minus mean"):
        load_encoder(path, norm="none")
    for other in (build_encoder(NAME, head=None, seed=2), build_encoder(NAME, head=None, norm="0.5/0.5", seed=2)):
        with pytest.raises(ValueError, match=r"takes pixels minus mean \(0\.485"):
            load_checkpoint(other, path)
    raw = save_encoder(build_encoder(NAME, head=None, seed=1), tmp_path / "raw.safetensors")
    assert load_encoder(raw).pixels.values == (None, None)  # null: trained on pixels as they are


def test_a_name_of_the_paper_states_it():
    assert build_encoder("resnet50_at", head=None, seed=1).pixels.stated_by == "the name resnet50_at"
    assert build_encoder("resnet50", head=None, seed=1).pixels.values == (None, None)


@pytest.mark.parametrize("norm", ["image-net", "0.5", "1,2/", "a/b", "0.5,0.5/0.5", "128/64", "nan/1", "0.5/0"])
def test_bad_statements_are_refused(norm):
    with pytest.raises(ValueError, match=r"norm must be|mean|std"):
        wrap_encoder(nn.Flatten(), norm=norm)


def test_both_forms_at_once_are_refused():
    with pytest.raises(ValueError, match="give one of them"):
        wrap_encoder(nn.Flatten(), norm="none", mean=0.5, std=0.5)


LEAST = (8 / 255) ** 2
"""What is added to the variance of a channel."""


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.5, 2.0), offset=st.floats(-0.2, 0.2), channel=st.integers(0, 2), seed=st.integers(0, 2**31 - 1))
def test_an_image_by_its_own_mean_and_std(gain, offset, channel, seed):
    images = torch.rand(3, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = standardise_images(images)
    torch.testing.assert_close(found, F.instance_norm(images, eps=LEAST), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], standardise_images(images[1:2])[0], rtol=1e-12, atol=1e-12)
    stained = images.clone()
    stained[:, channel] = gain * stained[:, channel] + offset
    variance = images.var((2, 3), correction=0)[:, channel, None, None]
    factor = gain * ((variance + LEAST) / (gain**2 * variance + LEAST)).sqrt()  # 1 but for what is added
    torch.testing.assert_close(standardise_images(stained)[:, channel], factor * found[:, channel])
    assert bool((factor - 1).abs().max() < 0.1)


def test_what_is_blank_is_not_blown_up_and_gradients_are_right():
    blank = torch.full((1, 3, 8, 8), 0.9)
    assert standardise_images(blank).abs().max() < 1e-5
    speck = blank + torch.randn(blank.shape, generator=torch.Generator().manual_seed(0)) / 255
    assert standardise_images(speck).std() < 0.2  # with a tiny eps it would be 1
    images = torch.rand(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardise_images, images)


def test_the_encoder_standardises_its_file_says_so_and_nobody_contradicts(tmp_path):
    encoder = build_encoder(NAME, head=None, norm="image", seed=1).eval()
    raw = build_encoder(NAME, head=None, norm="none", seed=1).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder.features(images), raw.features(standardise_images(images)))
    assert fingerprint_weights(encoder) != fingerprint_weights(raw)
    path = save_encoder(encoder, tmp_path / "e.safetensors")
    for again in (load_encoder(path), load_encoder(path, NAME), load_encoder(path, norm="image")):
        assert torch.equal(again(images), encoder(images))
        assert normalisation_of(again)["per_image"] is True
        assert "its own mean" in str(again.pixels)
    with pytest.raises(ValueError, match="its own mean"):
        load_encoder(path, norm="none")
    with pytest.raises(ValueError, match="its own mean"):
        load_checkpoint(raw, path)
    with pytest.raises(ValueError, match="its own mean"):
        load_checkpoint(encoder, save_encoder(raw, tmp_path / "raw.safetensors"))
    with pytest.raises(ValueError, match="leave mean and std out"):
        Encoder(nn.Flatten(), mean=0.5, std=0.5, per_image=True)


def test_a_stranger_s_weights_for_standardised_images(tmp_path):
    path = backbone_file(tmp_path / "b.pth")
    encoder = load_encoder(path, NAME, norm="image")
    assert encoder.pixels.per_image
    assert encoder.pixels.stated_by == "the caller"
    own = wrap_encoder(encoder.backbone, norm="image")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(own.eval().features(images), encoder.features(images))


def test_a_function_gets_normalised_images_at_the_front_door():
    images = torch.rand(2, 3, 8, 8)
    found = open_encoder(lambda x: x.flatten(1), norm="image", name="own")
    assert torch.equal(found.encoder(images), standardise_images(images).flatten(1))
    assert "its own mean" in found.note
    found = open_encoder(lambda x: x, norm="0.5,0.25,0/0.5,1,2", name="own")
    wanted = torch.stack([(images[:, 0] - 0.5) / 0.5, images[:, 1] - 0.25, images[:, 2] / 2], 1)
    torch.testing.assert_close(found.encoder(images), wanted)
    assert torch.equal(open_encoder(lambda x: x, norm="none", name="own").encoder(images), images)
