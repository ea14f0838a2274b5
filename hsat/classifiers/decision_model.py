"""An encoder and a classifier as one module from images to logits: what attacks on decisions need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hsat.types import EmbeddingFunction, FittedClassifier

Layer = Literal["features", "embedding"]


@runtime_checkable
class HoldsTensors(Protocol):
    """A fitted classifier whose tensors a module can keep as buffers."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that `logits` computes with, by name."""


class DecisionModel(nn.Module):
    """Images -> logits of a classifier of embeddings: what torchattacks, foolbox, ART and AutoAttack call a model.

    The highest logit is the classifier's decision.  The bank is held once, in non-persistent buffers: `.to(device)`
    moves it, and no state_dict holds it.  Conversions such as `.half()` change the encoder only; the bank keeps its
    float32 rows, so that the decisions stay.  A module starts in the mode of the encoder: call `.eval()`, as for any
    model that is attacked, or wrap it in `hsat.models.frozen`.

    Args:
        encoder: Images (n, c, h, w) in [0, 1] -> embeddings (n, d); a module or any function.
        fitted: The classifier; what its bank was embedded with is what `encoder` and `layer` have to be.
        layer: "features" reads `encoder.features` where there is one, else the call, as `embed` does; "embedding" reads
            the call.

    Attributes:
        encoder: The encoder.
        layer: The layer that the classifier reads.
    """

    def __init__(self, encoder: EmbeddingFunction, fitted: FittedClassifier, *, layer: Layer = "features") -> None:
        super().__init__()
        if layer not in ("features", "embedding"):
            raise ValueError(f"unknown layer {layer!r}; choose one of ['features', 'embedding']")
        self.encoder, self.layer = encoder, layer
        tensors = (*encoder.parameters(), *encoder.buffers()) if isinstance(encoder, nn.Module) else ()
        self._classifier = fitted.to(tensors[0].device) if tensors else fitted
        place = torch.empty(0, device=tensors[0].device if tensors else None)
        self._device = place.device
        self.register_buffer("place", place, persistent=False)  # tells where the module is, whatever the classifier is
        self._register_bank()
        self.training = encoder.training if isinstance(encoder, nn.Module) else False

    @property
    def fitted(self) -> FittedClassifier:
        """The classifier, with its tensors where the module is."""
        device = self.get_buffer("place").device
        known = all(self.get_buffer(name) is tensor for name, tensor in self._bank_tensors().items())
        if device != self._device or not known:  # moved, or converted by `.half()`: take the exact values there
            self._classifier, self._device = self._classifier.to(device), device
            self._register_bank()
        return self._classifier

    def _register_bank(self) -> None:
        for name, tensor in self._bank_tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def _bank_tensors(self) -> dict[str, Tensor]:
        held = self._classifier.tensors() if isinstance(self._classifier, HoldsTensors) else {}
        return {f"bank_{name}": tensor for name, tensor in held.items()}

    def embed(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> the layer's embeddings (n, d), as the encoder gives them."""
        return self.layers()[self.layer](images)

    def layers(self) -> dict[str, EmbeddingFunction]:
        """The encoder's layers by name: "features", and "embedding" where features are something else than the call."""
        features: Callable[[Tensor], Tensor] | None = getattr(self.encoder, "features", None)
        if callable(features):
            return {"features": features, "embedding": self.encoder}
        return {"features": self.encoder} if self.layer == "features" else {"embedding": self.encoder}

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> logits (n, classes).

        A classifier of one class gets a second logit, one below its own, so that margins exist.
        """
        logits = self.fitted.logits(self.embed(images))
        return logits if logits.shape[1] > 1 else torch.cat((logits, logits.detach() - 1.0), 1)

    def scores(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> class scores (n, classes); rows sum to one."""
        return self.fitted.scores(self.embed(images))
