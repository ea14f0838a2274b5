"""Black-box transfer: encoders measured on images that were attacked on other encoders."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import nn

from hsat.classifiers import KNNClassifier
from hsat.distributed import World
from hsat.embedding import Embedder, LoaderInfo, resolve_device
from hsat.eval.evaluation import (
    ScoredClassifier,
    ScoresKey,
    embed_bank,
    evaluation_settings,
    fit_bank,
    loader_settings,
    query_info,
    record_template,
    score_queries,
)
from hsat.eval.objectives import ObjectiveFactory
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.records import Record, RecordTemplate
from hsat.eval.runner import CLEAN, AttackRunner, Condition, Session, open_session, open_world
from hsat.eval.scoring import level_scores
from hsat.eval.statistics.bootstrap import no_interval
from hsat.eval.statistics.intervals import Interval, interval_around
from hsat.eval.statistics.resampling import metric_values, patient_draws
from hsat.eval.store import EmbeddingCache, result_of, table_of
from hsat.eval.whitebox import check_attacks, condition_records
from hsat.fingerprints import fingerprint_table
from hsat.types import Attack, Classifier, EmbeddingFunction, EmbeddingTable, HierarchicalBatch

OTHERS = "others"  # the surrogate of records that average over all surrogates but the target itself
DROPS = {"accuracy": "accuracy_drop", "mca": "mca_drop"}
_GROWING = ("attack.", "bank.", "encoder.")
_OF_ONE_SURROGATE = ("surrogate_checkpoint", "stationary_share", "zero_gradient_share", "never_moved_share")

EncoderSource = EmbeddingFunction | Callable[[], EmbeddingFunction]
Banks = Iterable[HierarchicalBatch] | Mapping[str, EmbeddingTable]
Pair = tuple[str, str]
_Place = tuple[ScoresKey, str, str]  # classifier, level, metric


@dataclass(frozen=True, eq=False)
class TransferResult:
    """The result of `evaluate_transfer`.

    Attributes:
        records: See there.
        clean: Class scores (n, classes) of the queries as they are, by target and classifier (see `WhiteboxResult`).
        attacked: The same by (surrogate, attack, target) and classifier.
        queries: Ids and labels of the queries, without embeddings; rows of scores follow it.
        class_names: Columns of the scores, by target.
        made: The (surrogate, attack) pairs that this call attacked, in order; the others came from `resume_dir`.
    """

    records: tuple[Record, ...]
    clean: dict[str, dict[ScoresKey, np.ndarray]]
    attacked: dict[tuple[str, str, str], dict[ScoresKey, np.ndarray]]
    queries: EmbeddingTable
    class_names: dict[str, tuple[str, ...]]
    made: tuple[Pair, ...]


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

    Raises:
        ValueError: For unknown or doubled pairs, names that are taken ("", "others"), a folder of other settings
            (naming them), queries that differ between readings, and what `evaluate_whitebox` refuses.
        TypeError: For encoders that are no mapping of callables.
    """
    target = Target.of(target)
    check_attacks(attacks)
    chosen = check_pairs(encoders, pairs)
    _check_banks(banks, [name for _, name in chosen])
    if isinstance(queries, Iterator):
        raise ValueError(
            f"the queries are read once per target and per attack, and a {type(queries).__name__} can be read only"
            " once; give a list of batches or a loader such as hsat.data.patch_loader"
        )
    with open_world(run) as (world, cache):
        work = _TransferWork(
            encoders, banks, queries, classifier, target=target, scoring=scoring, run=run, provenance=provenance or {}
        )
        work.open(world, cache, chosen, attacks)
        targets = list(dict.fromkeys(name for _, name in chosen))
        clean = {name: work.clean(name) for name in targets}
        conditions: dict[Pair, Condition] = {}
        made: list[Pair] = []
        for surrogate in dict.fromkeys(name for name, _ in chosen):
            readers = [name for first, name in chosen if first == surrogate]
            for name, attack in attacks.items():
                conditions[surrogate, name], fresh = work.attack(surrogate, name, attack, readers)
                made += [(surrogate, name)] if fresh else []
    records, attacked = _transfer_records(work, clean, conditions, attacks)
    first = clean[targets[0]]
    no_rows = np.zeros((len(first), 1), dtype=np.float32)
    return TransferResult(
        records=tuple(records),
        clean={name: score_queries(work.classifiers(name), clean[name]) for name in targets},
        attacked=attacked,
        queries=dataclasses.replace(first, z=no_rows, norm=None, encoder=""),
        class_names={name: work.classifiers(name)[0].fitted.class_names for name in targets},
        made=tuple(made),
    )


