"""Pulling an image's embedding towards that of another patient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.objectives import cosine_similarity
from hsat.types import EmbeddingFunction, EmbeddingTable
from hsat.types.row_checks import check_labels, check_rows

Which = Literal["nearest", "farthest"]


@dataclass(frozen=True, eq=False)
class FeatureMatch:
    """Cosine similarity of each image's embedding to its target; see `match_features`."""

    encode: EmbeddingFunction
    targets: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> similarities (n,) in [-1, 1], float32 or wider."""
        z = self.encode(images)
        if z.shape != self.targets.shape:
            check_rows(z, len(images), "the encoder")
            raise ValueError(
                f"the encoder gave embeddings {tuple(z.shape)}, the targets are {tuple(self.targets.shape)}"
            )
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(z.dtype, self.targets.dtype)
            return cosine_similarity(z.to(dtype), self.targets.to(dtype))

    def select(self, index: Tensor) -> FeatureMatch:
        """The same for the images `index` of the batch."""
        return FeatureMatch(self.encode, self.targets[index])


def match_features(encoder: EmbeddingFunction, targets: Tensor) -> FeatureMatch:
    """Targeted objective: pull the embedding of each image towards a given one, such as another patient's.

    The feature adversaries of Sabour et al., arXiv:1511.05122, eq. 1, which minimise the Euclidean distance to the
    guide's features; here it is the cosine, since that is what kNN and the losses compare.

    Args:
        encoder: Images (n, c, h, w) -> embeddings (n, d).
        targets: (n, d), one embedding per image, of any length, such as `choose_guide_images` gives.

    Returns:
        Images -> cosine similarities to the targets (n,), to be maximised.

    Raises:
        ValueError: For targets of another shape, not finite, or of length zero.

    Example:
        >>> objective = match_features(lambda images: images.flatten(1), torch.tensor([[0.0, 2.0]]))
        >>> objective(torch.tensor([0.6, 0.8]).reshape(1, 1, 1, 2))
        tensor([0.8000])
    """
    if not isinstance(targets, Tensor) or targets.ndim != 2 or not targets.dtype.is_floating_point:
        form = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be floats (n, d), one embedding per image; got {form}")
    length = torch.linalg.vector_norm(targets.detach().double().cpu(), dim=1)
    if len(bad := ((length == 0) | ~length.isfinite()).nonzero().flatten()):
        raise ValueError(
            f"the target of image {int(bad[0])} is zero or not finite: it has no direction to pull towards"
        )
    return FeatureMatch(encoder, targets.detach().to(torch.promote_types(targets.dtype, torch.float32)))


def choose_guide_images(
    bank: EmbeddingTable, z: Tensor, *, labels: Tensor, patients: Tensor | None = None, which: Which = "nearest"
) -> Tensor:
    """For each embedding the nearest, or farthest, row of a bank that has another class and another patient, (n, d).

    Distance is the cosine on float32 products; ties go to the earlier row.

    Args:
        bank: Embeddings of other images.
        z: (n, d) embeddings of the images.
        labels: (n,) ints, their classes as indices of the bank's classes.
        patients: (n,), their patients; None where the bank is of another cohort, whose ids mean nothing here.
        which: "nearest" or "farthest".

    Returns:
        (n, d) float32 rows of the bank, on the device of z.

    Raises:
        TypeError: For labels that are no integers.
        ValueError: For embeddings, labels or patients that do not fit, and where the bank has no such row for an image,
            naming it.
    """
    if which not in ("nearest", "farthest"):
        raise ValueError(f"which must be 'nearest' or 'farthest', got {which!r}")
    if z.ndim != 2 or z.shape[1] != bank.z.shape[1]:
        raise ValueError(f"embeddings must be (n, {bank.z.shape[1]}) as the bank's are, got {tuple(z.shape)}")
    check_labels(labels, classes=len(bank.class_names))
    if patients is not None and patients.shape != labels.shape:
        raise ValueError(f"{len(labels)} labels but patients of shape {tuple(patients.shape)}; give one per image")
    rows = torch.tensor(bank.z).float().to(z.device)
    other = torch.tensor(bank.label).to(z.device) != labels.to(z.device)[:, None]
    if patients is not None:
        other &= torch.tensor(bank.patient).to(z.device) != patients.to(z.device)[:, None]
    if len(without := (~other.any(1)).nonzero().flatten()):
        raise ValueError(f"the bank has no row of another class and patient for image {int(without[0])}")
    with torch.no_grad():
        similarity = F.normalize(z.detach().float(), dim=1) @ rows.T
    if which == "nearest":
        return rows[similarity.masked_fill(~other, -math.inf).argmax(1)]
    return rows[similarity.masked_fill(~other, math.inf).argmin(1)]
