"""The Square attack: random search that asks for values only, never for a gradient."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from hsat.attacks import square_windows as windows
from hsat.attacks.calling import Ascent, check_counts, check_number, check_threat
from hsat.attacks.gradient import name_images
from hsat.attacks.running import Climb, Escape, Run, shaped, wide
from hsat.attacks.starts import Noise
from hsat.attacks.threat import L2
from hsat.types import ThreatModel

BLOCK = 64
"""Proposals whose random numbers are drawn at once."""


@dataclass(frozen=True, repr=False)
class Square(Ascent):
    """Square attack: random squares on the perturbation, kept image by image where the value rises.

    Andriushchenko et al., arXiv:1912.00049, algorithm 1, with the proposals of algorithm 2 for Linf (from vertical
    stripes of +-eps) and of algorithm 3 for L2 (from a grid of bumps).  Other threat models get those of Linf,
    projected; one that confines another, as Masked does, those of the inner one.
    The objective is asked for values only: it may be a remote service, or not differentiable.  The natural one is
    `margin`, which needs nothing but scores.
    queries: how often it is asked per restart, counted in `forwards` (`success`, where given, asks on its own).
    area: share of the image that a square covers at first, p of the paper, halved after 10, 50, 200, 500, 1000, 2000,
    4000, 6000 and 8000 of 10,000 queries, in proportion for other numbers; the paper's 0.05 is for 224 x 224 pixels,
    small images want more (AutoAttack takes 0.8).
    Each image has squares of its own, with `ids` from its own id; the published code draws one square per batch.  In
    L2 windows hand on their norm over all channels, as in AutoAttack; by the paper, channel by channel, it is weaker.
    `start` replaces the first restart's stripes or grid.  A scalar objective is one value for the batch: a proposal is
    then kept or dropped for all images together.  `stationary` and `zero_gradient` of the result are zero.
    Raises FloatingPointError, naming the images, for values that are not finite.
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

    def _climb(self) -> Climb:
        return Climb(
            threat=self.threat,
            step_size=self.threat.eps,
            steps=self.queries,
            random_start=True,
            restarts=self.restarts,
            gradient=False,
            first=self._first,
            path=self._path,
        )

    def _first(self, run: Run, restart: int) -> Tensor:
        """Stripes for Linf, a grid of bumps for L2, at full size."""
        noise = _noise(run, restart, "first")
        c, h, w = run.x.shape[1:]
        x, eps = run.x.to(run.work), shaped(run.climb.threat.eps, run.x.to(run.work))
        if not _is_l2(run.climb.threat):
            direction = windows.stripes(noise.uniform(c, 1, w, like=x)).to(x.dtype)
        else:
            grid = windows.tiles(noise.uniform(c, windows.count_tiles(h, w), like=x), x)
            direction = run.climb.threat.ascent(grid)
        return run.project(x + eps * direction)

    def _path(self, run: Run, y: Tensor, escape: Escape | None, restart: int) -> tuple[Tensor, Tensor | None]:
        """One restart: the best points and their values."""
        value = run.value(y)
        run.start_value = value if run.start_value is None else run.start_value
        best, noise = _checked(run, value), _noise(run, restart, "squares")
        drawn, u = 2 + run.x.shape[1] + 3 * _is_l2(run.climb.threat), y[:0]
        for query in range(self.queries - 1):
            if run.stop_early(y):
                break
            if query % BLOCK == 0:
                u = noise.uniform(BLOCK, drawn, like=y)
            proposed = self._proposal(run, y, u[:, query % BLOCK], query)
            value = _checked(run, run.value(torch.where(wide(run.done), y, proposed)))
            rises = (value > best) & ~run.done
            best = torch.where(rises, value, best)
            y = torch.where(wide(rises), proposed, y)
        return y, best if run.per_image or len(run.x) == 0 else best[0]

    def _proposal(self, run: Run, y: Tensor, u: Tensor, query: int) -> Tensor:
        h, w = y.shape[2:]
        l2, eps = _is_l2(run.climb.threat), shaped(run.climb.threat.eps, y)
        side = windows.side_of(windows.area_at(query, self.queries, self.area), h, w, bumps=l2)
        if not l2:
            return run.project(y + 2 * eps * windows.square(u, y, side))
        x = run.x.to(run.work)
        return run.project(x + windows.moved_mass(u, y - x, eps, side))


def _noise(run: Run, restart: int, purpose: str) -> Noise:
    return Noise(len(run.x), generator=run.generator, ids=run.ids, restart=restart, purpose=purpose)


def _checked(run: Run, value: Tensor) -> Tensor:
    """Values (n,), finite but for images that are finished."""
    value = value.expand(len(run.x))
    bad = ~value.isfinite() & ~run.done
    run.bad |= bad
    if value.device.type == "cpu" and bool(bad.any()):
        raise FloatingPointError(f"the objective is not finite for images {name_images(bad)} of the batch")
    return value


def _is_l2(threat: Any) -> bool:
    while not isinstance(threat, L2) and isinstance(getattr(threat, "threat", None), ThreatModel):
        threat = threat.threat
    return isinstance(threat, L2)