class _TransferWork:
    """Banks, clean queries, and pairs of surrogate and attack, each done once."""

    def __init__(
        self,
        encoders: Mapping[str, EncoderSource],
        banks: Banks,
        queries: Iterable[HierarchicalBatch],
        classifier: Classifier | Sequence[Classifier],
        *,
        target: Target,
        scoring: Scoring,
        run: RunOptions,
        provenance: Mapping[str, Provenance],
    ) -> None:
        self._sources, self._banks, self._queries, self._classifier = encoders, banks, queries, classifier
        self.target, self.scoring, self.run, self.provenance = target, scoring, run, dict(provenance)
        self.encoders: dict[str, EmbeddingFunction] = {}
        self._fitted: dict[str, tuple[ScoredClassifier, ...]] = {}
        self.bank_tables: dict[str, EmbeddingTable] = {}
        self._session: Session
        self._cache: EmbeddingCache | None = None

    def of(self, name: str) -> Provenance:
        """What records say of an encoder."""
        known = self.provenance.get(name, Provenance())
        return dataclasses.replace(known, model=known.model or name)

    def open(
        self, world: World, cache: EmbeddingCache | None, pairs: Sequence[Pair], attacks: Mapping[str, Attack]
    ) -> None:
        """Load the encoders and open the store."""
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        self.encoders = {name: load_source(name, self._sources[name]) for name in names}
        self._cache = cache
        named = {name: (encoder, self.of(name).checkpoint) for name, encoder in self.encoders.items()}
        settings = evaluation_settings(
            named, self._queries, attacks, target=self.target, scoring=self.scoring, run=self.run
        )
        settings["classifier"] = repr(self._classifier)
        if isinstance(self._banks, Mapping):
            settings |= {f"bank.{name}": fingerprint_table(self._banks[name]) for name in names if name in self._banks}
        else:
            settings |= {f"banks.{key}": value for key, value in loader_settings(self._banks).items()}
        settings |= {f"queries.{key}": value for key, value in loader_settings(self._queries).items()}
        self._session = open_session(self.run, settings, world, cache, growing=_GROWING)

    def classifiers(self, name: str) -> tuple[ScoredClassifier, ...]:
        """An encoder's classifiers, fitted on its own bank."""
        if name not in self._fitted:
            self.bank_tables[name] = self._bank(name)
            self._fitted[name] = fit_bank(self._classifier, self.bank_tables[name])
        return self._fitted[name]

    def info(self, name: str) -> LoaderInfo:
        """Facts of the queries as an encoder's classifier reads them."""
        return query_info(self._queries, self.of(name), self.classifiers(name)[0].fitted.class_names)

    def clean(self, name: str) -> EmbeddingTable:
        """A target's embeddings of the clean queries."""
        store = self._session.store
        if self._session.store.file_name("clean", name) in self._session.finished:
            stored = store.get("clean", name)
            if stored is not None:
                return table_of(stored)
        layer, encoder = self.scoring.layer, self.encoders[name]
        embedder = Embedder(encoder, layer=layer, device=self.run.device, name=name, progress=self.run.progress)
        table = embedder.run(self._queries, self.info(name), self._session.world)
        if self._session.world.is_main:
            store.put(result_of(table), "clean", name)
        return table

    def attack(self, surrogate: str, name: str, attack: Attack, readers: Sequence[str]) -> tuple[Condition, bool]:
        """The targets' embeddings of the queries attacked on a surrogate, and whether they were made just now."""
        encoder = self.encoders[surrogate]
        factory = ObjectiveFactory(encoder, self.target, self.scoring.layer, self.classifiers(surrogate)[0].fitted)
        runner = AttackRunner(
            encoder,
            factory,
            {reader: self.encoders[reader] for reader in readers},
            layer=self.scoring.layer,
            run=dataclasses.replace(self.run, keep_examples=0),
            device=resolve_device(encoder, self.run.device),
            include_clean=False,
        )
        conditions = runner.run(
            self._queries, {name: attack}, self._session, self.info(surrogate), key=("attacked", surrogate, name)
        )
        fresh = any(self._session.world.gather(runner.computed > 0))
        return conditions[name], fresh

    def template(self, name: str, queries: EmbeddingTable) -> RecordTemplate:
        """What all records of a target have in common."""
        return record_template(
            self.bank_tables[name],
            queries,
            self.classifiers(name)[0].fitted.class_names,
            target=self.target,
            scoring=self.scoring,
            run=self.run,
            provenance=self.of(name),
            encoder=self.encoders[name],
        )

    def _bank(self, name: str) -> EmbeddingTable:
        if isinstance(self._banks, Mapping):
            return self._banks[name]
        session = self._session
        if session.store.file_name("bank", name) in session.finished:
            stored = session.store.get("bank", name)
            if stored is not None:
                return table_of(stored)
        table = embed_bank(
            self.encoders[name],
            self._banks,
            layer=self.scoring.layer,
            run=self.run,
            provenance=self.of(name),
            world=session.world,
            cache=self._cache,
        )
        if session.world.is_main:
            session.store.put(result_of(table), "bank", name)
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
        classifiers, template = work.classifiers(target), work.template(target, table)
        scores = score_queries(classifiers, table)
        before = condition_records(
            CLEAN, Condition.of(table), None, table, scores, classifiers=classifiers, template=template
        )
        records += before
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
                surrogate_checkpoint=work.of(surrogate).checkpoint,
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


