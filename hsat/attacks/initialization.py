"""Where an attack begins: at the images, at a given point, or at a random point of the feasible set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from hsat.types import ThreatModel


def to_device_of(t: Tensor, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`t` on the device of the images, in `dtype` (None: its own).

    From the CPU to CUDA it goes through page-locked memory, so that neither the host nor the queued work waits.
    """
    if dtype is not None and t.device.type == "cpu":
        t = t.to(dtype)  # here, since a copy that converts on its way would leave page-locked memory
    if images.is_cuda and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(images.device, dtype, non_blocking=images.is_cuda)


def draw_noise(x: Tensor, generator: torch.Generator | None, source: Callable[..., Tensor]) -> Tensor:
    """Noise of the shape of x, drawn where the generator lives and moved to x; float32, or float64 for float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    device = x.device if generator is None else generator.device
    pinned = device.type == "cpu" and x.is_cuda  # page-locked: nothing waits for the copy
    noise = source(x.shape, generator=generator, device=device, dtype=dtype, pin_memory=pinned)
    return noise.to(x.device, non_blocking=pinned)


def image_seed(seed: int, image_id: int, restart: int, purpose: str = "") -> int:
    """63-bit seed of one image's noise; nothing else enters.  purpose: what is drawn, when it is not a start."""
    text = f"{seed}/{image_id}/{restart}{purpose and '/' + purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class NoiseSource:
    """What one restart draws: for the batch at once, or with ids from a generator of each image's own.

    Without ids draws come from `generator` (torch's global one if None).  With ids (n,) those of an image depend on the
    generator's initial seed, its id, the restart, the purpose and how much was drawn before; no generator is advanced.
    """

    def __init__(
        self, n: int, *, generator: torch.Generator | None, ids: Tensor | None, restart: int, purpose: str = ""
    ) -> None:
        self.n, self.generator = n, generator
        self.image_generators: list[torch.Generator] | None = None
        if ids is not None:
            seed = torch.initial_seed() if generator is None else generator.initial_seed()
            seeds = [image_seed(seed, image_id, restart, purpose) for image_id in ids.tolist()]
            self.image_generators = [torch.Generator().manual_seed(s) for s in seeds]

    def random_start(self, x: Tensor, threat: ThreatModel) -> Tensor:
        """A random point of the feasible set around each image of x (n, c, h, w), which lies in the pixel range."""
        if self.image_generators is None:
            return threat.random_start(x, self.generator)
        points = [
            threat.select(torch.tensor([i])).random_start(x[i : i + 1], generator)
            for i, generator in enumerate(self.image_generators)
        ]
        return torch.cat(points) if points else x

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """(n, *shape) float32 in [0, 1), on the device of `like`."""
        if self.image_generators is None:
            device = like.device if self.generator is None else self.generator.device
            return to_device_of(torch.rand((self.n, *shape), generator=self.generator, device=device), like)
        rows = [torch.rand(shape, generator=generator) for generator in self.image_generators]
        return to_device_of(torch.stack(rows) if rows else torch.zeros((0, *shape)), like)


def random_start(
    x: Tensor, threat: ThreatModel, *, generator: torch.Generator | None, ids: Tensor | None, restart: int
) -> Tensor:
    """A random feasible point for each image of x (n, c, h, w), which lies in the pixel range.

    Without ids the noise of the batch is drawn at once from `generator` (torch's global one if None).  With ids (n,)
    the noise of an image depends on the generator's initial seed, its id and the restart only, and no generator is
    advanced: batch size, order and rank do not matter.
    """
    return NoiseSource(len(x), generator=generator, ids=ids, restart=restart).random_start(x, threat)


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
