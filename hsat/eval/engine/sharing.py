"""An embedding table whose batches the ranks deal out among themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple

import torch

from hsat.distributed import ShardedLoader, World
from hsat.embedding import (
    EmbeddingBuffer,
    Layer,
    LoaderInfo,
    embed,
    encode,
    eval_mode,
    loader_info,
    require_labels,
    resolve_device,
    select_layer,
    show_progress,
    to_device,
)
from hsat.types import EmbeddingFunction, EmbeddingTable, HierarchicalBatch


def shared_embed(
    encoder: EmbeddingFunction,
    loader: Iterable[HierarchicalBatch],
    world: World,
    *,
    layer: Layer,
    class_names: Sequence[str] | None,
    device: torch.device | str | None,
    encoder_name: str,
    progress: bool,
) -> EmbeddingTable:
    """`embed`, the same table on every rank, which have all to call it; each embeds whole batches of its own."""
    if world.size == 1:
        about = {"class_names": class_names, "device": device, "encoder_name": encoder_name, "progress": progress}
        return embed(encoder, loader, layer=layer, **about)  # type: ignore[arg-type]
    scored, place = select_layer(encoder, layer), resolve_device(encoder, device)
    names, cohort, split = astuple(loader_info(loader, class_names))
    share, parts = ShardedLoader(loader, world), {}
    with eval_mode(encoder):
        for number, batch in show_progress(share, "embedding", shown=progress and world.is_main):
            require_labels(batch)
            parts[number] = EmbeddingBuffer()
            parts[number].append(batch, encode(scored, to_device(batch.images, place)))
    share.check()
    return joined_rows(parts, world).table(
        LoaderInfo(class_names=names, cohort=cohort, split=split), encoder=encoder_name
    )


def joined_rows(parts: Mapping[int, EmbeddingBuffer], world: World) -> EmbeddingBuffer:
    """The rows of all ranks in the order of their batches; parts: this rank's by the batches' numbers."""
    return EmbeddingBuffer.merge(world.gather_by_index(parts))
