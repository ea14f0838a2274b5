"""White-box robustness of an encoder: how often a classifier of its embeddings is right on attacked queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import AttackEnsemble, NaturalShift, RandomNoise
from hsat.classifiers import KNNClassifier
from hsat.embedding import eval_mode
from hsat.eval.announcements import announce_bank, announce_cost
from hsat.eval.confidence import binomial_tail
from hsat.eval.diagnostics import Diagnosis, DiagnosticsCollector
from hsat.eval.doubts import list_doubts
from hsat.eval.evaluation import (
    Bank,
    Evaluation,
    ScoredClassifier,
    ScoresKey,
    classifier_settings,
    encoder_settings,
    fit_bank,
    score_queries,
)
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.paper_attacks import add_noise_baselines
from hsat.eval.records import AttackFacts, Record, RecordTemplate
from hsat.eval.result_files import SavedResult, save_conditions
from hsat.eval.result_text import result_html
from hsat.eval.runner import CLEAN, AttackRunner, Condition
from hsat.eval.store import CleanEmbeddings, Session, open_session, open_world
from hsat.types import (
    Attack,
    Classifier,
    EmbeddingFunction,
    EmbeddingTable,
    FittedClassifier,
    HierarchicalBatch,
)

_TOLERATED = 0.05  # share of the images robust to every gradient that a search without them may break by luck
_FALSE_ALARM = 0.01
POOLED = (
    "slides and patients pool each patch's worst case; a patch that is broken is not pushed further, so that an attack"
    " on the pool may do more"
)


@dataclass(frozen=True, eq=False, repr=False)
class WhiteboxResult(SavedResult):
    """The result of `evaluate_whitebox`; the keys of all mappings are "clean" and the names of the attacks.

    Attributes:
        records: One per condition, classifier, level and metric.
        tables: The embeddings.
        scores: Class scores (n, classes) by condition and classifier: its k for a kNN, else its settings as text.
            Columns follow `class_names`.
        examples: Some images of each class under each condition, as `RunOptions.keep_examples` says.
        class_names: The classes of the classifiers.
        outcomes: For each ensemble, which of its members broke which image.
        example_rows: Rows of the tables that the examples belong to.
    """

    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    scores: dict[str, dict[int | str, np.ndarray]]
    examples: dict[str, Tensor]
    class_names: tuple[str, ...]
    outcomes: dict[str, EnsembleOutcome] = field(default_factory=dict)
    example_rows: tuple[int, ...] = ()

    def _write(self, folder: Path) -> None:
        """Records, scores and evidence."""
        save_conditions(folder, [self])

    def doubts(self) -> tuple[str, ...]:
        """Reasons to distrust the numbers, the weightiest first: flags of records, and what only several show.

        Returns:
            The reasons in words, each once; none where there is nothing to say.
        """
        return list_doubts(self.records)

    _repr_html_ = result_html


class AttackedQueries(NamedTuple):
    """The queries under all conditions, what was found in the attacks, by name, and the loader of the queries."""

    conditions: dict[str, Condition]
    diagnoses: Mapping[str, Diagnosis]
    loader: object


def evaluate_whitebox(
    encoder: EmbeddingFunction,
    bank: Bank,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    *,
    classifier: Classifier | Sequence[Classifier] = KNNClassifier(),
    target: Target | str = "decision",
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
    surrogates: Mapping[str, EmbeddingFunction] | None = None,
) -> WhiteboxResult:
    """Attack the queries, embed them, and classify them by a classifier of a clean bank.

    Records carry flags where a result is doubtful: gradients that are exactly zero or images that never moved in more
    than 1 % of the images (a masked gradient looks like robustness), a bank that shares patients with the queries, and
    classifiers that were not the ones attacked.  With an approximate index the settings hold its recall and agreement
    with exact predictions on the same queries.

    With `torch.distributed`, every rank makes this same call, on a device of its own.  Bank, clean embeddings, attacks
    and diagnoses are shared out by whole batches, and every rank gets the records of one process.  Loaders have to give
    every rank the same batches.  An error on one rank is raised there at once, and as a RankFailedError on the others.

    Encoders in channels_last, with folded BatchNorm (`hsat.models.fold_batchnorm`), or under a `torch.autocast` block
    around this call give slightly other numbers, faster on some machines; records say so under settings["computed"].

    Args:
        encoder: A module whose call gives the projected embedding and whose `.features`, if it has one, gives the
            backbone feature; any other callable serves as both.  It is frozen meanwhile and restored afterwards.
        bank: A loader of clean training images, or their table from `embed` with the same layer, or several tables of
            one cohort.
        queries: A loader, read once; all attacks see each batch in turn and share its clean embedding.
        attacks: {"PGD-8": PGD(...), ...}.  Clean queries are always measured, under the name "clean".  An
            `AttackEnsemble` always attacks the decision; other attacks of the call under its threat model count as
            members and cost nothing again.
        classifier: One or several; the first is attacked, the others score the same embeddings, and their records are
            flagged.
        target: What the attacks maximise: "decision", "features" or "embedding"; see `Target`.
        scoring: How embeddings become numbers.
        run: Seed, device, folders, noise baselines, diagnosis, examples.
        provenance: What records say of the encoder.
        surrogates: Other encoders by name, from which ensembles transfer; they are frozen meanwhile.

    Returns:
        Records, embeddings, scores and examples.

    Raises:
        ValueError: For unknown options, an attack called "clean", a folder of another evaluation, and what `embed`
            and the classifier raise.
        TypeError: For attacks that are no mapping of attacks.
    """
    check_attacks(attacks, queries)
    evaluation = Evaluation(encoder, Target.of(target), scoring, run, provenance).checked(queries, bank)
    others = dict(surrogates or {})
    chosen = _with_surrogates(add_noise_baselines(attacks) if run.noise else dict(attacks), others)
    with open_world(run) as (world, cache):
        table = evaluation.embed_bank(bank, world, cache, announce=partial(announce_bank, evaluation, world.size))
        classifiers = fit_bank(classifier, table)
        settings = evaluation.settings(queries, chosen) | classifier_settings(classifiers, table)
        for name, other in others.items():
            settings |= encoder_settings(f"encoder.{name}", other, Provenance())
        session = open_session(run, settings, world, cache)
        frozen, fitted = tuple(others.values()), classifiers[0].fitted
        attacked = attack_queries(evaluation, queries, chosen, session, classifier=fitted, bank=table, frozen=frozen)
    return measure_attacks(evaluation, attacked, chosen, classifiers, bank=table)


def attack_queries(
    evaluation: Evaluation,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    session: Session,
    *,
    classifier: FittedClassifier,
    bank: EmbeddingTable | None = None,
    frozen: Sequence[EmbeddingFunction] = (),
) -> AttackedQueries:
    """The one pass over the queries, and the diagnoses of the attacks.

    Args:
        evaluation: The encoder and the options.
        queries: See `evaluate_whitebox`.
        attacks: By name, noise baselines among them.
        session: World, store and cache.
        classifier: What is attacked.
        bank: What it was fitted on, where it was.
        frozen: Further modules to freeze meanwhile.
    """
    encoder, layer, cache = evaluation.encoder, evaluation.layer, session.cache
    objectives = ObjectiveFactory(encoder, evaluation.target, layer, classifier)
    run, name = evaluation.run, evaluation.provenance.model
    diagnostics = DiagnosticsCollector(
        encoder, objectives, attacks, layer=layer, classifier=classifier, run=run, name=name
    )
    classes = len(classifier.class_names)
    if session.shows:
        announce_cost(evaluation, objectives, queries, attacks, bank=bank, session=session, classes=classes)
    conditions = AttackRunner(evaluation, objectives).run(
        queries,
        attacks,
        session,
        evaluation.query_info(queries, classifier.class_names),
        clean=CleanEmbeddings(cache, evaluation.clean_key(queries) if cache else None),
        visit=diagnostics.add,
        frozen=frozen,
    )
    with ExitStack() as stack:
        for module in objectives.modules:
            stack.enter_context(eval_mode(module))
        return AttackedQueries(conditions, diagnostics.finish(evaluation.device, session), queries)


def measure_attacks(
    evaluation: Evaluation,
    attacked: AttackedQueries,
    attacks: Mapping[str, Attack],
    classifiers: Sequence[ScoredClassifier],
    *,
    bank: EmbeddingTable | None,
) -> WhiteboxResult:
    """Scores and records of a pass, by every classifier; bank: what they were fitted on, None for a trained one."""
    conditions, diagnoses = attacked.conditions, attacked.diagnoses
    names = classifiers[0].fitted.class_names
    tables = {name: replace(one.tables[""], encoder=evaluation.provenance.model) for name, one in conditions.items()}
    template = evaluation.template(bank, tables[CLEAN], names, loader=attacked.loader)
    scores = {name: score_queries(classifiers, queries_table) for name, queries_table in tables.items()}
    records: list[Record] = []
    for name, condition in conditions.items():
        records += condition_records(
            name,
            condition,
            attacks.get(name),
            tables[name],
            scores[name],
            classifiers=classifiers,
            template=template.with_clean(records),  # clean comes first
            diagnosis=diagnoses.get(name),
        )
    return WhiteboxResult(
        records=tuple(records),
        tables=tables,
        scores=scores,
        examples={name: torch.cat(one.examples) for name, one in conditions.items() if one.examples},
        example_rows=conditions[CLEAN].example_rows,
        class_names=names,
        outcomes={name: one.outcome for name, one in conditions.items() if one.outcome is not None},
    )


def check_attacks(attacks: Mapping[str, Attack], queries: object = None) -> None:
    """Raise unless this maps names other than "clean" to attacks that fit the queries, where they say what they are.

    Raises:
        TypeError: For something else than a mapping of attacks.
        ValueError: For an attack called "clean", and for other stains of SRH patches, which are not stained.
    """
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a mapping such as {{'PGD-8': PGD(...)}}, got {type(attacks).__name__}")
    for name, attack in attacks.items():
        if not callable(getattr(attack, "run", None)):
            raise TypeError(f"attack {name!r} has no method run, as hsat.types.Attack wants: {attack!r}")
    if CLEAN in attacks:
        raise ValueError(f"an attack cannot be called {CLEAN!r}: that is the name of the queries as they are")
    kind = getattr(getattr(getattr(queries, "dataset", None), "cohort", None), "kind", None)
    stains = [name for name, attack in attacks.items() if isinstance(attack, NaturalShift) and attack.kind == "stain"]
    if stains and kind == "srh":
        raise ValueError(
            f"{', '.join(stains)}: SRH patches are not stained, so that no other stain can be measured;"
            " take NaturalShift.standard(stained=False)"
        )


def condition_records(
    name: str,
    condition: Condition,
    attack: Attack | None,
    table: EmbeddingTable,
    scores: Mapping[ScoresKey, np.ndarray],
    *,
    classifiers: Sequence[ScoredClassifier],
    template: RecordTemplate,
    diagnosis: Diagnosis | None = None,
    surrogate: str = "",
    surrogate_checkpoint: str | None = None,
) -> list[Record]:
    """The records of one condition by every classifier, with all flags."""
    records: list[Record] = []
    first = classifiers[0]
    decides = template.target == "decision" or condition.outcome is not None
    for classifier in classifiers:
        flags = list(classifier.flags)
        settings: dict[str, Any] = {}
        if decides:
            settings["attacked_classifier"] = repr(first.settings)
            if isinstance(first.key, int):
                settings["attacked_k"] = first.key
            if attack is not None and not classifier.attacked and not isinstance(attack, RandomNoise | NaturalShift):
                flags.append(f"the attack was optimised for {first.name}, but this record is for {classifier.name}")
        if isinstance(attack, NaturalShift):
            settings["natural_shift"] = {"kind": attack.kind, "strength": attack.strength, "text": attack.text}
        if condition.outcome is not None:
            flags += black_box_flags(condition.outcome)
            settings |= ensemble_settings(condition.outcome) | {"note": POOLED}
        if surrogate_checkpoint is not None:
            settings["surrogate_checkpoint"] = surrogate_checkpoint
        if diagnosis is not None:
            flags += diagnosis.flags
            settings["diagnosis"] = diagnosis.measures
        facts = AttackFacts(
            name=name,
            attack=attack,
            stats=condition.stats,
            flags=tuple(flags),
            settings=settings,
            surrogate=surrogate,
        )
        records += template.measure(facts, classifier.facts(table, seed=template.seed), scores[classifier.key], table)
    return records


def black_box_flags(outcome: EnsembleOutcome) -> tuple[str, ...]:
    """A flag if searches without gradients broke more of what every gradient left robust than luck explains.

    By an exact one-sided binomial test against a tolerated share of 5 %, at level 1 %: gradients are then masked, or
    the white-box members too weak.
    """
    searches = [member for member in outcome.members if member.black_box]
    seen, broken = max((one.seen for one in searches), default=0), sum(one.newly_broken for one in searches)
    if not broken or broken / seen <= _TOLERATED or binomial_tail(broken, seen, _TOLERATED) >= _FALSE_ALARM:
        return ()
    return (
        f"black box beats white box: searches without gradients broke {broken} of {seen} images that were robust to"
        f" every gradient ({_TOLERATED:.0%} would be tolerated)",
    )


def ensemble_settings(outcome: EnsembleOutcome) -> dict[str, Any]:
    """What records say of an ensemble's members."""
    counts = ("seen", "newly_broken", "forwards", "backwards")
    return {
        "members": {member.name: {name: getattr(member, name) for name in counts} for member in outcome.members},
        "member_attacks": {member.name: member.attack for member in outcome.members if member.attack},
        "robust": int(outcome.robust.sum()),
    }


def _with_surrogates(attacks: Mapping[str, Attack], surrogates: Mapping[str, EmbeddingFunction]) -> dict[str, Attack]:
    """The attacks, where ensembles know the other encoders."""
    return {
        name: replace(attack, surrogates={**attack.surrogates, **surrogates})
        if isinstance(attack, AttackEnsemble)
        else attack
        for name, attack in attacks.items()
    }
