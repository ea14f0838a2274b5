"""Slides as bags of embeddings: bags of a table, their scores, and the mean of the patches' scores as a decision."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsat.classifiers.base import positive_softmax, raise_winner
from hsat.classifiers.decision_model import HoldsTensors
from hsat.fingerprints import fingerprint_state, fingerprint_table, tensor_bytes
from hsat.types import EmbeddingTable, FittedClassifier, SlideClassifier, align_labels
from hsat.types.precision import widest_dtype


class SlideBag(NamedTuple):
    """The patches of one slide.

    Attributes:
        rows: (n, d) their embeddings.
        slide: The slide's id.
        patient: The patient's id.
        label: Its class: the table's `slide_label`, else the class that all its patches have.
    """

    rows: np.ndarray
    slide: int
    patient: int
    label: int


def bags_of(table: EmbeddingTable, *, reads: Literal["unit", "raw"] = "raw") -> Iterator[SlideBag]:
    """The slides of a table in ascending order of their ids, each with its patches in the order of the rows.

    Args:
        table: Embeddings of patches.
        reads: "raw": as the encoder gave them; "unit": the unit rows.

    Yields:
        One bag per slide.

    Raises:
        ValueError: For a table without lengths where raw rows are asked for, and for a slide without
            `slide_label` whose patches have several labels, naming it.
    """
    rows = table.raw() if reads == "raw" else table.z
    for slide in np.unique(table.slide):
        at = np.flatnonzero(table.slide == slide)
        stated = -1 if table.slide_label is None else int(table.slide_label[at[0]])
        labels = sorted(set(table.label[at].tolist())) if stated < 0 else [stated]
        if len(labels) > 1:
            names = [table.class_names[label] for label in labels]
            raise ValueError(
                f"slide {slide} holds patches of the classes {names}; a slide has one class, which a column slide_label"
                " of the cohort can say"
            )
        yield SlideBag(np.asarray(rows[at]), int(slide), int(table.patient[at[0]]), labels[0])


def bag_scores(classifier: SlideClassifier, bag: Tensor) -> Tensor:
    """Class scores of a slide: the classifier's own where it has some, else the softmax of its logits.

    Args:
        classifier: Any slide classifier.
        bag: (n, d) embeddings of the slide's patches.

    Returns:
        (classes,) float64 (float32 on devices without it) that sum to one; the highest is the decision.
    """
    own = getattr(classifier, "scores", None)
    if own is not None:
        scores: Tensor = own(bag)
        return scores
    return softmax_scores(classifier.logits(bag))


def softmax_scores(logits: Tensor) -> Tensor:
    """Softmax of the logits (classes,) of a slide, float64 where there is such a thing; the winner stays the winner."""
    wide = positive_softmax(logits.to(widest_dtype(logits.device))[None])
    return raise_winner(wide, logits.detach().argmax()[None])[0]


def predict_slides(classifier: SlideClassifier, table: EmbeddingTable) -> np.ndarray:
    """Class scores of the slides of a table.

    Args:
        classifier: Any slide classifier, on the CPU.
        table: Embeddings of patches; its classes are matched by name.

    Returns:
        (slides, classes) float64, by ascending slide id.

    Raises:
        ValueError: As `bags_of` does, and for a class of the table that the classifier does not know.
    """
    align_labels(table.label, table.class_names, classifier.class_names)
    with torch.no_grad():
        scores = [
            bag_scores(classifier, torch.from_numpy(np.array(bag.rows))).double().numpy()
            for bag in bags_of(table, reads=classifier.reads)
        ]
    return np.stack(scores)


@dataclass(frozen=True, eq=False, repr=False)
class MeanPooling:
    """The decision of a slide by the mean of its patches' class scores, as `hsat.eval.pool` takes it.

    The logit of a class is the log of its mean score; with p_ic the softmax of the patches' logits it is
    log mean_i p_ic, so that margins are those of `hsat.attacks.aggregate_margin` and do not vanish where all patches
    agree.  For a kNN vote, whose scores can be zero, p_ic comes from its logits, in which a class without a neighbour
    takes part; the highest logit is the decision by the votes all the same.

    Args:
        classifier: A fitted classifier of patches, such as KNNClassifier(k=20).fit(bank).

    Attributes:
        classifier: The classifier of patches.

    Raises:
        TypeError: For a classifier that is not fitted.

    Example:
        >>> from hsat.classifiers import NearestCentroid
        >>> ids = np.arange(2)
        >>> bank = EmbeddingTable(np.eye(2), ids, ids, ids, ids, class_names=("hgg", "normal"))
        >>> slide = MeanPooling(NearestCentroid(temperature=1.0).fit(bank))
        >>> slide.scores(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).numpy().round(3)
        array([0.577, 0.423])
    """

    classifier: FittedClassifier

    def __post_init__(self) -> None:
        if not isinstance(self.classifier, FittedClassifier):
            raise TypeError(
                f"MeanPooling needs a fitted classifier of patches, such as KNNClassifier(k=20).fit(bank);"
                f" got {self.classifier!r}"
            )

    def __repr__(self) -> str:
        settings = getattr(self.classifier, "settings", None)
        return f"MeanPooling({type(self.classifier).__name__ if settings is None else repr(settings)})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return self.classifier.class_names

    @property
    def reads(self) -> Literal["unit", "raw"]:
        """What the classifier of patches reads."""
        return self.classifier.reads

    def logits(self, bag: Tensor) -> Tensor:
        """The log of the mean scores; see the class.

        Args:
            bag: (n, d) embeddings of the slide's patches.

        Returns:
            (classes,) float64 (float32 on devices without it); the highest is the decision.
        """
        wide = bag.to(widest_dtype(bag.device))
        pooled = self.classifier.logits(wide).log_softmax(1).logsumexp(0) - math.log(len(bag))
        with torch.no_grad():
            winner = self.scores(bag).argmax()
        return raise_winner(pooled[None], winner[None])[0]

    def scores(self, bag: Tensor) -> Tensor:
        """The mean of the patches' class scores.

        Args:
            bag: (n, d) embeddings of the slide's patches.

        Returns:
            (classes,) float64 (float32 on devices without it) that sum to one.
        """
        return self.classifier.scores(bag.to(widest_dtype(bag.device))).mean(0)

    def representation(self, bag: Tensor) -> Tensor:
        """The mean of the patches' embeddings, as unit rows where the classifier reads these.

        Args:
            bag: (n, d) embeddings of the slide's patches.

        Returns:
            (d,).
        """
        return (F.normalize(bag, dim=1) if self.reads == "unit" else bag).mean(0)

    def fingerprint(self) -> str:
        """SHA-256, as hex, of all that decides what it computes."""
        digest, fitted = hashlib.sha256(repr(self).encode()), self.classifier
        table = getattr(fitted, "table", None)
        if isinstance(table, EmbeddingTable):  # of a kNN, also where its bank lies on the disk
            digest.update(fingerprint_table(table).encode())
        elif isinstance(fitted, HoldsTensors):
            for name, tensor in fitted.tensors().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor_bytes(tensor))
        if isinstance(fitted, nn.Module):
            digest.update(fingerprint_state(fitted).encode())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same with the classifier's tensors on a device.

        Args:
            device: Where embeddings will be.

        Returns:
            The slide classifier there.
        """
        moved = self.classifier.to(device)
        return self if moved is self.classifier else type(self)(moved)
