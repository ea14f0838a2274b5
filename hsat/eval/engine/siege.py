"""The strongest attack at work on one encoder: member after member, each on the images that still stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import feature_drift, margin
from hsat.attacks.nearest_vote import SoftKNN
from hsat.attacks.starts import image_seed, threat_of
from hsat.classifiers import FittedKNN
from hsat.embedding import LAYERS, encode, eval_mode, normalize_rows, select_layer
from hsat.eval.aiming import Aim
from hsat.eval.engine.layers import Layers
from hsat.eval.engine.strongest import Member, MemberCount, Strongest
from hsat.types import Attack, AttackResult, EmbeddingFunction, Objective

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Tried:
    """An attack of the same call that was run on all images already: its images and what the scored layer says.

    climbed: whether it followed gradients of the encoder that is measured.
    """

    attack: Attack
    x_adv: Tensor
    z: Tensor
    climbed: bool


@dataclass(frozen=True, eq=False)
class Fall:
    """What came of one batch, image by image; z (n, d) is the scored layer at x_adv.  See `Casualties`.

    zero_gradient: (n,) bool, images whose gradient was exactly zero in some step of some member.  never_moved:
    (n,) bool, images that were left in place by every member that follows gradients, of one such member or more; an
    image that is reported clean because nothing tried was stronger did move.
    """

    x_adv: Tensor
    z: Tensor
    felled_by: np.ndarray
    margin: np.ndarray
    zero_gradient: Tensor
    never_moved: Tensor
    members: tuple[MemberCount, ...]


class Siege:
    """Everything about an encoder that the members need; frozen by the caller, but for the surrogates.

    aim: knows the vote on the scored layer.  knn: the classifier that scores; its decision at aim.k says who has
    fallen.  surrogates: other encoders by name.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
        layers: Layers,
        aim: Aim,
        *,
        knn: FittedKNN,
        layer: str,
        target: str,
        surrogates: Mapping[str, EmbeddingFunction],
        seed: int,
    ) -> None:
        self.layers, self.aim, self.knn, self.seed, self.target = layers, aim, knn, seed, target
        self.scored, self.surrogates = layers.select(layer), dict(surrogates)
        own = select_layer(encoder, "features") is not encoder
        self.names = LAYERS if own else ("features",)  # without features of its own the call is both

    def members(self, attack: Strongest) -> tuple[Member, ...]:
        """Who takes part."""
        return attack.members(layers=self.names, surrogates=tuple(self.surrogates))

    def run(
        self,
        attack: Strongest,
        images: Tensor,
        clean: Tensor,
        *,
        labels: np.ndarray,
        ids: Tensor,
        tried: Mapping[str, Tried],
    ) -> Fall:
        """All members on one batch.  clean: (n, d), the scored layer at images; labels: (n,), the bank's classes.

        tried: attacks of the same call by name; those of another threat model are none of the ensemble's.
        """
        field = _Field(self, images, clean, labels, ids)
        with ExitStack() as frozen:
            for other in self.surrogates.values():
                frozen.enter_context(eval_mode(other))
            fitting = {name: each for name, each in tried.items() if _threat(each.attack) == attack.threat}
            for name, each in fitting.items():
                field.take_over(name, each)
            same = self.aim.branch is None  # through another branch they did something else than the members
            done = [(each.attack, self.target) for each in fitting.values()] if same else []
            for member in self.members(attack):
                if (member.attack, member.climbs) not in done or member.surrogate:
                    field.send(member)
        return field.result()

    def generator(self, member: Member) -> torch.Generator:
        """The source of a member's noise: the evaluation's for the paper's attacks, else one of its own."""
        seed = self.seed if member.common_start else image_seed(self.seed, 0, 0, member.name)
        return torch.Generator().manual_seed(seed)