@dataclass(frozen=True, eq=False)
class TransferDrop:
    """Records of the drops under one attack, and their values over the resamples, by (classifier, level, metric)."""

    records: dict[_Place, Record]
    resampled: dict[_Place, np.ndarray]


def resample_metrics(
    template: RecordTemplate, scores: Mapping[ScoresKey, np.ndarray], table: EmbeddingTable
) -> dict[_Place, np.ndarray]:
    """Accuracy and mca in resamples of the patients, (resamples,) each; nothing where there can be no interval.

    The draw depends on the seed and the number of patients only, so that two conditions of the same queries are
    measured on the same resamples and their difference is paired.
    """
    values: dict[_Place, np.ndarray] = {}
    n_patients, scoring = len(np.unique(table.patient)), template.scoring
    if no_interval(n_patients, scoring.bootstrap):
        return values
    draws = patient_draws(n_patients, scoring.bootstrap, np.random.default_rng(template.seed))
    for key, rows in scores.items():
        levels = level_scores(rows, table, class_names=template.class_names, how=scoring.pooling, keys=scoring.group_by)
        for level, (pooled, labels, patients) in levels.items():
            member_of = np.unique(patients, return_inverse=True)[1]
            drawn = metric_values(pooled, labels, member_of, draws, names=tuple(DROPS), absent=scoring.absent_classes)
            values |= {(key, level, metric): value for metric, value in drawn.items()}
    return values


def transfer_drop(
    clean: Sequence[Record],
    attacked: Sequence[Record],
    *,
    clean_resampled: Mapping[_Place, np.ndarray],
    attacked_resampled: Mapping[_Place, np.ndarray],
    classifiers: Sequence[ScoredClassifier],
    table: EmbeddingTable,
) -> TransferDrop:
    """Clean minus attacked for each number of one target under one surrogate's attack, with paired intervals.

    The rest of a drop's record is the attacked one's.
    """
    keys = {repr(classifier.settings): classifier.key for classifier in classifiers}
    before = {(keys[r.classifier], r.level, r.metric): r.value for r in clean}
    n_patients = len(np.unique(table.patient))
    records, resampled = {}, {}
    for record in attacked:
        if record.metric in DROPS:
            place = (keys[record.classifier], record.level, record.metric)
            if place in clean_resampled:
                resampled[place] = clean_resampled[place] - attacked_resampled[place]
            records[place] = _with_interval(
                record, DROPS[record.metric], before[place] - record.value, resampled.get(place), n_patients
            )
    return TransferDrop(records, resampled)


