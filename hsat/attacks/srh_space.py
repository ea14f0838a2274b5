"""The two recorded channels of SRH images as what an attacker moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.types import ThreatModel

CHANNELS = slice(1, 3)
"""Where CH2 and CH3 stand among the three channels that `srh_to_rgb` makes."""


@dataclass(frozen=True)
class RawChannels:
    """The space of raw SRH: the attacker moves CH2 and CH3, and the third channel follows through the graph.

    The variable is (n, 2, h, w) in [0, 1], counts / 65536; eps = 8/255 there is the same share of the 16-bit range as
    it is of the pixel range in the paper's setting, about 2056 counts.  The paper lets the attacker move all three
    channels freely, though one is computed from the other two; no file could hold such an image.

    Attributes:
        to_rgb: `hsat.data.srh_to_rgb`, from (n, 2, h, w) to (n, 3, h, w) = (CH3 - CH2 + 5000/65536, CH2, CH3).

    Raises:
        ValueError: For images that are no SRH images, that is, whose first channel is not what to_rgb makes of the
            other two.  Patches that a dataset resized are such images wherever the first channel was clamped: read
            them at their own size (image_size=None) and let the encoder resize (input_size=...).
    """

    to_rgb: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.to_rgb):
            raise TypeError(f"to_rgb must be hsat.data.srh_to_rgb or such a function, got {self.to_rgb!r}")

    def __repr__(self) -> str:
        return f"RawChannels({getattr(self.to_rgb, '__name__', repr(self.to_rgb))})"

    def encode(self, y: Tensor, x: Tensor) -> Tensor:
        """CH2 and CH3 of images y; x is checked to be made by to_rgb.

        Args:
            y: (n, 3, h, w) images.
            x: (n, 3, h, w) clean images.

        Returns:
            (n, 2, h, w).

        Raises:
            ValueError: For images x of another shape, or that to_rgb did not make, naming the first.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"SRH images have three channels, (n, 3, h, w); got shape {tuple(x.shape)}")
        made = self.to_rgb(x[:, CHANNELS])
        gap = (made.double() - x.double()).abs()
        if len(gap) and float(gap.max()) > max(1e-5, 4 * torch.finfo(x.dtype).eps):
            image = int(gap.flatten(1).amax(1).argmax())
            raise ValueError(
                f"image {image} of the batch is not what {self!r} makes of its second and third channel: they differ by"
                f" {float(gap.max()):.3g}. Raw attacks need SRH patches at their own size: read them with"
                " image_size=None and resize inside the encoder, build_encoder(..., input_size=...)"
            )
        return y[:, CHANNELS].contiguous()

    def decode(self, variable: Tensor, x: Tensor) -> Tensor:
        """to_rgb of the two channels; pixels whose channels are those of x are x.

        Args:
            variable: (n, 2, h, w), CH2 and CH3.
            x: (n, 3, h, w) clean images.

        Returns:
            (n, 3, h, w), differentiable in the variable.
        """
        same = (variable == x[:, CHANNELS]).all(1, keepdim=True)
        made = self.to_rgb(variable)
        return torch.where(same, x + (made - made.detach()), made)  # the value of x, with the gradient of made

    def check(self, threat: ThreatModel | None) -> None:
        """Refuse a range other than [0, 1]: to_rgb clamps what lies outside.

        Args:
            threat: Of the attack, or None.

        Raises:
            ValueError: For such a range.
        """
        if threat is not None and not 0.0 <= threat.low < threat.high <= 1.0:
            raise ValueError(f"raw channels lie in [0, 1]; the threat model's range is [{threat.low}, {threat.high}]")
