"""From batches of images to a table of embeddings, clean or attacked: what training's validation and eval share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import FittedUniversal, NaturalShift, RandomNoise, feature_drift
from hsat.attacks.base import GradientAttack
from hsat.attacks.library_attack import LibraryAttack
from hsat.distributed import ShardedLoader, World, gather_objects
from hsat.progress import show_progress
from hsat.types import (
    GROUP_LABELS,
    Attack,
    AttackResult,
    EmbeddingFunction,
    EmbeddingTable,
    HierarchicalBatch,
    Objective,
)
from hsat.types.plain_batches import PlainBatches
from hsat.types.row_checks import check_rows

__all__ = ["embed", "gather_table"]

Layer = Literal["features", "embedding"]
LAYERS = ("features", "embedding")
IDS = ("label", "patch", "slide", "patient")


def embed(  # noqa: PLR0913
    encoder: EmbeddingFunction,
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
    """Embed all images of a loader as unit rows, in the loader's order, clean or attacked.

    Args:
        encoder: A module whose call gives the projected embedding and whose `.features`, if it has one, gives the
            backbone feature; any other callable serves as both.  A module is frozen meanwhile (evaluation mode, no
            parameter gradients) and restored afterwards.
        loader: HierarchicalBatches with labels; or pairs (images, labels), where each image counts as a patient.
        class_names: Names of the classes; by default those of `loader.dataset` (`class_names` or `classes`).
        layer: Which of the two fills the table; the paper's kNN reads "features".
        attack: Attacks each batch first, maximising the cosine drift of the layer `target` from its clean value, which
            is computed once per batch.
        target: The layer that the attack moves.
        generator: Source of the attack's noise, which depends on the generator's seed and on each image's patch id
            only, so that batch size and order do not matter; seed 0 without one.
        device: Where the images go; by default where the encoder's first parameter is.  The encoder is not moved.
        cohort: Fingerprint of the cohort; by default that of `loader.dataset`.
        split: Name of the split; by default that of `loader.dataset`.
        encoder_name: What the table calls the encoder.
        progress: Show a progress bar.

    Returns:
        The table, which also knows the length of each row before normalisation.

    Raises:
        ValueError: For an unknown layer, an empty loader, batches without labels, missing class names, and embeddings
            that are not finite, naming the patch ids.

    Example:
        >>> batch = HierarchicalBatch(
        ...     torch.rand(2, 3, 4, 4), torch.arange(2), torch.zeros(2).long(), torch.zeros(2).long(), torch.arange(2)
        ... )
        >>> table = embed(nn.Flatten(), [batch], class_names=("hgg", "normal"))
        >>> table.z.shape, table.label.tolist()
        ((2, 48), [0, 1])
    """
    attacked = select_layer(encoder, target)
    seeded = torch.Generator().manual_seed(0) if generator is None else generator

    def attack_images(images: Tensor, batch: HierarchicalBatch) -> Tensor:
        if attack is None:
            return images
        objective = feature_drift(attacked, images, "cosine", reference=encode(attacked, images))
        return attack(images, objective, generator=seeded, ids=batch.patch)

    info = loader_info(loader, class_names, cohort=cohort, split=split)
    embedder = Embedder(encoder, layer=layer, device=device, name=encoder_name, progress=progress)
    return embedder.run(PlainBatches(loader), info, World(), change=attack_images)


@dataclass(frozen=True, kw_only=True)
class LoaderInfo:
    """What is known of a loader's images as a whole: class names, fingerprint of the cohort, name of the split.

    slide_label, patient_label: The class of a slide or patient by its id, where the cohort has a column that says it.
    """

    class_names: tuple[str, ...]
    cohort: str = ""
    split: str = ""
    slide_label: Mapping[int, int] | None = None
    patient_label: Mapping[int, int] | None = None


class Embedder:
    """Embeds loaders with one layer of one encoder, by one process or shared out among several.

    Args:
        encoder: See `embed`.
        layer: The layer that fills the tables.
        device: Where the images go; None: where the encoder is.
        name: What the tables call the encoder.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
        *,
        layer: str,
        device: torch.device | str | None,
        name: str,
        progress: bool = False,
    ) -> None:
        self.encoder, self.name, self._progress = encoder, name, progress
        self.layer, self.device = select_layer(encoder, layer), resolve_device(encoder, device)

    @property
    def _doing(self) -> str:
        return f"embedding by {self.name}" if self.name else "embedding"

    def run(
        self,
        loader: Iterable[HierarchicalBatch],
        info: LoaderInfo,
        world: World,
        *,
        change: Callable[[Tensor, HierarchicalBatch], Tensor] | None = None,
    ) -> EmbeddingTable:
        """Embed a loader; all ranks get the whole table.

        Args:
            loader: HierarchicalBatches with labels; every rank gives the same batches.
            info: Facts for the table.
            world: The processes that share the batches.
            change: Makes other images, (n, c, h, w) on the encoder's device, out of those of a batch.
        """
        shard, parts = ShardedLoader(loader, world), dict[int, EmbeddingBuffer]()
        with eval_mode(self.encoder):
            shown = self._progress and world.is_main
            for number, batch in show_progress(shard, self._doing) if shown else shard:
                require_labels(batch)
                images = to_device(batch.images, self.device)
                parts[number] = EmbeddingBuffer()
                parts[number].append(batch, encode(self.layer, images if change is None else change(images, batch)))
        shard.check()
        return EmbeddingBuffer.merge(world.gather_by_index(parts)).table(info, encoder=self.name)


