"""What a search knows already about decisions: the pass that gave the gradient also said what the model decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RememberedModel:
    """A model of logits that remembers what it was shown last and what it decided, and counts images.

    Args:
        model: Images (n, c, h, w) -> logits, or scores, (n, classes).

    Attributes:
        images: What it was shown last, detached; None before.
        logits: (n, classes), what it said of them.
        forwards: Images that went through the model.
        backwards: Images of passes that were made for a gradient.
    """

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self._model = model
        self.images: Tensor | None = None
        self.logits: Tensor | None = None
        self.forwards = self.backwards = 0

    def __call__(self, images: Tensor) -> Tensor:
        """The logits, with gradients as the model gives them."""
        logits = self._model(images)
        self.forwards += len(images)
        self.backwards += len(images) * (torch.is_grad_enabled() and images.requires_grad)
        self.images, self.logits = images.detach(), logits.detach()
        return logits


class DecisionTest:
    """The `success` of one search: is the decision wrong?  Images go through the model only if nobody has asked before.

    A search asks about its iterates, and most of them are what the model was shown last, or what this test was asked
    last.  Which they are is seen by comparing pixels, so no answer depends on how the search is written.  Images that
    have succeeded once stay so: searches leave them where they are.

    Args:
        model: The model that the search's objective reads.
        labels: (n,) the true classes of the images of the search.
    """

    def __init__(self, model: RememberedModel, labels: Tensor) -> None:
        self._model, self._labels = model, labels
        self._done = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        self._asked: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> (n,) bool."""
        rows = (~self._done).nonzero().flatten()
        everything = len(rows) == len(images)
        asked, wrong = images if everything else images[rows], torch.zeros_like(self._done[rows])
        unknown = ~wrong
        shown, logits = self._model.images, self._model.logits
        if shown is not None and logits is not None and shown.shape == asked.shape and shown.dtype == asked.dtype:
            same = _same(shown, asked)
            wrong, unknown = same & (logits.argmax(1) != self._labels[rows]), ~same
        if self._asked is not None and bool(unknown.any()):  # not done then, so the decision was right
            unknown = unknown & ~_same(self._asked if everything else self._asked[rows], asked)
        if bool(unknown.any()):
            left = unknown.nonzero().flatten()
            with torch.no_grad():
                wrong[left] = self._model(asked[left]).argmax(1) != self._labels[rows[left]]
        self._done[rows] = wrong | self._is_hopeless(asked, rows)
        self._asked = images.detach().clone()
        return self._done.clone()

    def _is_hopeless(self, images: Tensor, rows: Tensor) -> Tensor:
        """Which of the images, the `rows` of the batch, the search is to give up, (m,) bool."""
        return torch.zeros_like(self._done[rows])


class QueryTest(DecisionTest):
    """The same for a search by queries, which gives images up on which gradients led much farther.

    Such a search is there for models whose gradients mislead.  On an image where it has not come half as far as the
    members with gradients after a quarter of its queries, or three quarters as far after half of them, they do not.

    The comparison is of margins of logits, which tell apart what scores near 0 and 1 do not; the search sees
    none of them.

    Args:
        model: The model that the search's objective reads.
        labels: (n,) the true classes of the images of the search.
        logits: Images (n, c, h, w) -> logits (n, classes).
        clean: (n,) the margins of the clean images.
        reached: (n,) the highest margins that gradients led to.
        queries: How many the search has.
    """

    def __init__(
        self,
        model: RememberedModel,
        labels: Tensor,
        logits: Callable[[Tensor], Tensor],
        *,
        clean: Tensor,
        reached: Tensor,
        queries: int,
    ) -> None:
        super().__init__(model, labels)
        self._logits, self._clean, self._reached = logits, clean, reached
        self._needed = {-(-queries // 4): 0.5, -(-queries // 2): 0.75}  # share of the way, by queries
        self._calls = 0

    def _is_hopeless(self, images: Tensor, rows: Tensor) -> Tensor:
        self._calls += 1
        share, clean, reached = self._needed.get(self._calls), self._clean[rows], self._reached[rows]
        if share is None or not len(rows):
            return super()._is_hopeless(images, rows)
        with torch.no_grad():
            here = gaps(self._logits(images), self._labels[rows]).amax(1)
        self._model.forwards += len(rows)
        return (here < clean + share * (reached - clean)) & (reached > clean)


def gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (n, classes) minus that of the true class, which itself is put at -inf."""
    return (logits - logits.gather(1, labels[:, None])).scatter(1, labels[:, None], -torch.inf)


def _same(left: Tensor, right: Tensor) -> Tensor:
    """(n,) bool: which images of two batches are equal in every pixel."""
    return (left == right).flatten(1).all(1)
