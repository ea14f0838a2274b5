"""What all evaluations do before and after the pass: bank, classifiers, the settings that decide numbers, records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hsat.classifiers import FittedKNN, concat_tables, fit_classifiers, predict_scores
from hsat.distributed import World
from hsat.embedding import Embedder, LoaderInfo, loader_info
from hsat.eval.options import PAPER, Provenance, RunOptions, Scoring, Target
from hsat.eval.records import ClassifierFacts, RecordTemplate, bank_flags
from hsat.eval.store import EmbeddingCache
from hsat.fingerprints import (
    fingerprint_attack,
    fingerprint_encoder,
    fingerprint_loader,
    fingerprint_table,
    numerics_of,
)
from hsat.types import Attack, Classifier, EmbeddingFunction, EmbeddingTable, FittedClassifier, HierarchicalBatch

Bank = Iterable[HierarchicalBatch] | EmbeddingTable | Sequence[EmbeddingTable]
Queries = Iterable[HierarchicalBatch]
ScoresKey = int | str


def embed_bank(
    encoder: EmbeddingFunction,
    bank: Bank,
    *,
    layer: str,
    run: RunOptions,
    provenance: Provenance,
    world: World,
    cache: EmbeddingCache | None,
) -> EmbeddingTable:
    """The table of a bank: given, in one piece or several, from the cache, or embedded by all ranks together.

    The cached table is used only if every rank finds it; otherwise rank 0 writes it.
    """
    if isinstance(bank, EmbeddingTable):
        return bank
    if isinstance(bank, Sequence) and any(isinstance(part, EmbeddingTable) for part in bank):
        return concat_tables(cast(Sequence[EmbeddingTable], bank))
    loader = cast(Iterable[HierarchicalBatch], bank)
    info = loader_info(loader, provenance.class_names)
    key = clean_key(encoder, loader, layer=layer, checkpoint=provenance.checkpoint)
    if cache is not None and key is not None:
        names = None if provenance.class_names is None else list(provenance.class_names)
        key |= {"classes": names, "model": provenance.model}
        table = cache.get_table(key)
        if all(world.gather(table is not None)) and table is not None:
            return table
    embedder = Embedder(encoder, layer=layer, device=run.device, name=provenance.model, progress=run.progress)
    table = embedder.run(loader, info, world)
    if cache is not None and key is not None and world.is_main:
        cache.put_table(key, table)
    return table


def clean_key(encoder: EmbeddingFunction, loader: object, *, layer: str, checkpoint: str) -> dict[str, Any] | None:
    """What decides the clean embeddings of a loader; None where encoder or loader cannot say."""
    of_encoder, of_loader = fingerprint_encoder(encoder, checkpoint), fingerprint_loader(loader, describe_loader)
    if of_encoder is None or of_loader is None:
        return None
    return {"encoder": of_encoder, "loader": of_loader, "layer": layer}


def describe_loader(loader: object) -> tuple[tuple[str, ...], str, str]:
    """Class names, cohort fingerprint and split of a loader."""
    info = loader_info(loader)
    return info.class_names, info.cohort, info.split


def loader_settings(loader: object) -> dict[str, Any]:
    """What is known of a loader's images as a whole, by name."""
    dataset = getattr(loader, "dataset", None)
    settings: dict[str, Any] = {"image_size": getattr(dataset, "image_size", None)}
    if getattr(dataset, "class_names", None) is not None:
        info = loader_info(loader)
        settings |= {"classes": list(info.class_names), "cohort": info.cohort, "split": info.split}
    try:
        settings["images"] = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        settings["images"] = None
    return settings


def query_info(queries: Queries, provenance: Provenance, class_names: Sequence[str]) -> LoaderInfo:
    """Facts of the queries; labels of a loader that knows no class names are indices of the classifier's classes."""
    names = provenance.class_names
    if names is None and getattr(getattr(queries, "dataset", None), "class_names", None) is None:
        names = class_names
    return loader_info(queries, names)


@dataclass(frozen=True, eq=False)
class ScoredClassifier:
    """A classifier that scores the queries.

    Attributes:
        settings: The classifier before it was fitted.
        fitted: The classifier.
        attacked: Whether attacks on the decision are against this one.
    """

    settings: Classifier
    fitted: FittedClassifier
    attacked: bool

    @property
    def key(self) -> ScoresKey:
        """Its key in results: k for a kNN, else its settings as text."""
        return self.fitted.k if isinstance(self.fitted, FittedKNN) else repr(self.settings)

    @property
    def name(self) -> str:
        """What flags call it."""
        return f"k={self.key}" if isinstance(self.key, int) else self.key

    def facts(self, queries: EmbeddingTable, *, seed: int) -> ClassifierFacts:
        """What records say of it; the quality of an approximate index is measured on these queries."""
        if not isinstance(self.fitted, FittedKNN):
            return ClassifierFacts(name=repr(self.settings), attacked=self.attacked)
        settings: dict[str, Any] = {
            "index": self.fitted.settings.index,
            **self.fitted.index_quality(queries, seed=seed),
        }
        return ClassifierFacts(
            name=repr(self.settings),
            k=self.fitted.k,
            temperature=self.fitted.settings.temperature,
            attacked=self.attacked,
            settings=settings,
        )


