"""Certified robustness of a classifier's decision at patch, slide and patient level, and attacks that check it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import L2, PGD, feature_drift, margin
from hsat.attacks.threat import eps_text
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.embedding import Layer, eval_mode, require_labels, resolve_device, select_layer, to_device
from hsat.eval.certificates import ABSTAIN, POOLINGS, Certificates, GroupPooling, group_radius, patch_radius
from hsat.eval.evaluation import (
    Queries,
    ScoredClassifier,
    classifier_settings,
    embed_bank,
    evaluation_settings,
    fit_bank,
    query_info,
)
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.records import AttackFacts, Record, RecordTemplate, bank_flags
from hsat.eval.runner import open_session, open_world, run_batches
from hsat.eval.smoothing import Smoothing, Vote, classifier_vote, count_votes, gaussian_noise
from hsat.eval.statistics.binomial import binomial_tail
from hsat.eval.statistics.bootstrap import bootstrap_intervals
from hsat.eval.store import StoredResult
from hsat.types import (
    LEVELS,
    Attack,
    Classifier,
    EmbeddingFunction,
    EmbeddingTable,
    FittedClassifier,
    HierarchicalBatch,
    Objective,
    align_labels,
)

RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
_FIRST_DRAW = 10**9  # draws of a check are far from those that made the certificate


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
    noisy_bank: bool = True

    def __post_init__(self) -> None:
        radii = tuple(float(radius) for radius in self.radii)
        if not radii or not all(radius >= 0 and np.isfinite(radius) for radius in radii):
            raise ValueError(f"radii must be numbers of at least 0, in units of the pixel range; got {self.radii!r}")
        object.__setattr__(self, "radii", radii)
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r} of certificates; choose one of {list(POOLINGS)}")


@dataclass(frozen=True, eq=False)
class CertificateResult:
    """The result of `certify`.

    Attributes:
        levels: `Certificates` by "patch", "slide" and "patient".
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

    Raises:
        ValueError: For bad settings, repeated patch ids, a noisy bank that is a table, a bank of one class, and as
            `embed` does.
    """
    if options.noisy_bank and isinstance(bank, EmbeddingTable):
        raise ValueError("noisy_bank=True needs the bank's images, and a table has none; give its loader")
    with open_world(run) as (world, cache):
        images = NoisyLoader(cast(Queries, bank), smoothing) if options.noisy_bank else bank
        table = embed_bank(
            encoder, images, layer=scoring.layer, run=run, provenance=provenance, world=world, cache=cache
        )
        if len(np.unique(table.label)) == 1:
            only = table.class_names[int(table.label[0])]
            raise ValueError(
                f"the bank holds one class only, {only!r} of {table.class_names}: there is no decision to certify;"
                " give a bank with images of at least two classes"
            )
        classifiers = fit_bank(classifier, table)
        fitted = classifiers[0].fitted
        named = {"": (encoder, provenance.checkpoint)}
        settings = evaluation_settings(named, queries, {}, target=Target(), scoring=scoring, run=run)
        settings |= {"smoothing": repr(smoothing)} | classifier_settings(classifiers, table)
        session = open_session(run, settings, world, cache)
        info = query_info(queries, provenance, fitted.class_names)
        device, vote = (
            resolve_device(encoder, run.device),
            classifier_vote(select_layer(encoder, scoring.layer), fitted),
        )

        def compute(number: int, batch: HierarchicalBatch) -> StoredResult:
            label = align_labels(require_labels(batch), info.class_names, fitted.class_names)
            return StoredResult(
                {}, _vote_batch(batch, label, vote, smoothing, classes=len(fitted.class_names), device=device)
            )

        with eval_mode(encoder):
            results = run_batches(queries, compute, session, description="certifying")
    if not results:
        raise ValueError(f"the queries gave no batches (split {info.split!r}): nothing to certify")
    votes = {name: np.concatenate([result.arrays[name] for result in results]) for name in results[0].arrays}
    if len(np.unique(votes["patch"])) < len(votes["patch"]):
        raise ValueError("the queries repeat patch ids; noise is drawn by id, so that each patch must come once")
    levels = _levels(votes, smoothing, options.pooling)
    ids: dict[str, Any] = {name: votes[name] for name in ("label", *LEVELS)}
    no_rows = np.zeros((len(votes["label"]), 1), dtype=np.float32)
    seen = EmbeddingTable(no_rows, **ids, class_names=fitted.class_names, cohort=info.cohort, split=info.split)
    template = _template(table, seen, smoothing=smoothing, options=options, scoring=scoring, provenance=provenance)
    records = _certificate_records(template, levels, classifiers[0], queries=seen, smoothing=smoothing, options=options)
    return CertificateResult(
        levels, votes["selected"], votes["counts"], tuple(records), fitted, smoothing, scoring.layer
    )


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
    batch: HierarchicalBatch,
    label: np.ndarray,
    vote: Vote,
    smoothing: Smoothing,
    *,
    classes: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Votes under noise and ids of one batch."""
    last = smoothing.selection + smoothing.samples
    images = to_device(batch.images, device)
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


