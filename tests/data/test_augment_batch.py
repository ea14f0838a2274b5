"""Batched augmentation: the per-image pipelines' images to rounding, and their distribution where noise is its own."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from torch import Tensor

from hsat.data import image_operations as do
from hsat.data.augment import AUGMENTATIONS, GaussianNoise, build_transform, fork_cpu_rng
from hsat.data.augment_batch import Jitter, Move, Noise, augment_batch, draw_parameters

STRENGTHS = (1.0, 0.4, 0.0)


def some_patches(count: int, height: int = 21, width: int = 26, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, height, width, generator=generator) for _ in range(count)]


def each(patches: list[Tensor], pipeline, seeds, source) -> list[Tensor]:
    """The per-image pipeline, as the datasets run it."""
    found = []
    with fork_cpu_rng():
        for seed, which in zip(seeds, source, strict=True):
            torch.default_generator.manual_seed(seed)
            found.append(pipeline(patches[which]))
    return found


# --- operations -------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "brightness": (lambda x: do.brightness(x, [1.3, 0.7]), lambda x, i: tvf.adjust_brightness(x, (1.3, 0.7)[i])),
    "contrast": (lambda x: do.contrast(x, [1.3, 0.7]), lambda x, i: tvf.adjust_contrast(x, (1.3, 0.7)[i])),
    "saturation": (lambda x: do.saturation(x, [1.3, 0.7]), lambda x, i: tvf.adjust_saturation(x, (1.3, 0.7)[i])),
    "hue": (lambda x: do.shift_hue(x, [0.1, -0.3]), lambda x, i: tvf.adjust_hue(x, (0.1, -0.3)[i])),
    "autocontrast": (do.autocontrast, lambda x, i: tvf.autocontrast(x)),
    "solarize": (lambda x: do.solarize(x, 0.35), lambda x, i: tvf.solarize(x, 0.35)),
    "sharpen": (lambda x: do.sharpen(x, 2.0), lambda x, i: tvf.adjust_sharpness(x, 2.0)),
    "blur": (
        lambda x: do.gaussian_blur(x, [1.0, 0.3]),
        lambda x, i: tvf.gaussian_blur(x, [5, 5], [(1.0, 0.3)[i]] * 2),
    ),
    "affine": (
        lambda x: do.rotate_and_move(x, [7.0, -3.5], [(3.0, -5.0), (0.0, 2.0)]),
        lambda x, i: tvf.affine(x, (7.0, -3.5)[i], [(3, -5), (0, 2)][i], 1.0, [0.0, 0.0], fill=[0.0, 0.0, 0.0]),
    ),
    "erase": (
        lambda x: do.erase(x, [(1, 2, 5, 6), (0, 0, 3, 20)]),
        lambda x, i: tvf.erase(x, *((1, 2, 5, 6), (0, 0, 3, 20))[i], torch.zeros(1, 1, 1)),
    ),
    "grayscale": (do.grayscale, lambda x, i: tvf.rgb_to_grayscale(x, 3)),
}


def hard_images() -> Tensor:
    """Two images with greys, black, white, pure colours, equal channels and a constant channel."""
    x = torch.stack(some_patches(2))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
    x[0, :, 0, :26] = corners.T[:, :26]
    x[0, :, 1, :13] = corners.T[:, 14:]
    x[1, 2] = 0.25
    return x


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvisions_on_each_image(name):
    ours, theirs = OPERATIONS[name]
    x = hard_images()
    expected = torch.stack([theirs(image, i) for i, image in enumerate(x)])
    torch.testing.assert_close(ours(x.clone()), expected, atol=2e-6, rtol=0)


def test_hue_by_its_definition():
    """A loop over pixels with Python's own conversion."""
    import colorsys

    x = hard_images()[:1, :, :6]
    moved = do.shift_hue(x.clone(), [0.27])[0]
    for row in range(6):
        for column in range(26):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, row, column].double().tolist())
            expected = colorsys.hsv_to_rgb((hue + 0.27) % 1.0, saturation, value)
            assert moved[:, row, column].tolist() == pytest.approx(expected, abs=2e-6)


def test_an_operation_on_part_of_a_batch_leaves_the_rest():
    x = torch.rand(4, 3, 5, 5)
    out = do.on_part(x.clone(), [2, 0], lambda part: part.mul_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1)))
    assert torch.equal(out[[1, 3]], x[[1, 3]])
    assert torch.equal(out[2], 2 * x[2])
    assert torch.equal(out[0], 3 * x[0])


