"""The clean embeddings of the queries, from the cache or on their way into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.distributed import World
from hsat.eval.engine.cache import EmbeddingCache
from hsat.eval.engine.journal import batch_digest
from hsat.types import HierarchicalBatch


class References:
    """What the scored layer says of clean queries, batch by batch and bit by bit as it was computed.

    cache, key: where they are kept; None for nowhere.  A batch that is not the one that was kept is computed anew.
    """

    def __init__(self, cache: EmbeddingCache | None, key: Mapping[str, Any] | None) -> None:
        self._cache = cache if key is not None else None
        self._key = key or {}
        found = None if self._cache is None else self._cache.arrays(self._key)
        self._digests: list[str] = [] if found is None else list(found[0]["batches"])
        self._known: dict[str, np.ndarray] = {} if found is None else found[1]
        self._new: dict[int, tuple[str, np.ndarray]] = {}

    def of(self, number: int, batch: HierarchicalBatch, place: torch.device) -> Tensor | None:
        """The embeddings of a batch (n, d) on a device, or None."""
        if number >= len(self._digests) or self._digests[number] != batch_digest(batch):
            return None
        return torch.from_numpy(self._known[f"z{number}"]).to(place)

    def note(self, number: int, batch: HierarchicalBatch, z: Tensor) -> None:
        """Take in embeddings that were computed."""
        if self._cache is not None and z.dtype in (torch.float32, torch.float64):
            self._new[number] = (batch_digest(batch), z.detach().cpu().numpy())

    def close(self, batches: int, world: World) -> None:
        """Keep what all ranks took in, if that is all of the batches; the first rank writes it."""
        if self._cache is None:
            return
        new = world.gather_by_index(self._new)
        if not new or len(new) < batches or not world.is_main:
            return
        digests = [digest for digest, _ in new]
        arrays = {f"z{number}": z for number, (_, z) in enumerate(new)}
        self._cache.keep(self._key, arrays, {"batches": digests})
