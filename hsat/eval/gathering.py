"""An embedding table made by several ranks: each embeds its share of the batches, all get all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from hsat.types import EmbeddingTable

_ROWS = ("z", "label", "patch", "slide", "patient")
_TEXT = ("class_names", "cohort", "split", "encoder")


def own_rows(n: int, *, batch_size: int) -> slice:
    """Share of n rows for this rank: consecutive whole batches, the ones that one process would make of all rows.

    Shares of the ranks lie behind one another; a rank may get none.  Without a process group it is everything.
    Raises ValueError for a batch_size below 1 or a negative n.
    """
    if n < 0 or batch_size < 1:
        raise ValueError(f"n must be at least 0 and batch_size at least 1, got {n} and {batch_size}")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if _several_ranks() else (0, 1)
    batches = -(-n // batch_size)
    begin, end = batches * rank // ranks, batches * (rank + 1) // ranks
    return slice(min(n, begin * batch_size), min(n, end * batch_size))


def gather_table(table: EmbeddingTable | None) -> EmbeddingTable:
    """The rows of all ranks as one table, in order of rank, on every rank; each rank has to call it.

    table: this rank's rows, None if it has none.  With `own_rows` the result is the table of one process.  With one
    rank, or without a process group, it is the table itself.
    Raises ValueError if no rank has rows, or if the ranks' tables differ in width, classes, cohort, split or encoder.
    """
    every: list[Any] = [_plain(table)]
    if _several_ranks():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, _plain(table))
    elif table is not None:
        return table
    parts = [part for part in every if part is not None]
    if not parts:
        raise ValueError("no rank has embedded anything, so there are no rows to gather")
    for name in (*_TEXT, "width"):
        found = [part[name] for part in parts]
        if any(value != found[0] for value in found):
            raise ValueError(f"tables of the ranks differ in {name}: {', '.join(map(str, found))}")
    rows: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in _ROWS}
    return EmbeddingTable(**rows, **{name: parts[0][name] for name in _TEXT})


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _plain(table: EmbeddingTable | None) -> dict[str, Any] | None:
    if table is None:
        return None
    return {name: getattr(table, name) for name in (*_ROWS, *_TEXT)} | {"width": table.z.shape[1]}
