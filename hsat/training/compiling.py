"""Graph breaks of a model, counted and explained, before it is compiled."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsat.models import frozen
from hsat.training.accumulation import kept_statistics


@dataclass(frozen=True)
class GraphBreaks:
    """What the compiler made of one call: so many graphs; `reasons` holds one text per break between them."""

    graphs: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        if not self.reasons:
            return f"{self.graphs} graph(s), no graph break"
        return f"{self.graphs} graphs, {len(self.reasons)} graph break(s): " + "; ".join(self.reasons)


def graph_breaks(model: nn.Module, images: Tensor) -> dict[str, GraphBreaks]:
    """Graph breaks of model(images) in the two ways a training step calls it: {"outer": ..., "inner": ...}.

    outer: as the model is, with gradients to its parameters.  inner: frozen, with gradients to the images, as in the
    attack.  BatchNorm statistics, gradients and torch's random state are left alone; what the compiler cached is
    cleared, so call this before `model.compile()`.
    """
    found = {}
    with kept_statistics(model), torch.random.fork_rng([images.device] if images.is_cuda else []):
        found["outer"] = _explained(model, images.detach())
        with frozen(model, layers="plain"):
            found["inner"] = _explained(model, images.detach().clone().requires_grad_())
    return found


def _explained(model: nn.Module, images: Tensor) -> GraphBreaks:
    import torch._dynamo

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler about itself
        told = torch._dynamo.explain(model)(images)
    torch._dynamo.reset()
    reasons = tuple(str(broken.reason).strip().splitlines()[0] for broken in told.break_reasons)
    return GraphBreaks(int(told.graph_count), reasons)
