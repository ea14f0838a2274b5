"""A threat model that is confined to a part of the image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks.initialization import to_device_of
from hsat.attacks.threat import check_threat, kept, read_only
from hsat.types import ThreatModel


def _convert_mask(mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor of bools or of 0 and 1, got {type(mask).__name__}")
    if mask.ndim not in (2, 4) or mask.numel() == 0:
        raise ValueError(f"mask must be (h, w), (1, 1, h, w) or (n, 1, h, w); got shape {tuple(mask.shape)}")
    allowed = mask.detach() != 0
    if mask.dtype != torch.bool and not bool((mask.detach() == allowed).all()):
        raise ValueError("mask must hold bools, or nothing but 0 and 1: a pixel may change or it may not")
    return allowed.clone() if mask.ndim == 4 else allowed[None, None].clone()


@read_only("mask", _convert_mask)
@dataclass(frozen=True, repr=False, eq=False)
class Masked(ThreatModel):
    """Only the pixels where the mask is true may change; those follow another threat model.

    The feasible set is that of `threat`, met with "unmasked pixels are those of x"; the projection is its nearest
    point, as exact as that of `threat`: for Linf pixels do not know of each other, and for L2 the nearest point of the
    ball with some coordinates fixed is the ball's projection of the point whose fixed coordinates are already in place.
    `steepest_ascent` is the steepest direction among those that the mask allows.  A random start draws from `threat`
    and puts the unmasked pixels back (for L2 it is then not uniform in the smaller ball).

    Attributes:
        threat: Linf, L2, or any threat model whose feasible set does not grow when a pixel moves away from the
            image.
        mask: Bools (or 0 and 1), True where the attacker may write: (h, w) or (1, 1, h, w) for all images, (n, 1,
            h, w) one per image; a second axis of c gives each channel its own.  It is copied, compared and hashed
            by value.

    Raises:
        ValueError: For a mask of another shape than the images, naming both.
        TypeError: For a threat that is none.
    """

    threat: ThreatModel
    mask: Tensor

    def __post_init__(self) -> None:
        check_threat(self.threat)

    @property
    def eps(self) -> float | Tensor:  # type: ignore[override]
        """Size of the ball inside the mask."""
        return self.threat.eps

    @property
    def low(self) -> float:  # type: ignore[override]
        """Least pixel value, for messages."""
        return self.threat.low

    @property
    def high(self) -> float:  # type: ignore[override]
        """Largest pixel value, for messages."""
        return self.threat.high

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of `threat` with the unmasked pixels put back.

        Args:
            x: (n, c, h, w) images in the pixel range.
            generator: Source of noise; None is torch's global generator.

        Returns:
            (n, c, h, w) feasible points; dtype of x.
        """
        return torch.where(self._mask_for(x), self.threat.random_start(x, generator), self.clamp(x)[0])

    def steepest_ascent(self, grad: Tensor) -> Tensor:
        """The direction of `threat` for the gradient inside the mask; zero elsewhere.

        Args:
            grad: (n, c, h, w), the gradient of the objective.

        Returns:
            (n, c, h, w), zero outside the mask.
        """
        allowed = self._mask_for(grad)
        return torch.where(allowed, self.threat.steepest_ascent(torch.where(allowed, grad, 0.0)), 0.0)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest point to x_adv that `threat` allows and that differs from x inside the mask only.

        Args:
            x_adv: (n, c, h, w), anywhere.
            x: (n, c, h, w) clean images in the pixel range.

        Returns:
            (n, c, h, w), in x_adv's dtype.
        """
        return self._restrict(x_adv, self.clamp(x)[0], lambda y: self.threat.project(y, x))

    def projection_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a fixed x.

        Args:
            x: (n, c, h, w) clean images in the pixel range.

        Returns:
            x_adv -> `project(x_adv, x)`.
        """
        project = self.threat.projection_at(x)
        return lambda x_adv: self._restrict(x_adv, x, project)

    def clamp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As in `threat`.

        Args:
            x: (n, c, h, w) images.

        Returns:
            x clamped to the pixel range, and a 0-d bool: must the images be refused?
        """
        return self.threat.clamp(x)

    def select(self, index: Tensor) -> Masked:
        """The threat model of the images `index` of a batch.

        Args:
            index: (m,) int64, places in the batch.

        Returns:
            The threat model of these images, in this order.
        """
        mask = kept(self, "mask")
        return Masked(self.threat.select(index), mask[index.to(mask.device)] if len(mask) > 1 else mask)

    def _restrict(self, x_adv: Tensor, x: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        allowed = self._mask_for(x)
        dtype = torch.promote_types(x_adv.dtype, x.dtype)
        return torch.where(allowed, project(torch.where(allowed, x_adv.to(dtype), x.to(dtype))), x.to(dtype))

    def _mask_for(self, x: Tensor) -> Tensor:
        mask: Tensor = kept(self, "mask")
        own, wanted = mask.shape, x.shape
        if x.ndim != 4 or own[0] not in (1, len(x)) or own[1] not in (1, wanted[1]) or own[2:] != wanted[2:]:
            raise ValueError(
                f"mask of shape {tuple(own)} does not fit images of shape {tuple(wanted)}:"
                f" give (h, w) = {tuple(wanted[2:])}, or one mask per image, ({len(x)}, 1, h, w)"
            )
        return to_device_of(mask, x)

    def _key(self) -> tuple[object, ...]:
        mask = kept(self, "mask")
        return (self.threat, tuple(mask.shape), _digest(mask))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masked) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        mask = kept(self, "mask")
        share = float(mask.double().mean())
        text = f"tensor(shape={tuple(mask.shape)}, share={share:.4g}, sha256={_digest(mask)[:8]})"
        return f"Masked(threat={self.threat!r}, mask={text})"


def _digest(mask: Tensor) -> str:
    return hashlib.sha256(repr(tuple(mask.shape)).encode() + mask.cpu().contiguous().numpy().tobytes()).hexdigest()