def average_drops(drops: Mapping[str, TransferDrop], *, n_patients: int) -> list[Record]:
    """The mean drop of one target under one attack over surrogates, by their names; the same patients are resampled.

    forwards and backwards are those of all surrogates together, since each had to be attacked.
    """
    records = []
    for place, first in next(iter(drops.values())).records.items():
        parts = {name: drop.records[place] for name, drop in drops.items()}
        gaps = [drop.resampled[place] for drop in drops.values() if place in drop.resampled]
        settings = {key: value for key, value in first.settings.items() if key not in _OF_ONE_SURROGATE}
        mean = dataclasses.replace(
            first,
            surrogate=OTHERS,
            flags=tuple(f"{name}: {flag}" for name, record in parts.items() for flag in record.flags),
            settings=settings | {"surrogates": list(parts)},
            forwards=sum(record.forwards for record in parts.values()),
            backwards=sum(record.backwards for record in parts.values()),
        )
        value = float(np.mean([record.value for record in parts.values()]))
        records.append(_with_interval(mean, first.metric, value, np.mean(gaps, axis=0) if gaps else None, n_patients))
    return records


def _with_interval(record: Record, metric: str, value: float, resampled: np.ndarray | None, n_patients: int) -> Record:
    settings = {key: entry for key, entry in record.settings.items() if key not in ("interval", "no_interval")}
    if resampled is None:
        interval = Interval(None, None, no_interval(n_patients, settings["bootstrap"]))
    else:
        interval = interval_around(value, resampled, people=n_patients, method="t", confidence=0.95, difference=True)
    if interval.reason:
        settings["no_interval"] = interval.reason
    return dataclasses.replace(
        record, metric=metric, value=value, low=interval.low, high=interval.high, settings=settings
    )


def check_pairs(encoders: Mapping[str, EncoderSource], pairs: Sequence[Pair] | None) -> tuple[Pair, ...]:
    """The pairs of surrogate and target: what was asked for, else all.

    Raises:
        TypeError: For encoders that are no mapping of callables, and pairs that are no pairs of names.
        ValueError: For names that are unknown, doubled or taken, naming them.
    """
    if not isinstance(encoders, Mapping) or not encoders:
        raise TypeError(f"encoders must be a mapping such as {{'a': encoder}}, got {type(encoders).__name__}")
    for name, encoder in encoders.items():
        if not isinstance(name, str) or not callable(encoder):
            raise TypeError(
                f"encoders must map names to encoders, or to functions that load one; got {name!r}: {encoder!r}"
            )
    if taken := {"", OTHERS} & encoders.keys():
        raise ValueError(f"an encoder cannot be called {taken.pop()!r}: records need that name for something else")
    if pairs is None:
        return tuple((surrogate, target) for surrogate in encoders for target in encoders)
    chosen = [tuple(pair) if not isinstance(pair, str) else () for pair in pairs]
    if not chosen or any(len(pair) != 2 for pair in chosen):
        raise TypeError(f"pairs must hold (surrogate, target) names, as in (('a', 'b'),); got {pairs!r}")
    if unknown := sorted({name for pair in chosen for name in pair} - encoders.keys()):
        raise ValueError(f"pairs name {unknown}, which are no encoders; there are {list(encoders)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"pairs hold a pair twice: {chosen}")
    return cast(tuple[Pair, ...], tuple(chosen))


def _check_banks(banks: Banks, targets: Sequence[str]) -> None:
    if isinstance(banks, EmbeddingTable):
        raise TypeError("one table cannot be the bank of every target; give a loader, or {name: table} by target")
    if isinstance(banks, Mapping):
        if missing := sorted(set(targets) - banks.keys()):
            raise ValueError(f"banks have no table for the targets {missing}; they have {list(banks)}")
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
