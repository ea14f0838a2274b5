"""White-box robustness of an encoder: its kNN accuracy on clean, noisy and attacked queries, as records."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.classifiers import FittedKNN, KNNClassifier
from hsat.distributed import shared_world
from hsat.embedding import LAYERS, Layer
from hsat.eval.aiming import TARGETS, Aim, published_aim
from hsat.eval.baselines import with_noise
from hsat.eval.conventions import Absent, Compat, How, Keys
from hsat.eval.doubt.doubts import Doubts
from hsat.eval.engine.cache import EmbeddingCache
from hsat.eval.engine.ensemble_records import ensemble_record
from hsat.eval.engine.keeping import Bank, cache_key, embedded_bank, journal_of
from hsat.eval.engine.layers import Layers
from hsat.eval.engine.precision import unusual_computing
from hsat.eval.engine.references import References
from hsat.eval.engine.siege import CLEAN, Siege
from hsat.eval.engine.strongest import Casualties, Strongest
from hsat.eval.engine.trial import Trial
from hsat.eval.measuring import Frame, condition_records, evaluation_frame
from hsat.eval.records import Record
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch


@dataclass(frozen=True, eq=False)
class WhiteboxResult:
    """What `evaluate_whitebox` found; the keys of all mappings are "clean" and the names of the attacks.

    records: one per condition, k, level and metric.  tables: the embeddings.  scores: class scores (n, classes) by
    condition and k, columns as in `class_names`.  examples: the first images of the queries under each condition.
    casualties: for each `Strongest`, which of its members felled which image.
    """

    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    scores: dict[str, dict[int, np.ndarray]]
    examples: dict[str, Tensor]
    class_names: tuple[str, ...]
    casualties: dict[str, Casualties] = field(default_factory=dict)


def evaluate_whitebox(
    encoder: EmbeddingFunction,
    bank: Bank,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack | Strongest],
    *,
    target: str | None = None,
    layer: Layer = "features",
    k: int | Sequence[int] = 200,
    temperature: float = 0.07,
    index: str = "flat",
    seed: int = 0,
    device: torch.device | str | None = None,
    how: How | None = None,
    absent: Absent | None = None,
    keys: Keys | None = None,
    attack_branch: str | None = None,
    compat: Compat | None = None,
    bootstrap: int = 1000,
    noise: bool = False,
    diagnose: bool | int = False,
    surrogates: Mapping[str, EmbeddingFunction] | None = None,
    cache: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    model: str = "",
    checkpoint: str = "",
    progress: bool = False,
    keep_examples: int = 0,
) -> WhiteboxResult:
    """Attack the queries, embed them, and classify them by their neighbours in a clean bank.

    bank: a loader of clean training images, or their table from `embed` with the same `layer`, or several such tables
    of one cohort, which are put together in memory.  queries: a loader, read
    once; all attacks see each batch in turn and share its clean embedding.  attacks: {"PGD-8": PGD(...), ...}; clean
    queries are always measured, under the name "clean".  noise=True adds one random point of each threat model.
    diagnose: look for masked gradients on that many queries (True: 32), for each attack, as `hsat.eval.diagnose` does;
    decisions there are those of the first k.

    An attack may be a `Strongest`: an ensemble that fells images one by one (docs/strongest.md).  It comes after the
    others, which count as its members where they have its threat model.  surrogates: other encoders by name, from which
    it transfers; they are frozen meanwhile.

    target: the layer whose cosine distance to the clean value the attacks maximise, "features" (what kNN reads; the
    default) or "embedding" (the projected embedding, as in the paper's tables); or "knn": the attacks know the bank
    and the true labels and maximise the margin of the vote itself (`soft_knn`).  layer: what kNN reads.  Each image's
    random start depends on (seed, patch id) only.  k: one number or several; neighbours are searched once, and "knn"
    attacks the vote of the first, with a flag in the records of the others.
    attack_branch: for an encoder with dual BatchNorm, the branch that the attacks go through; by default they go
    through the branch that is scored, the active one.  how, absent, keys: see `score_levels`.
    compat="paper" repeats the published evaluation: target "embedding", attack_branch "pgd" (dual encoders only) and
    the published arithmetic; an option that is given wins.  The attacks are yours: see `paper_attacks`.
    bootstrap: resamples of patients for the intervals; 0 for none.
    model, checkpoint: what the records say.  class_names: for loaders that do not know theirs.

    cache: a folder that keeps the embeddings of bank and clean queries for the next time (see `EmbeddingCache`), where
    encoder and loaders can say what they are: modules, and unshuffled loaders over a PatchDataset without transform.
    state: a folder that keeps every finished batch.  After an interruption, even by kill -9, the same call goes on from
    there and ends with the same records; a state that was begun under other settings is refused.  What is computed from
    the scores (bootstrap, how, absent, keys) may change.  One evaluation at a time may use it.

    Several processes: where torch.distributed has a process group, every rank makes this same call, on a device of its
    own.  Bank, clean references, attacks and diagnoses are shared out by whole batches, and every rank gets the result
    of one process: the same records, with pass counts over all ranks.  Loaders have to give every rank the same
    batches.  cache and state may be common folders; a state may be gone on with by another number of ranks.  An error
    on one rank is raised there at once, and as a RuntimeError on the others when they wait for it; torchrun ends them
    before.

    Encoders in channels_last, with folded BatchNorm (`hsat.models.fold_batchnorm`), or under a `torch.autocast` block
    around this call give slightly other numbers, faster on some machines; records say so under settings["computed"].

    Records carry flags where a result is doubtful: gradients that are exactly zero or images that never moved in more
    than 1 % of the images (a masked gradient looks like robustness), and a bank that shares patients with the queries.
    With an approximate index the settings hold its recall and agreement with exact predictions on the same queries.

    Raises ValueError for an unknown target, k, how, absent, keys, attack_branch or compat, an attack called "clean",
    TypeError for attacks that are no mapping of attacks, and what `embed` and `KNNClassifier` raise.
    """
    target, attack_branch = published_aim(compat, encoder, target, attack_branch)
    ks = _checked(target, attacks, how=how, compat=compat, k=k, surrogates=surrogates)
    kept = None if cache is None else EmbeddingCache(cache)
    read: dict[str, Any] = {"layer": layer, "device": device, "class_names": class_names}
    with shared_world() as world:
        bank = embedded_bank(encoder, bank, kept, world, model=model, checkpoint=checkpoint, progress=progress, **read)
        knn = KNNClassifier(k=max(ks), temperature=temperature, index=index).fit(bank)
        chosen: dict[str, Any] = with_noise(attacks) if noise else dict(attacks)  # type: ignore[arg-type]
        layers, others = Layers(encoder), dict(surrogates or {})
        aim = Aim(encoder, target, layer, knn=knn, k=ks[0], branch=attack_branch, layers=layers)
        seen: dict[str, Any] = {"knn": knn, "layer": layer, "seed": seed}
        doubts = Doubts(encoder, aim, chosen, images=diagnose, **seen)
        siege = Siege(encoder, layers, aim, target=target, surrogates=others, **seen)
        trial = Trial(encoder, layers, chosen, aim=aim, siege=siege, doubts=doubts, keep=keep_examples, **seen)
        decisive = {"target": target, "k": list(ks), "attack_branch": attack_branch, "keep_examples": keep_examples}
        known = ({"": encoder, **others}, queries, chosen, decisive | seen)
        tables = trial.run(
            queries,
            world=world,
            journal=journal_of(state, *known, world=world, checkpoint=checkpoint),
            references=References(kept, cache_key(encoder, queries, layer, checkpoint)),
            class_names=class_names,
            device=device,
            model=model,
            progress=progress,
        )
    named: dict[str, Any] = {"how": how, "absent": absent, "keys": keys, "compat": compat, "bootstrap": bootstrap}
    named |= {"model": model, "checkpoint": checkpoint, "attack_branch": attack_branch}
    frame = evaluation_frame(knn, tables[CLEAN], target=target, layer=layer, seed=seed, **named)
    frame = dataclasses.replace(frame, settings=frame.settings | unusual_computing(encoder))
    scores = {name: scores_by_k(knn, table, ks) for name, table in tables.items()}
    records = _records(frame, trial, tables, scores, aim=aim, doubts=doubts)
    examples = {name: torch.cat(tally.kept) for name, tally in trial.tallies.items() if keep_examples and tally.kept}
    return WhiteboxResult(records, tables, scores, examples, knn.class_names, trial.casualties())


def _records(
    frame: Frame,
    trial: Trial,
    tables: Mapping[str, EmbeddingTable],
    scores: Mapping[str, dict[int, np.ndarray]],
    *,
    aim: Aim,
    doubts: Doubts,
) -> tuple[Record, ...]:
    """The records of all conditions, in their order, with what ensembles, aim and diagnoses have to say."""
    casualties = trial.casualties()
    return tuple(
        doubts.note(ensemble_record(record, found, aim.k) if (found := casualties.get(name)) else aim.describe(record))
        for name in tables
        for record in condition_records(
            frame,
            name=name,
            attack=trial.attacks.get(name),
            tally=trial.tallies[name],
            table=tables[name],
            scores=scores[name],
        )
    )


def _checked(
    target: str, attacks: Any, *, how: Any, compat: Any, k: int | Sequence[int], surrogates: Any
) -> tuple[int, ...]:
    """The numbers of neighbours, after the checks of options."""
    check_options(target, attacks, how, compat, targets=TARGETS, ensembles=True)
    if wrong := [name for name, other in (surrogates or {}).items() if not callable(other)]:
        raise TypeError(f"surrogates must map names to encoders; those of {wrong} cannot be called")
    return several_k(k)


def several_k(k: int | Sequence[int]) -> tuple[int, ...]:
    """One or several numbers of neighbours as a tuple; ValueError for none, and for what is no number of at least 1."""
    ks = tuple(np.atleast_1d(np.asarray(k)).tolist())
    if not ks or not all(isinstance(each, int) and each >= 1 for each in ks):
        raise ValueError(f"k must be a number of at least 1, or several as in (200, 20); got {k!r}")
    return ks


def scores_by_k(knn: FittedKNN, table: EmbeddingTable, ks: Sequence[int]) -> dict[int, np.ndarray]:
    """Class scores for each k, from one search; k above the bank are cut to it."""
    found = knn.neighbours(table)
    return {k: knn.score(found, k=k) for k in dict.fromkeys(min(k, knn.k) for k in ks)}


def check_options(
    target: str,
    attacks: Mapping[str, Attack],
    how: str | None,
    compat: str | None,
    *,
    targets: Sequence[str] = LAYERS,
    ensembles: bool = False,
) -> None:
    """ValueError or TypeError for an unknown target, how or compat, and for attacks that are no mapping of attacks.

    ensembles: `Strongest` is welcome, which is no attack on its own.
    """
    if target not in targets:
        raise ValueError(f"unknown target {target!r}; choose one of {list(targets)}")
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping such as {{'PGD-8': PGD(...)}}, got {type(attacks).__name__}")
    for name, attack in attacks.items():
        if ensembles and isinstance(attack, Strongest):
            continue
        if not callable(getattr(attack, "run", None)):
            raise TypeError(f"attack {name!r} has no method run, as hsat.types.Attack wants: {attack!r}")
    if CLEAN in attacks:
        raise ValueError(f"an attack cannot be called {CLEAN!r}: that is the name of the queries as they are")
    if how not in (None, "mean", "paper"):
        raise ValueError(f"how must be 'mean' or 'paper', got {how!r}")
    if compat not in (None, "paper"):
        raise ValueError(f"compat must be None or 'paper', got {compat!r}")
