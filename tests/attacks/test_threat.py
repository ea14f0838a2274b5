"""Laws of the threat models: exact feasibility, idempotence, nearest points, eps of every shape, and their errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import L2, PGD, Linf
from hsat.attacks.projections import next_float, round_inside
from hsat.attacks.threat import eps_text, eps_value
from hsat.testing import DTYPES, check_feasible
from hsat.types import ThreatModel

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 10_000)
epsilons = st.one_of(st.sampled_from([0.0, 1 / 255, 4 / 255, 8 / 255, 0.5, 1.0]), st.floats(0, 1))


def draw_images(seed: int, dtype: torch.dtype, *, n: int = 3, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Images with pixels at both ends, in the middle and very close to zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 4, 5, generator=generator, dtype=torch.float64)
    x = torch.where(x < 0.15, 0.0, torch.where(x > 0.85, 1.0, x))
    x[..., 0] *= 10.0 ** -(torch.rand(x[..., 0].shape, generator=generator, dtype=torch.float64) * 30)
    return (
        (low + (high - low) * x).to(dtype).clamp(round_inside(low, dtype, up=True), round_inside(high, dtype, up=False))
    )


def far_points(x: torch.Tensor, seed: int, spread: float) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return (x.double() + spread * noise).to(x.dtype)


@settings(max_examples=150, deadline=None)
@given(seeds, dtypes, epsilons, st.sampled_from([1e-3, 0.05, 1.0, 100.0]))
def test_linf_projection_is_exact_idempotent_and_nearest(seed, dtype, eps, spread):
    threat, x = Linf(eps), draw_images(seed, dtype)
    y = far_points(x, seed, spread)
    z = threat.project(y, x)
    check_feasible(z, x, threat)
    assert torch.equal(threat.project(z, x), z)
    inside = ((y.double() - x.double()).abs() <= eps) & (y >= 0) & (y <= 1)
    assert torch.equal(z[inside], y[inside]), "feasible pixels moved"
    for up in (True, False):  # nearest: no float between z and y is feasible, but for float64's own rounding
        further = next_float(z, up=up)
        nearer = (further.double() - y.double()).abs() < (z.double() - y.double()).abs() - 2e-16
        feasible = ((further.double() - x.double()).abs() <= eps) & (further >= 0) & (further <= 1)
        assert not (nearer & feasible).any()


@settings(max_examples=120, deadline=None)
@given(
    seeds, dtypes, st.one_of(st.sampled_from([0.0, 0.5, 3.0]), st.floats(0, 7)), st.sampled_from([1e-3, 0.1, 2.0, 50.0])
)
def test_l2_projection_is_exact_and_idempotent(seed, dtype, eps, spread):
    threat, x = L2(eps), draw_images(seed, dtype)
    y = far_points(x, seed, spread)
    z = threat.project(y, x)
    check_feasible(z, x, threat)
    assert torch.equal(threat.project(z, x), z)
    feasible = ((y.double() - x.double()).flatten(1).norm(dim=1) <= eps) & ((y >= 0) & (y <= 1)).flatten(1).all(1)
    assert torch.equal(z[feasible], y[feasible]), "feasible images moved"


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.05, 4), st.sampled_from([0.05, 0.5, 5.0]))
def test_l2_projection_is_the_nearest_point_of_ball_and_box(seed, eps, spread):
    """Against bisection on the multiplier of the published form, z = clip((y + mu x) / (1 + mu))."""
    x = draw_images(seed, torch.float64, n=2)
    y = far_points(x, seed, spread)
    z = L2(eps).project(y, x)
    for i in range(len(x)):
        low, high = 0.0, 1e9
        if (y[i].clamp(0, 1) - x[i]).norm() <= eps:
            best = y[i].clamp(0, 1)
        else:
            for _ in range(200):
                mu = (low + high) / 2
                best = ((y[i] + mu * x[i]) / (1 + mu)).clamp(0, 1)
                low, high = (mu, high) if (best - x[i]).norm() > eps else (low, mu)
        torch.testing.assert_close(z[i], best, atol=1e-6, rtol=0)
        assert (z[i] - y[i]).norm() <= (best - y[i]).norm() + 1e-6


@settings(max_examples=60, deadline=None)
@given(seeds, dtypes, st.sampled_from([(-1.0, 2.0), (0.1, 0.9), (-0.3, 0.3)]), st.sampled_from([Linf, L2]))
def test_other_pixel_ranges(seed, dtype, ends, kind):
    low, high = ends
    threat, x = kind(0.2, low=low, high=high), draw_images(seed, dtype, low=low, high=high)
    z = threat.project(far_points(x, seed, 1.0), x)
    assert ((z.double() >= low) & (z.double() <= high)).all()
    assert torch.equal(threat.project(z, x), z)


@settings(max_examples=60, deadline=None)
@given(seeds, dtypes, st.sampled_from([Linf(8 / 255), L2(0.4), Linf(0.0), L2(0.0)]))
def test_random_starts_are_feasible_seeded_and_leave_the_global_generator_alone(seed, dtype, threat):
    x, before = draw_images(seed, dtype), torch.get_rng_state()
    one, two = (threat.random_start(x, torch.Generator().manual_seed(seed)) for _ in range(2))
    check_feasible(one, x, threat)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert threat.eps == 0 or not torch.equal(one, threat.random_start(x, torch.Generator().manual_seed(seed + 1)))


def test_linf_start_fills_the_ball_evenly():
    noise = Linf(0.1).random_start(torch.full((1, 1, 200, 200), 0.5), torch.Generator().manual_seed(0)) - 0.5
    share = torch.histc(noise, bins=10, min=-0.1, max=0.1) / noise.numel()
    torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_l2_start_is_uniform_in_the_ball():
    """The share of points within half the radius of a d-dimensional ball is 2 ** -d."""
    x = torch.full((20_000, 1, 1, 2), 0.5, dtype=torch.float64)
    radius = (L2(0.4).random_start(x, torch.Generator().manual_seed(0)) - x).flatten(1).norm(dim=1)
    assert abs(float((radius < 0.2).double().mean()) - 0.25) < 0.02


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_ascent_has_unit_size_and_zero_stays_zero(scale):
    grad = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    grad[1] = 0
    assert torch.equal(Linf(0.1).steepest_ascent(grad), grad.sign())
    direction = L2(0.1).steepest_ascent(grad)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert (direction * grad >= 0).all()


def test_eps_per_image_per_channel_and_per_pixel():
    x, y = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, 3, 4, 4)
    per_image = Linf(torch.tensor([0.0, 0.25])).project(y, x) - x
    assert torch.equal(per_image, torch.tensor([0.0, 0.25])[:, None, None, None].expand_as(x))
    per_channel = Linf(torch.tensor([0.0, 0.125, 0.25]).view(1, 3, 1, 1)).project(y, x) - x
    assert torch.equal(per_channel[1, :, 0, 0], torch.tensor([0.0, 0.125, 0.25]))
    assert torch.equal(Linf(torch.full((2, 3, 4, 4), 0.125)).project(y, x) - x, torch.full_like(x, 0.125))
    norms = (L2(torch.tensor([0.0, 0.5], dtype=torch.float64)).project(y, x) - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (3, 4, 4), (2, 2, 1, 1), (1,)])
def test_eps_of_another_shape_is_an_error_naming_both(shape):
    x = torch.full((2, 3, 4, 4), 0.5)
    with pytest.raises(ValueError) as error:
        Linf(torch.full(shape, 0.1)).project(x, x)
    assert str(tuple(shape)) in str(error.value)
    assert "(2, 3, 4, 4)" in str(error.value)


def test_select_takes_the_eps_of_some_images():
    threat = Linf(torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(threat.select(torch.tensor([2, 0])).eps, torch.tensor([0.3, 0.1]))
    assert Linf(0.1).select(torch.tensor([0])) == Linf(0.1)
    per_channel = Linf(torch.full((1, 3, 1, 1), 0.1))
    assert per_channel.select(torch.tensor([1])) == per_channel


def test_a_tensor_eps_is_a_read_only_copy_compared_and_hashed_by_value():
    eps = torch.tensor([0.1, 0.2])
    threat = Linf(eps)
    eps.mul_(3)
    threat.eps.mul_(3)
    assert torch.equal(threat.eps, torch.tensor([0.1, 0.2]))
    same = Linf(torch.tensor([0.1, 0.2]))
    assert threat == same and hash(threat) == hash(same) and threat != Linf(torch.tensor([0.1, 0.3]))
    assert threat != L2(torch.tensor([0.1, 0.2])) and Linf(0.1) == Linf(0.1) != Linf(0.1, high=2.0)
    assert "shape=(2,), min=0.1, max=0.2" in repr(threat)
    for copied in (copy.deepcopy(threat), pickle.loads(pickle.dumps(threat)), dataclasses.replace(threat)):
        assert copied == threat
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.eps = 0.5


@pytest.mark.parametrize("grey", range(256))
def test_repr_can_be_typed_back(grey):
    assert eval(repr(Linf(grey / 255))) == Linf(grey / 255)


@pytest.mark.parametrize("eps", [8, -0.1, float("nan"), float("inf"), torch.tensor([0.1, 8.0])])
def test_eps_out_of_range_is_refused_with_a_hint(eps):
    with pytest.raises(ValueError, match=r"eps must lie in \[0, 1\].*write eps=8/255"):
        Linf(eps)


def test_l2_refuses_an_eps_beyond_the_diagonal_of_the_box():
    x = torch.full((1, 3, 4, 4), 0.5)
    L2(48**0.5).project(x, x)
    with pytest.raises(ValueError, match=r"eps must lie in \[0, 6\.9282.*got 8"):
        L2(8).project(x, x)


@pytest.mark.parametrize("bad", ["8/255", None, True, torch.tensor([1])])
def test_eps_of_another_type_is_refused(bad):
    with pytest.raises(TypeError, match="eps must"):
        Linf(bad)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, float("inf")), (0.5, 0.5)])
def test_a_range_without_room_is_refused(ends):
    with pytest.raises(ValueError, match="low < high"):
        Linf(0.0, low=ends[0], high=ends[1])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.1)])
def test_images_out_of_range_are_refused_with_their_extremes_and_small_excess_is_clamped(threat):
    x = torch.full((1, 3, 2, 2), 0.5)
    x[0, 0, 0, 0] = 1.0 + 2e-6
    with pytest.raises(ValueError, match=r"\[0, 1\]; got values from 0\.5 to 1"):
        threat.project(x, x)
    x[0, 0, 0, 0] = 1.0 + 9e-7
    assert threat.project(x, x).max() <= 1.0
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        threat.random_start(x)
    with pytest.raises(ValueError, match=r"\(n, c, h, w\)"):
        threat.project(x[0], x[0])
    with pytest.raises(TypeError, match="uint8"):
        threat.project(x.to(torch.uint8), x.to(torch.uint8))


@pytest.mark.parametrize("far", [float("inf"), 1e200])
def test_l2_projection_of_points_whose_squared_distance_overflows(far):
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(L2(0.4).project(x + far, x), x + 0.2)


class Brighter(ThreatModel):
    """The least that a threat model says."""

    eps = 0.1

    def random_start(self, x, generator=None):
        return x

    def steepest_ascent(self, grad):
        return grad.clamp(min=0).sign()

    def project(self, x_adv, x):
        return torch.minimum(torch.maximum(x_adv, x), x + self.eps)


def test_what_a_threat_model_need_not_say():
    threat, x = Brighter(), draw_images(0, torch.float32)
    y = far_points(x, 1, 0.3)
    assert torch.equal(threat.projection_at(x)(y), threat.project(y, x))
    clamped, refused = threat.clamp(x)
    assert clamped is x and refused.shape == () and not refused
    assert threat.select(torch.tensor([1])) is threat
    with pytest.raises(TypeError, match="abstract"):
        ThreatModel()


def test_a_projection_of_a_subclass_is_the_one_that_attacks_use():
    """An inherited `projection_at` would pass it by; with one of its own, or further up, nothing is replaced."""

    class Grid(Linf):
        def project(self, x_adv, x):
            return (super().project(x_adv, x) * 255).round() / 255

    class Finer(Grid):
        def projection_at(self, x):
            return lambda x_adv: x_adv

    class Mixed(Brighter, Linf):
        """Projection and the rest of Brighter come before those of Linf."""

    x = torch.full((1, 1, 2, 2), 0.5)
    assert torch.equal(Grid(0.1).projection_at(x)(x + 0.05), Grid(0.1).project(x + 0.05, x))
    assert not torch.equal(Grid(0.1).project(x + 0.05, x), Linf(0.1).project(x + 0.05, x))
    assert torch.equal(Finer(0.1).projection_at(x)(x + 1), x + 1)
    assert torch.equal(Mixed(0.1).projection_at(x)(x - 0.05), x)


def test_a_class_that_does_not_derive_is_told_what_to_do():
    class Homemade:
        eps = 0.1

        def project(self, x_adv, x):
            return x

    with pytest.raises(TypeError, match=r"class Homemade\(hsat\.ThreatModel\).*steepest_ascent"):
        PGD(Homemade(), step_size=0.1, steps=1)
    with pytest.raises(TypeError, match=r"such as Linf\(8/255\)"):
        PGD(0.1, step_size=0.1, steps=1)


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (4 / 255, "4/255"),
        (1.0, "1"),
        (0.0, "0"),
        (0.5, "0.5"),
        (0.01, "0.01"),
        (0.0123456, "0.0123456"),
        (torch.tensor([8 / 255]), "8/255"),
        (torch.tensor([4 / 255, 8 / 255]), "4/255..8/255"),
    ],
)
def test_eps_as_text(eps, text):
    assert eps_text(eps) == text


def test_eps_as_a_number():
    assert eps_value(torch.tensor([0.1, 0.25])) == 0.25
    assert eps_value(0.5) == 0.5


def test_eps_of_a_float32_tensor_reads_as_the_float_does():
    for eps in (0.1, 0.2, 0.4, 8 / 255, 51 / 255, 0.05):
        assert eps_text(torch.tensor([eps])) == eps_text(eps)
    assert eps_text(torch.tensor([0.1, 0.2])) == "0.1..0.2"