def fit_bank(classifier: Classifier | Sequence[Classifier], bank: EmbeddingTable) -> tuple[ScoredClassifier, ...]:
    """Fit one or several classifiers on a bank; the first is the one that is attacked.

    Raises:
        ValueError: For no classifier at all, and for two with the same key.
    """
    several = tuple(classifier) if isinstance(classifier, Sequence) else (classifier,)
    if not several:
        raise ValueError("no classifier is given; the default is hsat.KNNClassifier()")
    if wrong := [one for one in several if not isinstance(one, Classifier)]:
        raise TypeError(f"a classifier needs a method fit(bank), as KNNClassifier() has; got {wrong[0]!r}")
    scored = [
        ScoredClassifier(settings, fitted, attacked=number == 0)
        for number, (settings, fitted) in enumerate(zip(several, fit_classifiers(several, bank), strict=True))
    ]
    unique = {one.key: one for one in reversed(scored)}  # ks above the bank are cut to it, and may then be equal
    return tuple(one for one in scored if unique[one.key] is one)


def score_queries(classifiers: Sequence[ScoredClassifier], queries: EmbeddingTable) -> dict[ScoresKey, np.ndarray]:
    """Class scores (n, classes) of the queries by each classifier; kNNs of one bank share one search."""
    scores = predict_scores([one.fitted for one in classifiers], queries)
    return {one.key: rows for one, rows in zip(classifiers, scores, strict=True)}


def evaluation_settings(
    encoders: Mapping[str, tuple[EmbeddingFunction, str]],
    queries: Queries,
    attacks: Mapping[str, Attack],
    *,
    target: Target,
    scoring: Scoring,
    run: RunOptions,
) -> dict[str, Any]:
    """All that decides the results of a pass, by name, but for bank and classifier.

    Args:
        encoders: (encoder, checkpoint) by what they are called; "" is the one that is measured.
        queries: The loader of the queries.
        attacks: By name.
        target: What the attacks maximise.
        scoring: Only the layer decides; the rest is arithmetic on the results.
        run: Only the seed and the number of examples decide.
    """
    settings: dict[str, Any] = {"target": target.objective, "attack_branch": target.branch, "layer": scoring.layer}
    settings |= {"seed": run.seed, "keep_examples": run.keep_examples}
    settings |= {
        f"queries.{name}": value for name, value in (fingerprint_loader(queries, describe_loader) or {}).items()
    }
    settings |= {f"attack.{name}": fingerprint_attack(attack) for name, attack in attacks.items()}
    for name, (encoder, checkpoint) in encoders.items():
        place = f"encoder.{name}" if name else "encoder"
        for key, value in (fingerprint_encoder(encoder, checkpoint) or {}).items():
            settings[f"{place}.{key}"] = value
    return settings


def classifier_settings(classifiers: Sequence[ScoredClassifier], bank: EmbeddingTable) -> dict[str, Any]:
    """What of bank and classifiers decides the results of a pass: the one that is attacked."""
    return {"bank": fingerprint_table(bank), "classifier": repr(classifiers[0].settings)}


def record_template(
    bank: EmbeddingTable,
    queries: EmbeddingTable,
    class_names: Sequence[str],
    *,
    target: Target | str,
    scoring: Scoring,
    run: RunOptions,
    provenance: Provenance,
    encoder: object = None,
) -> RecordTemplate:
    """What all records of an evaluation of these queries by classifiers of this bank have in common."""
    goal = target if isinstance(target, Target) else None
    published = goal == PAPER.target and (scoring.pooling, scoring.absent_classes, scoring.group_by) == (
        PAPER.scoring.pooling,
        PAPER.scoring.absent_classes,
        PAPER.scoring.group_by,
    )
    settings: dict[str, Any] = {
        "layer": scoring.layer,
        "how": scoring.pooling,
        "absent": scoring.absent_classes,
        "keys": scoring.group_by,
        "compat": "paper" if published else "",
        "bootstrap": scoring.bootstrap,
        "bank_rows": len(bank),
        "bank_cohort": bank.cohort,
        "bank_split": bank.split,
    }
    if goal is not None and (branch := goal.branch_of(cast(EmbeddingFunction, encoder))):
        settings["attack_branch"] = branch
    if numerics := numerics_of(encoder):
        settings["computed"] = numerics
    return RecordTemplate(
        target=target if isinstance(target, str) else target.objective,
        scoring=scoring,
        seed=run.seed,
        model=provenance.model,
        checkpoint=provenance.checkpoint,
        cohort=queries.cohort,
        split=queries.split,
        class_names=tuple(class_names),
        flags=bank_flags(bank, queries),
        settings=settings,
    )
