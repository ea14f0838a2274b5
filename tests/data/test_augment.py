"""The augmentation pipelines: published parameters, golden operations, range, size, strength, randomness."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsat.data.augment import AUGMENTATIONS, CropToSize, GaussianNoise, build_transform, resize_patch

GOLDEN = Path(__file__).parents[1] / "golden"
PIPELINES = json.loads((GOLDEN / "transforms.json").read_text())
READING = {"Normalize", "GetThirdChannel", "MinMaxChop"}
AUGMENTING = [name for name in AUGMENTATIONS if name != "none"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "transforms.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def patch(height: int = 24, width: int | None = None, *, seed: int = 0) -> Tensor:
    """A smooth patch with some detail."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(height, width or height), mode="bilinear")[0]
    return (0.8 * x + 0.2 * torch.rand(x.shape, generator=generator)).clamp(0.0, 1.0)


# --- agreement with the published pipelines --------------------------------------------------------------------------


def as_published(step: object) -> dict:
    """One of our steps in the terms of the published lists."""
    if isinstance(step, tv.RandomApply):
        return {"p": step.p, **as_published(step.transforms[0])}
    if isinstance(step, GaussianNoise):
        return {"class": "GaussianNoise", "min_var": step.low, "max_var": step.high}
    if isinstance(step, CropToSize):
        crop = {"scale": step.scale, "ratio": step.ratio, "interpolation": step.mode, "antialias": True}
        return {"class": "RandomResizedCrop", "size": (step.size, step.size), "p": step.prob, **crop}
    names = {
        "p",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "threshold",
        "sharpness_factor",
        "kernel_size",
        "sigma",
    }
    names |= {"degrees", "translate", "scale", "shear", "fill", "center", "ratio", "value", "inplace"}
    found = {name: getattr(step, name) for name in names if hasattr(step, name)}
    if hasattr(step, "interpolation"):
        found["interpolation"] = step.interpolation.value
    return {"class": type(step).__name__, **found}


def as_flat(entry: dict) -> dict:
    if entry["class"] == "RandomApply":
        return {**as_flat(entry["transforms"][0]), "p": entry["p"]}
    flat = {"class": entry["class"], **entry["params"]}
    return {"p": 1.0, **flat} if entry["class"] == "RandomResizedCrop" else flat


@pytest.mark.parametrize("key", PIPELINES)
def test_parameters_equal_the_published_lists(key):
    words = dict(re.findall(r"(strength|rand_prob)=([\d.e-]+)", key))
    name = {"get_strong_aug": "static", "get_dynamic_augs": "v0", "get_dynacl_aug_v1": "v1"}[key.split("(")[0]]
    strength = float(words.get("strength", 1.0))
    ours = build_transform(name, image_size=300, strength=strength, prob=float(words.get("rand_prob", 0.5))).steps
    published = [as_flat(entry) for entry in PIPELINES[key] if entry["class"] not in READING]
    published = [entry for entry in published if entry["class"] != "ColorJitter" or entry["brightness"] is not None]
    published = [entry for entry in published if entry.get("p") != 0.0]
    assert [step["class"] for step in map(as_published, ours)] == [entry["class"] for entry in published]
    for step, entry in zip(map(as_published, ours), published, strict=True):
        assert set(step) == set(entry)
        for word, value in entry.items():
            if isinstance(value, (str, bool)) or value is None:
                assert step[word] == value, (word, step, entry)
            else:
                np.testing.assert_allclose(step[word], value, rtol=0, atol=1e-12, err_msg=f"{word} of {entry['class']}")


def step_of(pipeline: str, kind: type, **options: float) -> object:
    for step in build_transform(pipeline, image_size=None, **options).steps:
        inner = step.transforms[0] if isinstance(step, tv.RandomApply) else step
        if isinstance(inner, kind):
            return step
    raise AssertionError(f"{pipeline} has no {kind.__name__}")


@pytest.mark.parametrize(
    ("pipeline", "kind", "strength", "array"),
    [
        ("static", tv.RandomSolarize, 1.0, "solarize_0.2"),
        ("v0", tv.RandomSolarize, 0.5, "solarize_0.6"),
        ("v0", tv.RandomAutocontrast, 0.5, "autocontrast"),
        ("v0", tv.RandomAdjustSharpness, 0.5, "sharpness_2"),
        ("static", tv.GaussianBlur, 1.0, "gaussian_blur_5_1.0"),
        ("v0", tv.GaussianBlur, 0.5, "gaussian_blur_5_0.5"),
        ("v1", tv.RandomGrayscale, 1.0, "grayscale3"),
    ],
)
def test_operations_equal_the_golden_arrays(golden, pipeline, kind, strength, array):
    step = step_of(pipeline, kind, strength=strength)
    step.p = 1.0
    torch.testing.assert_close(step(golden["aug_in"]), golden[f"aug/{array}"], rtol=0, atol=1e-6)


