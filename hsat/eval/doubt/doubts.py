"""Diagnosis inside an evaluation: a handful of its queries, once for each attack, as flags of its records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers import FittedKNN
from hsat.distributed import World
from hsat.embedding import encode, select_layer, using_branch
from hsat.eval.aiming import Aim
from hsat.eval.doubt.diagnosis import Diagnosis, check_attack_fits, examine, suspect_of
from hsat.eval.doubt.subset import Handful
from hsat.eval.engine.identity import key_of
from hsat.eval.engine.journal import Journal, batch_digest
from hsat.eval.records import Record
from hsat.types import Attack, EmbeddingFunction, HierarchicalBatch, Objective

IMAGES = 32
"""Queries that diagnose=True looks at: enough to see a sign that a third of the images show."""


class Doubts:
    """Collects queries while an evaluation sees them, then diagnoses its attacks.

    images: how many queries, True for 32, False or 0 for none.  Attacks that cannot be diagnosed (random noise, eps 0,
    attacks without a threat model on the pixels) are left out.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
        aim: Aim,
        attacks: Mapping[str, Attack],
        *,
        knn: FittedKNN,
        layer: str,
        images: bool | int,
        seed: int,
    ) -> None:
        size = IMAGES * images if isinstance(images, bool) else images
        if not isinstance(size, int | np.integer) or size < 0:
            raise ValueError(f"diagnose must be True, False or a number of images, got {images!r}")
        self._handful = Handful(int(size), seed=seed) if size else None
        self._encoder, self._aim, self._layer = encoder, aim, layer
        self._knn = dataclasses.replace(knn, k=aim.k)  # the vote that the attack is measured by
        self._attacks = {name: attack for name, attack in attacks.items() if _fits(attack)}
        self._seed = seed
        self._found: dict[str, Diagnosis] = {}

    def see(self, batch: HierarchicalBatch, labels: np.ndarray) -> None:
        """Consider the images of a batch; labels: (n,) as the bank numbers them."""
        if self._handful is not None:
            self._handful.see(batch, torch.from_numpy(labels))

    def settle(self, device: torch.device, journal: Journal, world: World) -> None:
        """Diagnose every attack on the queries that were kept; the encoder is frozen by the caller.

        journal: of the evaluation; diagnoses that it knows are taken from there, as they were found.  world: each rank
        diagnoses attacks of its own, all on the same queries, out of what all have seen.
        """
        if self._handful is None:
            return
        self._handful.join(world.gather(self._handful))
        batches = self._handful.batches()
        seen = [batch_digest(batch) for batch in batches]
        for name, attack in list(self._attacks.items())[world.rank :: world.size]:
            key = key_of({"diagnosis of": name, "images": seen})
            if (known := journal.recall(key)) is not None:
                self._found[name] = Diagnosis(flags=tuple(known["flags"]), measures=known["measures"])
                continue
            suspect = suspect_of(
                self._encoder,
                self._knn,
                attack=attack,
                target=self._layer,
                layer=self._layer,
                objective=self._objective,
                seed=self._seed,
            )
            self._found[name] = examine(suspect, batches, device=device)
            journal.note(key, dataclasses.asdict(self._found[name]))
        for found in world.gather(self._found):
            self._found |= found

    def note(self, record: Record) -> Record:
        """The record with the flags of its attack, and with what was measured under settings["diagnosis"]."""
        found = self._found.get(record.attack_name)
        if found is None:
            return record
        settings = record.settings | {"diagnosis": found.measures}
        return dataclasses.replace(record, flags=record.flags + found.flags, settings=settings)

    def _objective(self, images: Tensor, labels: Tensor) -> Objective:
        clean = encode(select_layer(self._encoder, self._layer), images)
        with using_branch(self._encoder, self._aim.branch):
            objective = self._aim.objective(images, clean, labels.cpu().numpy())
        if self._aim.branch is None:
            return objective

        def inside(shown: Tensor) -> Tensor:
            with using_branch(self._encoder, self._aim.branch):
                return objective(shown)

        return inside


def _fits(attack: Attack) -> bool:
    if not callable(getattr(attack, "run", None)):  # an ensemble has black-box members of its own, and its own flag
        return False
    try:
        check_attack_fits(attack)
    except ValueError:
        return False
    return True
