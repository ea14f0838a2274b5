"""Robustness to an attacker who may alter only some of a slide's or patient's patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Literal

import numpy as np
import torch

from hsat.classifiers import FittedKNN, KNNClassifier
from hsat.embedding import (
    Layer,
    LoaderInfo,
    embed,
    encode,
    eval_mode,
    loader_info,
    require_labels,
    resolve_device,
    select_layer,
    show_progress,
    to_device,
)
from hsat.eval.budgets.budget_result import BudgetResult, budget_records
from hsat.eval.budgets.flipping import ORDERS, Order, altered_counts
from hsat.eval.conventions import How
from hsat.eval.measuring import evaluation_frame
from hsat.eval.named_objectives import TARGETS, MakeObjective, objective_named
from hsat.eval.pooling import pool
from hsat.eval.tally import Tally
from hsat.types import Attack, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, align_labels

GroupLevel = Literal["slide", "patient"]
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)


def evaluate_hierarchical_budget(
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    attack: Attack,
    *,
    level: GroupLevel = "patient",
    fractions: Sequence[float] = FRACTIONS,
    order: Order = "worst",
    target: str = "knn",
    objective: MakeObjective | None = None,
    layer: Layer = "features",
    k: int = 200,
    temperature: float = 0.07,
    index: str = "flat",
    how: How = "mean",
    seed: int = 0,
    device: torch.device | str | None = None,
    bootstrap: int = 1000,
    class_names: Sequence[str] | None = None,
    name: str = "attack",
    model: str = "",
    checkpoint: str = "",
    progress: bool = False,
) -> BudgetResult:
    """The smallest share of a patient's (or slide's) patches whose alteration changes the diagnosis.

    Every query patch is attacked by itself; a group's decision then comes from the attacked scores of the k patches
    that the attacker alters and the clean scores of the others, pooled as in `pool`.  order="worst" lets the attacker
    choose them, and finds the exact minimum over all choices (see `flipping.fewest_altered`); order="random" alters
    them in a random order.  What is exact is the choice, for the patches as this attack left them: a stronger attack
    may need fewer.

    target: what the attack climbs; "knn", the margin of the vote against the true class (`soft_knn`), or the drift of
    "features" or "embedding".  objective: (images, batch) -> an objective, in place of it; records say "custom".
    fractions: shares of the patches, at which the records give the accuracy; `floor(fraction * patches)` may change.
    bank, layer, k, temperature, index, seed, device, bootstrap, class_names, model, checkpoint: as in
    `evaluate_whitebox`.  name: of the attack; its records are called "name@10%".

    Raises ValueError for an unknown level, order or target, fractions outside [0, 1], and what `embed` raises.
    """
    _check_options(level, order, target, fractions)
    options = {"class_names": class_names, "device": device}
    if not isinstance(bank, EmbeddingTable):
        bank = embed(encoder, bank, layer=layer, encoder_name=model, progress=progress, **options)  # type: ignore[arg-type]
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank)
    make = objective or objective_named(encoder, target, layer, knn)
    trial = _Trial(encoder, layer, attack, make, knn=knn, seed=seed)
    clean, attacked = trial.run(queries, model=model, progress=progress, **options)  # type: ignore[arg-type]
    scores = knn.predict_proba(clean), knn.predict_proba(attacked)
    labels, ids = align_labels(clean.label, clean.class_names, knn.class_names), getattr(clean, level)
    pooled = pool(scores[0], ids, labels, how=how)
    assert pooled.labels is not None  # labels were given
    result = BudgetResult(
        records=(),
        level=level,
        groups=pooled.groups,
        labels=pooled.labels,
        patients=clean.patient[np.unique(ids, return_index=True)[1]],
        sizes=pooled.sizes,
        needed=altered_counts(*scores, ids, labels, how=how, order=order, seed=seed),
        clean=clean,
        attacked=attacked,
    )
    frame = evaluation_frame(
        knn,
        clean,
        target="custom" if objective else target,
        layer=layer,
        seed=seed,
        how=how,
        compat=None,
        bootstrap=bootstrap,
        model=model,
        checkpoint=checkpoint,
    )
    records = budget_records(
        result, frame, trial.tally, attack=attack, name=name, k=knn.k, order=order, fractions=fractions
    )
    return dataclasses.replace(result, records=tuple(records))


class _Trial:
    """One pass over the queries, clean and attacked."""

    def __init__(
        self, encoder: EmbeddingFunction, layer: str, attack: Attack, make: MakeObjective, *, knn: FittedKNN, seed: int
    ) -> None:
        self.encoder, self.attack, self.make, self.knn, self.seed = encoder, attack, make, knn, seed
        self.scored = select_layer(encoder, layer)
        self.clean, self.tally = Tally(), Tally()

    def run(
        self,
        queries: Iterable[HierarchicalBatch],
        *,
        class_names: Sequence[str] | None,
        device: torch.device | str | None,
        model: str,
        progress: bool,
    ) -> tuple[EmbeddingTable, EmbeddingTable]:
        """The embeddings of all queries as they are and after the attack."""
        names, cohort, split = astuple(loader_info(queries, class_names))
        place = resolve_device(self.encoder, device)
        with eval_mode(self.encoder):
            for batch in show_progress(queries, "attacking", shown=progress):
                matched = align_labels(require_labels(batch), names, self.knn.class_names)
                images = to_device(batch.images, place)
                ids = batch.patch, batch.slide, batch.patient
                objective = self.make(images, HierarchicalBatch(batch.images, *ids, torch.from_numpy(matched)))
                generator = torch.Generator().manual_seed(self.seed)
                result = self.attack.run(images, objective, generator=generator, ids=batch.patch)
                self.tally.count(result, images)
                self.clean.rows.append(batch, encode(self.scored, images))
                self.tally.rows.append(batch, encode(self.scored, result.x_adv))
        info = LoaderInfo(class_names=names, cohort=cohort, split=split)
        return self.clean.rows.table(info, encoder=model), self.tally.rows.table(info, encoder=model)


def _check_options(level: str, order: str, target: str, fractions: Sequence[float]) -> None:
    if level not in ("slide", "patient"):
        raise ValueError(f"level must be 'slide' or 'patient', the groups that are pooled; got {level!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {list(ORDERS)}, got {order!r}")
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {list(TARGETS)}")
    if wrong := [value for value in fractions if not 0 < value <= 1]:
        raise ValueError(f"fractions of the patches lie in (0, 1]; got {wrong[0]}. For 10 % write 0.1")
