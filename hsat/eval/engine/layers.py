"""The layers of an encoder, which do not compute twice what they have just computed."""

from __future__ import annotations

import torch
from torch import Tensor

from hsat.embedding import select_layer
from hsat.types import EmbeddingFunction


class Remembering:
    """A layer that answers the same images again, asked without a graph, from memory.

    Only the very same tensor, unchanged, counts as the same images: an attack asks for the value at its last point, and
    the evaluation for the embedding there, which is one pass through the network and not two.  Passes with a graph
    are never remembered.
    """

    def __init__(self, layer: EmbeddingFunction) -> None:
        self._layer = layer
        self._images: Tensor | None = None
        self._version = 0
        self._value: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> the layer's values (n, d)."""
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self._layer(images)
        if self._value is None or images is not self._images or images._version != self._version:
            self._images, self._version, self._value = images, images._version, self._layer(images)
        return self._value

    def recall(self, images: Tensor, value: Tensor) -> None:
        """Take it from the caller that this is the value at these images."""
        self._images, self._version, self._value = images, images._version, value


class Layers:
    """The layers of an encoder by name, each remembering its last images; see `select_layer`.

    Where the embedding is the projection of the features, as in hsat's own encoders, the two share one memory.
    """

    def __init__(self, encoder: EmbeddingFunction) -> None:
        self._encoder = encoder
        self._features = Remembering(select_layer(encoder, "features"))
        project = _projection(encoder)
        if select_layer(encoder, "features") is encoder:
            self._embedding: EmbeddingFunction = self._features
        elif project is not None:
            self._embedding = lambda images: project(self._features(images))
        else:
            self._embedding = Remembering(encoder)

    def select(self, layer: str) -> EmbeddingFunction:
        """The layer "features" or "embedding"; the same object every time.  ValueError for another name."""
        select_layer(self._encoder, layer)
        return self._features if layer == "features" else self._embedding


def _projection(encoder: EmbeddingFunction) -> EmbeddingFunction | None:
    """What makes the embedding from the features, where calling the encoder does exactly that and nothing else."""
    if not isinstance(encoder, torch.nn.Module):
        return None
    from hsat.models.encoder import Encoder as Ours

    if type(encoder) is not Ours or encoder._forward_hooks or encoder._forward_pre_hooks or "forward" in vars(encoder):
        return None
    return encoder.project
