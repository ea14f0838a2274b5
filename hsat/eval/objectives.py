"""What the attacks of an evaluation maximise: the margin of the decision, or the drift of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import AttackEnsemble, feature_drift, margin
from hsat.classifiers import DecisionModel
from hsat.embedding import Layer, encode, require_labels, select_layer
from hsat.eval.options import Target
from hsat.types import (
    Attack,
    DecisionObjective,
    EmbeddingFunction,
    FittedClassifier,
    HierarchicalBatch,
    Objective,
    align_labels,
)


def attacks_decision(target: Target, attack: Attack) -> bool:
    """Whether an attack of an evaluation is against the decision of its classifier; ensembles always are."""
    return target.objective == "decision" or isinstance(attack, AttackEnsemble)


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


class ObjectiveFactory:
    """Makes the objective of each batch.

    Args:
        encoder: The encoder that is attacked.
        target: What the attacks maximise.
        layer: The layer that the classifier reads.
        classifier: The classifier whose decision is measured; its tensors go to the images' device once.  None where
            nothing is about decisions.
    """

    def __init__(
        self, encoder: EmbeddingFunction, target: Target, layer: Layer, classifier: FittedClassifier | None
    ) -> None:
        self.branch, self.target = target.branch_of(encoder), target.objective
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

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What has a mode of its own and has to be frozen while it is attacked, beside the encoder: a trained head."""
        return (self._classifier,) if isinstance(self._classifier, nn.Module) else ()

    def labels_of(self, batch: HierarchicalBatch, class_names: Sequence[str]) -> np.ndarray:
        """The labels of a batch as indices of the classifier's classes, (n,); class_names: those of its loader."""
        labels = require_labels(batch)
        if self._classifier is None:
            return labels
        return align_labels(labels, class_names, self._classifier.class_names)

    def check_fits(self, clean: Tensor) -> None:
        """Raise ValueError unless the classifier can read embeddings (n, d) of the scored layer."""
        if self._classifier is None:
            return
        try:
            self._classifier.predict_proba(clean[:1])
        except ValueError as error:
            raise ValueError(
                f"the classifier cannot read the encoder's embeddings of width {clean.shape[1]} ({error}): its bank is"
                " that of another encoder or layer"
            ) from error

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
        if self._classifier is None:
            raise ValueError("there is no decision to attack without a classifier")
        device = str(labels.device)
        if device not in self._models:
            fitted = self._classifier.to(device)
            self._models[device] = DecisionModel(self._encoder, fitted, layer=self._layer, wide=True)
        return margin(self._models[device], labels)
