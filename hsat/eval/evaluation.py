"""What all evaluations do before and after the pass: bank, classifiers, the settings that decide numbers, records."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hsat.classifiers import (
    FittedKNN,
    FittedLinearProbe,
    KNNClassifier,
    concat_tables,
    fit_classifiers,
    predict_scores,
)
from hsat.distributed import World
from hsat.embedding import Embedder, Layer, LoaderInfo, eval_mode, loader_info, resolve_device, select_layer
from hsat.eval.flags import MeasuredData, bank_flags, stated_training
from hsat.eval.options import PAPER, Provenance, RunOptions, Scoring, Target
from hsat.eval.records import ClassifierFacts, RecordTemplate
from hsat.eval.store import EmbeddingCache
from hsat.fingerprints import (
    fingerprint_attack,
    fingerprint_classifier,
    fingerprint_encoder,
    fingerprint_loader,
    fingerprint_table,
    normalisation_of,
    numerics_of,
)
from hsat.types import Attack, Classifier, EmbeddingFunction, EmbeddingTable, FittedClassifier, HierarchicalBatch

Bank = Iterable[HierarchicalBatch] | EmbeddingTable | Sequence[EmbeddingTable]
Queries = Iterable[HierarchicalBatch]
ScoresKey = int | str
LOGITS = "logits"
NOT_CONVERGED = "the fit of the linear probe did not converge: raise max_iter, or give a smaller C"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An encoder, and the options under which it is measured.

    Attributes:
        encoder: The encoder; images -> embeddings.
        target: What the attacks maximise.
        scoring: How embeddings become numbers.
        run: Seed, device, folders.
        provenance: What records say of the encoder.
        flags: Reasons to distrust all its records.
    """

    encoder: EmbeddingFunction
    target: Target
    scoring: Scoring
    run: RunOptions
    provenance: Provenance
    flags: tuple[str, ...] = ()

    @property
    def layer(self) -> Layer:
        """The layer that the classifier reads."""
        return self.scoring.layer

    @property
    def device(self) -> torch.device:
        """Where images go."""
        return resolve_device(self.encoder, self.run.device)

    def checked(self, *loaders: object) -> Evaluation:
        """The evaluation, with a flag for all its records where the encoder is a function whose embeddings vary.

        Modules are put into evaluation mode by every evaluation; what a function calls is out of its reach.  So a few
        images are embedded twice, and some of them by themselves, before anything else is done.

        Args:
            loaders: Of the queries, and of the bank.

        Returns:
            The evaluation; a warning says what is wrong with the encoder.
        """
        if isinstance(self.encoder, nn.Module):
            return self
        from hsat.eval.batch_dependence import find_instability

        reason = find_instability(select_layer(self.encoder, self.layer), loaders, self.device)
        if not reason:
            return self
        warnings.warn(f"{self.provenance.model or 'the encoder'}: {reason}", stacklevel=3)
        return dataclasses.replace(self, flags=(*self.flags, reason))

    def embedder(self, name: str) -> Embedder:
        """What embeds loaders with the scored layer; `name` is what tables call the encoder."""
        run = self.run
        return Embedder(self.encoder, layer=self.layer, device=run.device, name=name, progress=run.progress)

    def embed_bank(
        self,
        bank: Bank,
        world: World,
        cache: EmbeddingCache | None,
        *,
        announce: Callable[[Iterable[HierarchicalBatch]], None] | None = None,
    ) -> EmbeddingTable:
        """The table of a bank: given, in one piece or several, or embedded by `embed_clean`."""
        if isinstance(bank, EmbeddingTable):
            return bank
        if isinstance(bank, Sequence) and any(isinstance(bank[number], EmbeddingTable) for number in range(len(bank))):
            return concat_tables(cast(Sequence[EmbeddingTable], bank))
        loader = cast(Iterable[HierarchicalBatch], bank)
        info = loader_info(loader, self.provenance.class_names)
        return self.embed_clean(loader, info, world, cache, announce=announce)

    def embed_clean(
        self,
        loader: Iterable[HierarchicalBatch],
        info: LoaderInfo,
        world: World,
        cache: EmbeddingCache | None,
        *,
        announce: Callable[[Iterable[HierarchicalBatch]], None] | None = None,
    ) -> EmbeddingTable:
        """The table of a loader's images, from the cache or embedded by all ranks together.

        The cached table is used only if every rank finds it; otherwise rank 0 writes it.

        announce: Where progress is shown, is called on rank 0 with the loader before it is embedded.
        """
        key = None if cache is None else self.clean_key(loader)
        if cache is not None and key is not None:
            key |= {"classes": list(info.class_names), "model": self.provenance.model}
            table = cache.get_table(key)
            if all(world.gather(table is not None)) and table is not None:
                return table
        if announce is not None and self.run.progress and world.is_main:
            announce(loader)
        table = self.embedder(self.provenance.model).run(loader, info, world)
        if cache is not None and key is not None and world.is_main:
            cache.put_table(key, table)
        return table

    def clean_key(self, loader: object) -> dict[str, Any] | None:
        """What decides the clean embeddings of a loader; None where encoder or loader cannot say."""
        of_encoder = fingerprint_encoder(self.encoder, self.provenance.checkpoint)
        of_loader = fingerprint_loader(loader, describe_loader)
        if of_encoder is None or of_loader is None:
            return None
        return {"encoder": of_encoder, "loader": of_loader, "layer": self.layer}

    def query_info(self, queries: Queries, class_names: Sequence[str]) -> LoaderInfo:
        """Facts of the queries; labels of a loader that knows no class names are indices of the classifier's."""
        names = self.provenance.class_names
        if names is None and getattr(getattr(queries, "dataset", None), "class_names", None) is None:
            names = class_names
        return loader_info(queries, names)

    def settings(self, queries: Queries, attacks: Mapping[str, Attack]) -> dict[str, Any]:
        """All that decides the results of a pass, by name, but for bank and classifier."""
        own = encoder_settings("encoder", self.encoder, self.provenance)
        return self.pass_settings(queries, attacks) | own

    def pass_settings(self, queries: Queries, attacks: Mapping[str, Attack]) -> dict[str, Any]:
        """The same without the encoder.

        Of the scoring only the layer decides, of the run only the seed and the number of examples: the rest is
        arithmetic on the results.
        """
        target, run = self.target, self.run
        settings: dict[str, Any] = {"target": target.objective, "attack_branch": target.branch, "layer": self.layer}
        settings |= {"seed": run.seed, "examples_of_classes": run.keep_examples}
        about_queries = fingerprint_loader(queries, describe_loader) or {}
        settings |= {f"queries.{name}": value for name, value in about_queries.items()}
        return settings | {f"attack.{name}": fingerprint_attack(attack) for name, attack in attacks.items()}

    def template(
        self,
        bank: EmbeddingTable | None,
        queries: EmbeddingTable | LoaderInfo,
        class_names: Sequence[str],
        *,
        loader: object,
        target: str | None = None,
    ) -> RecordTemplate:
        """What all records of these queries have in common.

        Args:
            bank: What the classifiers were fitted on; None for classifiers without one.
            queries: Their table (of logits, where there is no bank), or the facts of their loader where slides are
                scored.
            class_names: Columns of the scores.
            loader: Of the queries; its dataset may say what they are.
            target: What the attacks maximise, where that is something else than the target.
        """
        scoring, flags = self.scoring, tuple[str, ...]()
        measured = MeasuredData.of(loader, self.encoder)
        settings = arithmetic_settings(scoring) | {"layer": self.layer, "bootstrap": scoring.bootstrap}
        if measured.image_size is not None:
            settings["image_size"] = measured.image_size
        settings["pixel_normalisation"] = normalisation_of(self.encoder)
        if bank is not None and isinstance(queries, EmbeddingTable):
            settings |= {"bank_rows": len(bank), "bank_cohort": bank.cohort, "bank_split": bank.split}
            flags = bank_flags(bank, queries)
        elif isinstance(queries, EmbeddingTable):
            settings["layer"] = LOGITS
        if target is None and (branch := self.target.branch_of(self.encoder)):
            settings["attack_branch"] = branch
        if numerics := numerics_of(self.encoder):
            settings["computed"] = numerics
        return RecordTemplate(
            target=self.target.objective if target is None else target,
            scoring=scoring,
            seed=self.run.seed,
            model=self.provenance.model,
            checkpoint=self.provenance.checkpoint,
            cohort=queries.cohort,
            split=queries.split,
            class_names=tuple(class_names),
            flags=(*self.flags, *flags, *measured.flags(stated_training(self.encoder, self.provenance))),
            settings=settings,
        )