# --- equal to the per-image pipelines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("size", [18, None])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_same_seed_gives_the_same_image_to_rounding(name, size, strength):
    pipeline = build_transform(name, image_size=size, strength=strength)
    patches = some_patches(3)
    seeds, source = [*range(40, 76)], [i % 3 for i in range(36)]
    ours = augment_batch(patches, pipeline, seeds, source=source)
    theirs = torch.stack(each(patches, pipeline, seeds, source))
    assert ours.dtype == torch.float32
    assert ours.min() >= 0.0
    assert ours.max() <= 1.0
    # A pixel midway between two of the source may go to either: nearest neighbours of a rotation.
    assert ((ours - theirs).abs() > 2e-5).float().mean() < 1e-3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_several_images_at_once_equal_one_by_one(name, monkeypatch):
    """What a GPU does: all images of a size go through the operations together."""
    room = importlib.import_module("hsat.data.augment_batch")  # the package has a function of this name

    pipeline = build_transform(name, image_size=18, strength=0.9)
    patches, seeds = [*some_patches(2), *some_patches(2, 30, 17)], [*range(30)]
    source = [i % 4 for i in seeds]
    alone = augment_batch(patches, pipeline, seeds, source=source)
    monkeypatch.setattr(room, "CPU_AT_ONCE", 7)
    together = augment_batch(patches, pipeline, seeds, source=source)
    assert ((alone - together).abs() > 2e-5).float().mean() < 1e-3


def test_an_image_depends_on_its_patch_and_seed_alone_to_the_bit():
    pipeline = build_transform("v0", image_size=18)
    patches, seeds = some_patches(3), [*range(12)]
    source = [i % 3 for i in seeds]
    everything = augment_batch(patches, pipeline, seeds, source=source)
    backwards = augment_batch(patches[::-1], pipeline, seeds[::-1], source=[2 - i for i in source[::-1]])
    assert torch.equal(everything, backwards.flip(0))
    assert torch.equal(everything[5:6], augment_batch([patches[2]], pipeline, [5]))


def test_inputs_and_the_global_generator_stay():
    pipeline = build_transform("v0", image_size=None)
    patches = some_patches(2)
    before, state = [patch.clone() for patch in patches], torch.random.get_rng_state()
    augment_batch(patches, pipeline, [1, 2, 3, 4], source=[0, 1, 0, 1])
    assert all(torch.equal(a, b) for a, b in zip(patches, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrong_calls_are_refused():
    pipeline = build_transform("v0", image_size=None)
    with pytest.raises(ValueError, match="got 1 seeds for 2 images"):
        augment_batch(some_patches(2), pipeline, [1])
    with pytest.raises(ValueError, match="at least one image"):
        augment_batch([], pipeline, [])
    with pytest.raises(ValueError, match=r"2 sizes come out.*image_size"):
        augment_batch([*some_patches(1), *some_patches(1, 9, 9)], pipeline, [1, 2])
    with pytest.raises(TypeError, match="divide integers"):
        augment_batch([torch.zeros(3, 9, 9, dtype=torch.uint8)], pipeline, [1])
    kept = build_transform("v0", image_size=9, uncropped="keep")
    with pytest.raises(ValueError, match="cannot be stacked"):
        augment_batch(some_patches(1), kept, [1])


# --- equal in distribution where the device draws its own noise -------------------------------------------------------


def same_law(x, y) -> float:
    """The p-value of Kolmogorov's and Smirnov's test of two samples, by its limit for large ones."""
    x, y = np.sort(np.asarray(x, dtype=float)), np.sort(np.asarray(y, dtype=float))
    points = np.concatenate([x, y])
    shares = [np.searchsorted(sample, points, side="right") / len(sample) for sample in (x, y)]
    scaled = np.abs(shares[0] - shares[1]).max() * math.sqrt(len(x) * len(y) / (len(x) + len(y)))
    if scaled < 0.2:  # the series converges slowly there, and the p-value is 1 to ten digits
        return 1.0
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))


def test_the_test_of_two_laws_by_known_values():
    """lambda = 1.3581 is the 5% point of the limit law."""
    n = 2000
    x = np.arange(n) / n
    assert same_law(x, x) == 1.0
    assert same_law(x, x + 1.3581 * math.sqrt(2 / n)) == pytest.approx(0.05, abs=0.003)
    assert same_law(x, x + 0.2) < 1e-12


def drawn(name: str, strength: float, *, with_noise: bool, first: int, count: int) -> list[list]:
    pipeline = build_transform(name, image_size=40, strength=strength)
    found = []
    with fork_cpu_rng():
        for seed in range(first, first + count):
            torch.default_generator.manual_seed(seed)
            found.append(draw_parameters(pipeline, 40, 40, with_noise=with_noise))
    return found


