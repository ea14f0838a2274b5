"""The decision on a slide as an objective over the images of some of its patches.

The embeddings of the other patches are constants, and the images go through the encoder in chunks whose activations are
computed again on the way back (`torch.utils.checkpoint`), so that memory does not grow with the slide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hsat.attacks.objectives import cosine_similarity
from hsat.types import EmbeddingFunction, SlideClassifier
from hsat.types.row_checks import check_rows

SlideTarget = Literal["decision", "cross_entropy", "own_decision", "representation"]
NEEDS_LABEL = ("decision", "cross_entropy")


def encode_in_chunks(encode: EmbeddingFunction, images: Tensor, *, chunk: int) -> Tensor:
    """Embeddings of images, `chunk` at a time; gradients are those of one piece, activations of one chunk at a time.

    Args:
        encode: Images (m, c, h, w) -> embeddings (m, d); the same numbers each time it is asked.
        images: (n, c, h, w), n at least 1.
        chunk: Images per pass.

    Returns:
        (n, d).
    """
    parts = []
    for part in torch.split(images, chunk):
        if part.requires_grad and len(images) > chunk:
            z: Tensor = checkpoint(encode, part, use_reentrant=False)
        else:
            z = encode(part)
        check_rows(z, len(part), "the encoder")
        parts.append(z)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class SlideObjective:
    """One number for a slide, as a function of the images of some of its patches; see `slide_objective`.

    Attributes:
        encode: Images -> embeddings.
        classifier: What decides about the slide.
        embeddings: (n, d) of all patches as they are.
        index: (m,) int64, the patches whose images are given.
        target: What the value is.
        label: The class that a margin or cross-entropy is about; None for a representation.
        reference: (e,) the representation of the slide as it is; None for other targets.
        chunk: Images per pass of the encoder.
    """

    encode: EmbeddingFunction
    classifier: SlideClassifier
    embeddings: Tensor
    index: Tensor
    target: SlideTarget
    label: int | None
    reference: Tensor | None
    chunk: int

    @property
    def stationary_at_clean(self) -> bool:
        """Whether the images as they are are a stationary point, as for any distance from themselves."""
        return self.target == "representation"

    def __call__(self, images: Tensor) -> Tensor:
        """The value, to be maximised.

        Args:
            images: (m, c, h, w), of the patches `index`.

        Returns:
            A scalar: a patch's part in it depends on all other patches.
        """
        return self.of_bag(self.bag(images))

    def of_bag(self, bag: Tensor) -> Tensor:
        """The value as a function of the embeddings of all patches.

        Args:
            bag: (n, d).

        Returns:
            A scalar.
        """
        if self.reference is not None:
            moved = _representation(self.classifier, bag).to(self.reference.dtype)
            return 1.0 - cosine_similarity(moved, self.reference)
        assert self.label is not None  # of all other targets
        logits = slide_logits(self.classifier, bag)
        if self.target == "cross_entropy":
            return -logits.log_softmax(0)[self.label]
        others = torch.cat((logits[: self.label], logits[self.label + 1 :]))
        return others.amax() - logits[self.label]

    def bag(self, images: Tensor) -> Tensor:
        """The embeddings of all patches, where those of the patches `index` are of these images.

        Args:
            images: (m, c, h, w).

        Returns:
            (n, d).
        """
        if len(images) != len(self.index):
            raise ValueError(f"the objective is about {len(self.index)} patches of the slide, got {len(images)} images")
        z = encode_in_chunks(self.encode, images, chunk=self.chunk)
        return self.embeddings.index_copy(0, self.index, z.to(self.embeddings.dtype))


def slide_objective(
    encode: EmbeddingFunction,
    classifier: SlideClassifier,
    embeddings: Tensor,
    *,
    target: SlideTarget = "decision",
    label: int | None = None,
    index: Tensor | None = None,
    chunk: int = 64,
) -> SlideObjective:
    """The decision on one slide as an objective of the images of all or some of its patches.

    It is a scalar: restarts are kept whole, and there is no `success` and no `.select`.

    Args:
        encode: Images (m, c, h, w) -> embeddings (m, d).
        classifier: What decides about the slide.
        embeddings: (n, d) of all patches of the slide as they are.
        target: "decision": the best other logit minus that of the true class, above 0 where the decision is wrong.
            "cross_entropy": of the true class.  Without labels, "own_decision": the margin away from what is decided
            about the slide as it is; "representation": one minus the cosine similarity of the slide's representation
            to that of the slide as it is.
        label: The true class, for the targets that need it.
        index: (m,) int64, the patches that the attack may alter, in the order of its images; None: all.
        chunk: Images that go through the encoder at a time.

    Returns:
        Images (m, c, h, w) of these patches -> a scalar.

    Raises:
        ValueError: For an unknown target, embeddings or an index of another form, a label that is missing or no class,
            and a classifier of one class.
        TypeError: For a classifier without a representation where that is the target.

    Example:
        Three patches whose embedding is their mean colour; the slide is decided by the sum:

        >>> from hsat.classifiers import MIL
        >>> class Sum(torch.nn.Module):
        ...     def forward(self, bag):
        ...         return bag.sum(0)
        >>> encode, images = lambda x: x.mean((2, 3)), torch.rand(3, 2, 4, 4)
        >>> third, classifier = torch.tensor([2]), MIL(Sum(), ("a", "b"))
        >>> objective = slide_objective(encode, classifier, encode(images), label=0, index=third)
        >>> objective(images[third]).shape
        torch.Size([])
    """
    if target not in get_args(SlideTarget):
        raise ValueError(f"unknown target {target!r}; choose one of {list(get_args(SlideTarget))}")
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(f"embeddings must be (n, d) of the n >= 1 patches of a slide, got {tuple(embeddings.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    n, embeddings = len(embeddings), embeddings.detach()
    index = torch.arange(n) if index is None else index
    if index.ndim != 1 or index.dtype != torch.int64 or len(torch.unique(index)) < len(index):
        raise ValueError("index must be (m,) int64 numbers of patches, each once")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise ValueError(f"index runs from {int(index.min())} to {int(index.max())}, but the slide has {n} patches")
    classes, reference = len(classifier.class_names), None
    if target in NEEDS_LABEL:
        if label is None or not 0 <= label < classes:
            raise ValueError(f"target={target!r} needs the slide's class, a number below {classes}; got {label!r}")
    elif target == "own_decision":
        with torch.no_grad():
            label = int(slide_logits(classifier, embeddings).argmax())
    else:
        label = None
        with torch.no_grad():
            reference = _representation(classifier, embeddings)
            reference = reference.to(torch.promote_types(reference.dtype, torch.float32))
    return SlideObjective(
        encode, classifier, embeddings, index.to(embeddings.device), target, label, reference, int(chunk)
    )


def slide_logits(classifier: SlideClassifier, bag: Tensor) -> Tensor:
    """The logits (classes,) of a bag (n, d), float32 or wider.

    Raises:
        ValueError: For logits of another shape, and where there is one class only.
    """
    classes = len(classifier.class_names)
    if classes < 2:
        raise ValueError(f"{classifier!r} has one class only, {classifier.class_names}: no decision can change")
    logits = classifier.logits(bag)
    if logits.shape != (classes,):
        raise ValueError(
            f"{classifier!r} must give the logits ({classes},) of one slide; got {tuple(logits.shape)} for a bag"
            f" {tuple(bag.shape)}. A classifier of patches becomes one of slides by hsat.classifiers.MeanPooling"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _representation(classifier: SlideClassifier, bag: Tensor) -> Tensor:
    function = getattr(classifier, "representation", None)
    if function is None:
        raise TypeError(
            f"{classifier!r} has no representation(bag) that an attack could move; without labels there is also"
            " target='own_decision'"
        )
    value: Tensor = function(bag)
    return value
