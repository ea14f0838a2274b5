"""NI-, DI-, TI- and VMI-FGSM against their equations written out, and the pieces they are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import DIFGSM, L2, MIFGSM, NIFGSM, TIFGSM, VMIFGSM, Linf, feature_drift
from hsat.attacks.initialization import NoiseSource
from hsat.attacks.momentum import ResizePad, blur, gaussian_kernel

NUMBERS = {"step_size": 0.01, "steps": 4}
THREAT = Linf(0.03)
ALL = [
    NIFGSM(THREAT, **NUMBERS),
    NIFGSM(THREAT, scales=3, **NUMBERS),
    DIFGSM(THREAT, resize=0.5, **NUMBERS),
    TIFGSM(THREAT, size=3, probability=0.5, resize=0.5, **NUMBERS),
    VMIFGSM(THREAT, samples=3, **NUMBERS),
]


def images(n: int = 3, h: int = 6, w: int = 6, *, low: float = 0.2):
    generator = torch.Generator().manual_seed(0)
    return low + (1 - 2 * low) * torch.rand(n, 3, h, w, generator=generator, dtype=torch.float64)


def waves(v):
    """Elementwise, with many hills and with a place for every pixel."""
    w = 30 * torch.linspace(-1, 1, v[0].numel(), dtype=torch.float64).reshape(v.shape[1:]) + 0.3
    return ((v * w).sin() * w).to(v.dtype).flatten(1).cumsum(1)[:, -1]


def gradient(v, f=waves):
    v = v.clone().requires_grad_()
    return torch.autograd.grad(f(v).sum(), v)[0]


def unit(g):
    return g / g.abs().mean((1, 2, 3), keepdim=True)


def momentum_steps(x, gradient_at, *, decay=1.0, step=0.01, steps=4, threat=THREAT):
    """MI-FGSM with any gradient (x, m, number of the step)."""
    y, m = x.clone(), torch.zeros_like(x)
    for t in range(steps):
        m = decay * m + unit(gradient_at(y, m, t))
        y = threat.project(y + step * m.sign(), x)
    return y


def test_the_plain_gradient_gives_mifgsm():
    x = images()
    expected = MIFGSM(THREAT, **NUMBERS)(x, waves)
    torch.testing.assert_close(momentum_steps(x, lambda y, m, t: gradient(y)), expected, atol=1e-12, rtol=0)
    for same in (
        NIFGSM(THREAT, decay=0.0, **NUMBERS),
        VMIFGSM(THREAT, decay=0.0, beta=0.0, samples=2, **NUMBERS),
        DIFGSM(THREAT, decay=0.0, probability=0.0, **NUMBERS),
        TIFGSM(THREAT, decay=0.0, size=1, **NUMBERS),
    ):
        assert torch.equal(same(x, waves), MIFGSM(THREAT, decay=0.0, **NUMBERS)(x, waves)), same


@pytest.mark.parametrize("scales", [1, 3])
def test_nesterov_follows_its_equations(scales):
    x = images()

    def ahead(y, m, t):
        point = (y + 0.8 * 0.01 * m).clamp(0, 1)
        return sum(gradient(point / 2**i) / 2**i for i in range(scales)) / scales

    expected = momentum_steps(x, ahead, decay=0.8)
    got = NIFGSM(THREAT, decay=0.8, scales=scales, **NUMBERS).run(x, waves)
    torch.testing.assert_close(got.x_adv, expected, atol=1e-12, rtol=0)
    assert (got.forwards, got.backwards) == (4 * scales + 1, 4 * scales)
    assert not torch.equal(got.x_adv, MIFGSM(THREAT, decay=0.8, **NUMBERS)(x, waves))


def test_nesterov_in_a_euclidean_ball_looks_one_share_of_a_step_ahead():
    x, seen = images(), []

    def watched(v):
        seen.append(v.detach().clone())
        return waves(v)

    attack = NIFGSM(L2(0.5), step_size=0.1, steps=2, decay=0.5)
    attack(x, watched)
    first = x + 0.1 * L2(0.5).steepest_ascent(gradient(x))
    torch.testing.assert_close(seen[1], first + 0.5 * 0.1 * L2(0.5).steepest_ascent(gradient(x)), atol=1e-12, rtol=0)


def test_variance_tuning_follows_its_algorithm():
    x, threat = images(), Linf(0.03)
    seeded = lambda: torch.Generator().manual_seed(7)
    noise, memory = seeded(), {"v": torch.zeros_like(x)}

    def tuned(y, m, t):
        g = gradient(y)
        total = g + memory["v"]
        around = torch.zeros_like(x)
        if t < 3:
            for _ in range(3):
                u = torch.rand(x.shape, generator=noise, dtype=torch.float64) * 2 - 1
                around += gradient((y + 1.5 * 0.03 * u).clamp(0, 1))
            memory["v"] = around / 3 - g
        return total

    expected = momentum_steps(x, tuned)
    got = VMIFGSM(threat, samples=3, **NUMBERS).run(x, waves, generator=seeded())
    torch.testing.assert_close(got.x_adv, expected, atol=1e-9, rtol=0)
    assert got.backwards == 4 + 3 * 3
    assert got.forwards == got.backwards + 1
    assert not torch.equal(got.x_adv, MIFGSM(threat, **NUMBERS)(x, waves))


def test_translation_invariance_blurs_the_gradient():
    x = images(h=6, w=8)

    def blurred(y, m, t):
        g, k = gradient(y), [torch.exp(torch.tensor(-0.5 * s * s)).double() for s in (-2.0, -1.0, 0.0, 1.0, 2.0)]
        total = sum(k)
        result = torch.zeros_like(g)
        for i in range(5):
            for j in range(5):
                padded = F.pad(g, (2, 2, 2, 2))
                result += k[i] * k[j] / total**2 * padded[:, :, i : i + 6, j : j + 8]
        return result

    expected = momentum_steps(x, blurred)
    torch.testing.assert_close(TIFGSM(THREAT, size=5, sigma=2.0, **NUMBERS)(x, waves), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("size", "sigma"), [(1, 3.0), (5, 2.0), (15, 3.0)])
def test_the_kernel(size, sigma):
    kernel = gaussian_kernel(size, sigma)
    assert float(kernel.sum()) == pytest.approx(1)
    assert torch.equal(kernel, kernel.flip(0))
    assert int(kernel.argmax()) == size // 2
    flat = torch.ones(1, 2, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(blur(flat, kernel)[:, :, 20, 20], torch.ones(1, 2, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(3, 12), st.sampled_from([0.3, 0.7, 0.9, 1.0]))
def test_a_layout_is_resize_and_pad(seed, h, w, resize):
    x = torch.rand(4, 2, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed + 1))
    layout = ResizePad.draw(u, x, probability=0.75, resize=resize)
    shown = layout.transform(x, None)
    assert torch.equal(layout.transform(x[[2, 0]], torch.tensor([2, 0])), shown[[2, 0]])
    for i in range(4):
        height, width = int(layout.height[i]), int(layout.width[i])
        top, left = int(layout.top[i]), int(layout.left[i])
        assert bool(layout.changed[i]) == bool(u[i, 3] < 0.75)
        assert max(int(resize * h), 1) <= height <= max(h - 1, int(resize * h))
        assert 0 <= top <= h - height and 0 <= left <= w - width
        if h == w:
            assert height == width
        expected = x[i : i + 1]
        if layout.changed[i]:
            small = F.interpolate(expected, size=(height, width), mode="bilinear", align_corners=False)
            expected = F.pad(small, (left, w - width - left, top, h - height - top))
        torch.testing.assert_close(shown[i : i + 1], expected, atol=1e-12, rtol=0)


def test_the_view_can_be_differentiated():
    x = images(2, 5, 5)
    layout = ResizePad.draw(torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.9, 0.2, 0.8, 0.9]]), x, probability=0.5, resize=0.6)
    assert layout.changed.tolist() == [True, False]
    assert torch.autograd.gradcheck(lambda v: layout.transform(v, None), x.requires_grad_())


def test_layouts_reach_every_place_and_as_often_as_they_should():
    x = torch.zeros(4000, 1, 10, 10)
    u = NoiseSource(4000, generator=torch.Generator().manual_seed(0), ids=None, restart=0).uniform(4, like=x)
    layout = ResizePad.draw(u, x, probability=0.3, resize=0.7)
    assert set(layout.height.tolist()) == {7, 8, 9}
    assert {(h, t) for h, t in zip(layout.height.tolist(), layout.top.tolist(), strict=True)} == {
        (h, t) for h in (7, 8, 9) for t in range(10 - h)
    }
    assert abs(float(layout.changed.float().mean()) - 0.3) < 0.03


def test_diversity_and_variance_draw_by_id():
    x, ids = images(4), torch.tensor([7, 8, 9, 10])
    for attack in ALL[2:]:
        whole = attack(x, waves, generator=torch.Generator().manual_seed(1), ids=ids)
        turned = attack(x[[2, 0]], waves, generator=torch.Generator().manual_seed(1), ids=ids[[2, 0]])
        torch.testing.assert_close(turned, whole[[2, 0]], atol=1e-12, rtol=0)
        other = attack(x, waves, generator=torch.Generator().manual_seed(1), ids=ids + 10)
        assert not torch.equal(other, whole), attack


def test_a_neighbour_without_a_gradient_changes_nothing_for_the_others():
    """Images that have to leave a stationary point make the first gradients be read again: draws must not shift."""
    x, ids = images(3), torch.tensor([1, 2, 3])
    alive = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    for attack in ALL:
        seeded = lambda: torch.Generator().manual_seed(1)
        mixed = attack.run(x, lambda v: waves(v) * alive, generator=seeded(), ids=ids)
        alone = attack.run(x, waves, generator=seeded(), ids=ids)
        assert mixed.stationary.tolist() == [False, True, False], attack
        torch.testing.assert_close(mixed.x_adv[[0, 2]], alone.x_adv[[0, 2]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_objectives_are_shown_the_pixel_range_only_and_the_last_point_in_the_ball(attack):
    x, seen = images(low=0.0), []

    def watched(v):
        seen.append(v.detach())
        return waves(v)

    x_adv = attack(x, watched, generator=torch.Generator().manual_seed(0))
    assert all(0 <= v.min() and v.max() <= 1 for v in seen)
    assert torch.equal(THREAT.project(x_adv, x), x_adv)


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_finished_images_stay_and_objectives_are_narrowed(attack):
    torch.manual_seed(0)
    encode = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten()).double().eval()
    x, ids = images(4), torch.arange(4)
    drift, first = feature_drift(encode, x), x.clone()
    first[1] += 0.02
    done = torch.tensor([False, True, False, False])
    seeded = lambda: torch.Generator().manual_seed(3)
    stopped = attack.run(x, drift, start=first, generator=seeded(), ids=ids, success=lambda v: done)
    free = attack.run(x, drift, start=first, generator=seeded(), ids=ids)
    assert torch.equal(stopped.x_adv[1], first[1])
    torch.testing.assert_close(stopped.x_adv[~done], free.x_adv[~done], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NIFGSM(THREAT, scales=0, **NUMBERS), "scales must be a whole number >= 1, got 0"),
        (lambda: NIFGSM(THREAT, decay=-1.0, **NUMBERS), "decay must be a finite number >= 0, got -1.0"),
        (lambda: DIFGSM(THREAT, probability=1.1, **NUMBERS), r"probability must be a finite number in \[0, 1\]"),
        (lambda: DIFGSM(THREAT, resize=1.1, **NUMBERS), r"resize must lie in \(0, 1\].*shrunk and padded back"),
        (lambda: TIFGSM(THREAT, size=4, **NUMBERS), "size must be odd, .* got 4"),
        (lambda: TIFGSM(THREAT, sigma=float("nan"), **NUMBERS), "sigma must be a finite number"),
        (lambda: VMIFGSM(THREAT, samples=0, **NUMBERS), "samples must be a whole number >= 1"),
        (lambda: VMIFGSM(THREAT, beta=-0.5, **NUMBERS), "beta must be a finite number >= 0"),
        (lambda: VMIFGSM(THREAT, step_size=0.1, steps=0), "steps must be a whole number >= 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
