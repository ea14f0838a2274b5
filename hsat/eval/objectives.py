"""What the attacks of an evaluation maximise: the margin of the decision, or the drift of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from hsat.attacks import feature_drift, margin
from hsat.classifiers import DecisionModel
from hsat.embedding import Layer, encode, select_layer
from hsat.eval.options import Target
from hsat.types import DecisionObjective, EmbeddingFunction, FittedClassifier, HierarchicalBatch, Objective


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
        self._reuse = target.objective == layer and self.branch is None
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
        reference = clean if self._reuse else encode(self._attacked, images)
        return feature_drift(self._attacked, images, "cosine", reference=reference)

    def decision(self, labels: Tensor) -> DecisionObjective:
        """The margin of the classifier for images of these labels (n,), on the device of the labels."""
        device = str(labels.device)
        if device not in self._models:
            self._models[device] = DecisionModel(self._encoder, self._classifier.to(device), layer=self._layer)
        return margin(self._models[device], labels)
