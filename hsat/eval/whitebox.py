"""White-box robustness of an encoder: its kNN accuracy on clean, noisy and attacked queries, as records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsat.eval.aiming import TARGETS, Aim, published_aim
from hsat.eval.baselines import with_noise
from hsat.eval.conventions import Absent, Compat, How, Keys
from hsat.eval.doubts import Doubts
from hsat.eval.embedding import (
    LAYERS,
    Layer,
    describe,
    device_of,
    embed,
    encode,
    frozen_module,
    labelled,
    select_layer,
    through_branch,
    watch,
)
from hsat.eval.knn import FittedKNN, KNNClassifier
from hsat.eval.measuring import condition_records, evaluation_frame
from hsat.eval.records import Record
from hsat.eval.scoring import match_labels
from hsat.eval.tally import Tally
from hsat.types import Attack, EmbeddingTable, Encoder, HierarchicalBatch

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class WhiteboxResult:
    """What `evaluate_whitebox` found; the keys of all mappings are "clean" and the names of the attacks.

    records: one per condition, k, level and metric.  tables: the embeddings.  scores: class scores (n, classes) by
    condition and k, columns as in `class_names`.  examples: the first images of the queries under each condition.
    """

    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    scores: dict[str, dict[int, np.ndarray]]
    examples: dict[str, Tensor]
    class_names: tuple[str, ...]


def evaluate_whitebox(
    encoder: Encoder,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
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
    class_names: Sequence[str] | None = None,
    model: str = "",
    checkpoint: str = "",
    progress: bool = False,
    keep_examples: int = 0,
) -> WhiteboxResult:
    """Attack the queries, embed them, and classify them by their neighbours in a clean bank.

    bank: a loader of clean training images, or their table from `embed` with the same `layer`.  queries: a loader, read
    once; all attacks see each batch in turn and share its clean embedding.  attacks: {"PGD-8": PGD(...), ...}; clean
    queries are always measured, under the name "clean".  noise=True adds one random point of each threat model.
    diagnose: look for masked gradients on that many queries (True: 32), for each attack, as `hsat.eval.diagnose` does;
    decisions there are those of the first k.

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

    Records carry flags where a result is doubtful: gradients that are exactly zero or images that never moved in more
    than 1 % of the images (a masked gradient looks like robustness), and a bank that shares patients with the queries.

    Raises ValueError for an unknown target, k, how, absent, keys, attack_branch or compat, an attack called "clean",
    TypeError for attacks that are no mapping of attacks, and what `embed` and `KNNClassifier` raise.
    """
    target, attack_branch = published_aim(compat, encoder, target, attack_branch)
    check_options(target, attacks, how, compat, targets=TARGETS)
    ks = several_k(k)
    settings = KNNClassifier(k=max(ks), temperature=temperature, index=index)
    if not isinstance(bank, EmbeddingTable):
        bank = embed(
            encoder, bank, class_names=class_names, layer=layer, device=device, encoder_name=model, progress=progress
        )
    knn = settings.fit(bank)
    chosen = with_noise(attacks) if noise else dict(attacks)
    aim = Aim(encoder, target, layer, knn=knn, k=ks[0], branch=attack_branch)
    doubts = Doubts(encoder, aim, chosen, knn=knn, layer=layer, images=diagnose, seed=seed)
    trial = _Trial(encoder, aim, doubts, chosen, knn=knn, layer=layer, seed=seed, keep=keep_examples)
    tables = trial.run(queries, class_names=class_names, device=device, model=model, progress=progress)
    scores = {name: scores_by_k(knn, table, ks) for name, table in tables.items()}
    frame = evaluation_frame(
        knn,
        tables[CLEAN],
        target=target,
        layer=layer,
        seed=seed,
        how=how,
        absent=absent,
        keys=keys,
        compat=compat,
        bootstrap=bootstrap,
        model=model,
        checkpoint=checkpoint,
        attack_branch=attack_branch,
    )
    records = [
        doubts.note(aim.describe(record))
        for name in tables
        for record in condition_records(
            frame,
            name=name,
            attack=trial.attacks.get(name),
            tally=trial.tallies[name],
            table=tables[name],
            scores=scores[name],
        )
    ]
    examples = {name: torch.cat(tally.kept) for name, tally in trial.tallies.items() if tally.kept}
    return WhiteboxResult(tuple(records), tables, scores, examples, knn.class_names)


class _Trial:
    """One pass over the queries under all conditions."""

    def __init__(
        self,
        encoder: Encoder,
        aim: Aim,
        doubts: Doubts,
        attacks: Mapping[str, Attack],
        *,
        knn: FittedKNN,
        layer: str,
        seed: int,
        keep: int,
    ) -> None:
        self._encoder, self._bank, self._seed, self._keep = encoder, knn.table, seed, keep
        self._aim, self._doubts, self._scored = aim, doubts, select_layer(encoder, layer)
        self.attacks = attacks
        self.tallies = {name: Tally() for name in (CLEAN, *attacks)}

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        *,
        class_names: Sequence[str] | None,
        device: torch.device | str | None,
        model: str,
        progress: bool,
    ) -> dict[str, EmbeddingTable]:
        """The embeddings of all queries, by condition."""
        names, cohort, split = describe(queries, class_names, "", "")
        place = device_of(self._encoder, device)
        with frozen_module(self._encoder):
            for batch in watch(queries, progress, "attacking"):
                labels = match_labels(labelled(batch), names, self._bank.class_names)
                self.see(batch, batch.images.to(place), labels)
                self._doubts.see(batch, labels)
            self._doubts.settle(place)
        return {
            name: tally.rows.table(class_names=names, cohort=cohort, split=split, encoder=model)
            for name, tally in self.tallies.items()
        }

    def see(self, batch: HierarchicalBatch, images: Tensor, labels: np.ndarray) -> None:
        """Attack and embed one batch; the clean embedding is computed once and serves every attack."""
        clean = encode(self._scored, images)
        if (width := self._bank.z.shape[1]) != clean.shape[-1]:
            raise ValueError(f"the bank's embeddings have width {width}, the encoder's {clean.shape[-1]}: not its bank")
        self._store(CLEAN, batch, images, clean)
        with through_branch(self._encoder, self._aim.branch):
            objective = self._aim.objective(images, clean, labels)
        for name, attack in self.attacks.items():
            generator = torch.Generator().manual_seed(self._seed)
            with through_branch(self._encoder, self._aim.branch):
                result = attack.run(images, objective, generator=generator, ids=batch.patch)
            self.tallies[name].count(result, images)
            self._store(name, batch, result.x_adv, encode(self._scored, result.x_adv))

    def _store(self, name: str, batch: HierarchicalBatch, images: Tensor, z: Tensor) -> None:
        tally = self.tallies[name]
        tally.rows.add(batch, z)
        if (missing := self._keep - sum(map(len, tally.kept))) > 0:
            tally.kept.append(images[:missing].detach().cpu())


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
) -> None:
    """ValueError or TypeError for an unknown target, how or compat, and for attacks that are no mapping of attacks."""
    if target not in targets:
        raise ValueError(f"unknown target {target!r}; choose one of {list(targets)}")
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping such as {{'PGD-8': PGD(...)}}, got {type(attacks).__name__}")
    for name, attack in attacks.items():
        if not callable(getattr(attack, "run", None)):
            raise TypeError(f"attack {name!r} has no method run, as hsat.types.Attack wants: {attack!r}")
    if CLEAN in attacks:
        raise ValueError(f"an attack cannot be called {CLEAN!r}: that is the name of the queries as they are")
    if how not in (None, "mean", "paper"):
        raise ValueError(f"how must be 'mean' or 'paper', got {how!r}")
    if compat not in (None, "paper"):
        raise ValueError(f"compat must be None or 'paper', got {compat!r}")
