"""One batch under an ensemble of attacks: members in turn on the images that are robust so far, and who broke which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.decision_memory import DecisionTest, QueryTest, RememberedModel, gaps
from hsat.attacks.initialization import image_seed
from hsat.attacks.margins import EmbeddingDecision, dlr, margin
from hsat.attacks.objectives import classification, feature_drift
from hsat.attacks.square import Square
from hsat.attacks.threat import detach_images, require_images
from hsat.attacks.worst_case import with_threat
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
MemberObjective = Literal["features", "embedding", "margin", "cross-entropy", "dlr", "target", "scores"]
LAYERS = ("features", "embedding")


@runtime_checkable
class LayeredModel(Protocol):
    """A model of logits that also gives the embeddings it decides from, as `DecisionModel` does."""

    def layers(self) -> Mapping[str, EmbeddingFunction]:
        """Images -> embeddings (n, d), by "features" and, where it differs, "embedding"."""

    def scores(self, images: Tensor) -> Tensor:
        """Images -> class scores (n, classes), rows sum to one."""


@runtime_checkable
class LayerDecision(LayeredModel, EmbeddingDecision, Protocol):
    """A model that decides from one of its layers, so that embeddings which are known cost no pass."""

    @property
    def layer(self) -> str:
        """The layer's name."""


@dataclass(frozen=True, kw_only=True)
class EnsembleMember:
    """One attack of the ensemble.

    Attributes:
        name: Names the member in results; its noise depends on it.
        attack: The attack.
        objective: What it maximises: the cosine drift of a layer; the margin, cross-entropy or logit ratio of the
            decision; the margin of a wrong class ("target"); or the margin of the class scores, of which it sees
            nothing but the numbers.
        target: Which wrong class "target" aims at: 1 is the one of the highest logit at the clean image, 0 the one
            that the members before came nearest to.
        surrogate: The encoder on which it is made; None is the model that is attacked.
        common_start: Its noise is that of a single attack with the same generator; others have noise of their own.
    """

    name: str
    attack: Attack
    objective: MemberObjective
    target: int = 1
    surrogate: EmbeddingFunction | None = None
    common_start: bool = False

    @property
    def black_box(self) -> bool:
        """Whether it has no gradients of the model that is attacked."""
        return self.surrogate is not None or self.objective == "scores"


@dataclass(frozen=True, eq=False)
class Candidate:
    """Images that another attack made; an ensemble judges them first, and they cost it nothing.

    Attributes:
        attack: The attack.
        x_adv: (n, c, h, w).
        objective: What it maximised, as in `EnsembleMember.objective`; "" for anything else.
        follows_gradient: Whether it followed gradients of the model that is attacked.
        embedding: (n, d), what the model decides from at x_adv; None where nobody knows it yet.
    """

    attack: Attack
    x_adv: Tensor
    objective: str
    follows_gradient: bool
    embedding: Tensor | None = None


@dataclass(frozen=True)
class EnsembleOptions:
    """What a call gives to every member."""

    generator: torch.Generator | None
    ids: Tensor | None
    success: SuccessTest | None


