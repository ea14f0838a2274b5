"""Black-box transfer: encoders measured on images that were attacked on other encoders."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from torch import nn

from hsat.classifiers import KNNClassifier
from hsat.embedding import LoaderInfo
from hsat.eval.announcements import announce_bank, announce_transfer
from hsat.eval.evaluation import (
    Evaluation,
    Queries,
    ScoredClassifier,
    ScoresKey,
    encoder_settings,
    fit_bank,
    loader_settings,
    score_queries,
)
from hsat.eval.objectives import ObjectiveFactory, attacks_decision
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.records import Record, RecordTemplate
from hsat.eval.runner import CLEAN, AttackRunner, Condition
from hsat.eval.store import CleanEmbeddings, Session, open_session, open_world, result_of, table_of
from hsat.eval.transfer_drops import (
    Pair,
    TransferDrop,
    TransferResult,
    average_drops,
    check_pairs,
    resample_metrics,
    transfer_drop,
)
from hsat.eval.whitebox import check_attacks, condition_records
from hsat.fingerprints import fingerprint_classifier, fingerprint_table
from hsat.types import Attack, Classifier, EmbeddingFunction, EmbeddingTable, FittedClassifier, HierarchicalBatch

_GROWING = ("attack.", "bank.", "encoder.")

EncoderSource = EmbeddingFunction | Callable[[], EmbeddingFunction]
Banks = Iterable[HierarchicalBatch] | Mapping[str, EmbeddingTable]


def evaluate_transfer(
    encoders: Mapping[str, EncoderSource],
    banks: Banks,
    queries: Iterable[HierarchicalBatch],
    attacks: Mapping[str, Attack],
    *,
    pairs: Sequence[Pair] | None = None,
    classifier: Classifier | Sequence[Classifier] = KNNClassifier(),
    target: Target | str = "features",
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Mapping[str, Provenance] | None = None,
) -> TransferResult:
    """Attack the queries on each surrogate, and classify what comes out with each target's own bank.

    The published protocol (HSAT, arXiv:2503.10629, Table 2): the drop of a target is its accuracy on clean queries
    minus that on the surrogate's adversarial queries.  The published code makes the adversarial images anew for every
    target; here each (surrogate, attack) is attacked once, and each target embeds its bank once.

    Records, per classifier, level and metric: each target on clean queries (surrogate ""); each target under each
    surrogate's attack; "accuracy_drop" and "mca_drop" (clean minus attacked) with intervals from resampled patients,
    the same ones on both sides; and the mean of these drops over all surrogates but the target itself (surrogate
    "others").  forwards and backwards are passes per image through the surrogate.

    `run.resume_dir` keeps banks, clean queries and every attacked batch.  Encoders and attacks may be added later;
    anything else that decides a number is refused when it differs.  Several processes share the work as in
    `evaluate_whitebox`.

    Args:
        encoders: By name; each takes the user's pixels, so sizes and normalisations may differ.  A function without
            arguments is called for the encoder.
        banks: A loader of clean training images, read once per encoder, or each encoder's table from `embed`.
        queries: A loader that gives the same batches each time; it is read once per target and once per (surrogate,
            attack).
        attacks: {"PGD-8": PGD(...), ...}.
        pairs: (surrogate, target), all by default.  One that is both has its white-box numbers.
        classifier: See `evaluate_whitebox`.
        target: What the attacks maximise on the surrogate; "decision" is that of the surrogate's own bank.
        scoring: How embeddings become numbers.
        run: Seed, device, folders; noise, diagnosis and examples do not apply.
        provenance: What records say of each encoder.

    Returns:
        Records and scores of every pair.

    Raises:
        ValueError: For unknown or doubled pairs, names that are taken ("", "others"), a folder of other settings
            (naming them), queries that differ between readings, and what `evaluate_whitebox` refuses.
        TypeError: For encoders that are no mapping of callables.
    """
    target = Target.of(target)
    check_attacks(attacks)
    chosen = check_pairs(encoders, pairs)
    decides = any(attacks_decision(target, attack) for attack in attacks.values())
    _check_banks(banks, [name for pair in chosen for name in pair[not decides :]])
    if isinstance(queries, Iterator):
        raise ValueError(
            f"the queries are read once per target and per attack, and a {type(queries).__name__} can be read only"
            " once; give a list of batches or a loader such as hsat.data.patch_loader"
        )
    if unknown := sorted((provenance or {}).keys() - encoders.keys()):
        raise ValueError(f"provenance names {unknown}, which are no encoders; there are {list(encoders)}")
    run = dataclasses.replace(run, keep_examples=0)
    evaluations: dict[str, Evaluation] = {}
    for encoder in dict.fromkeys(name for pair in chosen for name in pair):
        known = (provenance or {}).get(encoder, Provenance())
        known = dataclasses.replace(known, model=known.model or encoder)
        source = load_source(encoder, encoders[encoder])
        evaluations[encoder] = Evaluation(source, target, scoring, run, known).checked(queries)
    with open_world(run) as (world, cache):
        settings = _transfer_settings(evaluations, banks, queries, attacks, classifier)
        session = open_session(run, settings, world, cache, growing=_GROWING)
        work = _TransferWork(evaluations, queries, banks, classifier, session)
        work.announce(chosen, attacks, decides=decides)
        clean = {name: work.clean(name) for name in dict.fromkeys(name for _, name in chosen)}
        conditions: dict[Pair, Condition] = {}
        made: list[Pair] = []
        for surrogate in dict.fromkeys(name for name, _ in chosen):
            readers = [name for first, name in chosen if first == surrogate]
            for name, attack in attacks.items():
                conditions[surrogate, name], fresh = work.attack(surrogate, name, attack, readers)
                made += [(surrogate, name)] if fresh else []
    records, attacked = _transfer_records(work, clean, conditions, attacks)
    first = next(iter(clean.values()))
    no_rows = np.zeros((len(first), 1), dtype=np.float32)
    return TransferResult(
        records=tuple(records),
        clean={name: score_queries(work.fitted(name).classifiers, table) for name, table in clean.items()},
        attacked=attacked,
        queries=dataclasses.replace(first, z=no_rows, norm=None, encoder=""),
        class_names={name: work.fitted(name).classifiers[0].fitted.class_names for name in clean},
        made=tuple(made),
    )


@dataclass(frozen=True, eq=False)
class FittedBank:
    """The bank of an encoder, and the classifiers that were fitted on it."""

    table: EmbeddingTable
    classifiers: tuple[ScoredClassifier, ...]


class _TransferWork:
    """Encoders, banks, clean queries, and pairs of surrogate and attack, each done once.

    Args:
        evaluations: What is measured, by name.
        queries: See `evaluate_transfer`.
        banks: See `evaluate_transfer`.
        classifier: See `evaluate_transfer`.
        session: Processes, store and cache.
    """

    def __init__(
        self,
        evaluations: Mapping[str, Evaluation],
        queries: Queries,
        banks: Banks,
        classifier: Classifier | Sequence[Classifier],
        session: Session,
    ) -> None:
        self._evaluations, self._queries, self._banks, self._classifier = evaluations, queries, banks, classifier
        self._session = session
        self._fitted: dict[str, FittedBank] = {}

    def fitted(self, name: str) -> FittedBank:
        """An encoder's bank, and the classifiers that were fitted on it."""
        if name not in self._fitted:
            table = self._bank(name)
            self._fitted[name] = FittedBank(table, fit_bank(self._classifier, table))
        return self._fitted[name]

    def announce(self, pairs: Sequence[Pair], attacks: Mapping[str, Attack], *, decides: bool) -> None:
        """Embed the banks, and say what is left, where progress is shown; decides: some attack is on the decision."""
        needed = dict.fromkeys(name for pair in pairs for name in pair[not decides :])
        banks = [self.fitted(name).table for name in needed]
        if self._session.shows:
            known = {name: self._objectives(name, decides=decides) for name, _ in pairs}
            session, queries = self._session, self._queries
            announce_transfer(self._evaluations, known, pairs, attacks, queries, banks=banks, session=session)

    def _objectives(self, name: str, *, decides: bool) -> ObjectiveFactory:
        evaluation, fitted = self._evaluations[name], self._decision(name) if decides else None
        return ObjectiveFactory(evaluation.encoder, evaluation.target, evaluation.layer, fitted)

    def clean(self, name: str) -> EmbeddingTable:
        """A target's embeddings of the clean queries."""
        evaluation = self._evaluations[name]
        runner = AttackRunner(evaluation, self._objectives(name, decides=True), {name: evaluation.encoder})
        conditions = self._pass(runner, evaluation, {}, self._info(name), key=("clean", name))
        return conditions[CLEAN].tables[name]

    def attack(self, surrogate: str, name: str, attack: Attack, readers: Sequence[str]) -> tuple[Condition, bool]:
        """The targets' embeddings of the queries attacked on a surrogate, and whether they were made just now."""
        evaluation = self._evaluations[surrogate]
        decides = attacks_decision(evaluation.target, attack)
        runner = AttackRunner(
            evaluation,
            self._objectives(surrogate, decides=decides),
            {reader: self._evaluations[reader].encoder for reader in readers},
            include_clean=False,
        )
        info = self._info(surrogate if decides else readers[0])
        conditions = self._pass(runner, evaluation, {name: attack}, info, key=("attacked", surrogate, name))
        return conditions[name], any(self._session.world.gather(runner.computed > 0))

    def template(self, name: str, queries: EmbeddingTable) -> RecordTemplate:
        """What all records of a target have in common."""
        fitted = self.fitted(name)
        names = fitted.classifiers[0].fitted.class_names
        return self._evaluations[name].template(fitted.table, queries, names, loader=self._queries)

    def _pass(
        self,
        runner: AttackRunner,
        evaluation: Evaluation,
        attacks: Mapping[str, Attack],
        info: LoaderInfo,
        *,
        key: Sequence[str],
    ) -> dict[str, Condition]:
        """One reading of the queries."""
        cache = self._session.cache
        clean = CleanEmbeddings(cache, evaluation.clean_key(self._queries) if cache else None)
        return runner.run(self._queries, attacks, self._session, info, key=key, clean=clean)

    def _decision(self, name: str) -> FittedClassifier:
        return self.fitted(name).classifiers[0].fitted

    def checkpoint(self, name: str) -> str:
        """What identifies an encoder's weights."""
        return self._evaluations[name].provenance.checkpoint

    def _info(self, name: str) -> LoaderInfo:
        """Facts of the queries as an encoder's classifier reads them."""
        class_names = self.fitted(name).classifiers[0].fitted.class_names
        return self._evaluations[name].query_info(self._queries, class_names)

    def _bank(self, name: str) -> EmbeddingTable:
        evaluation, session, banks = self._evaluations[name], self._session, self._banks
        if isinstance(banks, Mapping):
            return banks[name]
        announce = partial(announce_bank, evaluation, session.world.size)
        return self._stored(
            lambda: evaluation.embed_bank(banks, session.world, session.cache, announce=announce), "bank", name
        )

    def _stored(self, embed: Callable[[], EmbeddingTable], *key: str) -> EmbeddingTable:
        """The table of a key from the store; else a new one, which all ranks embed together."""
        session = self._session
        if session.store.file_name(*key) in session.finished:
            stored = session.store.get(*key)
            if all(session.world.gather(stored is not None)) and stored is not None:
                return table_of(stored)
        table = embed()
        if session.world.is_main:
            session.store.put(result_of(table), *key)
        return table


