"""Attacks on another description of the images: objectives after a transform, and attacks in a space of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hsat.attacks.threat import check_threat, detach_images, require_range
from hsat.types import Attack, AttackResult, Objective, SuccessTest, ThreatModel


@dataclass(frozen=True, eq=False)
class ComposedObjective:
    """An objective of images, as a function of what the images are made from; see `compose_objective`."""

    transform: Callable[[Tensor], Tensor]
    objective: Objective

    def __call__(self, variable: Tensor) -> Tensor:
        """objective(transform(variable))."""
        return self.objective(self.transform(variable))

    @property
    def stationary_at_clean(self) -> bool:
        """What the objective says of itself: a stationary point of it is one of the composition."""
        return bool(getattr(self.objective, "stationary_at_clean", False))

    @property
    def select(self) -> Callable[[Tensor], ComposedObjective]:
        """The same for some images of the batch; missing (AttributeError) where the objective has none."""
        narrow = self.objective.select  # type: ignore[attr-defined]
        select = getattr(self.transform, "select", None)
        return lambda index: ComposedObjective(self.transform if select is None else select(index), narrow(index))


def compose_objective(transform: Callable[[Tensor], Tensor], objective: Objective) -> ComposedObjective:
    """The objective variable -> objective(transform(variable)): the attack moves what the images are made from.

    transform: a differentiable function of (n, ...) that treats every row by itself, such as `srh_to_rgb` from the two
    recorded channels to the three that encoders see.  One that knows its batch offers `.select(index)`.
    Per-image values stay per image, and `.select` and `stationary_at_clean` are those of the objective.
    """
    return ComposedObjective(transform, objective)


@runtime_checkable
class Parametrization(Protocol):
    """Another description of images, next to clean ones: what an attacker moves in place of pixels."""

    def encode(self, y: Tensor, x: Tensor) -> Tensor:
        """The variable (n, ...) that describes images y next to clean images x, both (n, c, h, w) in [0, 1]."""

    def decode(self, variable: Tensor, x: Tensor) -> Tensor:
        """Images in [0, 1] from the variable that describes them; that of x next to x gives x bit for bit."""

    def check(self, threat: ThreatModel | None) -> None:
        """Raise ValueError for a threat model that makes no sense for the variable; None: the attack names none."""


@dataclass(frozen=True, eq=False)
class _Decoding:
    """`space.decode` next to a batch of clean images."""

    space: Parametrization
    x: Tensor

    def __call__(self, variable: Tensor) -> Tensor:
        return self.space.decode(variable, self.x)

    def select(self, index: Tensor) -> _Decoding:
        return _Decoding(self.space, self.x[index.to(self.x.device)])


@dataclass(frozen=True)
class Reparametrized:
    """An attack that moves another description of the images: the recorded channels, the stains.

    space: `RawChannels`, `Stains`, or a `Parametrization` of yours.  attack: any attack; its threat model holds for the
    variable of that space, not for pixels: its eps and step size are in the variable's units.

    It is an attack on images like any other: the images are described in the space, attacked there with the objective
    composed with the decoding, and turned back into images.  eps = 0 gives back x bit for bit.  `start` is encoded;
    `success` is asked about images.  `eps` is that of the attack; there is no `.threat`, since there is no ball of
    pixels.  Raises ValueError for images outside [0, 1] and for a threat model that does not fit the space.
    """

    space: Parametrization
    attack: Attack

    def __post_init__(self) -> None:
        if not isinstance(self.space, Parametrization):
            raise TypeError(
                f"space must be a Parametrization such as RawChannels(srh_to_rgb) or Stains(), got {self.space!r}"
            )
        if not callable(getattr(self.attack, "run", None)):
            raise TypeError(f"attack must be an attack such as PGD(Linf(8/255), ...), got {self.attack!r}")
        threat = getattr(self.attack, "threat", None)
        if threat is not None:
            check_threat(threat)
        self.space.check(threat)

    @property
    def eps(self) -> float | Tensor:
        """eps of the attack, in units of the space's variable; 0 where the attack names none."""
        eps: float | Tensor = getattr(getattr(self.attack, "threat", None), "eps", 0.0)
        return eps

    @property
    def random_start(self) -> bool | None:
        """Whether the attack says that it begins at a random point."""
        return getattr(self.attack, "random_start", None)

    @property
    def uses_objective(self) -> bool:
        """Whether the attack asks the objective; one that says nothing of it does."""
        return bool(getattr(self.attack, "uses_objective", True))

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
        """Adversarial images, same shape, dtype and device as x, detached; see `run`."""
        decode = self._decoding(x)
        variable = self.attack(
            self.space.encode(decode.x, decode.x),
            compose_objective(decode, objective),
            start=None if start is None else self.space.encode(start.detach().to(decode.x), decode.x),
            generator=generator,
            ids=ids,
            success=None if success is None else compose_objective(decode, success),
        )
        return decode(variable).detach()

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> AttackResult:
        """The same with the record of the attack; arguments as in every attack's `run`, in terms of images."""
        decode = self._decoding(x)
        result = self.attack.run(
            self.space.encode(decode.x, decode.x),
            compose_objective(decode, objective),
            start=None if start is None else self.space.encode(start.detach().to(decode.x), decode.x),
            generator=generator,
            ids=ids,
            success=None if success is None else compose_objective(decode, success),
        )
        return dataclasses.replace(result, x_adv=decode(result.x_adv).detach())

    def _decoding(self, x: Tensor) -> _Decoding:
        return _Decoding(self.space, require_range(detach_images(x), 0.0, 1.0))