class EnsemblePass:
    """One batch: which images are robust so far, and the strongest images of all members so far."""

    def __init__(
        self,
        x: Tensor,
        objective: DecisionObjective,
        threat: ThreatModel,
        options: EnsembleOptions,
        *,
        clean: Tensor | None = None,
    ) -> None:
        self.objective, self.threat = objective, threat
        self.generator, self.ids, self.success = options.generator, options.ids, options.success
        self.x = require_images(detach_images(x), threat)
        model = objective.model
        self.layers = dict(model.layers()) if isinstance(model, LayeredModel) else dict[str, EmbeddingFunction]()
        self.decides = model if isinstance(model, LayerDecision) else None
        self.everything = torch.arange(len(x), device=x.device)
        self.broken, self.margin, logits, self.z = self._judge(self.x, self.everything, clean)
        self.classes = logits.shape[1]
        self.reached = gaps(logits, objective.labels)  # (n, classes), the highest so far
        self.nearest = torch.sort(self.reached, dim=1, descending=True, stable=True).indices[
            :, :-1
        ]  # wrong classes, nearest first
        self.references: dict[str, Tensor] = {}
        if self.decides is not None and self.z is not None:
            self.references[self.decides.layer], self.z = self.z, self.z.clone()
        self.best = self.x.clone()
        self.start_value = self.margin.clone()
        self.broken_by = [CLEAN if broken else "" for broken in self.broken.tolist()]
        self.zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.climbed, self.moved = torch.zeros_like(self.broken), torch.zeros_like(self.broken)
        self.forwards, self.backwards = int(clean is None), 0
        newly, passes = int(self.broken.sum()), len(x) * self.forwards
        self.stats = [
            MemberStats(name=CLEAN, attack="", black_box=False, seen=len(x), newly_broken=newly, forwards=passes)
        ]

    def attack(
        self, members: Sequence[EnsembleMember], start: Tensor | None, candidates: Mapping[str, Candidate]
    ) -> AttackResult:
        """Judge the candidates, run the members, and report."""
        fitting = {
            name: candidate
            for name, candidate in candidates.items()
            if getattr(candidate.attack, "threat", None) == self.threat
        }
        for name, candidate in fitting.items():
            self.judge_candidate(name, candidate)
        done = [(candidate.attack, candidate.objective) for candidate in fitting.values()]
        for member in members:
            if member.surrogate is not None or (member.attack, member.objective) not in done:
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
            embedding=self.z,
        )

    def judge_candidate(self, name: str, candidate: Candidate) -> None:
        """Count an attack that ran on the whole batch as a member."""
        newly = self._update_best(name, self.everything, candidate.x_adv, candidate.embedding)
        if candidate.follows_gradient:
            self._count_moved(self.everything, candidate.x_adv)
        self.stats.append(
            MemberStats(name=name, attack=repr(candidate.attack), black_box=False, seen=len(self.x), newly_broken=newly)
        )

    def run_member(self, member: EnsembleMember, start: Tensor | None) -> None:
        """Run a member on the images that are robust so far; the batch is made smaller, so the others cost nothing."""
        stats = MemberStats(name=member.name, attack=repr(member.attack), black_box=member.black_box)
        keep = (~self.broken).nonzero().flatten()
        if len(keep):
            x, ids = self.x[keep], None if self.ids is None else self.ids[keep.to(self.ids.device)]
            if member.surrogate is not None or member.objective in LAYERS:
                model, success = None, None
                objective, extra = self._drift(member, x, keep)
            else:
                model, extra = RememberedModel(self._model_of(member)), 0
                labels = self.objective.labels[keep]
                objective = self._decision(member, model, labels, keep)
                success = self._test(member, model, labels, keep) if self.success is None else None
            attack = with_threat(member.attack, self.threat.select(keep))
            result: AttackResult = attack.run(
                x,
                objective,
                start=None if start is None else start[keep],
                generator=member_generator(member, self.generator, self.ids),
                ids=ids,
                success=success,
                score=False,  # the judge sees the images anyway
            )
            newly = self._update_best(member.name, keep, result.x_adv)
            self.zero[keep] += result.zero_gradient
            if result.backwards and member.surrogate is None:
                self._count_moved(keep, result.x_adv)
            n = len(keep)
            forwards, backwards = n * result.forwards, n * result.backwards
            if model is not None:  # images that are done leave the batch, so counting passes would count too many
                forwards, backwards = model.forwards, model.backwards
            self.forwards += result.forwards + 1 + (extra > 0)  # the one is the judge's
            self.backwards += result.backwards
            stats = dataclasses.replace(
                stats, seen=n, newly_broken=newly, forwards=extra + forwards + n, backwards=backwards
            )
        self.stats.append(stats)

    def _drift(self, member: EnsembleMember, x: Tensor, keep: Tensor) -> tuple[Objective, int]:
        """The drift of a layer or a surrogate, and how many images had to be encoded to make it."""
        if member.surrogate is not None:
            return feature_drift(member.surrogate, x), len(x)
        layer, fresh = self.layers[member.objective], member.objective not in self.references
        if fresh:  # of the whole batch, as an evaluation of single attacks has it
            with torch.no_grad():
                self.references[member.objective] = layer(self.x)
        return feature_drift(layer, x, reference=self.references[member.objective][keep]), len(self.x) * fresh

    def _model_of(self, member: EnsembleMember) -> Callable[[Tensor], Tensor]:
        """What a member on the decision sees: logits, or nothing but class scores."""
        model = self.objective.model
        if member.objective != "scores":
            return model
        return model.scores if isinstance(model, LayeredModel) else lambda images: F.softmax(model(images), dim=1)

    def _decision(
        self, member: EnsembleMember, model: RememberedModel, labels: Tensor, keep: Tensor
    ) -> DecisionObjective:
        """The objective of a member on the decision."""
        if member.objective == "target":
            best = self.reached[keep].argmax(1)
            return margin(model, labels, target=self.nearest[keep, member.target - 1] if member.target else best)
        if member.objective == "cross-entropy":
            return classification(model, labels)
        return (dlr if member.objective == "dlr" else margin)(model, labels)

    def _test(self, member: EnsembleMember, model: RememberedModel, labels: Tensor, keep: Tensor) -> DecisionTest:
        """What stops the images of a member: a wrong decision, and for Square the sight of better gradients."""
        if not isinstance(member.attack, Square):
            return DecisionTest(model, labels)
        known = {"clean": self.start_value[keep], "reached": self.margin[keep]}
        return QueryTest(model, labels, self.objective.model, **known, queries=member.attack.queries)

    def _update_best(self, name: str, keep: Tensor, x_adv: Tensor, z: Tensor | None = None) -> int:
        """Keep what is stronger: a success first, then the higher margin; how many images are newly broken."""
        wrong, value, logits, seen = self._judge(x_adv, keep, z)
        self.reached[keep] = torch.maximum(self.reached[keep], gaps(logits, self.objective.labels[keep]))
        before, higher = self.broken[keep], value > self.margin[keep]
        better = torch.where(before, wrong & higher, wrong | higher)
        at = keep[better]
        self.best[at], self.margin[at] = x_adv[better], value[better]
        if self.z is not None and seen is not None:
            self.z[at] = seen[better]
        newly = keep[wrong & ~before]
        for row in newly.tolist():
            self.broken_by[row] = name
        self.broken[newly] = True
        return len(newly)

    def _count_moved(self, keep: Tensor, x_adv: Tensor) -> None:
        """Note which images a member with gradients moved at all."""
        self.climbed[keep] = True
        self.moved[keep] |= (x_adv != self.x[keep]).flatten(1).any(1)

    def _judge(self, x_adv: Tensor, keep: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(wrong, margin, logits, what the model decides from) of images; z: the last, where it is known."""
        labels, model = self.objective.labels[keep], self.objective.model
        with torch.no_grad():
            if self.decides is None:
                logits, z = model(x_adv), None
            else:
                z = self.layers[self.decides.layer](x_adv) if z is None else z
                logits = self.decides.classify(z)
            value = margin(lambda images: logits, labels)(x_adv)
            if self.success is None:
                return value > 0, value, logits, z
            everything = x_adv if len(keep) == len(self.x) else self.best.index_copy(0, keep, x_adv)
            return self.success(everything)[keep], value, logits, z


def member_generator(
    member: EnsembleMember, generator: torch.Generator | None, ids: Tensor | None
) -> torch.Generator | None:
    """The source of a member's noise: with ids one of its own, but for members with the common start."""
    if ids is None or member.common_start:
        return generator
    seed = torch.initial_seed() if generator is None else generator.initial_seed()
    return torch.Generator().manual_seed(image_seed(seed, 0, 0, member.name))