def _transfer_records(
    work: _TransferWork,
    clean: Mapping[str, EmbeddingTable],
    conditions: Mapping[Pair, Condition],
    attacks: Mapping[str, Attack],
) -> tuple[list[Record], dict[tuple[str, str, str], dict[ScoresKey, np.ndarray]]]:
    """All records of all targets, target by target, and the class scores under attack."""
    records: list[Record] = []
    attacked: dict[tuple[str, str, str], dict[ScoresKey, np.ndarray]] = {}
    for target, table in clean.items():
        classifiers, template = work.fitted(target).classifiers, work.template(target, table)
        scores = score_queries(classifiers, table)
        before = condition_records(
            CLEAN, Condition.of(table), None, table, scores, classifiers=classifiers, template=template
        )
        records += before
        template = template.with_clean(before)
        resampled = resample_metrics(template, scores, table)
        drops: dict[str, dict[str, TransferDrop]] = {}
        for (surrogate, name), condition in conditions.items():
            if target not in condition.tables:
                continue
            rows = score_queries(classifiers, condition.tables[target])
            attacked[surrogate, name, target] = rows
            after = condition_records(
                name,
                condition,
                attacks[name],
                table,
                rows,
                classifiers=classifiers,
                template=template,
                surrogate=surrogate,
                surrogate_checkpoint=work.checkpoint(surrogate),
            )
            drop = transfer_drop(
                before,
                after,
                clean_resampled=resampled,
                attacked_resampled=resample_metrics(template, rows, table),
                classifiers=classifiers,
                table=table,
            )
            records += [*after, *drop.records.values()]
            drops.setdefault(name, {})[surrogate] = drop
        for by_surrogate in drops.values():
            if others := {name: drop for name, drop in by_surrogate.items() if name != target}:
                records += average_drops(others, n_patients=len(np.unique(table.patient)))
    return records, attacked