class EmbeddingBuffer:
    """Embeddings and ids of batch after batch, on the CPU, until they become a table."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._norms: list[np.ndarray] = []
        self._ids: dict[str, list[np.ndarray]] = {name: [] for name in IDS}

    @classmethod
    def merge(cls, buffers: Iterable[EmbeddingBuffer]) -> EmbeddingBuffer:
        """One buffer with the rows of several, in their order."""
        merged = cls()
        for buffer in buffers:
            merged._rows += buffer._rows
            merged._norms += buffer._norms
            for name in IDS:
                merged._ids[name] += buffer._ids[name]
        return merged

    def append(self, batch: HierarchicalBatch, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Append embeddings z (n, d) of the images of a batch; returns unit rows and lengths, as they are kept."""
        check_rows(z, len(batch), "the encoder")
        rows, norms = normalize_rows(z, batch.patch, batch.images)
        self.append_normalized(ids_of(batch), rows, norms)
        return rows, norms

    def append_normalized(self, ids: Mapping[str, np.ndarray], rows: np.ndarray, norms: np.ndarray) -> None:
        """Append what `normalize_rows` made, and what `ids_of` says of the batch."""
        self._rows.append(rows)
        self._norms.append(norms)
        for name in IDS:
            self._ids[name].append(ids[name])

    def table(self, info: LoaderInfo, *, encoder: str) -> EmbeddingTable:
        """All rows as one table; ValueError if there are none."""
        if not self._rows:
            raise ValueError(f"the loader gave no batches (split {info.split!r}): nothing to embed")
        ids = {name: np.concatenate(parts) for name, parts in self._ids.items()}
        stated = {name: getattr(info, name) for name in GROUP_LABELS if getattr(info, name) is not None}
        groups: dict[str, np.ndarray] = {
            name: np.array([labels.get(int(group), -1) for group in ids[name.removesuffix("_label")]], dtype=np.int64)
            for name, labels in stated.items()
        }
        return EmbeddingTable(
            z=np.concatenate(self._rows),
            **ids,
            **groups,
            class_names=info.class_names,
            cohort=info.cohort,
            split=info.split,
            encoder=encoder,
            norm=np.concatenate(self._norms),
        )


def ids_of(batch: HierarchicalBatch) -> dict[str, np.ndarray]:
    """Label, patch, slide and patient of the images of a batch with labels, each (n,) int64."""
    return {name: getattr(batch, name).cpu().numpy() for name in IDS}


