"""An ensemble of attacks, each on the images that all before it left robust; per image the worst case is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Self

import torch
from torch import Tensor

from hsat.attacks.apgd import APGD
from hsat.attacks.base import GradientAttack, check_counts, check_number, settings_text
from hsat.attacks.ensemble_pass import (
    LAYERS,
    Candidate,
    EnsembleMember,
    EnsembleOptions,
    EnsemblePass,
    member_generator,
)
from hsat.attacks.loop import AscentConfig
from hsat.attacks.pgd import MIFGSM, PGD
from hsat.attacks.square import Square
from hsat.attacks.threat import check_threat, eps_value
from hsat.attacks.worst_case import keep_worst
from hsat.types import (
    Attack,
    AttackResult,
    DecisionObjective,
    EmbeddingFunction,
    Objective,
    SuccessTest,
    ThreatModel,
)


@dataclass(frozen=True, repr=False)
class AttackEnsemble:
    """Several attacks in turn: an image counts as robust only if every one of them fails on it.

    Against a `DecisionObjective` (`margin`, `dlr`, `classification`) the members derive their objectives from its model
    and labels, and each sees the images whose decision is still right:

    1. the paper's attacks, PGD and MI-FGSM from random points on the cosine drift of the features and of the embedding,
       where the model gives its embeddings (BIM with a random start is PGD): cheap, since ten steps break most of what
       is not robust;
    2. Auto-PGD on the decision: on its margin, `restarts` times, and on its cross-entropy; with three classes or more a
       quarter of the steps on its logit ratio;
    3. with three classes or more Auto-PGD on the margin of each of the `targets` nearest wrong classes, a quarter of
       the steps each, and then all steps on that of the class which any member came nearest to: an untargeted search
       follows the class that is nearest at the moment, which need not be the one that can be reached;
    4. transfer: MI-FGSM on the drift of the features of every surrogate;
    5. Square, which sees class scores only.

    Members on the decision stop an image where it breaks.  Any other objective is climbed by PGD, MI-FGSM, Auto-PGD
    and Square, and the highest value per image is kept.

    The idea of an ensemble with a per-image worst case is that of Croce and Hein, arXiv:2003.01690, section 4, and so
    is the targeted search (section 5 there, on the logit ratio).  Noise depends on (seed, member's name, id, restart)
    only, not on which images are still robust.  The defaults are those of `standard`.

    Attributes:
        threat: A ball of pixels.
        steps: Of the drift members.
        step_size: Of the drift members; None is eps / 4, of each image's own eps.
        decision_steps: Of Auto-PGD.
        restarts: Of Auto-PGD on the margin.
        targets: How many wrong classes are aimed at, at most; 0 for none.
        queries: Of Square.
        area: Of Square, the share of pixels of its first proposals.
        surrogates: Other encoders by name, whose `.features` are moved where there are any; the caller keeps them
            frozen.

    Raises:
        ValueError: For counts below 1, negative targets, and as these attacks do.

    Example:
        >>> from hsat.attacks import Linf, margin
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
        >>> x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> ensemble = AttackEnsemble.standard(Linf(8 / 255), steps=5, queries=5)
        >>> result = ensemble.run(x, margin(model, model(x).argmax(1)), generator=torch.Generator().manual_seed(0))
        >>> [member.name for member in result.members][-2:]
        ['APGD best target', 'Square']
    """

    threat: ThreatModel
    _: KW_ONLY
    steps: int = 10
    step_size: float | None = None
    decision_steps: int = 100
    restarts: int = 1
    targets: int = 9
    queries: int = 1000
    area: float = 0.8
    surrogates: Mapping[str, EmbeddingFunction] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_counts(steps=self.steps, decision_steps=self.decision_steps, restarts=self.restarts, queries=self.queries)
        if isinstance(self.targets, bool) or not isinstance(self.targets, int) or self.targets < 0:
            raise ValueError(f"targets must be a whole number >= 0, got {self.targets!r}")
        check_number("area", self.area, high=1.0)
        if self.step_size is not None:
            check_number("step_size", self.step_size)
        if wrong := [name for name, other in self.surrogates.items() if not callable(other)]:
            raise TypeError(f"surrogates must map names to encoders; those of {wrong} cannot be called")

    @classmethod
    def standard(
        cls,
        threat: ThreatModel,
        *,
        steps: int = 100,
        targets: int = 9,
        queries: int = 1000,
        surrogates: Mapping[str, EmbeddingFunction] | None = None,
    ) -> Self:
        """The ensemble that is measured against AutoAttack: `benchmarks/ensemble_strength.py`.

        Args:
            threat: A ball of pixels.
            steps: Of Auto-PGD; the drift members take at most 10.
            targets: How many wrong classes are aimed at, at most.
            queries: Of Square.
            surrogates: Other encoders by name.

        Returns:
            The ensemble.

        Raises:
            ValueError: For counts below 1.
        """
        check_counts(steps=steps)
        return cls(
            threat,
            steps=min(10, steps),
            decision_steps=steps,
            targets=targets,
            queries=queries,
            surrogates=surrogates or {},
        )

    def __repr__(self) -> str:
        return settings_text(self, leave_out=("surrogates",))

    @property
    def random_start(self) -> bool:
        """Members begin at random points."""
        return True

    def members(self, layers: Sequence[str] = LAYERS, classes: int | None = None) -> tuple[EnsembleMember, ...]:
        """The members in the order of their turns.

        Args:
            layers: Those of the model that differ.
            classes: How many the model has; None for members that an objective without classes has as well.

        Returns:
            Attacks with what each climbs.
        """
        member = EnsembleMember
        apgd = APGD(self.threat, steps=self.decision_steps)
        found = [*self._drift_members(layers)]
        found += [member(name=f"APGD margin {n + 1}", attack=apgd, objective="margin") for n in range(self.restarts)]
        if classes is not None:
            found.append(member(name="APGD cross-entropy", attack=apgd, objective="cross-entropy"))
        if classes is not None and classes > 2:  # with two classes the margin is all there is
            short = APGD(self.threat, steps=-(-self.decision_steps // 4))  # enough to see which class can be reached
            found.append(member(name="APGD dlr", attack=short, objective="dlr"))
            found += [
                member(name=f"APGD target {rank}", attack=short, objective="target", target=rank)
                for rank in range(1, min(self.targets, classes - 1) + 1)
            ]
            if self.targets:
                found.append(member(name="APGD best target", attack=apgd, objective="target", target=0))
        for name, other in self.surrogates.items():
            momentum = self._drift_attack(decay=1.0)
            title = f"transfer from {name}"
            found.append(member(name=title, attack=momentum, objective="features", surrogate=_features(other)))
        square = Square(self.threat, queries=self.queries, area=self.area)
        return (*found, member(name="Square", attack=square, objective="scores"))

    def _drift_members(self, layers: Sequence[str]) -> list[EnsembleMember]:
        return [
            EnsembleMember(name=f"{kind} {layer}", attack=attack, objective=layer, common_start=True)  # type: ignore[arg-type]
            for kind, attack in (("PGD", self._drift_attack()), ("MIFGSM", self._drift_attack(decay=1.0)))
            for layer in layers
        ]

    def _drift_attack(self, *, decay: float | None = None) -> Attack:
        """PGD, or MI-FGSM with a decay of its momentum."""
        eps, size = self.threat.eps, self.step_size
        if size is None and isinstance(eps, Tensor):
            return _QuarterSteps(self.threat, steps=self.steps, decay=decay)
        size = eps_value(eps) / 4 if size is None else size
        if decay is None:
            return PGD(self.threat, step_size=size, steps=self.steps)
        return MIFGSM(self.threat, step_size=size, steps=self.steps, decay=decay, random_start=True)

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Adversarial images: same shape, dtype and device as x; detached."""
        return self.run(x, objective, start=start, generator=generator, ids=ids, success=success).x_adv

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        candidates: Mapping[str, Candidate] | None = None,
        clean: Tensor | None = None,
    ) -> AttackResult:
        """All members on one batch.

        Args:
            x: (n, c, h, w) images in the threat model's range.
            objective: What is attacked.
            start: (n, c, h, w), where the first member begins.
            generator: Source of noise.
            ids: (n,) ints that make each image's noise its own.
            success: (x_adv) -> (n,) bool; by default a wrong decision.
            candidates: Images of other attacks by name; those of another threat model are ignored.
            clean: (n, d), what the model decides from at x, where it is known already.

        Returns:
            The result; `value` is the margin of the decision for a `DecisionObjective`.
        """
        options = EnsembleOptions(generator, ids, success)
        if not isinstance(objective, DecisionObjective):
            return self._maximise(x, objective, start=start, options=options)
        judged = EnsemblePass(x, objective, self.threat, options, clean=clean)
        return judged.attack(self.members(tuple(judged.layers), judged.classes), start, candidates or {})

    def _maximise(
        self, x: Tensor, objective: Objective, *, start: Tensor | None, options: EnsembleOptions
    ) -> AttackResult:
        """All members on one objective that is no decision; the highest value is kept, per image where it can be."""
        best: AttackResult | None = None
        for member in self.members(layers=("features",)):
            is_scalar = best is not None and best.value.ndim == 0
            if member.surrogate is not None or (is_scalar and isinstance(member.attack, Square)):
                continue  # Square compares values per image
            result = member.attack.run(
                x,
                objective,
                start=start if best is None else None,
                generator=member_generator(member, options.generator, options.ids),
                ids=options.ids,
                success=options.success,
            )
            best = result if best is None else keep_worst(best, result)
        assert best is not None  # PGD is always a member
        return best


@dataclass(frozen=True, repr=False)
class _QuarterSteps(GradientAttack):
    """PGD or MI-FGSM where eps is a tensor: each image's step is a quarter of its own eps, whatever the others have."""

    threat: ThreatModel
    _: KW_ONLY
    steps: int
    decay: float | None
    random_start: bool = True

    def __repr__(self) -> str:
        name, momentum = ("PGD", "") if self.decay is None else ("MIFGSM", f", decay={self.decay}")
        return f"{name}(threat={self.threat!r}, step_size=eps/4, steps={self.steps}{momentum}, random_start=True)"

    def _config(self) -> AscentConfig:
        eps = self.threat.eps
        return AscentConfig(
            threat=self.threat, step_size=eps / 4, steps=self.steps, random_start=True, decay=self.decay
        )


def _features(encoder: EmbeddingFunction) -> EmbeddingFunction:
    """The features of an encoder; its call where it has none of its own."""
    features: EmbeddingFunction | None = getattr(encoder, "features", None)
    return features if callable(features) else encoder
