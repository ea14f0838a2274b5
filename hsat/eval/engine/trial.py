"""One pass over the queries under all conditions, which can go on where a killed process stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.eval.aiming import Aim
from hsat.eval.banks.knn import FittedKNN
from hsat.eval.doubt.doubts import Doubts
from hsat.eval.embedding import describe, device_of, encode, frozen_module, labelled, through_branch, watch
from hsat.eval.engine.journal import Arrays, Journal
from hsat.eval.engine.layers import Layers, Remembering
from hsat.eval.engine.references import References
from hsat.eval.engine.siege import CLEAN, Fall, Siege, Tried
from hsat.eval.engine.strongest import Casualties, MemberCount, Strongest
from hsat.eval.scoring import match_labels
from hsat.eval.tally import Tally
from hsat.types import Attack, EmbeddingTable, Encoder, HierarchicalBatch


class Trial:
    """The conditions of an evaluation, and what happened to the queries under each of them so far.

    attacks: by name; those that are `Strongest` come after the others, whose images they take into account.  keep: how
    many images of each condition to keep.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Layers,
        attacks: Mapping[str, Attack | Strongest],
        *,
        aim: Aim,
        siege: Siege,
        doubts: Doubts,
        knn: FittedKNN,
        layer: str,
        seed: int,
        keep: int,
    ) -> None:
        self._encoder, self._bank, self._seed, self._keep = encoder, knn.table, seed, keep
        self._aim, self._siege, self._doubts, self._scored = aim, siege, doubts, layers.select(layer)
        self.attacks: dict[str, Any] = dict(attacks)
        self.tallies = {name: Tally() for name in (CLEAN, *attacks)}
        self._falls = {name: _Falls() for name, attack in attacks.items() if isinstance(attack, Strongest)}

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        *,
        journal: Journal,
        references: References,
        class_names: Sequence[str] | None,
        device: torch.device | str | None,
        model: str,
        progress: bool,
    ) -> dict[str, EmbeddingTable]:
        """The embeddings of all queries, by condition."""
        names, cohort, split = describe(queries, class_names, "", "")
        place, batches = device_of(self._encoder, device), 0
        with frozen_module(self._encoder):
            for number, batch in enumerate(watch(queries, progress, "attacking")):
                labels = match_labels(labelled(batch), names, self._bank.class_names)
                known = journal.read(number, batch)
                if known is None:
                    images = batch.images.to(place)
                    self.see(batch, images, self._clean(number, batch, images, references), labels)
                    journal.write(number, batch, *self._packed())
                else:
                    self._unpack(batch, *known)
                self._doubts.see(batch, labels)
                batches = number + 1
            self._doubts.settle(place, journal)
        references.close(batches)
        return {
            name: tally.rows.table(class_names=names, cohort=cohort, split=split, encoder=model)
            for name, tally in self.tallies.items()
        }

    def _clean(self, number: int, batch: HierarchicalBatch, images: Tensor, references: References) -> Tensor:
        """The clean embedding of a batch, (n, d): known from an earlier evaluation, or computed."""
        clean = references.of(number, batch, images.device)
        if clean is None:
            clean = encode(self._scored, images)
            references.note(number, batch, clean)
        elif isinstance(self._scored, Remembering):
            self._scored.recall(images, clean)
        return clean

    def see(self, batch: HierarchicalBatch, images: Tensor, clean: Tensor, labels: np.ndarray) -> None:
        """Attack and embed one batch; the clean embedding serves every attack."""
        if (width := self._bank.z.shape[1]) != clean.shape[-1]:
            raise ValueError(f"the bank's embeddings have width {width}, the encoder's {clean.shape[-1]}: not its bank")
        self._store(CLEAN, batch, images, clean)
        with through_branch(self._encoder, self._aim.branch):
            objective = self._aim.objective(images, clean, labels)
        tried: dict[str, Tried] = {}
        for name, attack in self.attacks.items():
            if isinstance(attack, Strongest):
                continue
            generator = torch.Generator().manual_seed(self._seed)
            with through_branch(self._encoder, self._aim.branch):
                result = attack.run(images, objective, generator=generator, ids=batch.patch)
            self.tallies[name].count(result, images)
            z = encode(self._scored, result.x_adv)
            self._store(name, batch, result.x_adv, z)
            if self._falls:
                tried[name] = Tried(attack, result.x_adv, z, climbed=result.backwards > 0)
        for name, falls in self._falls.items():
            attack = self.attacks[name]
            fall = self._siege.run(attack, images, clean, labels=labels, ids=batch.patch, tried=tried)
            _count(self.tallies[name], fall)
            self._store(name, batch, fall.x_adv, fall.z)
            falls.add(fall, batch.patch.cpu().numpy())

    def casualties(self) -> dict[str, Casualties]:
        """By the name of a Strongest: which of its members felled which image."""
        return {name: falls.joined() for name, falls in self._falls.items()}

    def _store(self, name: str, batch: HierarchicalBatch, images: Tensor, z: Tensor) -> None:
        tally = self.tallies[name]
        tally.rows.add(batch, z)
        missing = max(0, self._keep - sum(map(len, tally.kept)))
        tally.kept.append(images[:missing].detach().cpu())

    def _packed(self) -> tuple[dict[str, Any], Arrays]:
        """Everything that the last batch added; counts are those of all batches so far."""
        arrays: Arrays = {}
        about: dict[str, Any] = {"counts": {name: tally.counts() for name, tally in self.tallies.items()}}
        for i, tally in enumerate(self.tallies.values()):
            arrays[f"z{i}"] = tally.rows.last
            kept = tally.kept[-1]
            arrays[f"kept{i}"] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy()
        for i, falls in enumerate(self._falls.values()):
            arrays |= {f"felled_by{i}": falls.felled_by[-1], f"margin{i}": falls.margin[-1]}
        about["members"] = {
            name: [dataclasses.asdict(each) for each in falls.members] for name, falls in self._falls.items()
        }
        return about, arrays

    def _unpack(self, batch: HierarchicalBatch, about: dict[str, Any], arrays: Arrays) -> None:
        """Put a batch that an earlier process finished in the place of its attacks."""
        for i, (name, tally) in enumerate(self.tallies.items()):
            tally.rows.add_unit(batch, arrays[f"z{i}"])
            tally.kept.append(torch.from_numpy(arrays[f"kept{i}"]).to(batch.images.dtype))
            for count, value in about["counts"][name].items():
                setattr(tally, count, value)
        for i, (name, falls) in enumerate(self._falls.items()):
            falls.patch.append(batch.patch.cpu().numpy())
            falls.felled_by.append(arrays[f"felled_by{i}"])
            falls.margin.append(arrays[f"margin{i}"])
            falls.members = [MemberCount(**each) for each in about["members"][name]]