def _levels(votes: Mapping[str, np.ndarray], smoothing: Smoothing, pooling: GroupPooling) -> dict[str, Certificates]:
    label, patient, sigma, alpha = votes["label"], votes["patient"], smoothing.sigma, smoothing.alpha
    selected, counts = votes["selected"], votes["counts"]
    prediction, radius = patch_radius(selected, counts, sigma=sigma, alpha=alpha)
    levels = {"patch": Certificates(votes["patch"], prediction, radius, label, patient)}
    for level in LEVELS[1:]:
        groups, first, member_of = np.unique(votes[level], return_index=True, return_inverse=True)
        if len(wrong := np.flatnonzero(label != label[first][member_of])):
            raise ValueError(f"{level} {groups[member_of[wrong[0]]]} holds patches with different labels; it has one")
        certificates = [
            group_radius(selected[rows], counts[rows], sigma=sigma, alpha=alpha, pooling=pooling)
            for rows in (np.flatnonzero(member_of == group) for group in range(len(groups)))
        ]
        answer, reach = (np.array(column) for column in zip(*certificates, strict=True))
        levels[level] = Certificates(groups, answer, reach, label[first], patient[first])
    return levels


def _template(
    bank: EmbeddingTable,
    queries: EmbeddingTable,
    *,
    smoothing: Smoothing,
    options: CertifyOptions,
    scoring: Scoring,
    provenance: Provenance,
) -> RecordTemplate:
    return RecordTemplate(
        target="any",
        scoring=scoring,
        seed=smoothing.seed,
        model=provenance.model,
        checkpoint=provenance.checkpoint,
        cohort=queries.cohort,
        split=queries.split,
        class_names=queries.class_names,
        flags=bank_flags(bank, queries),
        settings={
            "layer": scoring.layer,
            "how": options.pooling,
            "sigma": smoothing.sigma,
            "alpha": smoothing.alpha,
            "noisy_bank": options.noisy_bank,
            "bank_rows": len(bank),
            "bootstrap": scoring.bootstrap,
        },
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
    for level, certificates in levels.items():
        extra = {"abstained": float((certificates.prediction == ABSTAIN).mean())}
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
                extra=extra,
            )


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """How `check_certificates` attacks and tests.

    Attributes:
        share: Share of the certified radius within which the attack stays.
        inflate: Multiplies the radii first; 3 claims three times too much, which the test should find out.
        steps: Steps of PGD, where no attack is given.
        copies: Noisy copies per step, over which the objective is averaged (EOT).
        samples: Fresh draws that test each attacked image.
        alpha: Level of the one-sided binomial test of each image.
        limit: Attack this many certified patches at most, in the order of the queries.
    """

    share: float = 0.99
    inflate: float = 1.0
    steps: int = 20
    copies: int = 8
    samples: int = 1000
    alpha: float = 0.001
    limit: int | None = None


@dataclass(frozen=True)
class CertificateCheck:
    """What came of attacking certified patches inside their radius.

    Attributes:
        tested: Certified patches that were attacked.
        changed: Those whose decision was shown to have changed, each by a one-sided binomial test on fresh draws.
        alpha: Level of that test.
        p_value: Probability of so many among valid certificates, each of which may fail with probability at most (alpha
            of the certificate + alpha of the test).  A small one says that the certificates are wrong.
    """

    tested: int
    changed: int
    alpha: float
    p_value: float

    @property
    def violated(self) -> bool:
        """The certificates fail more often than they admit (p below 0.001)."""
        return self.p_value < 0.001


class SmoothedModel(nn.Module):
    """Logits averaged over fresh noisy copies of each image: what an attack on a smoothed decision climbs (EOT).

    Args:
        model: Images -> logits.
        sigma: Standard deviation of the noise.
        copies: Noisy copies per call.
        generator: Source of the noise.
    """

    def __init__(self, model: DecisionModel, *, sigma: float, copies: int, generator: torch.Generator) -> None:
        super().__init__()
        self.model, self.sigma, self.copies, self.generator = model, sigma, copies, generator

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> mean logits (n, classes)."""
        return self._mean(images, self.model)

    def scores(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> mean class scores (n, classes)."""
        return self._mean(images, self.model.scores)

    def layers(self) -> dict[str, EmbeddingFunction]:
        """The layers of the model, each averaged over noisy copies."""
        return {
            name: lambda images, layer=layer: self._mean(images, layer)  # type: ignore[misc]
            for name, layer in self.model.layers().items()
        }

    def _mean(self, images: Tensor, function: EmbeddingFunction) -> Tensor:
        noise = torch.randn((self.copies, *images.shape), generator=self.generator).to(images) * self.sigma
        values = function((images + noise).flatten(0, 1))
        mean: Tensor = values.reshape(self.copies, len(images), -1).mean(0)
        return mean


