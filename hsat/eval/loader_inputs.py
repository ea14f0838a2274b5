"""Loaders and tables of the caller's own as bank and queries of the front door."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hsat.embedding import (
    EmbeddingBuffer,
    LoaderInfo,
    embed,
    encode,
    eval_mode,
    require_labels,
    resolve_device,
    select_layer,
    to_device,
)
from hsat.eval.classifier import PATCH_ONLY
from hsat.eval.cost import own_random_state
from hsat.eval.options import RunOptions
from hsat.progress import show_progress
from hsat.types import EmbeddingFunction, EmbeddingTable, HierarchicalBatch
from hsat.types.batch import UNLABELLED
from hsat.types.plain_batches import PlainBatches

NO_BANK = (
    "the loader gives images with labels and there is no bank of training patches to decide by: give both as a pair"
    " (bank, queries); with one loader only how far attacks move the features is measured"
)


class ObservedBatches:
    """Batches with ids of any loader, which remembers the sizes of the images that it gave.

    Args:
        loader: Batches with ids, or pairs of images and labels.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.source, self._batches = loader, PlainBatches(loader)
        self.dataset = self._batches.dataset
        self.sizes: dict[tuple[int, int], None] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        for batch in self._batches:
            height, width = batch.images.shape[-2:]
            self.sizes[int(height), int(width)] = None
            yield batch


class LoaderBank:
    """A bank as a loader of the caller's own, which each encoder embeds for itself.

    Args:
        loader: Batches with ids, or pairs of images and labels.
        class_names: The classes, where the loader's dataset does not name them; numbers by default.
    """

    def __init__(self, loader: Any, class_names: tuple[str, ...] | None = None) -> None:
        self._loader, self._names = loader, name_classes(loader) or class_names
        self.sizes: dict[tuple[int, int], None] = {}

    def embed(self, encoder: EmbeddingFunction, *, name: str, run: RunOptions) -> EmbeddingTable:
        """The table of an encoder's features; the loader is read once.

        Args:
            encoder: The encoder.
            name: What the table calls it.
            run: Device and progress.

        Returns:
            The table.

        Raises:
            ValueError: For batches without labels, and as `hsat.embed`.
        """
        if is_own(self._loader):
            return embed(encoder, self._loader, device=run.device, encoder_name=name, progress=run.progress)
        batches, buffer = ObservedBatches(self._loader), EmbeddingBuffer()
        layer, device = select_layer(encoder, "features"), resolve_device(encoder, run.device)
        largest = -1
        with eval_mode(encoder):
            for batch in show_progress(batches, f"embedding the bank by {name}") if run.progress else batches:
                largest = max(largest, int(require_labels(batch).max()))
                buffer.append(batch, encode(layer, to_device(batch.images, device)))
        self.sizes |= batches.sizes
        names = self._names or tuple(map(str, range(largest + 1)))
        return buffer.table(LoaderInfo(class_names=names, split="bank"), encoder=name)


class LoaderPair(NamedTuple):
    """Bank and queries; class_names: of the queries; patch_only: whether they know no slides and patients."""

    bank: Any
    queries: Any
    class_names: tuple[str, ...] | None
    flags: tuple[str, ...]
    patch_only: bool


def open_pair(bank: Any, queries: Any, *, encoders: int) -> LoaderPair:
    """A bank and queries of the caller's own; plain batches of images and labels are taken, too.

    Args:
        bank: A table or a loader.
        queries: A loader.
        encoders: How many there are; a table is of one.

    Returns:
        Both, ready.

    Raises:
        ValueError: For one table and several encoders, and a loader without batches.
        TypeError: For batches of another kind.
    """
    if isinstance(bank, EmbeddingTable) and encoders > 1:
        raise ValueError(
            f"the bank is a table, which one encoder made, and there are {encoders} encoders: give the loader of the"
            " bank's images, which each of them embeds"
        )
    if is_own(queries):
        ready = bank if isinstance(bank, EmbeddingTable) or is_own(bank) else LoaderBank(bank, name_classes(queries))
        return LoaderPair(ready, queries, None, (), patch_only=False)
    queries, first = peek(queries)
    if first is None:
        raise ValueError("the loader of the queries gave no batches: nothing to evaluate")
    names, plain = name_classes(queries), not isinstance(first, HierarchicalBatch)
    if not isinstance(bank, EmbeddingTable):
        bank = LoaderBank(bank, names)
    return LoaderPair(bank, ObservedBatches(queries), names, (PATCH_ONLY,) if plain else (), patch_only=plain)


def open_alone(loader: Any) -> tuple[Any, bool]:
    """A loader without a bank, and whether its images have labels all the same."""
    if is_own(loader):
        names = loader.dataset.class_names
        return loader, len(names) > 1 and tuple(names) != (UNLABELLED,)
    loader, first = peek(loader)
    if isinstance(first, HierarchicalBatch):
        return loader, first.label is not None
    pair = isinstance(first, tuple | list) and len(first) >= 2 and all(isinstance(part, Tensor) for part in first[:2])
    if not pair or first[0].ndim != 4:
        return loader, False
    return loader, first[1].shape == first[0].shape[:1] and not first[1].is_floating_point()


def size_flags(*parts: object) -> tuple[str, ...]:
    """A flag where the images that bank and queries gave differ in size, which moves features by itself."""
    sizes = sorted({size for part in parts for size in getattr(part, "sizes", ())})
    if len(sizes) < 2:
        return ()
    listed = ", ".join(f"{height} x {width}" for height, width in sizes[:4])
    return (f"images of several sizes: {listed}{', ...' if len(sizes) > 4 else ''}; resize them alike",)


def is_own(loader: object) -> bool:
    """Whether this is a loader of hsat over a cohort."""
    return isinstance(loader, DataLoader) and hasattr(loader.dataset, "cohort")


def name_classes(loader: object) -> tuple[str, ...] | None:
    """The classes that the dataset of a loader names, as `class_names` or `classes`."""
    dataset = getattr(loader, "dataset", None)
    for place in ("class_names", "classes"):
        names = getattr(dataset, place, None)
        if names is not None:
            return tuple(map(str, names))
    return None


def peek(loader: Any) -> tuple[Any, Any]:
    """The loader, whole, and its first item; None as the item of an empty one."""
    with own_random_state(torch.device("cpu")):
        first = next(iter(loader), None)
    if first is not None and isinstance(loader, Iterator):
        return itertools.chain((first,), loader), first
    return loader, first
