"""The encoder: pixel normalisation, resizing, backbone and projection head behind one differentiable call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsat.fingerprints import fingerprint_state
from hsat.models.backbone_output import (
    OutputError,
    OutputTypeError,
    as_vectors,
    built_size,
    channel_axis,
    channel_axis_of_two,
    has_attribute,
    is_out_of_memory,
    pick_output,
)
from hsat.models.frozen import frozen
from hsat.models.metadata import LoadReport
from hsat.models.pixel_normalisation import (
    CALLER,
    NOBODY,
    PixelNormalisation,
    check_normalisation,
    standardise_images,
)

Features = Callable[[Tensor], Tensor]
PROBED_SIZES = (224, 96, 64, 32)


class Encoder(nn.Module):
    """Images (n, c, h, w) in [0, 1] -> unit rows (n, embedding_dim), with everything that happens to pixels inside.

    `features(x)` gives the backbone's (n, feature_dim) output as it is; `encoder(x)` sends it through `head` (none:
    the features themselves) and scales rows to unit length in float32 or wider; an all-zero row stays zero.
    Order: (x - mean) / std, or each image's own (`standardise_images`), bilinear resizing with antialiasing to
    `input_size` where the images differ from it, cast to the backbone's dtype, backbone.  All of it is differentiable,
    so a perturbation and its eps stay on the pixels that the caller passes.  mean and std are no part of the state
    dict.

    A backbone's output may be (n, d), or a map (n, d, h, w), which is averaged over h and w; anything else is an error
    that says what to do.  Build one with `build_encoder` or `wrap_encoder`.

    Attributes:
        backbone: The network that gives the features.
        head: The projection head, or None.
        mean: Pixel mean per channel, or None for pixels as they are.
        std: Pixel standard deviation per channel, or None.
        per_image: Whether mean and std are those of each channel of each image; `mean` and `std` are None then.
        pixels_stated_by: Who says that the weights were trained with this mean and std; "" where nobody does.
        input_size: (height, width) to which images are resized, or None.
        fixed_size: The one (height, width) that the backbone takes, or None.
        spec: What `build_encoder` needs to build the same encoder again, or None.
        weights_report: What was read from the file of its weights, or None.
        batchnorm_folded: Whether `fold_batchnorm` made it.
    """

    pixel_mean: Tensor | None
    pixel_std: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        *,
        feature_dim: int | None = None,
        head: nn.Module | None = None,
        embedding_dim: int | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        input_size: int | tuple[int, int] | None = None,
        features: str | int | Features | None = None,
        fixed_size: tuple[int, int] | None = None,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mean, self.std = check_normalisation(mean, std)
        if per_image and self.mean is not None:
            raise ValueError("per_image=True takes each image's own mean and std; leave mean and std out")
        self.per_image = per_image
        self.pixels_stated_by = CALLER if per_image or self.mean is not None else NOBODY
        self.input_size = check_size(input_size)
        self.fixed_size = fixed_size
        self.spec: dict[str, Any] | None = None
        self.weights_report: LoadReport | None = None
        self.batchnorm_folded = False
        self._feature_dim = feature_dim
        self._embedding_dim = embedding_dim
        self._features = features
        self._passed_sizes: set[tuple[int, int]] = set()
        self._channels_last: bool | None = None  # of feature maps: (n, h, w, d); None: no map was seen yet
        for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
            buffer = None if values is None else torch.tensor(values).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def fingerprint(self) -> str:
        """SHA-256 over the weights and over what the encoder does to pixels; see `hsat.fingerprints`."""
        own = ("per_image",) if self.per_image else ()
        return fingerprint_state(self, repr((self.mean, self.std, self.input_size, *own)))

    @property
    def pixels(self) -> PixelNormalisation:
        """Pixel normalisation, and who states it."""
        return PixelNormalisation(self.mean, self.std, self.pixels_stated_by, self.per_image)

    def attach_head(self, head: nn.Module, *, embedding_dim: int) -> None:
        """Put another head (n, feature_dim) -> (n, embedding_dim) in place of the present one.

        Args:
            head: The module.
            embedding_dim: Width of its output.
        """
        self.head = head
        self.spec = None
        self._embedding_dim = embedding_dim

    @property
    def feature_dim(self) -> int:
        """Width of `features`; where it was not given, that of the first forward pass or of black images."""
        if self._feature_dim is None:
            self._feature_dim = self._probe(self.features)
        return self._feature_dim

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings."""
        if self.head is None:
            return self.feature_dim
        if self._embedding_dim is None:
            self._embedding_dim = self._probe(self)
        return self._embedding_dim

    def features(self, x: Tensor) -> Tensor:
        """Backbone features (n, feature_dim), not normalised to unit length.

        Args:
            x: Images (n, c, h, w) in [0, 1].

        Returns:
            (n, feature_dim), with gradients to the images.

        Raises:
            TypeError: If x is no tensor of floats.
            ValueError: If x is not (n, c, h, w), has another number of channels than mean has, or another size than the
                backbone is built for.
        """
        images = self._prepare(x)
        if images is x:
            images = x.clone()  # a module that works in place would change the caller's images
        out = self._compute(images)
        features = as_vectors(out, len(x), channels_last=self._has_channels_last(out, images))
        if self._feature_dim is None:
            self._feature_dim = features.shape[1]
        elif features.shape[1] != self._feature_dim:
            raise ValueError(f"the backbone gave features of width {features.shape[1]}, expected {self._feature_dim}")
        return features

    def _compute(self, images: Tensor) -> object:
        """What the backbone, or the part of it that `features` names, gives; a size that it does not take is named."""
        compute: Callable[[Tensor], object] = self.backbone
        if callable(self._features):
            compute = self._features
        elif isinstance(self._features, str) and has_attribute(self.backbone, self._features):
            compute = attrgetter(self._features)(self.backbone)
        given = (images.shape[2], images.shape[3])
        try:
            out = compute(images)
            if not torch.compiler.is_compiling():
                self._passed_sizes.add(given)
        except (AssertionError, RuntimeError, ValueError) as error:
            built = built_size(self.backbone)
            if built in (None, given) or given in self._passed_sizes or is_out_of_memory(error):
                raise  # whatever it is, it is not the size
            raise ValueError(
                f"the backbone failed on {given[0]}x{given[1]} images and was built for {built[0]}x{built[1]} ({error})"
                f"; pass input_size={built[0] if built[0] == built[1] else built} (to wrap_encoder or build_encoder)"
                " to resize inside the encoder, or"
                " build the backbone for your size: build_encoder(..., image_size=...)"
            ) from error
        picks = isinstance(self._features, int) or (isinstance(self._features, str) and compute is self.backbone)
        return pick_output(out, self._features) if picks else out

    def _has_channels_last(self, out: object, images: Tensor) -> bool:
        """Whether a map is (n, h, w, d); found once, from its shape or by images of two sizes."""
        if not isinstance(out, Tensor) or out.ndim != 4:
            return False
        if self._channels_last is None:
            axis = channel_axis(out, images)
            if axis is None:
                axis = self._probe_channel_axis(images)
            self._channels_last = axis == 3
        return self._channels_last

    def _probe_channel_axis(self, images: Tensor) -> int:
        """The axis of a map that does not change with the size of the images."""
        height, width = images.shape[2:]
        maps: list[Tensor] = []
        for factor in (1, 2):
            black = images.new_zeros(1, images.shape[1], height * factor, width * 2 * factor)
            try:
                devices = [images.device] if images.device.type == "cuda" else []
                with frozen(self), torch.no_grad(), torch.random.fork_rng(devices):
                    out = self._compute(black)
            except Exception:  # whatever it cannot do with such a size
                break
            maps += [out] if isinstance(out, Tensor) else []
        return channel_axis_of_two(maps, type(self.backbone).__name__)

    def project(self, features: Tensor) -> Tensor:
        """Unit rows (n, embedding_dim) from backbone features (n, feature_dim); `encoder(x)` is this of `features(x)`.

        With it, one pass through the backbone gives both.

        Args:
            features: (n, feature_dim).

        Returns:
            (n, embedding_dim), rows of unit length; a zero row stays zero.
        """
        projected = features if self.head is None else self.head(features)
        if projected.dtype in {torch.float16, torch.bfloat16}:
            projected = projected.float()
        return F.normalize(projected, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings: unit rows (n, embedding_dim).

        Args:
            x: Images (n, c, h, w) in [0, 1].

        Returns:
            (n, embedding_dim), rows of unit length; a zero row stays zero.
        """
        return self.project(self.features(x))

    def extra_repr(self) -> str:
        """Name what happens to the pixels."""
        pixels = "per_image=True" if self.per_image else f"mean={self.mean}, std={self.std}"
        return f"{pixels}, input_size={self.input_size}"

    def _prepare(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"images must be a tensor (n, c, h, w), got {type(x).__name__}; write torch.as_tensor(images)"
            )
        if not x.dtype.is_floating_point:
            raise TypeError(f"images must be floats in [0, 1], got {x.dtype}; divide integers by their range")
        if x.ndim != 4:
            raise ValueError(f"images must be (n, c, h, w), got shape {tuple(x.shape)}; for one image write x[None]")
        if self.mean is not None and len(self.mean) not in {1, x.shape[1]}:
            raise ValueError(f"images have {x.shape[1]} channels, but mean and std have {len(self.mean)}")
        x = self._normalise(x)
        if self.input_size is not None and x.shape[2:] != self.input_size:
            x = F.interpolate(x, size=self.input_size, mode="bilinear", antialias=True, align_corners=False)
        if self.fixed_size is not None and x.shape[2:] != self.fixed_size:
            height, width = self.fixed_size
            raise ValueError(
                f"the backbone takes {height}x{width} images, got {x.shape[2]}x{x.shape[3]};"
                f" pass input_size={height if height == width else self.fixed_size} (to wrap_encoder or build_encoder)"
                " to resize inside the encoder"
            )
        dtype = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), x.dtype)
        return x.to(dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        if self.per_image:
            return standardise_images(x)
        if self.pixel_mean is None or self.pixel_std is None:
            return x
        if x.dtype == torch.float64:  # the buffers are float32: too coarse here
            mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            return (x - mean) / std
        return (x - self.pixel_mean) / self.pixel_std

    def _probe(self, function: Features) -> int:
        """Width of what function gives for black images, leaving modes, buffers and random numbers alone."""
        size = self.input_size or self.fixed_size or built_size(self.backbone)
        sizes = [size] if size is not None else [(side, side) for side in PROBED_SIZES]
        tensors = (*self.backbone.parameters(), *self.backbone.buffers())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        channels = self.channels
        errors: list[Exception] = []
        for height, width in sizes:
            black = torch.zeros(1, channels, height, width, device=device)
            try:
                with frozen(self), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    return function(black).shape[1]
            except (OutputError, OutputTypeError):
                raise  # no size would mend it
            except Exception as error:
                errors.append(error)
        raise ValueError(
            f"the width of the features could not be found by running {type(self.backbone).__name__} on black images"
            f" of {channels} channels, sides {', '.join(str(h) for h, _ in sizes)}: {errors[0]}."
            f" Pass feature_dim=, or input_size= if it needs one size"
        ) from errors[0]

    @property
    def channels(self) -> int:
        """Number of channels of the images: that of mean and std, else what the first convolution reads, else 3."""
        if self.mean is not None and len(self.mean) > 1:
            return len(self.mean)
        return next((m.in_channels for m in self.backbone.modules() if isinstance(m, nn.Conv2d)), 3)


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """input_size as (height, width)."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(side < 1 for side in sides):
        raise ValueError(f"input_size must be a positive side, or (height, width); got {size!r}")
    return sides[0], sides[1]