def _transfer_settings(
    evaluations: Mapping[str, Evaluation],
    banks: Banks,
    queries: Queries,
    attacks: Mapping[str, Attack],
    classifier: Classifier | Sequence[Classifier],
) -> dict[str, Any]:
    """All that decides the results; encoders, their banks and attacks may be added by later runs."""
    settings = next(iter(evaluations.values())).pass_settings(queries, attacks)
    for name, one in evaluations.items():
        settings |= encoder_settings(f"encoder.{name}", one.encoder, one.provenance)
    settings["classifier"] = fingerprint_classifier(classifier)
    if isinstance(banks, Mapping):
        settings |= {f"bank.{name}": fingerprint_table(banks[name]) for name in evaluations if name in banks}
    else:
        settings |= {f"banks.{key}": value for key, value in loader_settings(banks).items()}
    return settings | {f"queries.{key}": value for key, value in loader_settings(queries).items()}


def _check_banks(banks: Banks, names: Sequence[str]) -> None:
    if isinstance(banks, EmbeddingTable):
        raise TypeError("one table cannot be the bank of every target; give a loader, or {name: table} by target")
    if isinstance(banks, Mapping):
        if missing := sorted(set(names) - banks.keys()):
            raise ValueError(f"banks have no table for {missing}; they have {list(banks)}")
        if wrong := [name for name, table in banks.items() if not isinstance(table, EmbeddingTable)]:
            raise TypeError(f"the banks of {wrong} are no EmbeddingTables, as embed gives; give tables, or one loader")
    elif isinstance(banks, Iterator):
        raise ValueError(
            f"the bank is read once per encoder, and a {type(banks).__name__} can be read only once;"
            " give a list of batches, a loader such as hsat.data.patch_loader, or {name: table}"
        )


def load_source(name: str, source: EncoderSource) -> EmbeddingFunction:
    """The encoder of a source: itself, or what a function without arguments gives.

    An encoder needs its images, so that the two cannot be confused; `lambda file=file: load_encoder(file)` is a
    function that loads one.  Modules are encoders, and so are callables that take any arguments (*args).
    """
    if isinstance(source, nn.Module):
        return source
    try:
        signature = inspect.signature(source)
        signature.bind()
    except (TypeError, ValueError):
        return cast(EmbeddingFunction, source)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        return cast(EmbeddingFunction, source)
    encoder = cast(Callable[[], EmbeddingFunction], source)()
    if not callable(encoder):
        raise TypeError(f"the function for encoder {name!r} gave a {type(encoder).__name__}, which is no encoder")
    return encoder
