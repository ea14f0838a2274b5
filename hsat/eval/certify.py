"""Certified robustness of a classifier's decision at patch, slide and patient level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hsat.attacks.threat import eps_text
from hsat.classifiers import KNNClassifier
from hsat.embedding import Layer, LoaderInfo, eval_mode, require_labels, select_layer, to_device
from hsat.eval.announcements import announce_bank, announce_votes
from hsat.eval.certificates import ABSTAIN, POOLINGS, Certificates, GroupPooling, group_radius, patch_radius
from hsat.eval.confidence import bootstrap_intervals
from hsat.eval.evaluation import Evaluation, Queries, ScoredClassifier, classifier_settings, fit_bank
from hsat.eval.flags import MeasuredData, bank_flags, stated_training
from hsat.eval.metrics import chance_levels
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.pooling import own_labels, unreported_levels
from hsat.eval.records import AttackFacts, Record, RecordTemplate
from hsat.eval.result_files import SavedResult
from hsat.eval.runner import run_batches
from hsat.eval.smoothing import Smoothing, Vote, classifier_vote, count_votes, gaussian_noise
from hsat.eval.store import StoredResult, open_session, open_world
from hsat.types import (
    LEVELS,
    Classifier,
    EmbeddingFunction,
    EmbeddingTable,
    FittedClassifier,
    HierarchicalBatch,
    align_labels,
)

RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """What `certify` computes from the votes under noise.

    Attributes:
        radii: L2 norms in units of the pixel range, for the records.
        pooling: How a slide or patient decides: "mean" of its patches' class probabilities, or "vote" of their smoothed
            decisions; see `group_radius`.
        noisy_bank: Embed the bank's images with one draw of the noise each.  Any fixed bank is allowed, and this one
            usually certifies more.

    Raises:
        ValueError: For radii below 0 or not finite, and an unknown pooling.
    """

    radii: Sequence[float] = RADII
    pooling: GroupPooling = "mean"
    noisy_bank: bool = False

    def __post_init__(self) -> None:
        radii = tuple(float(radius) for radius in self.radii)
        if not radii or not all(radius >= 0 and np.isfinite(radius) for radius in radii):
            raise ValueError(f"radii must be numbers of at least 0, in units of the pixel range; got {self.radii!r}")
        object.__setattr__(self, "radii", radii)
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r} of certificates; choose one of {list(POOLINGS)}")


@dataclass(frozen=True, eq=False, repr=False)
class CertificateResult(SavedResult):
    """The result of `certify`.

    Attributes:
        levels: `Certificates` by "patch", "slide" and "patient"; without a level at which groups have no own label.
        selected, counts: (n, classes) votes under noise of each patch, in the order of the queries; columns as in
            `class_names`.
        classifier: What voted.
        records: One per level and radius.
        smoothing: The noise.
        layer: The layer that the classifier reads.
    """

    levels: dict[str, Certificates]
    selected: np.ndarray
    counts: np.ndarray
    records: tuple[Record, ...]
    classifier: FittedClassifier
    smoothing: Smoothing
    layer: Layer

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the classifier."""
        return self.classifier.class_names


