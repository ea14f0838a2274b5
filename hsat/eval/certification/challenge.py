"""An attack that tries to break certificates, and the test of whether it did so more often than they admit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks import L2, PGD
from hsat.embedding import eval_mode, resolve_device, select_layer, show_progress
from hsat.eval.certification.certificates import ABSTAIN
from hsat.eval.certification.certifying import CertificateResult
from hsat.eval.certification.smoothing import count_votes, knn_vote
from hsat.eval.statistics.binomial import binomial_tail
from hsat.types import EmbeddingFunction, HierarchicalBatch

_FIRST_DRAW = 10**9  # draws of the test are far from those that made the certificate


@dataclass(frozen=True)
class Challenge:
    """What came of attacking certified patches inside their radius.

    tested: certified patches that were attacked.  changed: those whose decision was shown to have changed, each by a
    one-sided binomial test at level `alpha` on fresh draws.  p_value: probability of so many among valid certificates,
    each of which may fail with probability at most (alpha of the certificate + alpha of the test).  A small one says
    that the certificates are wrong.
    """

    tested: int
    changed: int
    alpha: float
    p_value: float

    @property
    def refuted(self) -> bool:
        """The certificates fail more often than they admit (p below 0.001)."""
        return self.p_value < 0.001


def challenge_certificates(
    encoder: EmbeddingFunction,
    certified: CertificateResult,
    queries: Iterable[HierarchicalBatch],
    *,
    share: float = 0.99,
    inflate: float = 1.0,
    steps: int = 20,
    copies: int = 8,
    samples: int = 1000,
    alpha: float = 0.001,
    limit: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Challenge:
    """Attack patches inside their certified radius, and test whether the smoothed decisions change.

    queries: the loader that was certified.  The attack is PGD in L2 on the expectation over noise (EOT): it lowers the
    mean, over `copies` fresh noisy copies, of the log of a differentiable kNN score of the certified class, `steps`
    steps, within `share` of the radius and inside [0, 1].  Then `samples` fresh draws at the attacked image say whether
    the class still has its majority: a change is counted where fewer than half of them would be that rare below
    `alpha`.  A certificate that holds keeps p >= 1/2 there.
    inflate: multiplies the radii first; 3 claims three times too much, which the test should find out.
    limit: attack this many certified patches at most, in the order of the queries.

    Raises ValueError if no patch is certified, and for queries other than the certified ones.
    """
    answer = certified.levels["patch"]
    radius_of = dict(zip(answer.groups.tolist(), (answer.radius * share * inflate).tolist(), strict=True))
    class_of = dict(zip(answer.groups.tolist(), answer.prediction.tolist(), strict=True))
    layer, place = select_layer(encoder, certified.layer), resolve_device(encoder, device)
    vote, tested, changed = knn_vote(layer, certified.knn), 0, 0
    with eval_mode(encoder):
        for batch in show_progress(queries, "challenging", shown=progress):
            if unknown := [patch for patch in batch.patch.tolist() if patch not in class_of]:
                raise ValueError(f"patch {unknown[0]} was not certified; give the queries that certify was given")
            rows = [row for row, patch in enumerate(batch.patch.tolist()) if class_of[patch] != ABSTAIN]
            rows = rows if limit is None else rows[: max(0, limit - tested)]
            if not rows:
                continue
            patch = batch.patch[rows]
            images = batch.images[rows].to(place)
            label = torch.tensor([class_of[each] for each in patch.tolist()])
            eps = torch.tensor([radius_of[each] for each in patch.tolist()], dtype=torch.float64)
            x_adv = _attack(layer, certified, images, label.to(place), eps, steps=steps, copies=copies)
            counts = count_votes(
                vote,
                x_adv,
                patch,
                classes=len(certified.class_names),
                draws=range(_FIRST_DRAW, _FIRST_DRAW + samples),
                sigma=certified.settings.sigma,
                seed=certified.settings.seed,
                chunk=certified.settings.chunk,
            )
            own = counts[np.arange(len(rows)), label.numpy()]
            changed += sum(binomial_tail(samples - int(count), samples, 0.5) < alpha for count in own)
            tested += len(rows)
            if tested == limit:
                break
    if not tested:
        raise ValueError("no patch is certified, so there is nothing to challenge; try more samples or another sigma")
    admitted = min(1.0, certified.settings.alpha + alpha)
    return Challenge(tested, changed, alpha, binomial_tail(changed, tested, admitted))


def _attack(
    layer: EmbeddingFunction,
    certified: CertificateResult,
    images: Tensor,
    label: Tensor,
    eps: Tensor,
    *,
    steps: int,
    copies: int,
) -> Tensor:
    """PGD in L2 within eps (n,) on the expectation over noise; images lie in [0, 1]."""
    largest = float(np.sqrt(images[0].numel())) * 0.999  # no two images are further apart
    eps = eps.clamp(max=largest)
    generator = torch.Generator().manual_seed(certified.settings.seed)
    bank = torch.from_numpy(np.array(certified.knn.table.z, dtype=np.float32)).to(images.device)
    of_class = torch.from_numpy(certified.knn.table.label).to(images.device)

    def objective(x: Tensor) -> Tensor:
        noise = torch.randn((copies, *x.shape), generator=generator).to(x) * certified.settings.sigma
        z = layer((x + noise).flatten(0, 1))
        logits = F.normalize(z.float(), dim=1) @ bank.T / certified.knn.settings.temperature
        own = of_class == label.repeat(copies)[:, None]
        score = logits.masked_fill(~own, -torch.inf).logsumexp(1) - logits.masked_fill(own, -torch.inf).logsumexp(1)
        mean: Tensor = score.reshape(copies, -1).mean(0)
        return -mean

    attack = PGD(L2(eps.to(images.device)), step_size=2.5 * float(eps.max()) / steps, steps=steps, random_start=False)
    return attack(images, objective)
