"""The proposals of the Square attack: squares of one colour for l_inf, moved and added bumps for l_2."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hsat.attacks.placing import beside

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the area of the squares is halved; section 5 of arXiv:1912.00049."""


def area_at(query: int, queries: int, first: float) -> float:
    """Share of the image that a square covers at proposal `query` = 0, 1, ... of `queries`."""
    place = query * 10_000 // queries
    return first / 2.0 ** sum(place > mark for mark in HALVINGS)


def side_of(area: float, h: int, w: int, *, bumps: bool) -> int:
    """The whole number nearest to sqrt(area h w), at least 1 and at most the image; for bumps odd and at least 3."""
    side = max(round(math.sqrt(area * h * w)), 1)
    if bumps:
        side = max(side, 3)
        side += 1 - side % 2
    return min(side, h, w)


def corner(u: Tensor, size: int, side: int) -> Tensor:
    """First row or column of a window, 0 ... size - side, from u in [0, 1)."""
    return (u * (size - side + 1)).long().clamp(max=size - side)


def signs(u: Tensor) -> Tensor:
    """-1 or 1 from u in [0, 1)."""
    return torch.where(u < 0.5, -1.0, 1.0)


def stripes(u: Tensor) -> Tensor:
    """First l_inf direction: vertical stripes one pixel wide, each of its own sign; u (n, c, 1, w)."""
    return signs(u)


def square(u: Tensor, like: Tensor, side: int) -> Tensor:
    """Algorithm 2: one square per image with one sign per channel, zero elsewhere; u (n, 2 + c)."""
    h, w = like.shape[2:]
    top, left = corner(u[:, 0], h, side), corner(u[:, 1], w, side)
    rows, columns = _within(h, top, side), _within(w, left, side)
    colours = signs(u[:, 2:])[:, :, None, None].to(like.dtype)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], colours, 0.0)


def _within(size: int, first: Tensor, side: int) -> Tensor:
    place = torch.arange(size, device=first.device) - first[:, None]
    return (place >= 0) & (place < side)


def tiles(u: Tensor, like: Tensor) -> Tensor:
    """First l_2 direction: bumps side by side, a fifth of the shorter side each, with signs u (n, c, tiles)."""
    h, w = like.shape[2:]
    side = max(min(h, w) // 5, 1)
    down, across = h // side, w // side
    sign = signs(u).to(like.dtype).reshape(len(u), -1, down, across)
    pattern = beside(bump(side), like, like.dtype)
    grid = sign.repeat_interleave(side, 2).repeat_interleave(side, 3) * pattern.repeat(down, across)
    result = torch.zeros_like(like)
    top, left = (h - down * side) // 2, (w - across * side) // 2
    result[:, :, top : top + down * side, left : left + across * side] = grid
    return result


def count_tiles(h: int, w: int) -> int:
    """How many bumps `tiles` lays out."""
    side = max(min(h, w) // 5, 1)
    return (h // side) * (w // side)


def moved_mass(u: Tensor, gap: Tensor, eps: float | Tensor, side: int) -> Tensor:
    """Algorithm 3: the perturbation `gap` with the mass of a second window moved to a bump in the first; u (n, 5 + c).

    Each channel of the first window becomes (old direction + signed bump), scaled to the norm that both windows had
    together plus a fair share of the budget that is not used up; the second window becomes zero.  As in AutoAttack the
    norm of the windows is taken over all channels (in the paper over each one) and the sum is scaled back to eps.
    """
    limit = beside(eps, gap, gap.dtype) if isinstance(eps, Tensor) else gap.new_full((), eps)
    n, c, h, w = gap.shape
    first, rows1, columns1 = _window(corner(u[:, 0], h, side), corner(u[:, 1], w, side), side, h, w)
    second, _, _ = _window(corner(u[:, 2], h, side), corner(u[:, 3], w, side), side, h, w)
    unused = (limit**2 - _norm(gap, (1, 2, 3)) ** 2).clamp_min(0)
    available = (_norm(torch.where(first | second, gap, 0.0), (1, 2, 3)) ** 2 + unused / c).sqrt()
    index = torch.arange(n, device=gap.device)[:, None, None, None], torch.arange(c, device=gap.device)[:, None, None]
    old = gap[(*index, rows1, columns1)]
    pattern = beside(bump(side), gap, gap.dtype)
    turned = torch.where((u[:, 4] < 0.5)[:, None, None, None], pattern, pattern.T)
    added = signs(u[:, 5:])[:, :, None, None].to(gap.dtype) * turned + old / _norm(old, (2, 3)).clamp_min(1e-12)
    added = added / _norm(added, (2, 3)).clamp_min(1e-12) * available
    result = torch.where(second, 0.0, gap)
    result[(*index, rows1, columns1)] = added
    return limit * result / _norm(result, (1, 2, 3)).clamp_min(1e-12)


def _window(top: Tensor, left: Tensor, side: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (n, 1, h, w) of a window and its rows (n, 1, side, 1) and columns (n, 1, 1, side)."""
    step = torch.arange(side, device=top.device)
    mask = _within(h, top, side)[:, None, :, None] & _within(w, left, side)[:, None, None, :]
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