def certify(
    encoder: EmbeddingFunction,
    bank: Iterable[HierarchicalBatch] | EmbeddingTable,
    queries: Iterable[HierarchicalBatch],
    smoothing: Smoothing,
    *,
    options: CertifyOptions = CertifyOptions(),
    classifier: Classifier = KNNClassifier(),
    scoring: Scoring = Scoring(),
    run: RunOptions = RunOptions(),
    provenance: Provenance = Provenance(),
) -> CertificateResult:
    """Certify the smoothed decision of a classifier (Cohen et al., arXiv:1902.02918).

    Each image costs selection + samples passes.  The noise of a draw depends on (seed, patch id, draw) only.

    Records: metric "certified_accuracy", the share of rows whose decision is right and cannot be changed within the
    radius (a lower bound of the accuracy under any attack of that norm); intervals from resampled patients.  A
    certificate is wrong with probability at most alpha, for each row of a level by itself.

    Args:
        encoder, bank, queries, classifier, run, provenance: As for `evaluate_whitebox`; noise, diagnosis and examples
            do not apply.
        smoothing: The noise and the numbers of draws.
        options: Radii, pooling, bank.
        scoring: Only layer and bootstrap apply.

    Returns:
        Certificates of each level, votes and records.

    Raises:
        ValueError: For bad settings, repeated patch ids, a noisy bank that is a table, a bank of one class, and as
            `embed` does.
    """
    if options.noisy_bank and isinstance(bank, EmbeddingTable):
        raise ValueError("noisy_bank=True needs the bank's images, and a table has none; give its loader")
    evaluation = Evaluation(encoder, Target(), scoring, run, provenance).checked(queries)
    with open_world(run) as (world, cache):
        images = NoisyLoader(cast(Queries, bank), smoothing) if options.noisy_bank else bank
        table = evaluation.embed_bank(images, world, cache, announce=partial(announce_bank, evaluation, world.size))
        _check_classes(table)
        classifiers = fit_bank(classifier, table)
        fitted = classifiers[0].fitted
        settings = evaluation.settings(queries, {}) | {"smoothing": repr(smoothing)}
        session = open_session(run, settings | classifier_settings(classifiers, table), world, cache)
        info = evaluation.query_info(queries, fitted.class_names)
        vote = classifier_vote(select_layer(encoder, scoring.layer), fitted)

        if session.shows:
            announce_votes(evaluation, vote, queries, smoothing, bank=table, session=session)

        def compute(_: int, batch: HierarchicalBatch) -> StoredResult:
            label = align_labels(require_labels(batch), info.class_names, fitted.class_names)
            images = to_device(batch.images, evaluation.device)
            return StoredResult({}, _vote_batch(batch, images, label, vote, smoothing, classes=len(fitted.class_names)))

        with eval_mode(encoder):
            results = run_batches(queries, compute, session, description="certifying")
    if not results:
        raise ValueError(f"the queries gave no batches (split {info.split!r}): nothing to certify")
    votes = {name: np.concatenate([result.arrays[name] for result in results]) for name in results[0].arrays}
    if len(np.unique(votes["patch"])) < len(votes["patch"]):
        raise ValueError("the queries repeat patch ids; noise is drawn by id, so that each patch must come once")
    seen = _ids_table(votes, info, fitted.class_names)
    levels = _levels(votes, seen, smoothing, options.pooling)
    template = _template(evaluation, table, seen, smoothing=smoothing, options=options, loader=queries)
    records = _certificate_records(template, levels, classifiers[0], queries=seen, smoothing=smoothing, options=options)
    return CertificateResult(
        levels, votes["selected"], votes["counts"], tuple(records), fitted, smoothing, scoring.layer
    )


def _check_classes(bank: EmbeddingTable) -> None:
    """Raise ValueError for a bank of one class."""
    classes = np.unique(bank.label)
    if len(classes) == 1:
        raise ValueError(
            f"the bank holds one class only, {bank.class_names[int(classes[0])]!r} of {bank.class_names}: there is no"
            " decision to certify; give a bank with images of at least two classes"
        )


def _ids_table(votes: Mapping[str, np.ndarray], info: LoaderInfo, class_names: tuple[str, ...]) -> EmbeddingTable:
    """Ids and labels of the patches, and what slides and patients are, without embeddings."""
    ids: dict[str, Any] = {name: votes[name] for name in ("label", *LEVELS)}
    for level in LEVELS[1:]:
        if (stated := getattr(info, f"{level}_label")) is not None:
            place = {i: class_names.index(name) for i, name in enumerate(info.class_names) if name in class_names}
            ids[f"{level}_label"] = np.array([place.get(stated.get(group, -1), -1) for group in votes[level].tolist()])
    no_rows = np.zeros((len(votes["label"]), 1), dtype=np.float32)
    return EmbeddingTable(no_rows, **ids, class_names=class_names, cohort=info.cohort, split=info.split)


class NoisyLoader:
    """A loader whose images carry one draw of the noise each: draw -1, which no query uses."""

    def __init__(self, loader: Iterable[HierarchicalBatch], smoothing: Smoothing) -> None:
        self._loader, self._smoothing = loader, smoothing
        self.dataset = getattr(loader, "dataset", None)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        sigma, seed = self._smoothing.sigma, self._smoothing.seed
        for batch in self._loader:
            shape = tuple(batch.images.shape[1:])
            noise = [
                gaussian_noise(shape, patch, range(-1, 0), sigma=sigma, seed=seed) for patch in batch.patch.tolist()
            ]
            yield batch.replace(images=batch.images + torch.cat(noise).to(batch.images))


