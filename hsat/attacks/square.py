"""The Square attack: random search that asks for values only, never for a gradient."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hsat.attacks.base import GradientAttack, check_counts, check_number
from hsat.attacks.initialization import NoiseSource, to_device_of
from hsat.attacks.loop import AscentConfig, AttackState, RandomStart, broadcast_size, name_images, per_image
from hsat.attacks.masked import Masked
from hsat.attacks.threat import L2, check_threat
from hsat.types import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the area of the squares is halved; section 5 of arXiv:1912.00049."""

BLOCK = 64
"""Proposals whose random numbers are drawn at once."""


@dataclass(frozen=True, repr=False)
class Square(GradientAttack):
    """Square attack: random squares on the perturbation, kept image by image where the value rises.

    Proposals are those of algorithm 2 for Linf (from vertical stripes of +-eps) and of algorithm 3 for L2 (from a grid
    of bumps).  Other threat models get those of Linf, projected; Masked gets those of the threat model that it
    confines.  The objective is asked for values only: it may be a remote service, or not differentiable.  The natural
    one is `margin`, which needs nothing but scores.

    Each image has squares of its own, with `ids` from its own id; the published code draws one square per batch.  In L2
    windows hand on their norm over all channels, as in AutoAttack; by the paper, channel by channel, it is weaker.
    `start` replaces the first restart's stripes or grid.  A scalar objective is one value for the batch: a proposal is
    then kept or dropped for all images together.  `stationary` and `zero_gradient` of the result are zero.

    Attributes:
        threat: What the attack may change, such as Linf(8/255).
        queries: How often the objective is asked per restart, counted in `forwards` (`success`, where given, asks
            on its own).
        area: Share of the image that a square covers at first, p of the paper, in [0, 1]; halved after 10, 50, 200,
            500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries, in proportion for other numbers.  The paper's
            0.05 is for 224 x 224 pixels, small images want more (AutoAttack takes 0.8).
        restarts: At least 1; each image keeps its best run.

    Raises:
        FloatingPointError: Naming the images, for values that are not finite.

    References:
        Andriushchenko et al., Square Attack, arXiv:1912.00049, algorithms 1 to 3.

    Example:
        >>> from hsat.attacks import Linf
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> Square(Linf(0.25), queries=30)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    queries: int
    area: float = 0.05
    restarts: int = 1

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_counts(queries=self.queries, restarts=self.restarts)
        check_number("area", self.area, high=1.0)

    @property
    def random_start(self) -> bool:
        """Always: the first point is random stripes, or a random grid."""
        return True

    def _config(self) -> AscentConfig:
        return AscentConfig(
            threat=self.threat,
            step_size=self.threat.eps,
            steps=self.queries,
            random_start=True,
            restarts=self.restarts,
            gradient=False,
            first_point=self._first_point,
            path=self._path,
        )

    def _first_point(self, state: AttackState, restart: int) -> Tensor:
        """Stripes for Linf, a grid of bumps for L2, at full size."""
        noise = _noise(state, restart, "first")
        c, h, w = state.x.shape[1:]
        x, eps = state.x.to(state.work), broadcast_size(state.config.threat.eps, state.x.to(state.work))
        if not _is_l2(state.config.threat):
            direction = draw_signs(noise.uniform(c, 1, w, like=x)).to(x.dtype)
        else:
            grid = bump_grid(noise.uniform(c, count_bumps(h, w), like=x), x)
            direction = state.config.threat.steepest_ascent(grid)
        return state.project(x + eps * direction)

    def _path(
        self, state: AttackState, y: Tensor, fallback: RandomStart | None, restart: int
    ) -> tuple[Tensor, Tensor | None]:
        """One restart: the best points and their values."""
        value = state.value(y)
        state.start_value = value if state.start_value is None else state.start_value
        best, noise = _checked(state, value), _noise(state, restart, "squares")
        drawn, u = 2 + state.x.shape[1] + 3 * _is_l2(state.config.threat), y[:0]
        for query in range(self.queries - 1):
            if state.stop_early(y):
                break
            if query % BLOCK == 0:
                u = noise.uniform(BLOCK, drawn, like=y)
            proposed = self._proposal(state, y, u[:, query % BLOCK], query)
            value = _checked(state, state.value(torch.where(per_image(state.done), y, proposed)))
            higher = (value > best) & ~state.done
            best = torch.where(higher, value, best)
            y = torch.where(per_image(higher), proposed, y)
        return y, best if state.per_image or len(state.x) == 0 else best[0]

    def _proposal(self, state: AttackState, y: Tensor, u: Tensor, query: int) -> Tensor:
        h, w = y.shape[2:]
        l2, eps = _is_l2(state.config.threat), broadcast_size(state.config.threat.eps, y)
        side = square_side(square_area(query, self.queries, self.area), h, w, bumps=l2)
        if not l2:
            return state.project(y + 2 * eps * random_square(u, y, side))
        x = state.x.to(state.work)
        return state.project(x + move_mass(u, y - x, eps, side))


def _noise(state: AttackState, restart: int, purpose: str) -> NoiseSource:
    return NoiseSource(len(state.x), generator=state.generator, ids=state.ids, restart=restart, purpose=purpose)


def _checked(state: AttackState, value: Tensor) -> Tensor:
    """Values (n,), finite but for images that are finished."""
    value = value.expand(len(state.x))
    bad = ~value.isfinite() & ~state.done
    state.bad |= bad
    if value.device.type == "cpu" and bool(bad.any()):
        raise FloatingPointError(f"the objective is not finite for images {name_images(bad)} of the batch")
    return value


def _is_l2(threat: ThreatModel) -> bool:
    while isinstance(threat, Masked):
        threat = threat.threat
    return isinstance(threat, L2)


def square_area(query: int, queries: int, first: float) -> float:
    """Share of the image that a square covers at proposal `query` = 0, 1, ... of `queries`."""
    place = query * 10_000 // queries
    return first / 2.0 ** sum(place > mark for mark in HALVINGS)


def square_side(area: float, h: int, w: int, *, bumps: bool) -> int:
    """The whole number nearest to sqrt(area h w), at least 1 and at most the image; for bumps odd and at least 3."""
    side = max(round(math.sqrt(area * h * w)), 1)
    if bumps:
        side = max(side, 3)
        side += 1 - side % 2
    return min(side, h, w)


def corner(u: Tensor, size: int, side: int) -> Tensor:
    """First row or column of a window, 0 ... size - side, from u in [0, 1)."""
    return (u * (size - side + 1)).long().clamp(max=size - side)


def draw_signs(u: Tensor) -> Tensor:
    """-1 or 1 from u in [0, 1)."""
    return torch.where(u < 0.5, -1.0, 1.0)


def random_square(u: Tensor, like: Tensor, side: int) -> Tensor:
    """Algorithm 2: one square per image with one sign per channel, zero elsewhere; u (n, 2 + c)."""
    h, w = like.shape[2:]
    top, left = corner(u[:, 0], h, side), corner(u[:, 1], w, side)
    rows, columns = _in_window(h, top, side), _in_window(w, left, side)
    colours = draw_signs(u[:, 2:])[:, :, None, None].to(like.dtype)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], colours, 0.0)


def _in_window(size: int, first: Tensor, side: int) -> Tensor:
    place = torch.arange(size, device=first.device) - first[:, None]
    return (place >= 0) & (place < side)


def bump_grid(u: Tensor, like: Tensor) -> Tensor:
    """First l_2 direction: bumps side by side, a fifth of the shorter side each, with signs u (n, c, bumps)."""
    h, w = like.shape[2:]
    side = max(min(h, w) // 5, 1)
    down, across = h // side, w // side
    sign = draw_signs(u).to(like.dtype).reshape(len(u), -1, down, across)
    pattern = to_device_of(bump(side), like, like.dtype)
    grid = sign.repeat_interleave(side, 2).repeat_interleave(side, 3) * pattern.repeat(down, across)
    result = torch.zeros_like(like)
    top, left = (h - down * side) // 2, (w - across * side) // 2
    result[:, :, top : top + down * side, left : left + across * side] = grid
    return result


def count_bumps(h: int, w: int) -> int:
    """How many bumps `bump_grid` lays out."""
    side = max(min(h, w) // 5, 1)
    return (h // side) * (w // side)


def move_mass(u: Tensor, gap: Tensor, eps: float | Tensor, side: int) -> Tensor:
    """Algorithm 3: the perturbation `gap` with the mass of a second window moved to a bump in the first; u (n, 5 + c).

    Each channel of the first window becomes (old direction + signed bump), scaled to the norm that both windows had
    together plus a fair share of the budget that is not used up; the second window becomes zero.  As in AutoAttack the
    norm of the windows is taken over all channels (in the paper over each one) and the sum is scaled back to eps.
    """
    limit = to_device_of(eps, gap, gap.dtype) if isinstance(eps, Tensor) else gap.new_full((), eps)
    n, c, h, w = gap.shape
    first, rows1, columns1 = _window(corner(u[:, 0], h, side), corner(u[:, 1], w, side), side, h, w)
    second, _, _ = _window(corner(u[:, 2], h, side), corner(u[:, 3], w, side), side, h, w)
    unused = (limit**2 - _norm(gap, (1, 2, 3)) ** 2).clamp_min(0)
    available = (_norm(torch.where(first | second, gap, 0.0), (1, 2, 3)) ** 2 + unused / c).sqrt()
    index = torch.arange(n, device=gap.device)[:, None, None, None], torch.arange(c, device=gap.device)[:, None, None]
    old = gap[(*index, rows1, columns1)]
    pattern = to_device_of(bump(side), gap, gap.dtype)
    turned = torch.where((u[:, 4] < 0.5)[:, None, None, None], pattern, pattern.T)
    added = draw_signs(u[:, 5:])[:, :, None, None].to(gap.dtype) * turned + old / _norm(old, (2, 3)).clamp_min(1e-12)
    added = added / _norm(added, (2, 3)).clamp_min(1e-12) * available
    result = torch.where(second, 0.0, gap)
    result[(*index, rows1, columns1)] = added
    return limit * result / _norm(result, (1, 2, 3)).clamp_min(1e-12)


def _window(top: Tensor, left: Tensor, side: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (n, 1, h, w) of a window and its rows (n, 1, side, 1) and columns (n, 1, 1, side)."""
    step = torch.arange(side, device=top.device)
    mask = _in_window(h, top, side)[:, None, :, None] & _in_window(w, left, side)[:, None, None, :]
    return mask, (top[:, None] + step)[:, None, :, None], (left[:, None] + step)[:, None, None, :]


def _norm(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(t, dim=axes, keepdim=True)
    return result


@lru_cache(maxsize=64)
def bump(side: int) -> Tensor:
    """eta of eq. 2, (side, side) float64 of norm 1: a hill in the upper half and a hollow in the lower half."""
    upper = side // 2
    hill = torch.zeros(side, side, dtype=torch.float64)
    if upper:
        hill[:upper] = _hill(upper, side)
    hill[upper:] = -_hill(side - upper, side)
    unit: Tensor = hill / hill.norm()
    return unit


def _hill(h: int, w: int) -> Tensor:
    """sum over k = d + 1 ... max(h, w) // 2 + 1 of 1 / k^2, d the distance to the middle in whole steps; norm 1."""
    rows, columns = (torch.arange(h) - h // 2).abs(), (torch.arange(w) - w // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :])
    steps = torch.arange(1, max(h, w) // 2 + 2, dtype=torch.float64)
    tail = (1 / steps**2).flip(0).cumsum(0).flip(0)
    hill = tail[distance]
    unit: Tensor = hill / hill.norm()
    return unit
