"""One surrogate's adversarial images, made once and embedded by every target."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hsat.attacks import feature_drift
from hsat.eval.embedding import Rows, attack_unscored, device_of, encode, labelled, select_layer, through_branch
from hsat.eval.engine.crew import Crew
from hsat.eval.engine.dealing import Share
from hsat.eval.engine.sharing import joined_rows
from hsat.eval.tally import Tally
from hsat.eval.transfer.lending import Lender
from hsat.types import Attack, EmbeddingTable, Encoder, HierarchicalBatch
from hsat.types.tensor_bytes import tensor_bytes

_COLUMNS = ("images", "patch", "slide", "patient", "label")


class SameQueries:
    """The batches of the queries' loader that are this rank's, by number; it has to give the same ones each time.

    Rows of different passes are compared one by one, so that a loader that shuffles or augments would spoil every
    difference.  digests: one per batch, of any rank, from the first reading (or an earlier process); a batch that
    differs is a ValueError before anything is done with it.
    """

    def __init__(self, loader: Iterable[HierarchicalBatch], crew: Crew, digests: Sequence[str] = ()) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                f"the queries are read once per target and per attack, and a {type(loader).__name__} can be read only"
                " once; give a list of batches or a loader such as hsat.data.patch_loader"
            )
        self.loader, self.digests, self._crew = loader, list(digests), crew
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[tuple[int, HierarchicalBatch]]:
        before, share, seen = len(self.digests), Share(self.loader, self._crew), {}
        for number, batch in share:
            labelled(batch)
            seen[number] = _digest(batch)
            if before and (number >= before or seen[number] != self.digests[number]):
                raise ValueError(
                    f"batch {number + 1} of the queries is not what it was at the first reading ({before} batches);"
                    " all passes need the same patches in the same order and batches: no shuffling, no augmentation"
                )
            yield number, batch
        share.check()
        if not before:
            self.digests = self._crew.join(seen)
        elif share.batches < before:
            raise ValueError(f"the queries had {before} batches at the first reading and have {share.batches} now")


class Source:
    """Batches of queries after one attack on one surrogate, by number; can be read once, and counts as it goes.

    target: the layer that is attacked.  branch: of a dual BatchNorm that the attack goes through; None is the active.
    """

    def __init__(
        self,
        surrogate: Encoder,
        attack: Attack,
        queries: Iterable[tuple[int, HierarchicalBatch]],
        *,
        target: str,
        seed: int,
        branch: str | None,
        device: torch.device | str | None,
    ) -> None:
        self._surrogate, self._branch, self._attacked = surrogate, branch, select_layer(surrogate, target)
        self._attack, self._queries, self._seed = attack, queries, seed
        self._place = device_of(surrogate, device)
        self.tally = Tally()

    def __iter__(self) -> Iterator[tuple[int, HierarchicalBatch]]:
        for number, batch in self._queries:
            images = batch.images.to(self._place)
            generator = torch.Generator().manual_seed(self._seed)
            with through_branch(self._surrogate, self._branch):
                objective = feature_drift(self._attacked, images, "cosine")
                result = attack_unscored(self._attack, images, objective, generator=generator, ids=batch.patch)
            self.tally.count(result, images)
            yield number, batch.replace(images=result.x_adv.contiguous())


class Sink:
    """Embeddings of one target, batch after batch, of which each rank has some."""

    def __init__(self, encoder: Encoder, crew: Crew, *, layer: str, device: torch.device | str | None) -> None:
        self._layer, self._place, self._crew = select_layer(encoder, layer), device_of(encoder, device), crew
        self._parts: dict[int, Rows] = {}

    def add(self, number: int, batch: HierarchicalBatch) -> None:
        """Embed a batch."""
        self._parts[number] = Rows()
        self._parts[number].add(batch, encode(self._layer, batch.images.to(self._place)))

    def rows(self) -> Rows:
        """All ranks' rows in the order of the batches; every rank has to call it."""
        return joined_rows(self._parts, self._crew)


def table_of(rows: Rows, queries: EmbeddingTable, name: str) -> EmbeddingTable:
    """Embeddings of an encoder of this name, described as the queries are."""
    return rows.table(class_names=queries.class_names, cohort=queries.cohort, split=queries.split, encoder=name)


def stream(
    lender: Lender,
    surrogate: str,
    targets: Sequence[str],
    *,
    queries: EmbeddingTable,
    source: Any,
    sink: Any,
    crew: Crew,
) -> Iterator[tuple[str, EmbeddingTable, Tally]]:
    """Each target's table of attacked queries; every adversarial batch goes to all targets before the next is made.

    source(encoder) gives the surrogate's Source, sink(encoder) a target's Sink.  All of them are in memory together.
    """
    with ExitStack() as stack:
        made = source(stack.enter_context(lender.lend(surrogate)))
        sinks = {name: sink(stack.enter_context(lender.lend(name))) for name in targets}
        for number, batch in made:
            for each in sinks.values():
                each.add(number, batch)
    tally = made.tally.over(crew.gather)
    for name, each in sinks.items():
        yield name, table_of(each.rows(), queries, name), tally


def spill(
    lender: Lender,
    surrogate: str,
    targets: Sequence[str],
    *,
    queries: EmbeddingTable,
    source: Any,
    sink: Any,
    crew: Crew,
    folder: Path,
) -> Iterator[tuple[str, EmbeddingTable, Tally]]:
    """The same with one encoder at a time: the adversarial images wait in `folder`, float for float, and go at the end.

    The folder is the caller's to give and this function's to empty: whatever a killed process left there is removed.
    Several ranks have a folder each inside it.
    """
    with _emptied(folder if crew.size == 1 else folder / f"rank-{crew.rank}") as own:
        tally = _fill(lender, surrogate, source, own).over(crew.gather)
        for name in targets:
            yield name, table_of(_embed_from(lender, name, sink, own), queries, name), tally


def _fill(lender: Lender, surrogate: str, source: Any, folder: Path) -> Tally:
    """Write a surrogate's batches; a function of its own, so that nothing keeps the encoder afterwards."""
    with lender.lend(surrogate) as encoder:
        made: Source = source(encoder)
        for number, batch in made:
            _write_batch(folder / f"{number:06}.safetensors", batch)
        return made.tally


def _embed_from(lender: Lender, name: str, sink: Any, folder: Path) -> Rows:
    with lender.lend(name) as encoder:
        embedded: Sink = sink(encoder)
        for path in sorted(folder.glob("*.safetensors")):
            embedded.add(int(path.stem), _read_batch(path))
    return embedded.rows()


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_batch(path: Path, batch: HierarchicalBatch) -> None:
    from safetensors.torch import save_file

    columns = {name: getattr(batch, name).detach().cpu() for name in _COLUMNS}
    # Copies: columns that share their memory (views of one table of ids, one tensor in two roles) are refused.
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in columns.items()}, path)


def _read_batch(path: Path) -> HierarchicalBatch:
    from safetensors.torch import load_file

    columns: dict[str, Any] = load_file(path)
    return HierarchicalBatch(**columns)


def _digest(batch: HierarchicalBatch) -> str:
    """16 hexadecimal digits over the images and ids of a batch."""
    found = hashlib.blake2b(digest_size=8)
    for name in _COLUMNS:
        value = getattr(batch, name)
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(tensor_bytes(value))
    return found.hexdigest()
