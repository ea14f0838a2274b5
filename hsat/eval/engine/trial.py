"""One pass over the queries under all conditions, which can go on where a killed process stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.eval.aiming import Aim
from hsat.eval.banks.knn import FittedKNN
from hsat.eval.doubt.doubts import Doubts
from hsat.eval.embedding import (
    attack_unscored,
    describe,
    device_of,
    encode,
    frozen_module,
    labelled,
    select_layer,
    sent,
    through_branch,
    watch,
)
from hsat.eval.engine.crew import Crew
from hsat.eval.engine.dealing import Share
from hsat.eval.engine.journal import Arrays, Journal
from hsat.eval.engine.parts import Falls, Part, Seen, count_fall
from hsat.eval.engine.references import References
from hsat.eval.engine.siege import CLEAN, Siege, Tried
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
        self._aim, self._siege, self._doubts, self._scored = aim, siege, doubts, select_layer(encoder, layer)
        self.attacks: dict[str, Any] = dict(attacks)
        self.tallies = {name: Tally() for name in (CLEAN, *attacks)}
        self._falls = {name: Falls() for name, attack in attacks.items() if isinstance(attack, Strongest)}
        self._kept = 0

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        *,
        crew: Crew,
        journal: Journal,
        references: References,
        class_names: Sequence[str] | None,
        device: torch.device | str | None,
        model: str,
        progress: bool,
    ) -> dict[str, EmbeddingTable]:
        """The embeddings of all queries, by condition; each rank attacks batches of its own, and all get all rows."""
        names, cohort, split = describe(queries, class_names, "", "")
        place, share = device_of(self._encoder, device), Share(queries, crew, finished=journal.finished)
        parts: dict[int, Part] = {}
        with frozen_module(self._encoder):
            for number, batch in watch(share, progress and crew.leads, "attacking"):
                labels = match_labels(labelled(batch), names, self._bank.class_names)
                part = journal.read(number, batch)
                if part is None:
                    images = sent(batch.images, place)
                    part = self.see(batch, images, self._clean(number, batch, images, references), labels)
                    journal.write(number, batch, *part)
                parts[number] = part
                self._kept += len(part[1]["kept0"])
                self._doubts.see(batch, labels)
            share.check()
            every = crew.join(parts)
            self._doubts.settle(place, journal, crew)
        references.close(len(every), crew)
        for part in every:
            self._add(*part)
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
        return clean

    def see(self, batch: HierarchicalBatch, images: Tensor, clean: Tensor, labels: np.ndarray) -> Part:
        """Attack and embed one batch; the clean embedding serves every attack."""
        if (width := self._bank.z.shape[1]) != clean.shape[-1]:
            raise ValueError(f"the bank's embeddings have width {width}, the encoder's {clean.shape[-1]}: not its bank")
        seen = Seen(batch, keep=max(0, self._keep - self._kept))
        seen.store(CLEAN, images, clean, Tally())
        with through_branch(self._encoder, self._aim.branch):
            objective = self._aim.objective(images, clean, labels)
        tried: dict[str, Tried] = {}
        for name, attack in self.attacks.items():
            if isinstance(attack, Strongest):
                continue
            generator = torch.Generator().manual_seed(self._seed)
            with through_branch(self._encoder, self._aim.branch):
                result = attack_unscored(attack, images, objective, generator=generator, ids=batch.patch)
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
            tally.rows.add_unit(arrays, arrays[f"z{i}"])
            missing = max(0, self._keep - sum(map(len, tally.kept)))
            kept = torch.from_numpy(arrays[f"kept{i}"][:missing])
            tally.kept.append(kept.to(getattr(torch, about["dtype"])))
            tally.add_counts(about["counts"][name])
            if name in self._falls:
                members = [MemberCount(**each) for each in about["members"][name]]
                self._falls[name].add(arrays["patch"], arrays[f"felled_by{i}"], arrays[f"margin{i}"], members)