def encoder_settings(place: str, encoder: EmbeddingFunction, provenance: Provenance) -> dict[str, Any]:
    """What decides an encoder's values, and how its labels are read; each name begins with `place`."""
    names = provenance.class_names
    about_encoder = (fingerprint_encoder(encoder, provenance.checkpoint) or {}) | {
        "classes": None if names is None else list(names)
    }
    return {f"{place}.{key}": value for key, value in about_encoder.items()}


def arithmetic_settings(scoring: Scoring) -> dict[str, Any]:
    """What records say of the arithmetic; "compat" is "paper" where it is the published one."""
    published = dataclasses.replace(PAPER.scoring, layer=scoring.layer, bootstrap=scoring.bootstrap) == scoring
    return {
        "how": scoring.pooling,
        "absent": scoring.absent_classes,
        "keys": scoring.group_by,
        "compat": "paper" if published else "",
    }


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

    @cached_property
    def key(self) -> ScoresKey:
        """Its key in results: k for a kNN, else its settings as text."""
        return self.fitted.k if isinstance(self.fitted, FittedKNN) else self.text

    @property
    def as_fitted(self) -> Classifier:
        """The settings that came into effect: those of a kNN with the k in use."""
        if isinstance(self.settings, KNNClassifier) and isinstance(self.fitted, FittedKNN):
            return dataclasses.replace(self.settings, k=self.fitted.k)
        return self.settings

    @property
    def flags(self) -> tuple[str, ...]:
        """Reasons to distrust all its numbers."""
        doubtful = isinstance(self.fitted, FittedLinearProbe) and not self.fitted.converged
        return (NOT_CONVERGED,) if doubtful else ()

    @cached_property
    def text(self) -> str:
        """Its settings, as records state them."""
        return repr(self.settings)

    @property
    def name(self) -> str:
        """What flags call it."""
        return f"k={self.key}" if isinstance(self.key, int) else self.key

    def facts(self, queries: EmbeddingTable, *, seed: int) -> ClassifierFacts:
        """What records say of it; the quality of an approximate index is measured on these queries."""
        if isinstance(self.fitted, FittedLinearProbe):
            fit = {"iterations": self.fitted.iterations, "converged": self.fitted.converged}
            return ClassifierFacts(name=self.text, attacked=self.attacked, settings=fit)
        if not isinstance(self.fitted, FittedKNN):
            return ClassifierFacts(name=self.text, attacked=self.attacked)
        settings: dict[str, Any] = {
            "index": self.fitted.settings.index,
            **self.fitted.index_quality(queries, seed=seed),
        }
        return ClassifierFacts(
            name=self.text,
            k=self.fitted.k,
            temperature=self.fitted.settings.temperature,
            attacked=self.attacked,
            settings=settings,
        )


