"""Votes of a classifier on noisy copies of an image: what randomised smoothing counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsat.attacks.initialization import image_seed
from hsat.embedding import encode
from hsat.types import EmbeddingFunction, FittedClassifier

Vote = Callable[[Tensor], np.ndarray]
"""Images (n, c, h, w), any floats -> class indices (n,) int64."""


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Settings of randomised smoothing (Cohen, Rosenfeld and Kolter, arXiv:1902.02918, CERTIFY).

    The smoothed classifier answers what the base classifier answers most often under Gaussian noise.

    Attributes:
        sigma: Standard deviation of the noise, above 0, in units of the pixel range.
        selection: Draws that choose the class (n0 of the paper), at least 1.
        samples: Fresh draws that bound its probability (n), at least 1.
        alpha: Probability with which a certificate may be wrong, in (0, 0.5).
        seed: Of the noise, together with the patch id and the number of the draw.
        chunk: Noisy images per pass.

    Raises:
        ValueError: For values outside these ranges.
    """

    sigma: float
    selection: int = 100
    samples: int = 1000
    alpha: float = 0.001
    seed: int = 0
    chunk: int = 128

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma must be above 0, in units of the pixel range; got {self.sigma}, try 0.25 or 0.1")
        for name in ("selection", "samples", "chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 0.5, got {self.alpha}; the paper takes 0.001")


def gaussian_noise(shape: tuple[int, ...], patch: int, draws: range, *, sigma: float, seed: int) -> Tensor:
    """Noise for one image, (len(draws), *shape) float32 on the CPU; draw j depends on (seed, patch, j) only."""
    rows = [
        torch.randn(shape, generator=torch.Generator().manual_seed(image_seed(seed, patch, draw))) for draw in draws
    ]
    return torch.stack(rows) * sigma


def count_votes(
    vote: Vote, images: Tensor, patch: Tensor, *, classes: int, draws: range, sigma: float, seed: int, chunk: int
) -> np.ndarray:
    """How often each class is voted for under noise, (n, classes) int64; each row sums to len(draws).

    images: (n, c, h, w).  patch: (n,) ids, which seed the noise, so that batch and chunk do not matter.
    The noise is added to the pixels first and nothing is clipped: the theorem is about Gaussian noise, and clipping
    would have to be a part of the classifier.  Encoders of hsat take any floats.  At most `chunk` noisy images are
    alive at a time.
    """
    counts = np.zeros((len(images), classes), dtype=np.int64)
    for rows, parts in _chunks(len(images), draws, chunk):
        noisy = torch.cat(
            [
                images[row]
                + gaussian_noise(tuple(images.shape[1:]), int(patch[row]), part, sigma=sigma, seed=seed).to(images)
                for row, part in zip(rows, parts, strict=True)
            ]
        )
        answer = vote(noisy)
        np.add.at(counts, (np.repeat(rows, [len(part) for part in parts]), answer), 1)
    return counts


def _chunks(n: int, draws: range, chunk: int) -> Iterator[tuple[list[int], list[range]]]:
    """The pairs (image, draw) in order, at most `chunk` at a time, as images and ranges of draws."""
    total = n * len(draws)
    for begin in range(0, total, chunk):
        end = min(begin + chunk, total)
        rows = list(range(begin // len(draws), (end - 1) // len(draws) + 1))
        parts = [draws[max(0, begin - row * len(draws)) : min(len(draws), end - row * len(draws))] for row in rows]
        yield rows, parts


def classifier_vote(layer: EmbeddingFunction, classifier: FittedClassifier) -> Vote:
    """The decision of a classifier on the values of a layer: images -> indices into the classifier's class names.

    An image whose embedding is not finite (far outside [0, 1] a network may overflow) votes for class 0: any fixed
    answer keeps the base classifier a function of the image, which is all that the theorem asks.
    """

    def vote(images: Tensor) -> np.ndarray:
        z = encode(layer, images).detach().cpu().double().numpy()
        finite = np.isfinite(z).all(1)
        answer = np.zeros(len(z), dtype=np.int64)
        if finite.any():
            answer[finite] = classifier.predict_proba(z[finite]).argmax(1)
        return answer

    return vote
