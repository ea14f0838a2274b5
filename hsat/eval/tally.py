"""What happened to the queries under one condition: embeddings, counts, and reasons to distrust the outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

from hsat.eval.embedding import Rows
from hsat.types import Attack, AttackResult, EmbeddingTable

_SUSPICIOUS_SHARE = 0.01
_STARTS = {"FFGSM": True, "FGSM": False, "RandomNoise": True}  # attacks whose start is not an option


@dataclass
class Tally:
    """Embeddings and counts of one condition, over the batches."""

    rows: Rows = field(default_factory=Rows)
    kept: list[Tensor] = field(default_factory=list)
    images: int = 0
    forwards: int = 0
    backwards: int = 0
    zero_gradient: int = 0
    never_moved: int = 0
    stationary: int = 0

    def count(self, result: AttackResult, images: Tensor) -> None:
        """Add what an attack reports about a batch of images."""
        n = len(images)
        self.images += n
        self.forwards += n * result.forwards
        self.backwards += n * result.backwards
        self.zero_gradient += int((result.zero_gradient > 0).sum())
        self.never_moved += int((result.x_adv == images).flatten(1).all(1).sum())
        self.stationary += 0 if result.stationary is None else int(result.stationary.sum())

    def counts(self) -> dict[str, int]:
        """The counts by name, without the embeddings."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("rows", "kept")}

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Add the counts of another tally."""
        for name, value in counts.items():
            setattr(self, name, getattr(self, name) + value)

    def over(self, gather: Callable[[Any], list[Any]]) -> Tally:
        """The counts of all ranks together, without embeddings; gather: what every rank gives, on every rank."""
        total = Tally()
        for counts in gather(self.counts()):
            total.add_counts(counts)
        return total

    def share(self, name: str) -> float:
        """A count per image; 0 for the clean images, which are not attacked."""
        return float(getattr(self, name)) / max(1, self.images)


def attack_settings(attack: Attack | None, tally: Tally) -> dict[str, Any]:
    """What goes into a record's settings about an attack and how it went."""
    if attack is None:
        return {}
    random_start = getattr(attack, "random_start", _STARTS.get(type(attack).__name__))
    settings: dict[str, Any] = {"random_start": random_start, "stationary_share": tally.share("stationary")}
    settings |= {"zero_gradient_share": tally.share("zero_gradient"), "never_moved_share": tally.share("never_moved")}
    if type(attack).__name__ == "BIM" and random_start:
        settings["note"] = "BIM with a random start is PGD"
    return settings


def suspicions(tally: Tally, eps: float) -> tuple[str, ...]:
    """Reasons to take a number for a failed attack rather than for robustness; none where eps is 0."""
    if eps == 0:
        return ()
    flags = []
    if (share := tally.share("zero_gradient")) > _SUSPICIOUS_SHARE:
        flags.append(f"gradient exactly zero in some step for {share:.1%} of the images")
    if (share := tally.share("never_moved")) > _SUSPICIOUS_SHARE:
        flags.append(f"{share:.1%} of the images never moved")
    return tuple(flags)


def bank_flags(bank: EmbeddingTable, queries: EmbeddingTable) -> tuple[str, ...]:
    """Reasons to distrust every number that a bank gives: shared patients, and a single class that always wins."""
    only = np.unique(bank.label)
    if len(only) > 1:
        return shared_patients(bank, queries)
    name = bank.class_names[int(only[0])]
    return (
        *shared_patients(bank, queries),
        f"the bank holds one class only ({name}): no attack can change a decision",
    )


def shared_patients(bank: EmbeddingTable, queries: EmbeddingTable) -> tuple[str, ...]:
    """A flag if bank and queries come from one cohort and have patients in common."""
    if not bank.cohort or bank.cohort != queries.cohort:
        return ()
    shared = np.intersect1d(bank.patient, queries.patient)
    return (f"bank and queries share {len(shared)} patients",) if len(shared) else ()
