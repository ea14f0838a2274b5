"""The nearest rows of a bank, measured in float64 so that the answer does not depend on who proposed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

BLOCK_BYTES = 64 * 2**20  # a slice of the bank, of products, or of gathered rows: what a search holds beside the bank
_GATHER_BYTES = 4 * 2**20  # gathered rows are read three times: what fits a cache is measured twice as fast
_EQUAL = 1e-12  # float64 products of unit rows of any width in use are right to this; closer ones count as tied


class Neighbours(NamedTuple):
    """Nearest bank rows of each query, nearest first: cosine similarity (n, k) float64 and bank row (n, k) int64.

    Where an approximate index found fewer than k, the similarity is -inf and the row 0.
    """

    similarity: np.ndarray
    row: np.ndarray


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(n)."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def blocks(bank: np.ndarray, *, columns: int = 0, item: int = 4) -> Iterator[slice]:
    """Slices of the bank whose rows, and whose products with `columns` queries, stay within BLOCK_BYTES each."""
    return chunks(len(bank), max(1, BLOCK_BYTES // (item * max(bank.shape[1], columns, 1))))


def row_slack(bank: np.ndarray) -> float:
    """How far the length of a bank row is from one, at most; all-zero rows do not count.

    The bank is read once, in blocks, in place.  Raises ValueError, naming the row, where a length is not finite or off
    by more than 1e-3: only memory-mapped rows can be, as all others are normalised when their table is made.
    """
    worst = 0.0
    for part in blocks(bank, item=8):
        rows = bank[part].astype(np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        off = np.where(length == 0, 0.0, np.abs(length - 1.0))
        if not (off <= 1e-3).all():
            at = int(np.flatnonzero(~(off <= 1e-3))[0])
            raise ValueError(
                f"row {part.start + at} of the memory-mapped bank has length {length[at]:.6g}, but z must hold unit"
                " rows; EmbeddingTable(z=np.array(z), ...) normalises them in memory, and its save writes them"
            )
        worst = max(worst, float(off.max()))
    return worst


def measure(queries: np.ndarray, bank: np.ndarray, proposed: np.ndarray, k: int) -> Neighbours:
    """The k best of the proposed rows by (similarity, row).

    queries: (n, d) float64 unit rows.  proposed: (n, m) bank rows, -1 for none.  Each similarity is one product of
    `einsum` and depends on its query and its row only, not on what else is measured with it.
    """
    missing = proposed < 0
    rows = np.where(missing, 0, proposed)
    similarity = np.empty(rows.shape)
    for part in chunks(len(queries), max(1, _GATHER_BYTES // (8 * rows.shape[1] * bank.shape[1]))):
        close = bank[rows[part]].astype(np.float64)
        length = np.sqrt(np.einsum("nkd,nkd->nk", close, close))  # float32 rows are units to 1e-7 only
        similarity[part] = np.einsum("nkd,nd->nk", close, queries[part]) / np.where(length > 0, length, 1.0)
    similarity[missing] = -np.inf
    return best(similarity, rows, k)


def best(similarity: np.ndarray, row: np.ndarray, k: int) -> Neighbours:
    """The first k of each line by falling similarity, then rising row."""
    order = np.lexsort((row, -similarity), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1))


def rounding(width: int) -> float:
    """What a float32 product of two unit rows may be off by: rounding of `width` sums that wander, with a margin."""
    return float(8 * np.sqrt(width) * 2.0**-24)


def settle(queries: np.ndarray, bank: np.ndarray, k: int) -> Neighbours:
    """The exact k nearest rows where float32 products cannot tell: two passes over the bank in float64.

    The first pass finds the similarity of the k-th row, the second gathers all rows above it and the first 2 k of those
    that tie with it, in the order of the bank.  So equal rows go to the lower row, however many there are.
    """
    last = np.empty(len(queries))
    query = torch.from_numpy(queries)
    value = torch.empty(len(query), 0, dtype=torch.float64)
    for part in blocks(bank, columns=len(queries), item=8):
        value = torch.cat((value, query @ _unit_block(bank, part).T), 1)
        value = value.topk(min(k, value.shape[1]), dim=1).values
    last[:] = value[:, -1].numpy()
    at, row = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    seen = np.zeros(len(queries), dtype=np.int64)
    for part in blocks(bank, columns=len(queries), item=8):
        gap = (query @ _unit_block(bank, part).T).numpy() - last[:, None]
        tied = np.abs(gap) <= _EQUAL
        room = np.cumsum(tied, 1) <= (2 * k - seen)[:, None]
        seen += tied.sum(1)
        found = np.nonzero((gap > _EQUAL) | (tied & room))
        at.append(found[0])
        row.append(found[1] + part.start)
    return measure(queries, bank, _lines(np.concatenate(at), np.concatenate(row), len(queries)), k)


def _unit_block(bank: np.ndarray, part: slice) -> torch.Tensor:
    rows = bank[part].astype(np.float64)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return torch.from_numpy(rows / np.where(length > 0, length, 1.0)[:, None])


def _lines(at: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    """Pairs (line, row) as one array with a line per query, filled up with -1."""
    order = np.argsort(at, kind="stable")
    at, row = at[order], row[order]
    count = np.bincount(at, minlength=n)
    place = np.arange(len(at)) - np.repeat(np.cumsum(count) - count, count)
    lines = np.full((n, int(count.max(initial=1))), -1, dtype=np.int64)
    lines[at, place] = row
    return lines
