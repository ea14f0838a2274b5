"""From the class scores of a transfer evaluation to its records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from hsat.classifiers import FittedKNN
from hsat.eval.measuring import condition_records, evaluation_frame
from hsat.eval.records import Record
from hsat.eval.tally import Tally
from hsat.eval.transfer.drops import Drops, average_drops, drops_of, resampled_metrics
from hsat.eval.transfer.ledger import Entry, Scores
from hsat.types import Attack, EmbeddingTable

CLEAN = "clean"


def transfer_records(
    knns: Mapping[str, FittedKNN],
    clean: Scores,
    pairs: Mapping[tuple[str, str], Entry],
    *,
    attacks: Mapping[str, Attack],
    queries: EmbeddingTable,
    checkpoint: Callable[[str], str],
    options: Mapping[str, Any],
) -> Iterator[Record]:
    """All records of all targets, target by target.

    knns: each target's classifier (its settings and bank).  pairs: what is known by (surrogate, attack).
    checkpoint: an encoder's weights, for the records.  options: what `evaluation_frame` wants besides.
    """
    people = len(np.unique(queries.patient))
    for target, knn in knns.items():
        frame = evaluation_frame(knn, queries, model=target, checkpoint=checkpoint(target), **options)
        seed = frame.identity["seed"]

        def measure(name: str, scores: Any, attack: Attack | None, tally: Tally, frame: Any = frame) -> list[Record]:
            return condition_records(frame, name=name, attack=attack, tally=tally, table=queries, scores=scores)

        before = measure(CLEAN, clean[target], None, Tally())
        yield from before
        resampled = resampled_metrics(frame, clean[target], queries, seed=seed)
        drops: dict[str, dict[str, Drops]] = {}
        for (surrogate, name), entry in pairs.items():
            weights = {"surrogate_checkpoint": checkpoint(surrogate)}
            after = [
                dataclasses.replace(record, surrogate=surrogate, settings=record.settings | weights)
                for record in measure(name, entry.scores[target], attacks[name], entry.tally)
            ]
            drop = drops_of(
                before,
                after,
                clean_resampled=resampled,
                attacked_resampled=resampled_metrics(frame, entry.scores[target], queries, seed=seed),
                people=people,
            )
            yield from after
            yield from drop.records.values()
            drops.setdefault(name, {})[surrogate] = drop
        for by_surrogate in drops.values():
            if others := {name: drop for name, drop in by_surrogate.items() if name != target}:
                yield from average_drops(others, people=people)
