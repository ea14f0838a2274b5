"""One pass over the queries under all conditions, which can go on where a killed process stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers import FittedKNN
from hsat.distributed import ShardedLoader, World
from hsat.embedding import (
    LoaderInfo,
    encode,
    eval_mode,
    loader_info,
    require_labels,
    resolve_device,
    show_progress,
    to_device,
    using_branch,
)
from hsat.eval.aiming import Aim
from hsat.eval.doubt.doubts import Doubts
from hsat.eval.engine.journal import Arrays, Journal
from hsat.eval.engine.layers import Layers, Remembering
from hsat.eval.engine.parts import Falls, Part, Seen, count_fall
from hsat.eval.engine.references import References
from hsat.eval.engine.siege import CLEAN, Siege, Tried
from hsat.eval.engine.strongest import Casualties, MemberCount, Strongest
from hsat.eval.tally import Tally
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, align_labels


class Trial:
    """The conditions of an evaluation, and what happened to the queries under each of them so far.

    attacks: by name; those that are `Strongest` come after the others, whose images they take into account.  keep: how
    many images of each condition to keep.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
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
        self._falls = {name: Falls() for name, attack in attacks.items() if isinstance(attack, Strongest)}
        self._kept = 0

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        *,
        world: World,
        journal: Journal,
        references: References,
        class_names: Sequence[str] | None,
        device: torch.device | str | None,
        model: str,
        progress: bool,
    ) -> dict[str, EmbeddingTable]:
        """The embeddings of all queries, by condition; each rank attacks batches of its own, and all get all rows."""
        names, cohort, split = astuple(loader_info(queries, class_names))
        place, share = resolve_device(self._encoder, device), ShardedLoader(queries, world, finished=journal.finished)
        parts: dict[int, Part] = {}
        with eval_mode(self._encoder):
            for number, batch in show_progress(share, "attacking", shown=progress and world.is_main):
                labels = align_labels(require_labels(batch), names, self._bank.class_names)
                part = journal.read(number, batch)
                if part is None:
                    images = to_device(batch.images, place)
                    part = self.see(batch, images, self._clean(number, batch, images, references), labels)
                    journal.write(number, batch, *part)
                parts[number] = part
                self._kept += len(part[1]["kept0"])
                self._doubts.see(batch, labels)
            share.check()
            every = world.gather_by_index(parts)
            self._doubts.settle(place, journal, world)
        references.close(len(every), world)
        for part in every:
            self._add(*part)
        return {
            name: tally.rows.table(LoaderInfo(class_names=names, cohort=cohort, split=split), encoder=model)
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

    def see(self, batch: HierarchicalBatch, images: Tensor, clean: Tensor, labels: np.ndarray) -> Part:
        """Attack and embed one batch; the clean embedding serves every attack."""
        if (width := self._bank.z.shape[1]) != clean.shape[-1]:
            raise ValueError(f"the bank's embeddings have width {width}, the encoder's {clean.shape[-1]}: not its bank")
        seen = Seen(batch, keep=max(0, self._keep - self._kept))
        seen.store(CLEAN, images, clean, Tally())
        with using_branch(self._encoder, self._aim.branch):
            objective = self._aim.objective(images, clean, labels)
        tried: dict[str, Tried] = {}
        for name, attack in self.attacks.items():
            if isinstance(attack, Strongest):
                continue
            generator = torch.Generator().manual_seed(self._seed)
            with using_branch(self._encoder, self._aim.branch):
                result = attack.run(images, objective, generator=generator, ids=batch.patch)
            tally = Tally()
            tally.count(result, images)
            z = encode(self._scored, result.x_adv)
            seen.store(name, result.x_adv, z, tally)
            if self._falls:
                tried[name] = Tried(attack, result.x_adv, z, climbed=result.backwards > 0)
        for name in self._falls:
            attack = self.attacks[name]
            fall = self._siege.run(attack, images, clean, labels=labels, ids=batch.patch, tried=tried)
            seen.store(name, fall.x_adv, fall.z, count_fall(fall), fall)
        return seen.part(tuple(self.tallies))

    def casualties(self) -> dict[str, Casualties]:
        """By the name of a Strongest: which of its members felled which image."""
        return {name: falls.joined() for name, falls in self._falls.items()}

    def _add(self, about: dict[str, Any], arrays: Arrays) -> None:
        """Count a batch, whoever attacked it."""
        for i, (name, tally) in enumerate(self.tallies.items()):
            tally.rows.append_normalized(arrays, arrays[f"z{i}"], np.ones(len(arrays[f"z{i}"]), dtype=np.float32))
            missing = max(0, self._keep - sum(map(len, tally.kept)))
            kept = torch.from_numpy(arrays[f"kept{i}"][:missing])
            tally.kept.append(kept.to(getattr(torch, about["dtype"])))
            tally.add_counts(about["counts"][name])
            if name in self._falls:
                members = [MemberCount(**each) for each in about["members"][name]]
                self._falls[name].add(arrays["patch"], arrays[f"felled_by{i}"], arrays[f"margin{i}"], members)
