"""What decides about slides."""

from __future__ import annotations

from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SlideClassifier(Protocol):
    """A classifier of slides: the embeddings of all patches of a slide, a bag without order -> one decision.

    The decision is the highest logit; ties go to the lower class.  A classifier may offer more, which is used where it
    is there (and is not None):

    - `scores(bag)`: (classes,) class scores that sum to one and whose highest is the decision, where they are something
      else than the softmax of the logits.
    - `attention(bag)`: (n,) weights of the patches; by them an attack on a few patches chooses which.
    - `representation(bag)`: (e,), what stands for the slide before it is classified; attacks without labels may move
      it.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """What it decides from: unit rows, or the embeddings as the encoder gives them (of a table its `raw()`)."""

    def logits(self, bag: Tensor) -> Tensor:
        """Embeddings of the patches of one slide -> its logits, finite and differentiable.

        Args:
            bag: (n, d) embeddings as the encoder gives them, on the classifier's device; n at least 1.

        Returns:
            (classes,), finite, with gradients; float32 or wider.
        """

    def to(self, device: torch.device | str) -> Self:
        """The same classifier with its tensors on a device.

        Args:
            device: Where embeddings will be.

        Returns:
            The classifier there; the same object where nothing has to move.
        """