def _vote_batch(
    batch: HierarchicalBatch, images: Tensor, label: np.ndarray, vote: Vote, smoothing: Smoothing, *, classes: int
) -> dict[str, np.ndarray]:
    """Votes under noise and ids of one batch, whose images are on the device already."""
    last = smoothing.selection + smoothing.samples
    arrays = {"label": label, **{level: getattr(batch, level).cpu().numpy() for level in LEVELS}}
    draws = {"selected": range(smoothing.selection), "counts": range(smoothing.selection, last)}
    for name, part in draws.items():
        arrays[name] = count_votes(
            vote,
            images,
            batch.patch,
            classes=classes,
            draws=part,
            sigma=smoothing.sigma,
            seed=smoothing.seed,
            chunk=smoothing.chunk,
        )
    return arrays


def _levels(
    votes: Mapping[str, np.ndarray], seen: EmbeddingTable, smoothing: Smoothing, pooling: GroupPooling
) -> dict[str, Certificates]:
    """Certificates at each level at which every group has a label of its own."""
    label, patient, sigma, alpha = votes["label"], votes["patient"], smoothing.sigma, smoothing.alpha
    selected, counts = votes["selected"], votes["counts"]
    prediction, radius = patch_radius(selected, counts, sigma=sigma, alpha=alpha)
    levels = {"patch": Certificates(votes["patch"], prediction, radius, label, patient)}
    for level in LEVELS[1:]:
        own, _ = own_labels(seen, level)
        if own is None:
            continue
        groups, first, member_of = np.unique(votes[level], return_index=True, return_inverse=True)
        certificates = [
            group_radius(selected[rows], counts[rows], sigma=sigma, alpha=alpha, pooling=pooling)
            for rows in (np.flatnonzero(member_of == group) for group in range(len(groups)))
        ]
        answer, reach = (np.array(column) for column in zip(*certificates, strict=True))
        levels[level] = Certificates(groups, answer, reach, own[first], patient[first])
    return levels


def _template(
    evaluation: Evaluation,
    bank: EmbeddingTable,
    queries: EmbeddingTable,
    *,
    smoothing: Smoothing,
    options: CertifyOptions,
    loader: object,
) -> RecordTemplate:
    scoring, provenance = evaluation.scoring, evaluation.provenance
    measured = MeasuredData.of(loader, evaluation.encoder)
    known = {} if measured.image_size is None else {"image_size": measured.image_size}
    return RecordTemplate(
        target="any",
        scoring=scoring,
        seed=smoothing.seed,
        model=provenance.model,
        checkpoint=provenance.checkpoint,
        cohort=queries.cohort,
        split=queries.split,
        class_names=queries.class_names,
        flags=(*bank_flags(bank, queries), *measured.flags(stated_training(evaluation.encoder, provenance))),
        settings={
            "layer": scoring.layer,
            "how": options.pooling,
            "sigma": smoothing.sigma,
            "alpha": smoothing.alpha,
            "noisy_bank": options.noisy_bank,
            "bank_rows": len(bank),
            "bootstrap": scoring.bootstrap,
        }
        | known,
    )


def _certificate_records(
    template: RecordTemplate,
    levels: Mapping[str, Certificates],
    classifier: ScoredClassifier,
    *,
    queries: EmbeddingTable,
    smoothing: Smoothing,
    options: CertifyOptions,
) -> Iterator[Record]:
    facts_of_classifier = classifier.facts(queries, seed=template.seed)
    unreported = unreported_levels(queries)
    for level, certificates in levels.items():
        extra = {"abstained": float((certificates.prediction == ABSTAIN).mean())}
        chance = chance_levels(certificates.label)["accuracy"]  # a constant decision holds at every radius
        for radius in options.radii:
            holds = certificates.holds(radius)
            interval = bootstrap_intervals(
                np.stack((holds, ~holds), 1),
                np.zeros(len(holds), dtype=np.int64),
                certificates.patient,
                generator=np.random.default_rng(smoothing.seed),
                names=("accuracy",),
                resamples=template.scoring.bootstrap,
            )["accuracy"]
            facts = AttackFacts(
                name=f"certified-{eps_text(radius)}",
                text=f"certificate: {smoothing!r}",
                radius=float(radius),
                flags=classifier.flags,
                forwards=float(smoothing.selection + smoothing.samples),
            )
            yield template.build(
                facts,
                facts_of_classifier,
                level=level,
                metric="certified_accuracy",
                value=float(holds.mean()),
                n=len(holds),
                interval=interval,
                chance=chance,
                extra=extra,
                flags=unreported if level == "patch" else (),
            )