def check_certificates(
    encoder: EmbeddingFunction,
    certified: CertificateResult,
    queries: Iterable[HierarchicalBatch],
    *,
    options: CheckOptions = CheckOptions(),
    target: Target | str = "decision",
    attack: Attack | None = None,
    run: RunOptions = RunOptions(),
) -> CertificateCheck:
    """Attack patches inside their certified radius, and test whether the smoothed decisions change.

    The attack maximises an expectation over noise: the margin against the certified class, or the drift of a layer.
    Then `samples` fresh draws at the attacked image say whether the class still has its majority: a change is counted
    where fewer than half of them would be that rare below `alpha`.  A certificate that holds keeps p >= 1/2 there.

    Args:
        encoder: The encoder that was certified.
        certified: The result of `certify`.
        queries: The loader that was certified.
        options: How to attack and to test.
        target: What the attack maximises.
        attack: An attack or ensemble whose threat model is L2; its eps is replaced by each image's radius.  None is
            PGD.
        run: Device and progress.

    Raises:
        ValueError: If no patch is certified, and for queries other than the certified ones.
    """
    target, answer = Target.of(target), certified.levels["patch"]
    reach = answer.radius * options.share * options.inflate
    radius_of = dict(zip(answer.groups.tolist(), reach.tolist(), strict=True))
    class_of = dict(zip(answer.groups.tolist(), answer.prediction.tolist(), strict=True))
    layer, device = select_layer(encoder, certified.layer), resolve_device(encoder, run.device)
    vote, tested, changed = classifier_vote(layer, certified.classifier), 0, 0
    generator = torch.Generator().manual_seed(certified.smoothing.seed)
    model = DecisionModel(encoder, certified.classifier.to(device), layer=certified.layer)
    smoothed = SmoothedModel(model, sigma=certified.smoothing.sigma, copies=options.copies, generator=generator)
    with eval_mode(encoder):
        for batch in queries:
            if unknown := [patch for patch in batch.patch.tolist() if patch not in class_of]:
                raise ValueError(f"patch {unknown[0]} was not certified; give the queries that certify was given")
            rows = [row for row, patch in enumerate(batch.patch.tolist()) if class_of[patch] != ABSTAIN]
            rows = rows if options.limit is None else rows[: max(0, options.limit - tested)]
            if not rows:
                continue
            patch, images = batch.patch[rows], to_device(batch.images[rows], device)
            label = torch.tensor([class_of[one] for one in patch.tolist()], device=device)
            eps = torch.tensor([radius_of[one] for one in patch.tolist()], dtype=torch.float64)
            x_adv = _attack_inside(
                smoothed, images, target=target, attack=attack, label=label, eps=eps, patch=patch, options=options
            )
            counts = count_votes(
                vote,
                x_adv,
                patch,
                classes=len(certified.class_names),
                draws=range(_FIRST_DRAW, _FIRST_DRAW + options.samples),
                sigma=certified.smoothing.sigma,
                seed=certified.smoothing.seed,
                chunk=certified.smoothing.chunk,
            )
            own = counts[np.arange(len(rows)), label.cpu().numpy()]
            fails = options.samples - own
            changed += sum(binomial_tail(int(count), options.samples, 0.5) < options.alpha for count in fails)
            tested += len(rows)
            if tested == options.limit:
                break
    if not tested:
        raise ValueError("no patch is certified, so there is nothing to check; try more samples or another sigma")
    admitted = min(1.0, certified.smoothing.alpha + options.alpha)
    return CertificateCheck(tested, changed, options.alpha, binomial_tail(changed, tested, admitted))


def _attack_inside(
    smoothed: SmoothedModel,
    images: Tensor,
    *,
    target: Target,
    attack: Attack | None,
    label: Tensor,
    eps: Tensor,
    patch: Tensor,
    options: CheckOptions,
) -> Tensor:
    """Images attacked in L2 within eps (n,) on the expectation over noise; images lie in [0, 1]."""
    largest = float(np.sqrt(images[0].numel())) * 0.999  # no two images are further apart
    threat = L2(eps.clamp(max=largest).to(images.device))
    if attack is None:
        size = 2.5 * float(eps.max()) / options.steps
        chosen: Attack = PGD(threat, step_size=size, steps=options.steps, random_start=False)
    elif isinstance(getattr(attack, "threat", None), L2):
        chosen = dataclasses.replace(cast(Any, attack), threat=threat)
    else:
        raise ValueError(
            f"certificates hold in L2, so an attack that checks them needs an L2 threat model; got {attack!r}"
        )
    if target.objective == "decision":
        objective: Objective = margin(smoothed, label)
    else:
        layers = smoothed.layers()
        objective = feature_drift(layers.get(target.objective, layers["features"]), images)
    return chosen(images, objective, generator=smoothed.generator, ids=patch)
