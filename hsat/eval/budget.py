"""Robustness to an attacker who may alter only some of a slide's or patient's patches."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from hsat.classifiers import KNNClassifier
from hsat.eval.announcements import announce_bank, announce_cost
from hsat.eval.confidence import (
    Interval,
    bootstrap_draws,
    bootstrap_intervals,
    confidence_interval,
    missing_interval_reason,
)
from hsat.eval.evaluation import Bank, Evaluation, classifier_settings, fit_bank
from hsat.eval.metrics import chance_levels
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.patch_flips import ORDERS, Order, patches_to_flip
from hsat.eval.pooling import own_labels, pool
from hsat.eval.records import AttackFacts, ClassifierFacts, Record, RecordTemplate
from hsat.eval.result_files import SavedResult, save_records
from hsat.eval.runner import CLEAN, AttackRunner
from hsat.eval.store import CleanEmbeddings, open_session, open_world
from hsat.eval.whitebox import black_box_flags, check_attacks, ensemble_settings
from hsat.files import write_file
from hsat.types import Attack, Classifier, EmbeddingFunction, EmbeddingTable, HierarchicalBatch, Objective, align_labels
from hsat.untrusted import as_cell

GroupLevel = Literal["slide", "patient"]
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class PatchBudget:
    """How many patches of a group an attacker may alter.

    Attributes:
        level: The groups that are pooled, "slide" or "patient".
        fractions: Shares of the patches, in (0, 1]; `floor(fraction * patches)` may be altered.
        order: "worst": the attacker chooses the patches, and the minimum over all choices is computed, exact but for
            ties within rounding (`min_patches_to_flip`).  "random": patches are altered in a random order.
        name: Of the attack; its records are called "name@10%".
        objective: (images, batch) -> an objective, in place of the target; records say "custom".

    Raises:
        ValueError: For an unknown level or order, and fractions outside (0, 1].
    """

    level: GroupLevel = "patient"
    fractions: Sequence[float] = FRACTIONS
    order: Order = "worst"
    name: str = "attack"
    objective: Callable[[Tensor, HierarchicalBatch], Objective] | None = None

    def __post_init__(self) -> None:
        if self.level not in get_args(GroupLevel):
            raise ValueError(f"level must be 'slide' or 'patient', the groups that are pooled; got {self.level!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {list(ORDERS)}, got {self.order!r}")
        if wrong := [value for value in self.fractions if not 0 < value <= 1]:
            raise ValueError(f"fractions of the patches lie in (0, 1]; got {wrong[0]}. For 10 % write 0.1")


@dataclass(frozen=True, eq=False, repr=False)
class BudgetResult(SavedResult):
    """The result of `evaluate_budget`, one entry per slide or patient in ascending order of its id.

    Attributes:
        records: Accuracy at each budget, and the mean smallest fraction.
        level: "slide" or "patient".
        groups: (g,) ids.
        labels: (g,) true classes, columns of the scores.
        patients: (g,) ids.
        sizes: (g,) numbers of patches.
        needed: (g,) float64, the smallest number of altered patches that makes the decision wrong; 0 where it is
            wrong as it is, inf where altering all of them would not do.
        clean, attacked: Embeddings of all patches.
    """

    records: tuple[Record, ...]
    level: str
    groups: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    sizes: np.ndarray
    needed: np.ndarray
    clean: EmbeddingTable
    attacked: EmbeddingTable

    def _write(self, folder: Path) -> None:
        """Records, and groups.csv."""
        write_groups(save_records(folder, self.records), [self])

    @property
    def smallest_fraction(self) -> np.ndarray:
        """needed / sizes, (g,); inf where the decision never changes."""
        fraction: np.ndarray = self.needed / self.sizes
        return fraction

    def robust_at(self, fraction: float) -> np.ndarray:
        """Whether the decision is right whatever floor(fraction * size) patches are altered.

        Args:
            fraction: In [0, 1].

        Returns:
            (g,) bool.

        Raises:
            ValueError: For a fraction outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction of the patches lies in [0, 1]; got {fraction}")
        right: np.ndarray = self.needed > np.floor(fraction * self.sizes + 1e-9)
        return right

    def accuracy(self, fraction: float) -> float:
        """Share of groups that are right although that fraction of their patches is altered; never rises with it.

        Args:
            fraction: In [0, 1].

        Returns:
            A share in [0, 1].
        """
        return float(self.robust_at(fraction).mean())

    def flipped(self, fraction: float) -> float:
        """Share of the groups that were right and are wrong once that fraction may be altered.

        Args:
            fraction: In [0, 1].

        Returns:
            A share in [0, 1]; NaN if no group was right.
        """
        right = self.needed > 0
        return float((~self.robust_at(fraction))[right].mean()) if right.any() else float("nan")


