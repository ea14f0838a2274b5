"""Natural shifts: what each of them does, in known numbers, and the laws of attacks that draw and ask nothing."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hsat.attacks import Linf, NaturalShift
from hsat.attacks.natural_shift import STANDARD_AMOUNTS, STRENGTHS, blur, brighten, change_stains, resample
from hsat.stains import from_stains, to_stains
from hsat.testing import check_attack

STANDARD = NaturalShift.standard()
each_shift = pytest.mark.parametrize("shift", STANDARD.values(), ids=STANDARD.keys())


def images(n=4, h=17, w=13, *, channels=3):
    return torch.rand(n, channels, h, w, generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_standard_conditions():
    kinds = ("stain", "blur", "jpeg", "brightness", "resampling")
    assert list(STANDARD) == [f"{kind} {number}" for kind in kinds for number in (1, 2, 3)]
    assert repr(STANDARD["blur 2"]) == "NaturalShift(kind='blur', amount=2.0)"
    assert [shift.strength for shift in STANDARD.values()] == [*STRENGTHS] * 5
    assert NaturalShift("blur", 0.5).strength == ""
    assert list(NaturalShift.standard(stained=False)) == list(STANDARD)[3:]
    assert len({shift.text for shift in STANDARD.values()}) == 15
    assert set(STANDARD_AMOUNTS) == set(kinds)


@each_shift
def test_any_size_and_dtype_stay_in_range(shift):
    for shape in ((4, 17, 13), (1, 1, 1), (2, 3, 40), (0, 5, 5)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x = images(*shape).to(dtype)
            before = x.clone()
            y = shift(x, None, generator=seeded(), ids=torch.arange(len(x)))
            assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
            assert not len(y) or (y.min() >= 0 and y.max() <= 1)


@each_shift
def test_it_depends_on_seed_and_id_and_not_on_the_batch(shift):
    x, ids = images(6), torch.arange(6)
    whole = shift(x, None, generator=seeded(), ids=ids)
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    parts = torch.cat([shift(x[rows], None, generator=seeded(), ids=ids[rows]) for rows in order.split(2)])
    assert torch.equal(parts, whole[order])
    others = [shift(x, None, generator=seeded(seed), ids=ids) for seed in range(1, 6)]
    assert any(not torch.equal(other, whole) for other in others) == shift.random_start


@each_shift
def test_the_laws_of_attacks_that_ask_nothing(shift):
    """Chance has two directions (four for stain), so that two seeds or ids may choose alike; there is no start."""
    skip = ("start is obeyed", "another seed, other noise", "with ids, batch size and order do not matter")
    assert len(check_attack(shift, threat=Linf(1.0), skip=skip if shift.random_start else ())) >= 12


@each_shift
def test_run_and_call_agree_and_cost_nothing_without_a_score(shift):
    x = images()
    shifted = shift(x, None, generator=seeded(), ids=torch.arange(4))
    for score, passes in ((True, 2), (False, 0)):
        asked = []

        def objective(v, asked=asked):
            asked.append(len(v))
            return v.mean((1, 2, 3))

        result = shift.run(x, objective, generator=seeded(), ids=torch.arange(4), score=score)
        assert torch.equal(result.x_adv, shifted)
        assert result.forwards == len(asked) == passes and result.backwards == 0


def test_global_noise_is_drawn_without_a_generator_only():
    x = images()
    state = torch.get_rng_state()
    STANDARD["stain 2"](x, None, generator=seeded(), ids=torch.arange(4))
    STANDARD["blur 2"](x, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_three_strengths_push_a_patch_the_same_way():
    x = torch.full((8, 3, 4, 4), 0.5)
    ids = torch.arange(8)
    signs = [(STANDARD[f"brightness {n}"](x, None, generator=seeded(), ids=ids) - x).mean((1, 2, 3)) for n in (1, 2, 3)]
    assert torch.equal(signs[0].sign(), signs[2].sign()) and len(signs[0].sign().unique()) == 2
    for found, amount in zip(signs, (0.1, 0.2, 0.3), strict=True):
        torch.testing.assert_close(found.abs(), torch.full((8,), amount))


def test_a_stain_is_multiplied_in_optical_density():
    """An image that is a mixture of the stains becomes the mixture with other shares."""
    shares = torch.rand(2, 3, 5, 5, generator=seeded()) * torch.tensor([0.8, 0.6, 0.0])[None, :, None, None]
    x = from_stains(shares.double())
    change = torch.tensor([[0.2, -0.1], [-0.05, 0.2]], dtype=torch.float64)[:, :, None, None]
    changed = shares.double().clone()
    changed[:, :2] *= 1 + change
    torch.testing.assert_close(change_stains(x, change), from_stains(changed), atol=1e-9, rtol=0)
    white = torch.ones(2, 3, 4, 4)
    assert torch.equal(change_stains(white, change.float()), white), "the background stays white"
    found = to_stains(NaturalShift("stain", 0.2)(x, None, generator=seeded(), ids=torch.arange(2)))[:, :2]
    ratio = (found / to_stains(x)[:, :2]).mean((2, 3))
    torch.testing.assert_close((ratio - 1).abs(), torch.full_like(ratio, 0.2), atol=1e-6, rtol=0)


def test_a_stain_needs_colour():
    with pytest.raises(ValueError, match="colour images"):
        NaturalShift("stain", 0.1)(images(channels=2), None)
    assert NaturalShift("jpeg", 25)(images(channels=2), None).shape == (4, 2, 17, 13)


def test_blur_is_a_gaussian():
    """Against scipy, whose kernel ends at four sigma, too; a constant image stays."""
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images(2, 24, 19).double()
    for sigma in (0.5, 1.0, 3.0):
        wanted = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
        torch.testing.assert_close(blur(x, sigma), torch.from_numpy(wanted), atol=2e-6, rtol=0)
    flat = torch.full((1, 3, 5, 5), 0.3)
    torch.testing.assert_close(blur(flat, 2.0), flat)


def test_jpeg_is_that_of_pillow():
    x = images(1, 16, 24)
    file = io.BytesIO()
    Image.fromarray((x[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy()).save(file, "JPEG", quality=18)
    wanted = torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0)
    assert torch.equal((NaturalShift("jpeg", 18)(x, None)[0] * 255).round().to(torch.uint8), wanted)


def test_brightness_moves_the_value_and_keeps_hue_and_saturation():
    import colorsys

    x = images(1, 3, 3)
    change = torch.tensor([[[[0.2]]]])
    for before, after in zip(x.flatten(2)[0].T, brighten(x, change).flatten(2)[0].T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.2))
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(after.tolist(), wanted, strict=True))
    black = torch.zeros(1, 3, 2, 2)
    assert torch.equal(brighten(black, change), torch.full_like(black, 0.2))


def test_resampling_averages_and_interpolates():
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0]] * 4)[None, None].expand(1, 3, 4, 4)
    torch.testing.assert_close(resample(x, 0.5), torch.full((1, 3, 4, 4), 0.5))
    assert resample(images(1, 1, 1), 0.4).shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "amount", "message"),
    [
        ("fog", 1, "kind must be one of 'stain'"),
        ("blur", 0, "above 0"),
        ("blur", -1.0, "above 0"),
        ("jpeg", 96, r"\[1, 95\]"),
        ("jpeg", 1.5, "a whole number; got 1.5: give 2"),
        ("stain", 1.5, r"\[0, 1\]"),
        ("resampling", math.nan, "above 0"),
        ("brightness", True, "got True"),
    ],
)
def test_what_it_refuses(kind, amount, message):
    with pytest.raises(ValueError, match=message):
        NaturalShift(kind, amount)


def test_images_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        NaturalShift("blur", 1)(torch.full((1, 3, 4, 4), 1.5), None)
