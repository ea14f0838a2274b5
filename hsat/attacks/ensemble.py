"""An ensemble of attacks, each on the images that all before it left robust; per image the worst case is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.apgd import APGD
from hsat.attacks.base import check_counts, check_number, settings_text
from hsat.attacks.initialization import image_seed
from hsat.attacks.margins import margin
from hsat.attacks.objectives import classification, feature_drift
from hsat.attacks.pgd import MIFGSM, PGD
from hsat.attacks.square import Square
from hsat.attacks.threat import check_threat, eps_value, require_images
from hsat.attacks.worst_case import keep_worst, with_threat
from hsat.types import (
    Attack,
    AttackResult,
    DecisionObjective,
    EmbeddingFunction,
    MemberStats,
    Objective,
    SuccessTest,
    ThreatModel,
)

CLEAN = "clean"
MemberObjective = Literal["features", "embedding", "margin", "cross-entropy", "scores"]
LAYERS = ("features", "embedding")


@runtime_checkable
class LayeredModel(Protocol):
    """A model of logits that also gives the embeddings it decides from, as `DecisionModel` does."""

    def layers(self) -> Mapping[str, EmbeddingFunction]:
        """Images -> embeddings (n, d), by "features" and, where it differs, "embedding"."""

    def scores(self, images: Tensor) -> Tensor:
        """Images -> class scores (n, classes), rows sum to one."""


@dataclass(frozen=True, kw_only=True)
class EnsembleMember:
    """One attack of the ensemble.

    Attributes:
        name: Names the member in results; its noise depends on it.
        attack: The attack.
        objective: What it maximises: the cosine drift of a layer, the margin or cross-entropy of the decision, or the
            margin of the class scores, of which it sees nothing but the numbers.
        surrogate: Name of the encoder on which it is made; "" is the model that is attacked.
        common_start: Its noise is that of a single attack with the same generator; others have noise of their own.
    """

    name: str
    attack: Attack
    objective: MemberObjective
    surrogate: str = ""
    common_start: bool = False

    @property
    def black_box(self) -> bool:
        """Whether it has no gradients of the model that is attacked."""
        return bool(self.surrogate) or self.objective == "scores"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Images that another attack made; an ensemble judges them first, and they cost it nothing.

    Attributes:
        attack: The attack.
        x_adv: (n, c, h, w).
        objective: What it maximised, as in `EnsembleMember.objective`; "" for anything else.
        follows_gradient: Whether it followed gradients of the model that is attacked.
    """

    attack: Attack
    x_adv: Tensor
    objective: str
    follows_gradient: bool


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
        surrogates: Other encoders by name; the caller keeps them frozen.

    Raises:
        ValueError: For counts below 1, and as these attacks do.
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
        """The members in the order of their turns; layers: those of the model that differ."""
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
                member(name=f"transfer from {name}", attack=momentum, objective="features", surrogate=name)
                for name in self.surrogates
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

        Returns:
            The result; `value` is the margin of the decision for a `DecisionObjective`.
        """
        options = _Options(generator, ids, success)
        if not isinstance(objective, DecisionObjective):
            return self._maximise(x, objective, start=start, options=options)
        return _EnsembleState(self, x, objective, options).attack(start, candidates or {})

    def _maximise(self, x: Tensor, objective: Objective, *, start: Tensor | None, options: _Options) -> AttackResult:
        """All members on one objective that is no decision; the highest value is kept, per image where it can be."""
        best: AttackResult | None = None
        for member in self.members(layers=("features",)):
            if member.surrogate or (isinstance(member.attack, Square) and best is not None and best.value.ndim == 0):
                continue  # Square compares values per image
            result = member.attack.run(
                x,
                objective,
                start=start if best is None else None,
                generator=_member_generator(member, options.generator, options.ids),
                ids=options.ids,
                success=options.success,
            )
            best = result if best is None else keep_worst(best, result)
        assert best is not None  # PGD is always a member
        return best


@dataclass(frozen=True)
class _Options:
    """What a call gives to every member."""

    generator: torch.Generator | None
    ids: Tensor | None
    success: SuccessTest | None


class _EnsembleState:
    """One batch: which images are robust so far, and the strongest images of all members so far."""

    def __init__(self, ensemble: AttackEnsemble, x: Tensor, objective: DecisionObjective, options: _Options) -> None:
        self.ensemble, self.objective = ensemble, objective
        self.generator, self.ids, self.success = options.generator, options.ids, options.success
        self.x = require_images(x.detach(), ensemble.threat)
        self.layers: dict[str, EmbeddingFunction] = {}
        if isinstance(objective.model, LayeredModel):
            self.layers = dict(objective.model.layers())
        self.references: dict[str, Tensor] = {}
        self.best = self.x.clone()
        self.broken, self.margin = self._judge(self.x, torch.arange(len(x), device=x.device))
        self.start_value = self.margin.clone()
        self.broken_by = [CLEAN if broken else "" for broken in self.broken.tolist()]
        self.zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.climbed, self.moved = torch.zeros_like(self.broken), torch.zeros_like(self.broken)
        self.forwards = self.backwards = 0
        newly = int(self.broken.sum())
        self.stats = [MemberStats(name=CLEAN, attack="", black_box=False, seen=len(x), newly_broken=newly)]

    def attack(self, start: Tensor | None, candidates: Mapping[str, Candidate]) -> AttackResult:
        """Judge the candidates, run the members, and report."""
        fitting = {
            name: candidate
            for name, candidate in candidates.items()
            if getattr(candidate.attack, "threat", None) == self.ensemble.threat
        }
        for name, candidate in fitting.items():
            self.judge_candidate(name, candidate)
        done = [(candidate.attack, candidate.objective) for candidate in fitting.values()]
        for member in self.ensemble.members(layers=tuple(self.layers)):
            if member.surrogate or (member.attack, member.objective) not in done:
                self.run_member(member, start)
                start = None
        return AttackResult(
            x_adv=self.best,
            value=self.margin,
            start_value=self.start_value,
            zero_gradient=self.zero,
            success=self.broken,
            forwards=self.forwards,
            backwards=self.backwards,
            broken_by=tuple(self.broken_by),
            members=tuple(self.stats),
            never_moved=self.climbed & ~self.moved,
        )

    def judge_candidate(self, name: str, candidate: Candidate) -> None:
        """Count an attack that ran on the whole batch as a member."""
        everything = torch.arange(len(self.x), device=self.x.device)
        newly = self._update_best(name, everything, candidate.x_adv)
        if candidate.follows_gradient:
            self._count_moved(everything, candidate.x_adv)
        self.stats.append(
            MemberStats(name=name, attack=repr(candidate.attack), black_box=False, seen=len(self.x), newly_broken=newly)
        )

    def run_member(self, member: EnsembleMember, start: Tensor | None) -> None:
        """Run a member on the images that are robust so far; the batch is made smaller, so the others cost nothing."""
        stats = MemberStats(name=member.name, attack=repr(member.attack), black_box=member.black_box)
        keep = (~self.broken).nonzero().flatten()
        if len(keep):
            x, ids = self.x[keep], None if self.ids is None else self.ids[keep.to(self.ids.device)]
            objective, extra = self._member_objective(member, x, keep)
            attack = with_threat(member.attack, self.ensemble.threat.select(keep))
            result: AttackResult = attack.run(
                x,
                objective,
                start=None if start is None else start[keep],
                generator=_member_generator(member, self.generator, self.ids),
                ids=ids,
                score=False,  # the judge sees the images anyway
            )
            newly = self._update_best(member.name, keep, result.x_adv)
            self.zero[keep] += result.zero_gradient
            if result.backwards and not member.surrogate:
                self._count_moved(keep, result.x_adv)
            n, forwards = len(keep), result.forwards + extra + 1  # the last one is the judge's
            self.forwards, self.backwards = self.forwards + forwards, self.backwards + result.backwards
            stats = dataclasses.replace(
                stats, seen=n, newly_broken=newly, forwards=n * forwards, backwards=n * result.backwards
            )
        self.stats.append(stats)

    def _member_objective(self, member: EnsembleMember, x: Tensor, keep: Tensor) -> tuple[Objective, int]:
        """The member's objective, and the passes that it cost to make."""
        model, labels = self.objective.model, self.objective.labels[keep]
        if member.surrogate:
            return feature_drift(self.ensemble.surrogates[member.surrogate], x), 1
        if member.objective in LAYERS:
            layer, fresh = self.layers[member.objective], member.objective not in self.references
            if fresh:  # of the whole batch, as an evaluation of single attacks has it
                with torch.no_grad():
                    self.references[member.objective] = layer(self.x)
            return feature_drift(layer, x, reference=self.references[member.objective][keep]), int(fresh)
        if member.objective == "scores":
            scores: Callable[[Tensor], Tensor] = (
                model.scores if isinstance(model, LayeredModel) else lambda images: F.softmax(model(images), dim=1)
            )
            return margin(scores, labels), 0
        return (classification if member.objective == "cross-entropy" else margin)(model, labels), 0

    def _update_best(self, name: str, keep: Tensor, x_adv: Tensor) -> int:
        """Keep what is stronger: a success first, then the higher margin; how many images are newly broken."""
        wrong, value = self._judge(x_adv, keep)
        before, higher = self.broken[keep], value > self.margin[keep]
        better = torch.where(before, wrong & higher, wrong | higher)
        at = keep[better]
        self.best[at], self.margin[at] = x_adv[better], value[better]
        newly = keep[wrong & ~before]
        for row in newly.tolist():
            self.broken_by[row] = name
        self.broken[newly] = True
        return len(newly)

    def _count_moved(self, keep: Tensor, x_adv: Tensor) -> None:
        """Note which images a member with gradients moved at all."""
        self.climbed[keep] = True
        self.moved[keep] |= (x_adv != self.x[keep]).flatten(1).any(1)

    def _judge(self, x_adv: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(wrong, margin) of images, both of their length."""
        judge = margin(self.objective.model, self.objective.labels[keep])
        with torch.no_grad():
            value = judge(x_adv)
            if self.success is None:
                return value > 0, value
            everything = self.best.clone() if len(keep) < len(self.x) else x_adv
            if len(keep) < len(self.x):
                everything[keep] = x_adv
            return self.success(everything)[keep], value


def _member_generator(
    member: EnsembleMember, generator: torch.Generator | None, ids: Tensor | None
) -> torch.Generator | None:
    """The source of a member's noise: with ids one of its own, but for members with the common start."""
    if ids is None or member.common_start:
        return generator
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    return torch.Generator().manual_seed(image_seed(seed, 0, 0, member.name))
