"""An encoder and a classifier as one module from images to logits: what attacks on decisions need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsat.fingerprints import fingerprint_table, fingerprint_weights, tensor_bytes
from hsat.types import EmbeddingFunction, EmbeddingTable, FittedClassifier
from hsat.types.precision import widest_dtype
from hsat.types.row_checks import check_rows

Layer = Literal["features", "embedding"]

_ABSENT_CLASS = -1e3  # logit of the class that is put beside a single one, far below logits of usual temperatures


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

    Attributes:
        encoder: The encoder.
        layer: The layer that the classifier reads.
        wide: Whether logits are float64.

    Args:
        encoder: Images (n, c, h, w) in [0, 1] -> embeddings (n, d); a module or any function.
        fitted: The classifier; what its bank was embedded with is what `encoder` and `layer` have to be.
        layer: "features" reads `encoder.features` where there is one, else the call, as `embed` does; "embedding" reads
            the call.
        wide: Give float64 logits (float32 on devices without float64) for images of any dtype.  Without it logits have
            the dtype that other libraries expect, that of the encoder or float32, in which margins lose what is below
            1e-6: a search that compares margins (Auto-PGD, Square) may end at other images.

    Example:
        >>> from hsat.classifiers import Head
        >>> head = Head(nn.Linear(12, 2), class_names=("hgg", "normal"))
        >>> DecisionModel(nn.Flatten(), head).eval()(torch.rand(4, 3, 2, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self, encoder: EmbeddingFunction, fitted: FittedClassifier, *, layer: Layer = "features", wide: bool = False
    ) -> None:
        super().__init__()
        if layer not in ("features", "embedding"):
            raise ValueError(f"unknown layer {layer!r}; choose one of ['features', 'embedding']")
        self.encoder, self.layer, self.wide = encoder, layer, wide
        tensors = (*encoder.parameters(), *encoder.buffers()) if isinstance(encoder, nn.Module) else ()
        self._classifier = fitted.to(tensors[0].device) if tensors else fitted
        marker = torch.empty(0, device=tensors[0].device if tensors else None)
        self._device = marker.device
        self.register_buffer("device_marker", marker, persistent=False)  # says where a module without tensors is
        self._register_bank()
        self.training = encoder.training if isinstance(encoder, nn.Module) else False

    @property
    def fitted(self) -> FittedClassifier:
        """The classifier, with its tensors where the module is."""
        device = self.get_buffer("device_marker").device
        unchanged = all(self.get_buffer(name) is tensor for name, tensor in self._bank_tensors().items())
        if device != self._device or not unchanged:  # moved, or converted by `.half()`: take the exact values there
            self._classifier, self._device = self._classifier.to(device), device
            self._register_bank()
        return self._classifier

    def _register_bank(self) -> None:
        for name, tensor in self._bank_tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def _bank_tensors(self) -> dict[str, Tensor]:
        tensors = self._classifier.tensors() if isinstance(self._classifier, HoldsTensors) else {}
        return {f"bank_{name}": tensor for name, tensor in tensors.items()}

    def fingerprint(self) -> str:
        """SHA-256, as hex, over encoder, layer, settings and bank: no state_dict holds the last."""
        fitted = self.fitted
        about = [repr(getattr(fitted, "settings", fitted)), self.layer, self.wide, list(fitted.class_names)]
        if isinstance(self.encoder, nn.Module):
            about.append(fingerprint_weights(self.encoder))
        digest = hashlib.sha256(json.dumps(about).encode())
        if isinstance(table := getattr(fitted, "table", None), EmbeddingTable):
            digest.update(fingerprint_table(table).encode())
        else:
            for name, tensor in sorted(self._bank_tensors().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor_bytes(tensor))
        label = getattr(fitted, "label", None)
        digest.update(b"" if label is None else np.ascontiguousarray(label, dtype="<i8").tobytes())
        return digest.hexdigest()

    def embed(self, images: Tensor) -> Tensor:
        """The layer's embeddings, as the encoder gives them.

        Args:
            images: (n, c, h, w), in the range that the encoder takes.

        Returns:
            (n, d), differentiable.
        """
        z = self.layers()[self.layer](images)
        check_rows(z, len(images), "the encoder")
        return z

    def layers(self) -> dict[str, EmbeddingFunction]:
        """The encoder's layers by name: "features", and "embedding" where features are something else than the call."""
        features: Callable[[Tensor], Tensor] | None = getattr(self.encoder, "features", None)
        if callable(features):
            return {"features": features, "embedding": self.encoder}
        return {"features": self.encoder} if self.layer == "features" else {"embedding": self.encoder}

    def classify(self, z: Tensor) -> Tensor:
        """Logits of embeddings of the layer.

        A classifier of one class gets a second logit, -1000 or less and below its own, so that margins exist.

        Args:
            z: (n, d), as the encoder gives them.

        Returns:
            (n, classes), at least two columns, differentiable.
        """
        logits = self.fitted.logits(z.to(widest_dtype(z.device)) if self.wide else z)
        if logits.shape[1] > 1:
            return logits
        return torch.cat((logits, (logits.detach() - 1.0).clamp(max=_ABSENT_CLASS)), 1)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images, those of `classify`.

        Args:
            images: (n, c, h, w), in the range that the encoder takes.

        Returns:
            (n, classes), differentiable.
        """
        return self.classify(self.embed(images))

    def scores(self, images: Tensor) -> Tensor:
        """Class scores of images; zero for the second class of a classifier that has one.

        Args:
            images: (n, c, h, w), in the range that the encoder takes.

        Returns:
            (n, classes) in [0, 1]; rows sum to one.
        """
        scores = self.fitted.scores(self.embed(images))
        return scores if scores.shape[1] > 1 else F.pad(scores, (0, 1))
