"""Where an attack begins: at the images, at a given point, or at a random point of the feasible set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsat.attacks.placing import beside
from hsat.types import ThreatModel


def image_seed(seed: int, image_id: int, restart: int, purpose: str = "") -> int:
    """63-bit seed of one image's noise; nothing else enters.  purpose: what is drawn, when it is not a start."""
    text = f"{seed}/{image_id}/{restart}{purpose and '/' + purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def random_start(
    x: Tensor,
    threat: ThreatModel,
    *,
    generator: torch.Generator | None,
    ids: Tensor | None,
    restart: int,
    inside: bool = False,
) -> Tensor:
    """A random feasible point for each image.  inside=True: x is known to lie in the pixel range; do not check again.

    Without ids the noise of the batch is drawn at once from `generator` (torch's global one if None).  With ids (n,)
    the noise of an image depends on the generator's initial seed, its id and the restart only, and no generator is
    advanced: batch size, order and rank do not matter.
    """
    return Noise(len(x), generator=generator, ids=ids, restart=restart).point(x, threat, inside=inside)


class Noise:
    """What one restart draws: for the batch at once, or with ids from a generator of each image's own.

    Without ids draws come from `generator` (torch's global one if None).  With ids (n,) those of an image depend on the
    generator's initial seed, its id, the restart, the purpose and how much was drawn before; no generator is advanced.
    """

    def __init__(
        self, n: int, *, generator: torch.Generator | None, ids: Tensor | None, restart: int, purpose: str = ""
    ) -> None:
        self.n, self.generator = n, generator
        self.own: list[torch.Generator] | None = None
        if ids is not None:
            seed = torch.initial_seed() if generator is None else generator.initial_seed()
            seeds = [image_seed(seed, image_id, restart, purpose) for image_id in ids.tolist()]
            self.own = [torch.Generator().manual_seed(s) for s in seeds]

    def point(self, x: Tensor, threat: ThreatModel, *, inside: bool = False) -> Tensor:
        """A random point of the feasible set around each image of x (n, c, h, w); `inside` as in `random_start`."""
        if self.own is None:
            return _start(threat, x, self.generator, inside=inside)
        points = [
            _start(threat_of(threat, torch.tensor([i])), x[i : i + 1], own, inside=inside)
            for i, own in enumerate(self.own)
        ]
        return torch.cat(points) if points else x

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """(n, *shape) float32 in [0, 1), on the device of `like`."""
        if self.own is None:
            home = like.device if self.generator is None else self.generator.device
            return beside(torch.rand((self.n, *shape), generator=self.generator, device=home), like)
        rows = [torch.rand(shape, generator=own) for own in self.own]
        return beside(torch.stack(rows) if rows else torch.zeros((0, *shape)), like)


def _start(threat: ThreatModel, x: Tensor, generator: torch.Generator | None, *, inside: bool) -> Tensor:
    draw = shortcut(threat, "start_inside", instead_of="start") if inside else None
    point: Tensor = (draw or threat.start)(x, generator)
    return point


def shortcut(threat: ThreatModel, name: str, *, instead_of: str) -> Callable[..., Any] | None:
    """The threat model's faster form of one of its methods; None if it has none, or a subclass changed the method."""
    homes = [next((c for c in type(threat).__mro__ if n in vars(c)), None) for n in (name, instead_of)]
    return getattr(threat, name) if homes[0] is not None and homes[0] is homes[1] else None


def threat_of(threat: ThreatModel, index: Tensor) -> ThreatModel:
    """The threat model of some images of a batch; one without `select` is taken to be the same for all images."""
    select = getattr(threat, "select", None)
    return threat if select is None else select(index)


def check_ids(ids: Tensor | None, n: int) -> None:
    """Raise unless ids is None or holds one integer per image."""
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise TypeError(f"ids must be a tensor of integers, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.shape != (n,):
        raise ValueError(f"ids must have shape ({n},), one per image; got {tuple(ids.shape)}")


def check_start(start: Tensor | None, x: Tensor) -> None:
    """Raise unless start is None or a point for every image."""
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must have the shape of the images, {tuple(x.shape)}; got {tuple(start.shape)}")