def numbers(parameters) -> list[float]:
    """The parameters of one operation as a flat list."""
    match parameters:
        case Noise():
            return [parameters.std]
        case Jitter():
            return [*parameters.order, *parameters.factors]
        case Move():
            return [parameters.angle, *parameters.shift]
        case tuple():
            return [*parameters]
        case bool():
            return []
    return [parameters]


@pytest.mark.parametrize(("name", "strength"), [("static", 1.0), ("v0", 1.0), ("v0", 0.5), ("v1", 0.7)])
def test_parameters_are_distributed_alike(name, strength):
    """Two independent samples: rates by a z-test, every parameter by Kolmogorov and Smirnov; Bonferroni at 1e-3."""
    count = 800
    a = drawn(name, strength, with_noise=True, first=0, count=count)
    b = drawn(name, strength, with_noise=False, first=10**6, count=count)
    p_values = []
    for step_a, step_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        on_a, on_b = ([numbers(p) for p in step if p is not None] for step in (step_a, step_b))
        share = (len(on_a) + len(on_b)) / (2 * count)
        spread = math.sqrt(2 * share * (1 - share) / count)
        z = abs(len(on_a) - len(on_b)) / count / spread if spread else 0.0
        p_values.append(math.erfc(z / math.sqrt(2)))
        if on_a and on_a[0]:
            p_values += [same_law(*pair) for pair in zip(np.array(on_a).T, np.array(on_b).T, strict=True)]
    assert len(p_values) > len(a[0])
    assert min(p_values) > 1e-3 / len(p_values)


def features(images: Tensor) -> np.ndarray:
    """Numbers of each image that its operations move: moments, black share, gradients, asymmetries, a histogram."""
    flat = images.flatten(1)
    rows = [flat.mean(1), flat.std(1), (flat == 0).float().mean(1), (flat > 0.75).float().mean(1)]
    rows += [images.diff(dim=-1).abs().mean((1, 2, 3)), images.diff(dim=-2).abs().mean((1, 2, 3))]
    rows += [images[..., :10].mean((1, 2, 3)) - images[..., 10:].mean((1, 2, 3))]
    rows += [images[..., :10, :].mean((1, 2, 3)) - images[..., 10:, :].mean((1, 2, 3))]
    rows += [images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))]
    return torch.stack(rows, 1).numpy()


def smooth_patch() -> Tensor:
    across, along = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 20), indexing="ij")
    return torch.stack([0.2 + 0.5 * across, 0.3 + 0.3 * along, 0.1 + 0.4 * across * along])


@pytest.mark.parametrize("name", ["static", "v0", "v1"])
def test_images_are_distributed_alike(name):
    """Per-image pipeline against batched operations with noise of their own, on other seeds."""
    pipeline, count = build_transform(name, image_size=20), 250
    theirs = torch.stack(each([smooth_patch()], pipeline, range(count), [0] * count))
    seeds = range(10**6, 10**6 + count)
    ours = augment_batch([smooth_patch()], pipeline, seeds, source=[0] * count, replay_noise=False)
    columns = zip(features(theirs).T, features(ours).T, strict=True)
    p_values = [same_law(x, y) for x, y in columns]
    assert min(p_values) > 1e-3 / len(p_values)


def test_the_comparison_sees_another_strength():
    seeds, source = range(250), [0] * 250
    a, b = (
        augment_batch([smooth_patch()], build_transform("v0", image_size=20, strength=s), seeds, source=source)
        for s in (1.0, 0.6)
    )
    assert min(same_law(x, y) for x, y in zip(features(a).T, features(b).T, strict=True)) < 1e-6


def test_noise_of_the_device_is_white_and_of_the_drawn_size():
    plain, grey = build_transform("none", image_size=40), torch.full((3, 40, 40), 0.5)

    def deviation(std: float, seed: int) -> Tensor:
        pipeline = dataclasses.replace(plain, steps=(GaussianNoise(std, std),))
        return augment_batch([grey], pipeline, [seed], replay_noise=False) - 0.5

    noisy = torch.cat([deviation(0.05, 3), deviation(0.02, 4)])
    assert noisy[0].std().item() == pytest.approx(0.05, rel=0.05)
    assert noisy[1].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.corrcoef(noisy.flatten(1)).abs()[0, 1] < 0.05


def test_an_operation_without_a_batched_form_is_refused_by_name():
    from torchvision.transforms import RandomInvert

    pipeline = dataclasses.replace(build_transform("none", image_size=8), steps=(RandomInvert(1.0),))
    with pytest.raises(TypeError, match=r"RandomInvert.*image by image"):
        augment_batch([torch.rand(3, 8, 8)], pipeline, [0])
