"""What the attacks of an evaluation maximise: the margin of the decision, or the drift of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks import feature_drift, margin
from hsat.classifiers import DecisionModel
from hsat.embedding import Layer, encode, select_layer
from hsat.eval.options import Target
from hsat.types import DecisionObjective, EmbeddingFunction, FittedClassifier, HierarchicalBatch, Objective

_NEVER_WINS = -1e3  # below any logit of a vote with a temperature above 0.001; in float32 a margin keeps 4 digits


class CleanLayers:
    """What the layers of an encoder say of clean images whose scored layer is known already.

    The embedding of `hsat.models.Encoder` is the projection of its features, which costs no pass through the backbone.
    Whether that holds for this encoder (somebody may have given it hooks or another forward) is looked at in the first
    batch, where both are computed and have to agree in every bit; where they do not, every batch is encoded.

    Args:
        encoder: The encoder.
        scored: The layer that is known.
    """

    def __init__(self, encoder: EmbeddingFunction, scored: str) -> None:
        self._encoder, self._scored = encoder, scored
        self._is_projection: bool | None = None  # not yet known

    def value(self, layer: str, images: Tensor, clean: Tensor) -> Tensor:
        """The layer at images (n, c, h, w), (n, d); clean: (n, d), the scored layer there."""
        chosen = select_layer(self._encoder, layer)
        if chosen == select_layer(self._encoder, self._scored):
            return clean
        projected = None
        if layer == "embedding" and self._is_projection is not False:
            projected = _projection(self._encoder, clean)
        if projected is not None and self._is_projection:
            return projected
        value = encode(chosen, images)
        self._is_projection = projected is not None and torch.equal(projected, value)
        return value


def _projection(encoder: EmbeddingFunction, features: Tensor) -> Tensor | None:
    """The embedding that hsat's own encoder makes of its features; None for other encoders."""
    from hsat.models import Encoder

    return encode(encoder.project, features) if isinstance(encoder, Encoder) else None


class OneClassModel(DecisionModel):
    """A decision model that knows one class only, beside a rival that never wins, so that it has a margin."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> logits (n, 2)."""
        return F.pad(super().forward(images), (0, 1), value=_NEVER_WINS)

    def scores(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> class scores (n, 2); rows sum to one."""
        return F.pad(super().scores(images), (0, 1))


def decision_model(encoder: EmbeddingFunction, classifier: FittedClassifier, layer: Layer) -> DecisionModel:
    """Images -> logits of at least two classes."""
    kind = OneClassModel if len(classifier.class_names) == 1 else DecisionModel
    return kind(encoder, classifier, layer=layer)


class ObjectiveFactory:
    """Makes the objective of each batch.

    Args:
        encoder: The encoder that is attacked.
        target: What the attacks maximise.
        layer: The layer that the classifier reads.
        classifier: The classifier whose decision is measured; its tensors go to the images' device once.
    """

    def __init__(self, encoder: EmbeddingFunction, target: Target, layer: Layer, classifier: FittedClassifier) -> None:
        self.branch = target.branch_of(encoder)
        self.target, self.class_names = target.objective, classifier.class_names
        self._target, self._classifier = target, classifier
        self._attacked = select_layer(encoder, layer if target.objective == "decision" else target.objective)
        self._clean_layers = CleanLayers(encoder, layer) if self.branch is None else None
        self._encoder, self._layer = encoder, layer
        self._models: dict[str, DecisionModel] = {}
        self._custom: Callable[[Tensor, HierarchicalBatch], Objective] | None = None

    def with_custom(self, custom: Callable[[Tensor, HierarchicalBatch], Objective]) -> ObjectiveFactory:
        """The same factory with objectives of the caller's own: (images, batch) -> objective.

        Labels of the batch are indices of the classifier's classes.
        """
        factory = copy.copy(self)
        factory._custom = custom
        return factory

    def objective(
        self, images: Tensor, labels: Tensor, clean: Tensor, batch: HierarchicalBatch | None = None
    ) -> Objective:
        """The objective of one batch.

        Args:
            images: (n, c, h, w), clean.
            labels: (n,) int64, indices of the classifier's classes, on the images' device.
            clean: (n, d), what the layer that is scored says of the images.
            batch: Where the images come from, for custom objectives.
        """
        if self._custom is not None and batch is not None:
            ids = batch.patch, batch.slide, batch.patient
            return self._custom(images, HierarchicalBatch(batch.images, *ids, labels.cpu()))
        if self._target.objective == "decision":
            return self.decision(labels)
        if self._clean_layers is None:  # the attacks see another branch than the one that is scored
            reference = encode(self._attacked, images)
        else:
            reference = self._clean_layers.value(self._target.objective, images, clean)
        return feature_drift(self._attacked, images, "cosine", reference=reference)

    def decision(self, labels: Tensor) -> DecisionObjective:
        """The margin of the classifier for images of these labels (n,), on the device of the labels."""
        device = str(labels.device)
        if device not in self._models:
            self._models[device] = decision_model(self._encoder, self._classifier.to(device), self._layer)
        return margin(self._models[device], labels)
