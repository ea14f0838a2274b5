"""From batches of images to a table of embeddings, clean or attacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import FittedUniversal, RandomNoise, feature_drift
from hsat.attacks.calling import Ascent
from hsat.types import Attack, AttackResult, EmbeddingTable, Encoder, HierarchicalBatch, Objective
from hsat.types.row_checks import check_rows

Layer = Literal["features", "embedding"]
LAYERS = ("features", "embedding")
Item = TypeVar("Item")
_IDS = ("label", "patch", "slide", "patient")


def embed(
    encoder: Encoder,
    loader: Iterable[HierarchicalBatch],
    *,
    class_names: Sequence[str] | None = None,
    layer: Layer = "features",
    attack: Attack | None = None,
    target: Layer = "features",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    cohort: str = "",
    split: str = "",
    encoder_name: str = "",
    progress: bool = False,
) -> EmbeddingTable:
    """The embeddings of all images of a loader as unit rows, in the loader's order.

    encoder: a module whose call gives the projected embedding and whose `.features`, if it has one, gives the backbone
    feature; any other callable serves as both.  A module is frozen meanwhile (evaluation mode, no parameter gradients)
    and restored afterwards.  layer: which of the two fills the table; the paper's kNN reads "features".
    loader: HierarchicalBatches with labels.  class_names, cohort and split default to what `loader.dataset` says
    (`class_names`, `cohort.fingerprint()`, `split`).
    device: where the images go; by default where the encoder's first parameter is.  The encoder is not moved.

    attack: images are attacked first, maximising the cosine drift of the layer `target` from its clean value, which is
    computed once per batch.  Noise depends on the generator's seed and on each image's patch id (seed 0 without a
    generator), so that batch size and order do not matter.

    Raises ValueError for an unknown layer, an empty loader, batches without labels, missing class names, and for
    embeddings that are not finite, naming the patch ids.
    """
    scored, attacked = select_layer(encoder, layer), select_layer(encoder, target)
    names, cohort, split = describe(loader, class_names, cohort, split)
    place = device_of(encoder, device)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rows = Rows()
    with frozen_module(encoder):
        for batch in watch(loader, progress, "embedding"):
            labelled(batch)
            images = sent(batch.images, place)
            if attack is not None:
                objective = feature_drift(attacked, images, "cosine", reference=encode(attacked, images))
                images = attack(images, objective, generator=generator, ids=batch.patch)
            rows.add(batch, encode(scored, images))
    return rows.table(class_names=names, cohort=cohort, split=split, encoder=encoder_name)


class Rows:
    """Embeddings and ids of batch after batch, on the CPU, until they become a table."""

    def __init__(self) -> None:
        self._z: list[np.ndarray] = []
        self._ids: dict[str, list[np.ndarray]] = {name: [] for name in _IDS}

    def add(self, batch: HierarchicalBatch, z: Tensor) -> np.ndarray:
        """Append embeddings z (n, d) of the images of a batch; returns them as they are kept, see `unit_rows`."""
        check_rows(z, len(batch), "the encoder")
        rows = unit_rows(z, batch.patch)
        self.add_unit(ids_of(batch), rows)
        return rows

    def add_unit(self, ids: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        """Append rows (n, d) that `unit_rows` made, and what `ids_of` says of their batch."""
        self._z.append(rows)
        for name in _IDS:
            self._ids[name].append(ids[name])

    def extend(self, other: Rows) -> None:
        """Append all that another one holds."""
        self._z += other._z
        for name in _IDS:
            self._ids[name] += other._ids[name]

    def table(self, *, class_names: Sequence[str], cohort: str, split: str, encoder: str) -> EmbeddingTable:
        """All rows so far as one table; ValueError if there are none."""
        if not self._z:
            raise ValueError(f"the loader gave no batches (split {split!r}): nothing to embed")
        ids = {name: np.concatenate(parts) for name, parts in self._ids.items()}
        return EmbeddingTable(
            z=np.concatenate(self._z),
            **ids,
            class_names=tuple(class_names),
            cohort=cohort,
            split=split,
            encoder=encoder,
        )


def ids_of(batch: HierarchicalBatch) -> dict[str, np.ndarray]:
    """Label, patch, slide and patient of the images of a batch with labels, each (n,) int64."""
    return {name: getattr(batch, name).cpu().numpy() for name in _IDS}


def unit_rows(z: Tensor, patch: Tensor) -> np.ndarray:
    """Embeddings z (n, d) as float32 rows of length 1; ValueError, naming the patch ids (n,), where z is not finite."""
    value = z.detach().cpu().double()
    bad = ~torch.isfinite(value).all(1)
    if bad.any():
        ids = patch.cpu()[bad].tolist()
        shown = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        raise ValueError(f"embeddings of {len(ids)} of {len(z)} images are not finite: patch ids {shown}")
    length = value.norm(dim=1, keepdim=True)
    rows: np.ndarray = (value / torch.where(length > 0, length, 1.0)).float().numpy()
    return rows


def select_layer(encoder: Encoder, layer: str) -> Encoder:
    """The callable that gives a layer: "features" is `encoder.features` where there is one, "embedding" the call."""
    if layer not in LAYERS:
        raise ValueError(f"unknown layer or target {layer!r}; choose one of {list(LAYERS)}")
    features: Encoder | None = getattr(encoder, "features", None)
    return features if layer == "features" and callable(features) else encoder


def encode(layer: Encoder, images: Tensor) -> Tensor:
    """The layer's values (n, d) without a graph; ValueError for any other shape."""
    with torch.no_grad():
        z = layer(images)
    check_rows(z, len(images), "the encoder")
    return z


