"""Approximate indexes of a bank, built by FAISS from a factory string."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import numpy as np

from hsat.classifiers.search import iter_blocks

EXACT = ("flat", "stream", "torch")
EXAMPLES = "'IVF1024,Flat;nprobe=32' (lists), 'HNSW32' (graph), 'SQfp16' (all rows, float16 copies)"
_TRAIN_ROWS = 65536  # a training sample is never smaller, where the bank is large enough
_PER_LIST = 64  # rows per list of an inverted file that train its centre
_GRAPHS = re.compile(r"HNSW|NSG|NNDescent")
_LEAST_LINKS = 4  # per node of a graph: with fewer, FAISS ended the process or did not come back


def split_factory(index: str) -> tuple[str, str]:
    """Factory string and search parameters of "IVF64,Flat;nprobe=8"; the latter may be missing."""
    name, _, parameters = index.partition(";")
    return name.strip(), parameters.strip()


def build_index(bank: np.ndarray, factory: str, parameters: str, *, seed: int) -> Any:
    """A FAISS index of the bank (n, d), trained on a seeded sample and filled block by block.

    Graphs (HNSW, NSG) are built on one thread, so that the same bank gives the same graph.

    Args:
        bank: (n, d) rows.
        factory: FAISS's factory string.
        parameters: Search parameters in FAISS's notation, or "".
        seed: Draws the rows that train the index.

    Raises:
        ValueError: For a string that FAISS does not know, lists that outnumber the rows, graphs of fewer than 4 links,
            and parameters that do not fit, with examples.
        ImportError: Without FAISS.
    """
    faiss = load_faiss(factory)
    links = [int(number) for number in re.findall(r"(?:HNSW|NSG|NNDescent)(\d+)", factory)]
    if links and min(links) < _LEAST_LINKS:
        raise ValueError(
            f"index {factory!r} is a graph of {min(links)} links per row; give it 16 or 32, as in 'HNSW32'"
        )
    lists = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    if lists and min(lists) < 1:  # some releases of FAISS end the process
        raise ValueError(f"cannot build index {factory!r}: it has {min(lists)} lists; 4 sqrt(rows) is usual")
    if lists and max(lists) > len(bank):
        raise ValueError(
            f"index {factory!r} has {max(lists)} lists, more than the {len(bank)} rows of the bank; about 4 sqrt(rows)"
            f" is usual, here 'IVF{max(1, min(int(4 * len(bank) ** 0.5), len(bank) // 39))},Flat'; or use 'flat'"
        )
    threads = faiss.omp_get_max_threads()
    try:
        index = faiss.index_factory(bank.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_sample(bank, max(_TRAIN_ROWS, _PER_LIST * max(lists, default=0)), seed))
        set_parameters(faiss, index, parameters)
        _reserve(faiss, index, len(bank))
        if _GRAPHS.search(factory):
            faiss.omp_set_num_threads(1)
        for part in iter_blocks(bank):
            index.add(np.ascontiguousarray(bank[part], dtype=np.float32))
        index.search(np.ascontiguousarray(bank[:1], dtype=np.float32), 1)  # nprobe=0, for one, is refused only here
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"FAISS cannot build index {factory!r} {parameters!r} on {len(bank)} rows of width {bank.shape[1]}:"
            f" {reason}.  Examples are {EXAMPLES}.  Exact choices are 'flat' and 'stream'"
        ) from error
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def set_parameters(faiss: Any, index: Any, parameters: str) -> None:
    """Set search parameters in FAISS's notation, "nprobe=8"; RuntimeError where they do not fit."""
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)


def load_faiss(index: str) -> Any:
    """The module faiss, whose own type hints miss overloads; the ImportError names the index that needs none."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ImportError(f"index={index!r} needs FAISS: pip install faiss-cpu, or use index='stream'") from error


def _sample(bank: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """All rows of a small bank, else that many of them, in the order of the bank."""
    if len(bank) <= rows:
        return np.ascontiguousarray(bank, dtype=np.float32)
    chosen = np.random.default_rng(seed).choice(len(bank), rows, replace=False, shuffle=False)
    return np.ascontiguousarray(bank[np.sort(chosen)], dtype=np.float32)


def _reserve(faiss: Any, index: Any, rows: int) -> None:
    """Room for all codes at once: a vector that grows as it is filled holds up to three times its content meanwhile."""
    storage = faiss.downcast_index(getattr(index, "storage", None) or index)
    codes: Any = getattr(storage, "codes", None)
    size = getattr(storage, "code_size", 0)
    if hasattr(codes, "resize") and storage.ntotal == 0:
        codes.resize(rows * size)
        codes.resize(0)  # the room stays