def write_groups(folder: Path, results: Iterable[BudgetResult]) -> Path:
    """Write groups.csv, a line per encoder, attack and group; `needed` is empty where no number of patches does it.

    Args:
        folder: The folder of the run.
        results: Whose records name encoder and attack.

    Returns:
        The folder.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("model", "attack", "level", "group", "class", "patches", "needed", "fraction"))
    for result in results:
        last = result.records[-1]  # the mean fraction, which bears the attack's own name
        columns = zip(result.groups, result.labels, result.sizes, result.needed, strict=True)
        for group, label, size, needed in columns:
            count = ("", "") if needed == float("inf") else (int(needed), f"{needed / size:.6g}")
            row = (
                as_cell(last.model),
                as_cell(last.attack_name),
                result.level,
                int(group),
                int(label),
                int(size),
                *count,
            )
            writer.writerow(row)
    write_file(folder / "groups.csv", file.getvalue())
    return folder


def evaluate_budget(
    encoder: EmbeddingFunction,
    bank: Bank,
    queries: Iterable[HierarchicalBatch],
    attack: Attack,
    *,
    budget: PatchBudget = PatchBudget(),
    classifier: Classifier = KNNClassifier(),
    target: Target | str = "decision",
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> BudgetResult:
    """The smallest share of a patient's (or slide's) patches whose alteration changes the diagnosis.

    Every query patch is attacked by itself; a group's decision then comes from the attacked scores of the patches that
    the attacker alters and the clean scores of the others, pooled as in `pool`.  The choice of the patches is exact
    (`min_patches_to_flip`), for the patches as this attack left them: a stronger attack may need fewer.

    Args:
        encoder, bank, queries, classifier, target, scoring, run, provenance: As for `evaluate_whitebox`; noise,
            diagnosis and examples do not apply.
        attack: The attack on each patch.
        budget: Level, fractions, order, name.

    Returns:
        Smallest numbers of patches, embeddings and records.

    Raises:
        ValueError: For unknown options, and what `embed` and the classifier raise.
    """
    run = dataclasses.replace(run, keep_examples=0, diagnose=0)
    attacks = {budget.name: attack}
    check_attacks(attacks)
    evaluation = Evaluation(encoder, Target.of(target), scoring, run, provenance).checked(queries)
    with open_world(run) as (world, cache):
        table = evaluation.embed_bank(bank, world, cache, announce=partial(announce_bank, evaluation, world.size))
        classifiers = fit_bank(classifier, table)
        fitted = classifiers[0].fitted
        objectives = ObjectiveFactory(encoder, evaluation.target, scoring.layer, fitted)
        if budget.objective is not None:
            objectives = objectives.with_custom(budget.objective)
        settings = evaluation.settings(queries, attacks) | classifier_settings(classifiers, table)
        session = open_session(run, settings, world, cache)
        announce_cost(evaluation, objectives, queries, attacks, bank=table, session=session)
        conditions = AttackRunner(evaluation, objectives).run(
            queries,
            attacks,
            session,
            evaluation.query_info(queries, fitted.class_names),
            clean=CleanEmbeddings(cache, evaluation.clean_key(queries) if cache else None),
        )
    tables = {name: dataclasses.replace(one.tables[""], encoder=provenance.model) for name, one in conditions.items()}
    clean, attacked = tables[CLEAN], tables[budget.name]
    objective = "custom" if budget.objective else None
    template = evaluation.template(table, clean, fitted.class_names, loader=queries, target=objective)
    scores = fitted.predict_proba(clean), fitted.predict_proba(attacked)
    result = _flips(budget, scores, clean, attacked, template)
    outcome = conditions[budget.name].outcome
    facts = AttackFacts(
        name=budget.name,
        attack=attack,
        stats=conditions[budget.name].stats,
        flags=() if outcome is None else black_box_flags(outcome),
        settings={} if outcome is None else ensemble_settings(outcome),
    )
    of_classifier = classifiers[0].facts(clean, seed=run.seed)
    return dataclasses.replace(result, records=tuple(_budget_records(result, template, facts, of_classifier, budget)))


def _flips(
    budget: PatchBudget,
    scores: tuple[np.ndarray, np.ndarray],
    clean: EmbeddingTable,
    attacked: EmbeddingTable,
    template: RecordTemplate,
) -> BudgetResult:
    """How many patches every group needs, without records."""
    pooling = template.scoring.pooling
    own, reason = own_labels(clean, budget.level)
    if own is None:
        raise ValueError(f"{reason}; there is no decision to change. Give that column, or choose another level")
    labels, ids = align_labels(own, clean.class_names, template.class_names), getattr(clean, budget.level)
    pooled = pool(scores[0], ids, labels, pooling=pooling)
    assert pooled.labels is not None  # labels were given
    return BudgetResult(
        records=(),
        level=budget.level,
        groups=pooled.groups,
        labels=pooled.labels,
        patients=clean.patient[np.unique(ids, return_index=True)[1]],
        sizes=pooled.sizes,
        needed=patches_to_flip(*scores, ids, labels, pooling=pooling, order=budget.order, seed=template.seed),
        clean=clean,
        attacked=attacked,
    )


def _budget_records(
    result: BudgetResult,
    template: RecordTemplate,
    facts: AttackFacts,
    classifier: ClassifierFacts,
    budget: PatchBudget,
) -> list[Record]:
    """Clean accuracy, accuracy at each budget, and the mean smallest fraction (inf counts as 1)."""
    n, level, chance = len(result.groups), result.level, chance_levels(result.labels)["accuracy"]

    def accuracy(of: AttackFacts, fraction: float) -> Record:
        return template.build(
            of,
            classifier,
            level=level,
            metric="accuracy",
            value=result.accuracy(fraction),
            n=n,
            interval=_accuracy_interval(result, fraction, template),
            chance=chance,
        )

    counts = dict(facts.settings) | {
        "already_wrong": int((result.needed == 0).sum()),
        "never_flipped": int(np.isinf(result.needed).sum()),
        "order": budget.order,
    }
    records = [accuracy(AttackFacts(name=CLEAN), 0.0)]
    for fraction in sorted(set(budget.fractions)):
        at = dataclasses.replace(
            facts, name=f"{facts.name}@{100 * fraction:g}%", settings=counts | {"budget_fraction": fraction}
        )
        records.append(accuracy(at, fraction))
    finite = np.minimum(result.smallest_fraction, 1.0)
    note = {"note": "smallest fraction of patches that changes the decision; never counts as 1"}
    mean = template.build(
        dataclasses.replace(facts, settings=counts | note),
        classifier,
        level=level,
        metric="smallest_fraction",
        value=float(finite.mean()),
        n=n,
        interval=mean_interval(finite, result.patients, seed=template.seed, resamples=template.scoring.bootstrap),
    )
    return [*records, mean]


def mean_interval(values: np.ndarray, patients: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """The interval of the mean of values in [0, 1], one per group, over resampled patients."""
    people, member_of = np.unique(patients, return_inverse=True)
    if reason := missing_interval_reason(len(people), resamples):
        return Interval(None, None, reason)
    draws = bootstrap_draws(len(people), resamples, np.random.default_rng(seed))[:, member_of]
    drawn = draws @ values / draws.sum(1)
    return confidence_interval(float(values.mean()), drawn, n_patients=len(people), method="t", confidence=0.95)


def _accuracy_interval(result: BudgetResult, fraction: float, template: RecordTemplate) -> Interval:
    """The interval of an accuracy: right and wrong as the two classes of a score."""
    right = result.robust_at(fraction)
    return bootstrap_intervals(
        np.stack((right, ~right), 1).astype(float),
        np.zeros(len(right), dtype=np.int64),
        result.patients,
        generator=np.random.default_rng(template.seed),
        names=("accuracy",),
        resamples=template.scoring.bootstrap,
    )["accuracy"]
