"""Whether a function gives an image the same embedding whatever stands beside it, which a module in training mode does
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hsat.types import EmbeddingFunction, HierarchicalBatch

_IMAGES = 4
_ROUNDING, _COARSE = 5e-3, 5e-2  # share of a row's length, in float32 or wider, and in 16 bits
_BATCH_NORM = "more than 1 value per channel"  # what BatchNorm in training mode says of a single image
_CAUSE = (
    "call .eval() on the module inside, which is probably in training mode (BatchNorm, dropout) and whose running"
    " statistics change meanwhile"
)


def find_instability(layer: EmbeddingFunction, loaders: Sequence[object], device: torch.device) -> str:
    """How the embeddings of a few images differ from call to call or with the batch; "" where they do not.

    The random state stays as it was.  Loaders that can be read only once are not asked for images.

    Args:
        layer: Images -> embeddings.
        loaders: The first that gives images is asked.
        device: Where the images go.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images = next((found for one in loaders if (found := _first_images(one)) is not None), None)
        return "" if images is None else describe_instability(layer, images.to(device))


def describe_instability(layer: EmbeddingFunction, images: Tensor) -> str:
    """How the embeddings of the same images differ, with the likely cause; "" where they do not by more than rounding.

    Args:
        layer: Images -> embeddings.
        images: (n, c, h, w); with one image, only two calls are compared.
    """
    try:
        with torch.no_grad():
            whole, again = layer(images), layer(images)
            part = layer(images[: max(1, len(images) // 2)])
    except (RuntimeError, ValueError, TypeError) as error:  # anything but this is for the evaluation to report
        return f"the embedding of an image depends on the others of its batch: {_CAUSE}" * (_BATCH_NORM in str(error))
    if not all(isinstance(rows, Tensor) and rows.ndim == 2 and rows.isfinite().all() for rows in (whole, again, part)):
        return ""
    coarse = whole.dtype.itemsize < 4 or torch.is_autocast_enabled(whole.device.type)
    tolerance = _COARSE if coarse else _ROUNDING
    if (gap := _difference(whole, again)) > tolerance:
        return f"embeddings of the same images differ from call to call, by {gap:.1%} of their length: {_CAUSE}"
    if (gap := _difference(whole[: len(part)], part)) > tolerance:
        return f"the embedding of an image depends on the others of its batch, by {gap:.1%} of its length: {_CAUSE}"
    return ""


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest distance of two rows (n, d), as a share of the row's length."""
    one, other = one.double(), other.double()
    return float(((one - other).norm(dim=1) / one.norm(dim=1).clamp(min=1e-12)).max())


def _first_images(loader: object) -> Tensor | None:
    """A few images (n, c, h, w) of a loader that can be read again; None of others."""
    source: Any = loader
    while hasattr(source, "source"):  # plain batches
        source = source.source
    batch: Any = None
    if isinstance(source, DataLoader):
        try:
            rows = range(min(_IMAGES, len(source.dataset)))  # type: ignore[arg-type]
            batch = source.collate_fn([source.dataset[row] for row in rows])
        except Exception:  # what cannot be read is the loader's to report
            return None
    elif isinstance(source, Sequence) and len(source):
        batch = source[0]
    images = batch.images if isinstance(batch, HierarchicalBatch) else batch
    images = images[0] if isinstance(images, tuple | list) and images else images
    return images[:_IMAGES] if isinstance(images, Tensor) and images.ndim == 4 else None
