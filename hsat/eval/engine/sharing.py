"""An embedding table whose batches the ranks deal out among themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from hsat.distributed import ShardedLoader, World
from hsat.eval.embedding import (
    Layer,
    Rows,
    describe,
    device_of,
    embed,
    encode,
    frozen_module,
    labelled,
    select_layer,
    sent,
    watch,
)
from hsat.types import EmbeddingTable, Encoder, HierarchicalBatch


def shared_embed(
    encoder: Encoder,
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
    scored, place = select_layer(encoder, layer), device_of(encoder, device)
    names, cohort, split = describe(loader, class_names, "", "")
    share, parts = ShardedLoader(loader, world), {}
    with frozen_module(encoder):
        for number, batch in watch(share, progress and world.is_main, "embedding"):
            labelled(batch)
            parts[number] = Rows()
            parts[number].add(batch, encode(scored, sent(batch.images, place)))
    share.check()
    return joined_rows(parts, world).table(class_names=names, cohort=cohort, split=split, encoder=encoder_name)


def joined_rows(parts: Mapping[int, Rows], world: World) -> Rows:
    """The rows of all ranks in the order of their batches; parts: this rank's by the batches' numbers."""
    rows = Rows()
    for part in world.gather_by_index(parts):
        rows.extend(part)
    return rows
