"""An ensemble of attacks, each on the images that all before it left robust; per image the worst case is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from hsat.attacks.apgd import APGD
from hsat.attacks.base import check_counts, check_number, settings_text
from hsat.attacks.ensemble_pass import (
    LAYERS,
    Candidate,
    EnsembleMember,
    EnsembleOptions,
    EnsemblePass,
    member_generator,
)
from hsat.attacks.pgd import MIFGSM, PGD
from hsat.attacks.square import Square
from hsat.attacks.threat import check_threat, eps_value
from hsat.attacks.worst_case import keep_worst
from hsat.types import (
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
       where the model gives its embeddings (BIM with a random start is PGD);
    2. Auto-PGD on the decision: `restarts` times on its margin, once on its cross-entropy;
    3. transfer: MI-FGSM on the drift of the features of every surrogate;
    4. Square, which sees class scores only.

    Any other objective is climbed by all members, and the highest value per image is kept.

    The idea of an ensemble with a per-image worst case is that of Croce and Hein, arXiv:2003.01690, section 4.  Noise
    depends on (seed, member's name, id, restart) only, not on which images are still robust.

    Attributes:
        threat: A ball of pixels.
        steps: Of the drift members.
        step_size: Of the drift members; None is eps / 4.
        decision_steps: Of Auto-PGD.
        restarts: Of Auto-PGD on the margin.
        queries: Of Square.
        area: Of Square, the share of pixels of its first proposals.
        surrogates: Other encoders by name, whose `.features` are moved where there are any; the caller keeps them
            frozen.

    Raises:
        ValueError: For counts below 1, and as these attacks do.

    Example:
        >>> from hsat.attacks import Linf, margin
        >>> ensemble = AttackEnsemble(Linf(0.25), steps=2, decision_steps=2, restarts=1, queries=5)
        >>> x = torch.tensor([0.6, 0.4]).reshape(1, 1, 1, 2)
        >>> objective = margin(lambda images: images.flatten(1), torch.tensor([0]))
        >>> bool(objective(ensemble(x, objective)) > 0)
        True
    """

    threat: ThreatModel
    _: KW_ONLY
    steps: int = 10
    step_size: float | None = None
    decision_steps: int = 20
    restarts: int = 3
    queries: int = 200
    area: float = 0.3
    surrogates: Mapping[str, EmbeddingFunction] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_counts(steps=self.steps, decision_steps=self.decision_steps, restarts=self.restarts, queries=self.queries)
        check_number("area", self.area, high=1.0)
        if self.step_size is not None:
            check_number("step_size", self.step_size)
        if wrong := [name for name, other in self.surrogates.items() if not callable(other)]:
            raise TypeError(f"surrogates must map names to encoders; those of {wrong} cannot be called")

    def __repr__(self) -> str:
        return settings_text(self, leave_out=("surrogates",))

    @property
    def random_start(self) -> bool:
        """Members begin at random points."""
        return True

    def members(self, layers: Sequence[str] = LAYERS) -> tuple[EnsembleMember, ...]:
        """The members in the order of their turns.

        Args:
            layers: Those of the model that differ; drift members are made for each.

        Returns:
            Attacks with what each climbs.
        """
        size = eps_value(self.threat.eps) / 4 if self.step_size is None else self.step_size
        pgd = PGD(self.threat, step_size=size, steps=self.steps)
        momentum = MIFGSM(self.threat, step_size=size, steps=self.steps, random_start=True)
        apgd = APGD(self.threat, steps=self.decision_steps)
        square = Square(self.threat, queries=self.queries, area=self.area)
        member = EnsembleMember
        return (
            *(
                member(name=f"{kind} {layer}", attack=attack, objective=layer, common_start=True)  # type: ignore[arg-type]
                for kind, attack in (("PGD", pgd), ("MIFGSM", momentum))
                for layer in layers
            ),
            *(
                member(name=f"APGD vote {number + 1}", attack=apgd, objective="margin")
                for number in range(self.restarts)
            ),
            member(name="APGD vote-ce", attack=apgd, objective="cross-entropy"),
            *(
                member(name=f"transfer from {name}", attack=momentum, objective="features", surrogate=_features(other))
                for name, other in self.surrogates.items()
            ),
            member(name="Square", attack=square, objective="scores"),
        )

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
        return judged.attack(self.members(tuple(judged.layers)), start, candidates or {})

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


def _features(encoder: EmbeddingFunction) -> EmbeddingFunction:
    """The features of an encoder; its call where it has none of its own."""
    features: EmbeddingFunction | None = getattr(encoder, "features", None)
    return features if callable(features) else encoder