class _Field:
    """One batch: who stands, and the strongest image of everybody so far."""

    def __init__(self, siege: Siege, images: Tensor, clean: Tensor, labels: np.ndarray, ids: Tensor) -> None:
        self.siege, self.x, self.labels, self.ids = siege, images, labels, ids
        self.own = torch.from_numpy(labels).to(images.device)
        self.vote = siege.aim.vote(self.own)
        self.references: dict[str, Tensor] = {}
        self.best, self.z = images.clone(), clean.clone()
        self.fallen, self.margin = self._judge(clean, self.vote, labels)
        self.felled_by = np.where(self.fallen.cpu().numpy(), CLEAN, "").astype(object)
        self.zero = torch.zeros_like(self.fallen)
        self.climbed, self.moved = torch.zeros_like(self.fallen), torch.zeros_like(self.fallen)
        self.members = [
            MemberCount(name=CLEAN, attack="", black_box=False, seen=len(images), felled=int(self.fallen.sum()))
        ]

    def take_over(self, name: str, tried: Tried) -> None:
        """Count an attack that ran on the whole batch as a member."""
        everybody = torch.arange(len(self.x), device=self.x.device)
        felled = self._take(name, everybody, tried.x_adv, tried.z)
        if tried.climbed:
            self._watch(everybody, tried.x_adv)
        about = MemberCount(name=name, attack=repr(tried.attack), black_box=False, seen=len(self.x), felled=felled)
        self.members.append(about)

    def send(self, member: Member) -> None:
        """Run a member on the images that stand; the batch is made smaller, so that the others cost nothing."""
        keep = (~self.fallen).nonzero().flatten()
        about = MemberCount(name=member.name, attack=repr(member.attack), black_box=member.black_box)
        if len(keep):
            result, extra = self._run(member, keep)
            felled = self._take(member.name, keep, result.x_adv, encode(self.siege.scored, result.x_adv))
            self.zero[keep] |= result.zero_gradient > 0
            if result.backwards and not member.surrogate:
                self._watch(keep, result.x_adv)
            n, forwards = len(keep), result.forwards + extra + 1  # the last one is the judge's
            about = dataclasses.replace(about, seen=n, felled=felled, forwards=n * forwards)
            about = dataclasses.replace(about, backwards=n * result.backwards)
        self.members.append(about)

    def result(self) -> Fall:
        """The outcome of the batch."""
        return Fall(
            x_adv=self.best,
            z=self.z,
            felled_by=self.felled_by.astype(str),
            margin=self.margin.double().cpu().numpy(),
            zero_gradient=self.zero,
            never_moved=self.climbed & ~self.moved,
            members=tuple(self.members),
        )

    def _run(self, member: Member, keep: Tensor) -> tuple[AttackResult, int]:
        """The member's result on some of the images, and the passes that its objective cost besides."""
        x, ids = self.x[keep], self.ids[keep.to(self.ids.device)]
        objective, extra = self._objective(member, x, keep)
        attack: Any = member.attack
        if (narrowed := threat_of(attack.threat, keep)) is not attack.threat:
            attack = dataclasses.replace(attack, threat=narrowed)
        return attack.run(x, objective, generator=self.siege.generator(member), ids=ids), extra

    def _objective(self, member: Member, x: Tensor, keep: Tensor) -> tuple[Objective, int]:
        if member.surrogate:
            return feature_drift(select_layer(self.siege.surrogates[member.surrogate], "features"), x), 1
        if member.climbs in LAYERS:
            layer = self.siege.layers.select(member.climbs)
            fresh = member.climbs not in self.references
            if fresh:  # of the whole batch, as the evaluation of single attacks has it
                self.references[member.climbs] = encode(layer, self.x)
            return feature_drift(layer, x, reference=self.references[member.climbs][keep]), int(fresh)
        vote = self.vote.select(keep)
        if member.climbs == "scores":
            return margin(_scores_of(vote), self.own[keep]), 0
        return dataclasses.replace(vote, loss="ce") if member.climbs == "vote-ce" else vote, 0

    def _take(self, name: str, keep: Tensor, x_adv: Tensor, z: Tensor) -> int:
        """Keep what is stronger: a success first, then the higher margin.  Returns how many images fell just now."""
        wrong, value = self._judge(z, self.vote.select(keep), self.labels[keep.cpu().numpy()], keep)
        before, higher = self.fallen[keep], value > self.margin[keep]
        better = torch.where(before, wrong & higher, wrong | higher)
        at = keep[better]
        self.best[at], self.z[at], self.margin[at] = x_adv[better], z[better].to(self.z.dtype), value[better]
        newly = keep[wrong & ~before]
        self.felled_by[newly.cpu().numpy()] = name
        self.fallen[newly] = True
        return len(newly)

    def _watch(self, keep: Tensor, x_adv: Tensor) -> None:
        """Note which images a member with gradients moved at all."""
        self.climbed[keep] = True
        self.moved[keep] |= (x_adv != self.x[keep]).flatten(1).any(1)

    def _judge(self, z: Tensor, vote: SoftKNN, labels: np.ndarray, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(wrong, margin) of embeddings, both (n,): the decision that scores, and how far the vote leans."""
        ids = self.ids if keep is None else self.ids[keep.to(self.ids.device)]
        knn = self.siege.knn
        scores = knn.score(knn.neighbours(normalize_rows(z, ids)[0]), k=self.siege.aim.k)
        wrong = torch.from_numpy(scores.argmax(1) != labels).to(self.x.device)
        with torch.no_grad():
            return wrong, dataclasses.replace(vote, encode=_itself)(z)


def _itself(z: Tensor) -> Tensor:
    return z


def _scores_of(vote: SoftKNN) -> Callable[[Tensor], Tensor]:
    """Class scores of any number of images: all that an attacker from outside is told."""
    return lambda images: vote.bank.vote(vote.encode(images)).scores


def _threat(attack: Any) -> Any:
    return getattr(attack, "threat", None)