class _Falls:
    """What one Strongest did, over the batches."""

    def __init__(self) -> None:
        self.patch: list[np.ndarray] = []
        self.felled_by: list[np.ndarray] = []
        self.margin: list[np.ndarray] = []
        self.members: list[MemberCount] = []

    def add(self, fall: Fall, patch: np.ndarray) -> None:
        self.patch.append(patch)
        self.felled_by.append(fall.felled_by)
        self.margin.append(fall.margin)
        before = self.members or [
            dataclasses.replace(m, seen=0, felled=0, forwards=0, backwards=0) for m in fall.members
        ]
        self.members = [_sum(old, new) for old, new in zip(before, fall.members, strict=True)]

    def joined(self) -> Casualties:
        patch, felled_by, margin = map(np.concatenate, (self.patch, self.felled_by, self.margin))
        return Casualties(patch, felled_by, margin, tuple(self.members))


def _sum(old: MemberCount, new: MemberCount) -> MemberCount:
    names = ("seen", "felled", "forwards", "backwards")
    return dataclasses.replace(old, **{name: getattr(old, name) + getattr(new, name) for name in names})


def _count(tally: Tally, fall: Fall) -> None:
    """Add a batch of the strongest attack."""
    tally.images += len(fall.x_adv)
    tally.forwards += sum(each.forwards for each in fall.members)
    tally.backwards += sum(each.backwards for each in fall.members)
    tally.zero_gradient += int(fall.zero_gradient.sum())
    tally.never_moved += int(fall.never_moved.sum())
