"""The nearest rows of a bank: proposed from products in blocks, measured in float64, ties to the earlier row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers.base import chunks, row_products
from hsat.types import EmbeddingTable
from hsat.types.precision import widest_dtype

BLOCK_BYTES = 64 * 2**20  # a slice of the bank, of products, or of gathered rows: what a search holds beside the bank
GATHER_BYTES = 2**19  # gathered rows are read three times: what fits a cache is measured twice as fast
LEAST_PER_THREAD = 2**22  # values; below, starting a thread costs more than it measures
_EQUAL = 1e-12  # float64 products of unit rows of any width in use are right to this; closer ones count as tied
_INDEX_BYTES = 8  # of a column's number, which a partition of products holds beside each of them
_SAMPLE_ROWS = 1024  # rows of a class among which its nearest is looked for, where the bank cannot be held
_SAMPLE_BYTES = 128 * 2**20


class Neighbours(NamedTuple):
    """Nearest bank rows of each query, nearest first.

    Attributes:
        similarity: (n, k) float64 cosine; -inf where an approximate index found fewer than k.
        row: (n, k) int64 rows of the bank; 0 where the similarity is -inf.
    """

    similarity: np.ndarray
    row: np.ndarray


class Proposals(NamedTuple):
    """Rows with the highest products: product (n, count), row (n, count); class_row (n, classes), -1 for none."""

    product: Tensor
    row: Tensor
    class_row: Tensor | None


class BankRows:
    """The rows of a bank as searches read them: where they are, or copied to a device.

    Args:
        table: The bank; float32 rows are read in place, also from a memory-mapped file.
        device: Where products are computed.
        hold: Copy rows that are in memory to the device once; without it their blocks travel with every search.

    Attributes:
        z: The table's rows (m, d).
        tensor: The same as float32 tensor: the table's own memory on the CPU, or the copy on the device; None where
            rows are read in blocks.
        in_memory: Whether the rows are in memory and not in a file.
        has_warned_of_cost: Whether the user was warned what a bank in a file costs.
    """

    def __init__(self, table: EmbeddingTable, *, device: torch.device | str = "cpu", hold: bool = False) -> None:
        self.z, self.device = table.z, torch.empty(0, device=device).device  # with the number of the GPU
        self.in_memory = not isinstance(table.z, np.memmap)
        self.has_warned_of_cost = False
        self._samples: dict[int, tuple[np.ndarray, Tensor, tuple[Tensor, ...]]] = {}
        self._table = table
        shared = _shared_tensor(table.z)
        if self.device.type == "cpu":
            self.tensor = shared
        else:
            self.tensor = shared.to(self.device) if hold and self.in_memory and shared is not None else None

    def __len__(self) -> int:
        return len(self.z)

    @property
    def classes(self) -> int:
        """Number of classes, those without rows included."""
        return len(self._table.class_names)

    @cached_property
    def length(self) -> np.ndarray | None:
        """Lengths (m,) of the rows in memory, float64; None for a file, which is not read for them alone."""
        if not self.in_memory:
            return None
        return np.concatenate([row_lengths(self.z[part]) for part in iter_blocks(self.z, item=8)])

    @cached_property
    def rows_of_class(self) -> tuple[Tensor, ...]:
        """The rows of each class in rising order, on the device."""
        order = np.argsort(self._table.label, kind="stable")
        ends = np.cumsum(np.bincount(self._table.label, minlength=self.classes))[:-1]
        return tuple(torch.from_numpy(rows).to(self.device) for rows in np.split(order, ends))

    def block(self, part: slice) -> Tensor:
        """A slice of the rows on the device, float32."""
        if self.tensor is not None:
            return self.tensor[part]
        return torch.from_numpy(np.array(self.z[part], dtype=np.float32)).to(self.device)

    def gather(self, row: Tensor) -> Tensor:
        """The rows with these indices, (..., d) on the device of `row`."""
        if self.tensor is not None:
            return self.tensor[row.to(self.device)].to(row.device)
        return torch.from_numpy(np.array(self.z[row.cpu().numpy()], dtype=np.float32)).to(row.device)

    def propose(self, unit: np.ndarray, count: int, *, per_class: bool = False) -> Proposals:
        """The rows with the highest products, in one pass over the bank.

        Args:
            unit: (n, d) float64 unit rows.
            count: How many rows to propose for each query.
            per_class: Whether to look for the nearest row of every class as well.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            query = _query_tensor(unit, self.device)
            value = torch.empty(len(query), 0, dtype=query.dtype, device=self.device)
            row = torch.empty(len(query), 0, dtype=torch.int64, device=self.device)
            of_class = _ClassMaximum(self.rows_of_class, query) if per_class else None
            in_place = self.tensor is not None and self.tensor.dtype == query.dtype
            item, columns = query.element_size(), len(query)
            if self.device.type == "cpu":
                columns += columns * _INDEX_BYTES // item
            for part in iter_blocks(self.z, columns=columns, item=item, in_place=in_place):
                product = query @ self.block(part).to(query.dtype).T
                if of_class is not None:
                    of_class.update(product, part)
                product, at = highest(product, count)
                value, row = torch.cat((value, product), 1), torch.cat((row, at + part.start), 1)
                if value.shape[1] > count:
                    value, at = highest(value, count)
                    row = row.gather(1, at)
            value, at = value.sort(dim=1, descending=True)
            row = row.gather(1, at)
        return Proposals(value, row, None if of_class is None else of_class.row)

    def rank(self, unit: np.ndarray, candidates: np.ndarray, k: int, *, on_device: bool = False) -> Neighbours:
        """The k best candidates by falling similarity, then rising row.

        Args:
            unit: (n, d) float64 unit rows.
            candidates: (n, m) bank rows, -1 for none.
            k: How many to keep.
            on_device: Measure on the bank's device, which may differ in the last digit; else with numpy.
        """
        missing = candidates < 0
        rows = np.where(missing, 0, candidates)
        similarity = self.similarities(unit, rows, on_device=on_device)
        similarity[missing] = -np.inf
        return topk(similarity, rows, k)

    def similarities(self, unit: np.ndarray, row: np.ndarray, *, on_device: bool = False) -> np.ndarray:
        """Cosine similarity (n, m) float64 of unit queries (n, d) to bank rows (n, m) of any length.

        With numpy each is one product of `einsum` and depends on its query and its row only, not on what is measured
        with it.  Queries are shared out among as many threads as torch has.
        """
        if on_device:
            return self._similarities_on_device(unit, row)
        similarity, length = np.empty(row.shape), self.length

        def measure(part: slice) -> None:
            _measure(similarity[part], unit[part], self.z, row[part], length)

        _in_threads(measure, len(unit), row.size * self.z.shape[1])
        return similarity

    def _similarities_on_device(self, unit: np.ndarray, row: np.ndarray) -> np.ndarray:
        query = torch.from_numpy(unit).to(self.device, widest_dtype(self.device))
        index, parts = torch.from_numpy(row).to(self.device), []
        for part in chunks(len(row), max(1, BLOCK_BYTES // max(1, 8 * row.shape[1] * self.z.shape[1]))):
            rows = self.gather(index[part]).to(query.dtype)
            length = torch.linalg.vector_norm(rows, dim=2)
            parts.append((rows * query[part, None]).sum(2) / torch.where(length > 0, length, 1.0))
        return torch.cat(parts).double().cpu().numpy() if parts else np.empty(row.shape)

    def nearest_of_sample(self, unit: np.ndarray, *, seed: int) -> np.ndarray:
        """The nearest row of each class among at most 1,024 rows of it, (n, classes); -1 for a class without rows."""
        rows, sample, rows_of_class = self._sample(seed)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            query = _query_tensor(unit, self.device)
            of_class = _ClassMaximum(rows_of_class, query)
            of_class.update(query @ sample.to(query.dtype).T, slice(0, len(rows)))
        at = of_class.row.cpu().numpy()
        nearest: np.ndarray = np.where(at < 0, -1, rows[at])
        return nearest

    def _sample(self, seed: int) -> tuple[np.ndarray, Tensor, tuple[Tensor, ...]]:
        """Drawn rows, their values on the device, and the places of each class among them; drawn and read once."""
        if seed not in self._samples:
            generator = np.random.default_rng(seed)
            most = max(1, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (4 * self.classes * self.z.shape[1])))
            drawn = []
            for rows in (rows.cpu().numpy() for rows in self.rows_of_class):
                drawn.append(rows if len(rows) <= most else np.sort(generator.choice(rows, most, replace=False)))
            edges = np.cumsum([0, *map(len, drawn)]).tolist()
            places = tuple(torch.arange(a, b, device=self.device) for a, b in pairwise(edges))
            chosen = np.concatenate(drawn)
            self._samples[seed] = chosen, self.gather(torch.from_numpy(chosen)).to(self.device), places
        return self._samples[seed]


def _measure(
    similarity: np.ndarray, unit: np.ndarray, bank: np.ndarray, row: np.ndarray, length: np.ndarray | None
) -> None:
    """Fill `similarity` (n, m) of `BankRows.similarities`, in slices that stay in a core's cache."""
    (n, m), d = row.shape, bank.shape[1]
    columns = max(1, min(m, GATHER_BYTES // max(1, 8 * d)))
    lines = max(1, min(n, GATHER_BYTES // max(1, 8 * d * columns)))
    buffer = np.empty(lines * columns * d)  # one for all slices: fresh memory would cost as much as the products
    for line in chunks(n, lines):
        for column in chunks(m, columns):
            index = row[line, column]
            rows = buffer[: index.size * d].reshape(*index.shape, d)
            rows[...] = bank[index]
            similarity[line, column] = row_products("nkd,nd->nk", rows, unit[line])
            if length is None:
                similarity[line, column] /= _nonzero(_lengths(rows))
    if length is not None:
        similarity /= _nonzero(length[row])


def _nonzero(lengths: np.ndarray) -> np.ndarray:
    """The lengths, with one in the place of zero."""
    divisor: np.ndarray = np.where(lengths > 0, lengths, 1.0)
    return divisor


def highest(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` values of each line (n, m), in any order, and their columns; all where m is no more.

    On the CPU numpy partitions each line, which takes a fifth of the time of `topk`, which sorts.
    """
    if value.device.type != "cpu" or value.shape[1] <= count:
        return value.topk(min(count, value.shape[1]), dim=1, sorted=False)
    lines, first = value.numpy(), value.shape[1] - count
    column = np.empty((len(lines), count), dtype=np.int64)

    def partition(part: slice) -> None:
        column[part] = np.argpartition(lines[part], first, axis=1)[:, first:]

    _in_threads(partition, len(lines), lines.size)
    at = torch.from_numpy(column)
    return value.gather(1, at), at


def _in_threads(work: Callable[[slice], None], n: int, size: int) -> None:
    """Call `work` on slices that cover range(n), in as many threads as torch has; size: values that it goes through."""
    threads = max(1, min(torch.get_num_threads(), size // LEAST_PER_THREAD))
    parts = list(chunks(n, max(1, -(-n // threads))))
    if len(parts) <= 1:
        for part in parts:
            work(part)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(work, parts))


class _ClassMaximum:
    """The row with the highest product of each class, block after block."""

    def __init__(self, rows_of_class: tuple[Tensor, ...], query: Tensor) -> None:
        self._rows = rows_of_class
        self._value = query.new_full((len(query), len(rows_of_class)), -torch.inf)
        self.row = torch.full(self._value.shape, -1, dtype=torch.int64, device=query.device)

    def update(self, product: Tensor, part: slice) -> None:
        for label, rows in enumerate(self._rows):
            first, last = torch.searchsorted(rows, torch.tensor([part.start, part.stop], device=rows.device)).tolist()
            if first < last:
                inside = rows[first:last]
                value, at = product[:, inside - part.start].max(1)
                better = value > self._value[:, label]
                self._value[:, label] = torch.where(better, value, self._value[:, label])
                self.row[:, label] = torch.where(better, inside[at], self.row[:, label])


def _query_tensor(unit: np.ndarray, device: torch.device) -> Tensor:
    """Unit rows on a device; in float64 where float32 products may be rounded to fewer digits."""
    precise = torch.get_float32_matmul_precision() == "highest"
    return torch.from_numpy(unit).to(device, torch.float32 if precise else widest_dtype(device))


def _shared_tensor(z: np.ndarray) -> Tensor | None:
    """A tensor on the memory of float32 rows; None for others, which cannot be shared."""
    if z.dtype != np.float32 or not z.flags.c_contiguous:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of arrays that cannot be written; nobody does
        return torch.from_numpy(z)


def iter_blocks(bank: np.ndarray, *, columns: int = 0, item: int = 4, in_place: bool = False) -> Iterator[slice]:
    """Slices of the bank whose rows, and whose products with `columns` queries, stay within BLOCK_BYTES each.

    Rows that are read in place take no memory and do not count.
    """
    width = columns if in_place else max(bank.shape[1], columns)
    return chunks(len(bank), max(1, BLOCK_BYTES // (item * max(width, 1))))


def row_lengths(rows: np.ndarray) -> np.ndarray:
    """Euclidean lengths (n,) of rows, measured in float64."""
    lengths: np.ndarray = _lengths(rows.astype(np.float64)[None])[0]
    return lengths


def _lengths(rows: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.sqrt(row_products("nkd,nkd->nk", rows, rows))
    return lengths


def row_slack(bank: np.ndarray) -> float:
    """How far the length of a bank row is from one, at most; all-zero rows do not count.

    The bank is read once, in blocks, in place.

    Raises:
        ValueError: Naming the row, where a length is not finite or off by more than 1e-3: only memory-mapped rows can
            be, as all others are normalised when their table is made.
    """
    worst = 0.0
    for part in iter_blocks(bank, item=8):
        length = row_lengths(bank[part])
        off = np.where(length == 0, 0.0, np.abs(length - 1.0))
        if not (off <= 1e-3).all():
            at = int(np.flatnonzero(~(off <= 1e-3))[0])
            raise ValueError(
                f"row {part.start + at} of the memory-mapped bank has length {length[at]:.6g}, but z must hold unit"
                " rows; EmbeddingTable(z=np.array(z), ...) normalises them in memory, and its save writes them"
            )
        worst = max(worst, float(off.max()))
    return worst


def topk(similarity: np.ndarray, row: np.ndarray, k: int) -> Neighbours:
    """The first k of each line by falling similarity, then rising row."""
    order = np.lexsort((row, -similarity), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1))


def rounding_bound(width: int) -> float:
    """What a float32 product of two unit rows may be off by: rounding of `width` sums that wander, with a margin."""
    return float(8 * np.sqrt(width) * 2.0**-24)


def rerank_exact(unit: np.ndarray, bank: BankRows, k: int, *, on_device: bool = False) -> Neighbours:
    """The exact k nearest rows where float32 products cannot tell: two passes over the bank in float64.

    The first pass finds the similarity of the k-th row, the second gathers all rows that are as near, to within
    rounding; these are measured, and only the k best are kept where they crowd.
    """
    device = bank.device if on_device and bank.device.type != "mps" else torch.device("cpu")
    query = torch.from_numpy(unit).to(device)
    value = torch.empty(len(query), 0, dtype=torch.float64, device=device)
    for part in iter_blocks(bank.z, columns=len(unit), item=8):
        value = torch.cat((value, query @ _unit_block(bank, part, device).T), 1)
        value = value.topk(min(k, value.shape[1]), dim=1).values
    candidates = [np.empty(0, dtype=np.int64)] * len(unit)
    for part in iter_blocks(bank.z, columns=len(unit), item=8):
        near = query @ _unit_block(bank, part, device).T >= value[:, -1:] - _EQUAL
        line, row = (index.cpu().numpy() for index in near.nonzero(as_tuple=True))
        ends = np.searchsorted(line, np.arange(1, len(unit)))
        for at, more in enumerate(np.split(row + part.start, ends)):
            rows = np.concatenate((candidates[at], more)) if len(more) else candidates[at]
            if len(rows) > 2 * k:
                rows = bank.rank(unit[at : at + 1], rows[None], k, on_device=on_device).row[0]
            candidates[at] = rows
    lines = np.full((len(unit), max(map(len, candidates), default=0)), -1, dtype=np.int64)
    for line, rows in zip(lines, candidates, strict=True):
        line[: len(rows)] = rows
    return bank.rank(unit, lines, k, on_device=on_device)


def _unit_block(bank: BankRows, part: slice, device: torch.device) -> Tensor:
    if device.type != "cpu":
        rows = bank.block(part).double()
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(length > 0, length, 1.0)
    wide = bank.z[part].astype(np.float64)
    lengths = row_lengths(wide)
    return torch.from_numpy(wide / _nonzero(lengths)[:, None])