def test_noise_equals_the_golden_array(golden):
    torch.manual_seed(5)
    std = 0.06606115254007318
    noisy = GaussianNoise(std, std)(golden["aug_in"])
    torch.testing.assert_close(noisy, golden["aug/gaussian_noise_seed5"], rtol=0, atol=1e-7)


def test_resizing_equals_the_golden_array(golden):
    large = build_transform("none", image_size=224)(golden["image_lo/base"])
    torch.testing.assert_close(large[:, :8, :8], golden["image_lo/vit_base_first8x8"], rtol=0, atol=1e-6)
    torch.testing.assert_close(large.double().mean((1, 2)), golden["image_lo/vit_base_mean"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_crop_is_torchvisions(mode):
    x, scale, ratio = patch(40, 52), (0.08, 1.0), (0.75, 1.333)
    torch.manual_seed(3)
    ours = CropToSize(16, 1.0, scale, ratio, mode)(x)
    torch.manual_seed(3)
    torch.rand(())  # whether to crop
    theirs = tv.RandomResizedCrop(16, scale, ratio, tv.InterpolationMode(mode), antialias=True)(x)
    torch.testing.assert_close(ours, theirs.clamp(0.0, 1.0), rtol=0, atol=1e-6)


# --- laws ------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(AUGMENTATIONS),
    st.integers(5, 40),
    st.integers(5, 40),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from([0.0, 1e-6, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
@settings(max_examples=120, deadline=None)
def test_every_pipeline_ends_in_range_at_its_size_and_keeps_its_input(name, height, width, size, strength, prob, dtype):
    x = patch(height, width).to(dtype)
    before = x.clone()
    out = build_transform(name, image_size=size, strength=strength, prob=prob)(x)
    assert out.shape == ((3, height, width) if size is None else (3, size, size))
    assert out.dtype == torch.float32
    assert 0.0 <= float(out.min()) <= float(out.max()) <= 1.0
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", AUGMENTING)
@pytest.mark.parametrize("size", [32, 48, 300])
def test_the_papers_sizes(name, size):
    assert build_transform(name, image_size=size)(patch(300)).shape == (3, size, size)
    assert build_transform(name, image_size=size)(patch(32)).shape == (3, size, size)


@pytest.mark.parametrize("name", AUGMENTING)
def test_the_global_generator_decides_everything(name):
    transform, x = build_transform(name, image_size=20), patch()
    draws = []
    for seed in (*range(6), *range(6)):
        torch.manual_seed(seed)
        np.random.seed(len(draws))
        draws.append(transform(x))
    assert all(torch.equal(one, two) for one, two in zip(draws[:6], draws[6:], strict=True))
    assert len({one.numpy().tobytes() for one in draws[:6]}) >= 5


def test_none_draws_nothing_and_keeps_a_fitting_patch_bit_for_bit():
    x, state = patch(24), torch.get_rng_state()
    assert torch.equal(build_transform("none", image_size=24)(x), x)
    assert torch.equal(build_transform("none", image_size=None)(x), x)
    build_transform("none", image_size=10)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_strength_zero_only_mirrors_sharpens_and_stretches():
    """At strength 0 all that is left of v1 is the mirror, of v0 what the published list does not scale."""
    x = patch()
    for _ in range(10):
        out = build_transform("v1", image_size=24, strength=0.0)(x)
        assert torch.equal(out, x) or torch.equal(out, x.flip(2))
    kept = build_transform("v0", image_size=24, strength=0.0).steps
    kinds = {
        tv.RandomHorizontalFlip,
        tv.RandomVerticalFlip,
        tv.RandomAutocontrast,
        tv.RandomAdjustSharpness,
        CropToSize,
    }
    assert {type(step) for step in kept} == kinds


@pytest.mark.parametrize("name", ["v0", "v1"])
def test_the_mean_change_grows_with_strength(name):
    x = patch()

    def change(strength: float) -> float:
        transform = build_transform(name, image_size=24, strength=strength)
        mirrors = [x, x.flip(1), x.flip(2), x.flip(1, 2)]
        outs = [transform(x) for _ in range(250)]
        return float(np.mean([min(float((out - mirror).abs().mean()) for mirror in mirrors) for out in outs]))

    weak, middle, strong = change(0.0), change(0.4), change(1.0)
    assert weak < middle - 0.005 < strong - 0.03


def test_static_ignores_strength_and_v1_ignores_prob():
    x = patch()
    for one, two in [
        (build_transform("static", image_size=9, strength=0.1), build_transform("static", image_size=9)),
        (build_transform("v1", image_size=9, prob=0.1), build_transform("v1", image_size=9)),
    ]:
        torch.manual_seed(1)
        first = one(x)
        torch.manual_seed(1)
        assert torch.equal(two(x), first)


def test_noise_has_a_uniform_standard_deviation():
    x = torch.full((3, 64, 64), 0.5)
    widths = torch.stack([(GaussianNoise(0.02, 0.1)(x) - x).std() for _ in range(400)])
    assert 0.019 < float(widths.min()) < 0.025 < 0.095 < float(widths.max()) < 0.102
    assert abs(float(widths.mean()) - 0.06) < 0.006  # five sigma


def test_a_crop_is_drawn_as_often_as_asked():
    x = patch(30)
    crop = CropToSize(None, 0.3, (0.08, 0.5), (0.75, 1.333))
    share = np.mean([not torch.equal(crop(x), x) for _ in range(1000)])
    assert abs(share - 0.3) < 0.075  # five sigma


def test_resizing_is_exact_on_constants_and_identity_on_its_own_size():
    x = torch.full((3, 17, 9), 0.25)
    torch.testing.assert_close(resize_patch(x, (30, 5)), torch.full((3, 30, 5), 0.25))
    assert resize_patch(x, (17, 9)) is x


def test_bicubic_overshoot_and_rounding_are_clamped():
    edge = torch.zeros(3, 12, 12)
    edge[:, :, 6:] = 1.0
    large = resize_patch(edge, (30, 30), mode="bicubic")
    assert (float(large.min()), float(large.max())) == (0.0, 1.0)
    above = torch.full((3, 6, 6), 1.0 + 5e-7)
    assert float(above.max()) > 1.0
    assert float(build_transform("none", image_size=None)(above).max()) == 1.0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pipelines_travel_to_workers_and_show_their_configuration(name):
    transform, x = build_transform(name, image_size=20, strength=0.5, prob=0.25), patch()
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    torch.manual_seed(4)
    first = transform(x)
    torch.manual_seed(4)
    assert torch.equal(again(x), first)
    assert repr(transform) == f"Augmentation(name={name!r}, image_size=20, strength=0.5, prob=0.25)"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v2", {}, "unknown augmentation 'v2'; known are none, static, v0, v1"),
        ("v0", {"strength": 1.01}, r"strength must be a number in \[0, 1\], got 1.01"),
        ("v0", {"strength": -0.1}, r"strength must be a number in \[0, 1\], got -0.1"),
        ("v0", {"strength": float("nan")}, r"strength must be a number in \[0, 1\], got nan"),
        ("v1", {"prob": 2}, r"prob must be a number in \[0, 1\], got 2"),
        ("none", {"strength": "1"}, r"strength must be a number in \[0, 1\], got '1'"),
        ("v0", {"image_size": 0}, "image_size must be a whole number of pixels, at least 1, or None; got 0"),
        ("v0", {"image_size": 32.0}, "image_size must be a whole number .* got 32.0"),
        ("v0", {"image_size": True}, "image_size must be a whole number .* got True"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_transform(name, **{"image_size": 8, **options})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((3, 8, 8)), TypeError, "take a tensor .* got ndarray"),
        (torch.zeros(2, 8, 8), ValueError, r"one patch \(3, h, w\), got shape \(2, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), ValueError, "call them patch by patch"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "got torch.uint8; divide integers by their range"),
        (torch.zeros(3, 4, 9), ValueError, "4 x 9 pixels is too small, need 5 x 5"),
        (torch.full((3, 8, 8), 8.0), ValueError, r"values in \[0, 1\], got 8 to 8"),
        (torch.full((3, 8, 8), -0.5), ValueError, r"values in \[0, 1\], got -0.5 to -0.5"),
        (torch.full((3, 8, 8), torch.nan), ValueError, r"values in \[0, 1\], got nan to nan"),
    ],
)
def test_wrong_patches_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        build_transform("v0", image_size=8)(x)


def test_a_torchvision_that_does_not_load_is_named_with_its_cure(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"torchvision::nms does not exist.*pip install .*torch torchvision"):
        build_transform("v1", image_size=8)
    assert build_transform("none", image_size=8)(patch()).shape == (3, 8, 8)