def attack_unscored(
    attack: Attack, images: Tensor, objective: Objective, *, generator: torch.Generator, ids: Tensor
) -> AttackResult:
    """`attack.run` without the pass that ends it, for callers who embed the result and do not read `value`.

    Attacks that are not hsat's own may not know how to leave it out, and keep it.
    """
    if isinstance(attack, Ascent | RandomNoise | FittedUniversal):
        return attack.run(images, objective, generator=generator, ids=ids, score=False)
    return attack.run(images, objective, generator=generator, ids=ids)


def frozen_module(encoder: Encoder) -> AbstractContextManager[None]:
    """`hsat.models.frozen` for modules; nothing for other callables."""
    if not isinstance(encoder, nn.Module):
        return nullcontext()
    from hsat.models import frozen

    return frozen(encoder)


def through_branch(encoder: Encoder, name: str | None) -> AbstractContextManager[None]:
    """`hsat.models.branch` of a dual BatchNorm encoder; nothing for None."""
    if name is None:
        return nullcontext()
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{type(encoder).__name__} is no module, so it has no BatchNorm branch {name!r}")
    from hsat.models import branch

    return branch(encoder, name)


def device_of(encoder: Encoder, device: torch.device | str | None) -> torch.device:
    """The device that was asked for, else that of the encoder's first parameter or buffer, else the CPU."""
    if device is not None:
        return torch.device(device)
    if isinstance(encoder, nn.Module):
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            return tensor.device
    return torch.device("cpu")


def sent(images: Tensor, place: torch.device) -> Tensor:
    """Images on a device.  On its way to a GPU a batch that the loader has page-locked stops nobody."""
    return images.to(place, non_blocking=place.type == "cuda")  # the other way the host could read too early


def labelled(batch: HierarchicalBatch) -> np.ndarray:
    """The labels of a batch, (n,) int64; ValueError if it has none."""
    if batch.label is None:
        raise ValueError("a batch without labels cannot fill an embedding table; give HierarchicalBatch(label=...)")
    labels: np.ndarray = batch.label.cpu().numpy()
    return labels


def describe(
    loader: Any, class_names: Sequence[str] | None, cohort: str, split: str
) -> tuple[tuple[str, ...], str, str]:
    """Class names, cohort fingerprint and split: what was given, else what the loader's dataset says."""
    dataset = getattr(loader, "dataset", None)
    names = class_names if class_names is not None else getattr(dataset, "class_names", None)
    if names is None:
        raise ValueError(
            f"class names are missing and {type(loader).__name__} has no dataset.class_names; pass class_names=(...)"
        )
    fingerprint = getattr(getattr(dataset, "cohort", None), "fingerprint", "")
    found = fingerprint() if callable(fingerprint) else fingerprint
    return tuple(names), cohort or str(found or ""), split or str(getattr(dataset, "split", None) or "")


def watch(loader: Iterable[Item], progress: bool, description: str) -> Iterator[Item]:
    """The loader's batches, with a progress bar on standard error when asked for."""
    if not progress:
        yield from loader
        return
    from tqdm import tqdm

    yield from tqdm(loader, desc=description, unit="batch")
