"""Attacks inside the certified radius, which a valid certificate withstands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import L2, PGD, feature_drift, margin
from hsat.classifiers import DecisionModel
from hsat.embedding import eval_mode, resolve_device, select_layer, to_device
from hsat.eval.certificates import ABSTAIN
from hsat.eval.certify import CertificateResult
from hsat.eval.confidence import binomial_tail
from hsat.eval.options import RunOptions, Target
from hsat.eval.smoothing import classifier_vote, count_votes
from hsat.progress import show_progress
from hsat.types import Attack, EmbeddingFunction, HierarchicalBatch, Objective

_FIRST_DRAW = 10**9  # draws of a check are far from those that made the certificate


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

    Returns:
        How many patches were tested and how many decisions changed, with a p-value.

    Raises:
        ValueError: If no patch is certified, and for queries other than the certified ones.
    """
    target, answer, smoothing = Target.of(target), certified.levels["patch"], certified.smoothing
    reach = answer.radius * options.share * options.inflate
    radius_of = dict(zip(answer.groups.tolist(), reach.tolist(), strict=True))
    class_of = dict(zip(answer.groups.tolist(), answer.prediction.tolist(), strict=True))
    layer, device = select_layer(encoder, certified.layer), resolve_device(encoder, run.device)
    vote, tested, changed = classifier_vote(layer, certified.classifier), 0, 0
    generator = torch.Generator().manual_seed(smoothing.seed)
    model = DecisionModel(encoder, certified.classifier.to(device), layer=certified.layer)
    smoothed = SmoothedModel(model, sigma=smoothing.sigma, copies=options.copies, generator=generator)
    with eval_mode(encoder):
        for batch in show_progress(queries, "checking certificates") if run.progress else queries:
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
                sigma=smoothing.sigma,
                seed=smoothing.seed,
                chunk=smoothing.chunk,
            )
            own = counts[np.arange(len(rows)), label.cpu().numpy()]
            fails = options.samples - own
            changed += sum(binomial_tail(int(count), options.samples, 0.5) < options.alpha for count in fails)
            tested += len(rows)
            if tested == options.limit:
                break
    if not tested:
        raise ValueError("no patch is certified, so there is nothing to check; try more samples or another sigma")
    admitted = min(1.0, smoothing.alpha + options.alpha)
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