def fit_bank(classifier: Classifier | Sequence[Classifier], bank: EmbeddingTable) -> tuple[ScoredClassifier, ...]:
    """Fit one or several classifiers on a bank; the first is the one that is attacked.

    A classifier that is given twice, or is another after its k was cut to the bank, comes once.

    Raises:
        ValueError: For no classifier at all, and for two that differ but have the same key.
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
    unique: dict[ScoresKey, ScoredClassifier] = {}
    for one in scored:
        first = unique.setdefault(one.key, one)
        if first.as_fitted != one.as_fitted:
            raise ValueError(
                f"results name classifiers by k, or by their text, and two would have the key {one.key!r}: {first.text}"
                f" and {one.text}; evaluate them in two calls"
            )
    return tuple(unique.values())


def score_queries(classifiers: Sequence[ScoredClassifier], queries: EmbeddingTable) -> dict[ScoresKey, np.ndarray]:
    """Class scores (n, classes) of the queries by each classifier; kNNs of one bank share one search."""
    with ExitStack() as stack:
        for module in (one.fitted for one in classifiers if isinstance(one.fitted, nn.Module)):
            stack.enter_context(eval_mode(module))  # a head may be in training mode
        scores = predict_scores([one.fitted for one in classifiers], queries)
    return {one.key: rows for one, rows in zip(classifiers, scores, strict=True)}


def classifier_settings(classifiers: Sequence[ScoredClassifier], bank: EmbeddingTable) -> dict[str, Any]:
    """What of bank and classifiers decides the results of a pass: the one that is attacked."""
    return {"bank": fingerprint_table(bank), "classifier": fingerprint_classifier(classifiers[0].settings)}
