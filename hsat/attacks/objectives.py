"""What attacks maximise: drift from the clean embedding, the hierarchical loss, a classifier's error, anything else.

No objective owns or changes a model.  Wrap the model in `hsat.models.frozen` while you attack it: layers that behave
differently in training (dropout, batch statistics) would otherwise give every call another answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.margins import decision_is_wrong
from hsat.types import EmbeddingFunction, HierarchicalBatch, Levels, Objective
from hsat.types.row_checks import check_rows

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
Distance = Literal["cosine", "l2", "l1"]
DISTANCES = ("cosine", "l2", "l1")


@dataclass(frozen=True, eq=False)
class FeatureDrift:
    """Distance of each image's embedding to a fixed reference; see `feature_drift`."""

    encode: EmbeddingFunction
    reference: Tensor
    distance: Distance = "cosine"
    stationary_at_clean: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> distances (n,), float32 or wider."""
        z = self.encode(images)
        if z.shape != self.reference.shape:
            check_rows(z, len(images), "the encoder")
            raise ValueError(
                f"the encoder gave embeddings {tuple(z.shape)}, the reference has {tuple(self.reference.shape)}"
            )
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.reference.dtype)
            if self.distance == "cosine":
                return 1.0 - cosine_similarity(z, self.reference)
            gap = z - self.reference
            return gap.square().sum(1) if self.distance == "l2" else gap.abs().sum(1)

    def select(self, index: Tensor) -> FeatureDrift:
        """The same for the images `index` of the batch."""
        return FeatureDrift(self.encode, self.reference[index], self.distance)


def feature_drift(
    encode: EmbeddingFunction, x: Tensor, distance: Distance = "cosine", *, reference: Tensor | None = None
) -> FeatureDrift:
    """Label-free objective: how far the embedding of each image moves from that of the clean image.

    The clean images are a stationary point of all three distances, so attacks without a random start begin at a random
    point all the same (and count it).  Evaluation attack of HSAT, arXiv:2503.10629, section 3.

    Args:
        encode: Images (n, c, h, w) -> embeddings (n, d).
        x: (n, c, h, w) clean images, embedded once, here.
        distance: "cosine" (1 - cosine similarity), "l2" (squared distance) or "l1".
        reference: (n, d), the embeddings of the clean images where they are known already.

    Returns:
        Images -> distances (n,).

    Raises:
        ValueError: For an unknown distance or a reference of the wrong shape.

    Example:
        >>> x = torch.tensor([0.6, 0.8]).reshape(1, 1, 1, 2)
        >>> drift = feature_drift(lambda images: images.flatten(1), x)
        >>> drift(x.flip(3))  # 1 - 0.96
        tensor([0.0400])
    """
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; choose one of {DISTANCES}")
    if reference is None:
        with torch.no_grad():
            reference = encode(x)
        check_rows(reference, len(x), "the encoder")
    if reference.ndim != 2 or len(reference) != len(x):
        raise ValueError(f"the reference must be ({len(x)}, d), one row per image; got {tuple(reference.shape)}")
    return FeatureDrift(encode, reference.detach().to(torch.promote_types(reference.dtype, torch.float32)), distance)


def cosine_similarity(z: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity of rows (..., d) of one dtype, float32 or float64 and of any length; 0 for a row of zeros.

    Rows are divided by the power of two below their largest value first, as `supcon_loss` does: that loses no digit,
    and lengths neither overflow nor vanish.
    """
    integer, exponent = _EXPONENT[z.dtype]

    def scaled(rows: Tensor) -> Tensor:
        largest = rows.detach().abs().amax(-1, keepdim=True)
        power = (largest.view(integer) & exponent).view(z.dtype).clamp_min(torch.finfo(z.dtype).tiny)
        return rows / torch.where(largest == 0, 1.0, power)

    return F.cosine_similarity(scaled(z), scaled(reference), dim=-1)


def hierarchical(
    encoder: EmbeddingFunction, loss: Callable[[Tensor, Any], Any], batch: HierarchicalBatch | Levels
) -> Objective:
    """The hierarchical contrastive loss of a batch as a function of its images: HSAT's inner maximisation.

    arXiv:2503.10629, section 2.

    Args:
        encoder: Images (n, c, h, w) -> embeddings (n, d).
        loss: (embeddings, batch) -> a scalar, or terms with `.total`, for instance HiDiscLoss.
        batch: What the loss is called with: a batch, or its Levels.

    Returns:
        Images -> a scalar, because every image takes part in every other image's loss.

    Example:
        >>> from hsat.losses import HiDiscLoss
        >>> batch = HierarchicalBatch.from_grid(torch.rand(2, 1, 1, 2, 3, 4, 4))
        >>> objective = hierarchical(lambda images: images.flatten(1), HiDiscLoss(), batch)
        >>> objective(batch.images).shape
        torch.Size([])
    """

    def objective(images: Tensor) -> Tensor:
        terms = loss(encoder(images), batch)
        total: Tensor = terms if isinstance(terms, Tensor) else terms.total
        return total

    return objective


@dataclass(frozen=True, eq=False)
class Classification:
    """Cross-entropy of each image; see `classification`."""

    model: Callable[[Tensor], Tensor]
    labels: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> cross-entropy (n,)."""
        logits = self.model(images)
        check_rows(logits, len(images), "the model", columns="classes")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, self.labels, reduction="none")

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the decision, the highest logit with ties to the lower class, wrong?"""
        return decision_is_wrong(self.model, self.labels, images)

    def select(self, index: Tensor) -> Classification:
        """The same for the images `index` of the batch."""
        return Classification(self.model, self.labels[index])


def classification(model: Callable[[Tensor], Tensor], labels: Tensor) -> Classification:
    """Cross-entropy of a classifier against the true labels, one value per image; the untargeted attack.

    Args:
        model: Images (n, c, h, w) -> logits (n, classes), for instance a `hsat.classifiers.DecisionModel`.
        labels: (n,) int64, the true classes.

    Returns:
        A `DecisionObjective`: images -> cross-entropies (n,), float32 or wider.

    Example:
        >>> objective = classification(lambda images: images.flatten(1), torch.tensor([0]))
        >>> objective(torch.zeros(1, 1, 1, 2))  # log 2
        tensor([0.6931])
    """
    return Classification(model, labels)


def objective_from(model: Callable[[Tensor], Any], loss_fn: Callable[..., Tensor], *args: Any) -> Objective:
    """The objective images -> loss_fn(model(images), *args), for any model and loss of yours.

    Args:
        model: Images (n, c, h, w) -> anything.
        loss_fn: (what the model gives, *args) -> a scalar, or (n,), which promises that entry i depends on image i
            alone.
        args: Further arguments of the loss.

    Returns:
        The objective, to be maximised.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> objective = objective_from(lambda images: images.mean((1, 2, 3)), mse_loss, torch.zeros(2))
        >>> objective(torch.ones(2, 3, 4, 4))
        tensor(1.)
    """
    return lambda images: loss_fn(model(images), *args)