def normalize_rows(z: Tensor, patch: Tensor, images: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings z (n, d) as float32 unit rows, and their lengths (n,) float32.

    Raises:
        ValueError: If z is not finite, naming the patch ids (n,), and the images (n, c, h, w) that are not finite
            themselves.
    """
    value = z.detach().cpu().double()
    bad = ~torch.isfinite(value).all(1)
    if bad.any():
        ids = patch.cpu()[bad].tolist()
        shown = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        broken = None if images is None else (~images.detach().cpu().isfinite()).flatten(1).sum(1)
        if broken is not None and broken.any():
            named = [
                f"{one} ({count} values)" for one, count in zip(patch.tolist(), broken.tolist(), strict=True) if count
            ]
            raise ValueError(f"images hold NaN or infinity before any attack: patch ids {', '.join(named[:10])}")
        raise ValueError(f"embeddings of {len(ids)} of {len(z)} images are not finite: patch ids {shown}")
    length = value.norm(dim=1, keepdim=True)
    rows = value / torch.where(length > 0, length, 1.0)
    return rows.float().numpy(), length[:, 0].float().numpy()


def select_layer(encoder: EmbeddingFunction, layer: str) -> EmbeddingFunction:
    """The callable that gives a layer: "features" is `encoder.features` where there is one, "embedding" the call."""
    if layer not in LAYERS:
        raise ValueError(f"unknown layer {layer!r}; choose one of {list(LAYERS)}")
    features: EmbeddingFunction | None = getattr(encoder, "features", None)
    return features if layer == "features" and callable(features) else encoder


def encode(layer: EmbeddingFunction, images: Tensor) -> Tensor:
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
    if isinstance(attack, GradientAttack | RandomNoise | FittedUniversal | LibraryAttack | NaturalShift):
        return attack.run(images, objective, generator=generator, ids=ids, score=False)
    return attack.run(images, objective, generator=generator, ids=ids)


def eval_mode(encoder: EmbeddingFunction) -> AbstractContextManager[None]:
    """`hsat.models.frozen` for modules; nothing for other callables."""
    if not isinstance(encoder, nn.Module):
        return nullcontext()
    from hsat.models import frozen

    return frozen(encoder)


def using_branch(encoder: EmbeddingFunction, name: str | None) -> AbstractContextManager[None]:
    """`hsat.models.branch` of a dual BatchNorm encoder; nothing for None."""
    if name is None:
        return nullcontext()
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{type(encoder).__name__} is no module, so it has no BatchNorm branch {name!r}")
    from hsat.models import branch

    return branch(encoder, name)


def resolve_device(encoder: EmbeddingFunction, device: torch.device | str | None) -> torch.device:
    """The device that was asked for, else that of the encoder's first parameter or buffer, else the CPU."""
    if device is not None:
        return torch.device(device)
    if isinstance(encoder, nn.Module):
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            return tensor.device
    return torch.device("cpu")


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images on a device; pinned batches are copied to a GPU asynchronously."""
    return images.to(device, non_blocking=device.type == "cuda")  # the other way the host could read too early


def require_labels(batch: HierarchicalBatch) -> np.ndarray:
    """The labels of a batch, (n,) int64; ValueError if it has none."""
    if batch.label is None:
        raise ValueError("a batch without labels cannot fill an embedding table; give HierarchicalBatch(label=...)")
    labels: np.ndarray = batch.label.cpu().numpy()
    return labels


def loader_info(
    loader: object, class_names: Sequence[str] | None = None, *, cohort: str = "", split: str = ""
) -> LoaderInfo:
    """Class names, cohort fingerprint and split: what was given, else what the loader's dataset says.

    Raises:
        ValueError: If neither says what the classes are.
    """
    dataset = getattr(loader, "dataset", None)
    names = (
        class_names if class_names is not None else getattr(dataset, "class_names", getattr(dataset, "classes", None))
    )
    if names is None:
        raise ValueError(
            f"class names are missing and {type(loader).__name__} has no dataset.class_names; pass class_names=(...)"
        )
    source = getattr(dataset, "cohort", None)
    fingerprint = getattr(source, "fingerprint", "")
    stated = fingerprint() if callable(fingerprint) else fingerprint
    return LoaderInfo(
        class_names=tuple(names),
        cohort=cohort or str(stated or ""),
        split=split or str(getattr(dataset, "split", None) or ""),
        **{name: label_by_group(source, name) for name in GROUP_LABELS},
    )


def label_by_group(cohort: Any, name: str) -> dict[int, int] | None:
    """The class of each slide or patient by its id, as the cohort's column of that name says it; None without one."""
    column = getattr(cohort, name, None)
    if column is None:
        return None
    group, first = np.unique(getattr(cohort, name.removesuffix("_label")), return_index=True)
    return dict(zip(group.tolist(), np.asarray(column)[first].tolist(), strict=True))


_TEXT = ("class_names", "cohort", "split", "encoder")


def gather_table(table: EmbeddingTable | None) -> EmbeddingTable:
    """The rows of all ranks as one table, in order of rank, on every rank; each rank has to call it.

    With `hsat.distributed.row_share` the result is the table of one process.

    Args:
        table: This rank's rows; None if it has none.

    Returns:
        The rows of all ranks.

    Raises:
        ValueError: If no rank has rows, or if the ranks' tables differ in width, classes, cohort, split or encoder.
    """
    tables = [part for part in gather_objects(table) if part is not None]
    if not tables:
        raise ValueError("no rank has embedded anything, so there are no rows to gather")
    if len(tables) == 1:
        return tables[0]
    first = tables[0]
    for name in _TEXT:
        values = [getattr(part, name) for part in tables]
        if any(value != values[0] for value in values):
            raise ValueError(f"tables of the ranks differ in {name}: {', '.join(map(str, values))}")
    if any(part.z.shape[1] != first.z.shape[1] for part in tables):
        raise ValueError(f"tables of the ranks differ in width: {', '.join(str(part.z.shape[1]) for part in tables)}")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in tables]) for name in ("z", *IDS)}
    for name in ("norm", *GROUP_LABELS):
        parts = [getattr(part, name) for part in tables if getattr(part, name) is not None]
        columns[name] = np.concatenate(parts) if len(parts) == len(tables) else None
    text = {name: getattr(first, name) for name in _TEXT}
    return EmbeddingTable(**columns, **text)
