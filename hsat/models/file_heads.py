"""Which projection head a file of weights holds, read from the names and shapes in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

_LAYER = re.compile(r"(?P<where>(?:.*\.)?(?:proj|head)\.layers\.)(?P<number>\d+)\.(?P<entry>\w+)")
_WITH_BATCH_NORM = {0: 2, 1: 1, 3: 2, 4: 1, 6: 2, 7: 1}  # layer number: axes of its weight, as `projection_head` builds


@dataclass(frozen=True)
class FoundHead:
    """The options of `projection_head` that give a head of the same shapes."""

    kind: str
    in_features: int
    embedding_dim: int
    hidden: tuple[int, ...] = ()

    def __str__(self) -> str:
        hidden = f", head_hidden={list(self.hidden)}" if self.hidden else ""
        return f"head={self.kind!r}, embedding_dim={self.embedding_dim}{hidden}"


def head_in(state: Mapping[str, Tensor]) -> FoundHead | None:
    """The head among named tensors: `...proj.layers.N.weight` as published, or `...head.layers.N.weight` as here.

    None where there is no such entry.  Raises ValueError for two heads, and for layers that no head of
    `projection_head` has.
    """
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        match = _LAYER.fullmatch(key)
        if match and match["entry"] == "weight":
            found[match["where"]][int(match["number"])] = value
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"there are several projection heads: {', '.join(sorted(found))}")
    ((where, weights),) = found.items()
    axes = {number: weight.ndim for number, weight in sorted(weights.items())}
    linear = [weights[number] for number, n in axes.items() if n == 2]
    widths = [int(weight.shape[0]) for weight in linear]
    chained = all(a.shape[0] == b.shape[1] for a, b in pairwise(linear))
    plain = {2 * i: 2 for i in range(len(linear))}
    if not linear or not chained or axes not in (plain, _WITH_BATCH_NORM):
        shapes = ", ".join(f"{number}: {tuple(weights[number].shape)}" for number in axes)
        raise ValueError(f"the layers under {where} are those of no known projection head (weights {shapes})")
    kind = "mlp3_bn" if axes == _WITH_BATCH_NORM else "mlp" if len(linear) > 1 else "linear"
    return FoundHead(kind, int(linear[0].shape[1]), widths[-1], tuple(widths[:-1]))
