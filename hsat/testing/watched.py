"""An attack with a snapshot around every call, and the laws that are watched in all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsat.testing.snapshot import Snapshot
from hsat.types import Objective, ThreatModel

RESULT = "the result is a new tensor, outside every graph"
IDS = "with ids, batch size and order do not matter"
BATCH = "the objective sees the whole batch, in its dtype"
UNTOUCHED = "nothing but the result changes, also when the objective raises"
SETTINGS = "global settings stay, also when the objective raises"
RANDOM_STATES = "global random states stay, also when the objective raises"


class WatchedLawBroken(AssertionError):
    """A law that is watched in every call is broken, whatever the call was made for."""

    def __init__(self, law: str, seen: str) -> None:
        super().__init__(seen)
        self.law = law


@dataclass
class Watched:
    """An attack with a snapshot around every call.

    laws: names of the laws that are watched.  needs_decision: it gets its objectives as the margins of a model.
    calls: how often the objective was asked in the last call.  earlier: the images and the result of the last call,
    which a later call must not write into.
    """

    attack: Any
    threat: ThreatModel
    laws: frozenset[str]
    needs_decision: bool = False
    calls: int = 0
    earlier: dict[str, Tensor] = field(default_factory=dict)

    @property
    def uses_objective(self) -> bool:
        """False where the attack declares that it asks the objective nothing."""
        return bool(getattr(self.attack, "uses_objective", True))

    @property
    def draws_nothing(self) -> bool:
        """Whether the attack declares that it has no random start."""
        return getattr(self.attack, "random_start", None) is False

    def with_eps(self, eps: float | Tensor) -> Watched | None:
        """The attack with another eps, where attack and threat model are dataclasses that allow it."""
        attack, threat = self.attack, self.threat
        if not (dataclasses.is_dataclass(attack) and dataclasses.is_dataclass(threat) and hasattr(attack, "threat")):
            return None
        resized = _resized(threat, eps)
        return Watched(dataclasses.replace(attack, threat=resized), resized, self.laws, self.needs_decision)

    def __call__(
        self,
        x: Tensor,
        objective: nn.Module,
        *,
        start: Tensor | None = None,
        seed: int | None = 3,
        ids: Tensor | None = None,
        success: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The result of the attack; seed: that of the generator, None gives none."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        options: dict[str, object] = {"start": start, "generator": generator, "ids": ids, "success": success}
        tensors = {"x": x} | {name: t for name, t in (("start", start), ("ids", ids)) if t is not None}
        tensors |= self.earlier
        state = None if generator is None or ids is None else generator.get_state()
        with self._unchanged(objective, tensors, seeded=seed is not None):
            shown = self._shown(objective, x)
            result: Tensor = self.attack(
                x, shown, **{name: value for name, value in options.items() if value is not None}
            )
        if state is not None and generator is not None:
            self._watch(IDS, torch.equal(state, generator.get_state()), "with ids it advanced the generator")
        self._check_result(result, tensors)
        self.earlier = {"x of an earlier call": x, "the result of an earlier call": result}
        return result

    def _watch(self, law: str, condition: bool, seen: str) -> None:
        if law in self.laws and not condition:
            raise WatchedLawBroken(law, seen)

    def _shown(self, objective: nn.Module, x: Tensor) -> Objective:
        self.calls = 0

        def shown(v: Tensor) -> Tensor:
            self.calls += 1
            self._watch(BATCH, self.uses_objective, "it declares uses_objective = False and asks the objective")
            form = (tuple(v.shape), v.dtype, v.device)
            expected = (tuple(x.shape), x.dtype, x.device)
            self._watch(BATCH, form == expected, f"the objective was shown {form} for images {expected}")
            value: Tensor = objective(v)
            return value

        return TwoClasses(shown, len(x)) if self.needs_decision else shown

    @contextlib.contextmanager
    def _unchanged(self, objective: nn.Module, tensors: dict[str, Tensor], *, seeded: bool) -> Iterator[None]:
        """A snapshot around a call; what the call broke in the process is set back."""
        error: BaseException | None = None
        grad_mode = torch.is_grad_enabled()
        with torch.inference_mode(False):  # also ends an inference mode that the call leaves on
            torch.set_grad_enabled(grad_mode)
            before = Snapshot(objective, tensors)
            try:
                yield
            except BaseException as raised:
                error = raised
                raise
            finally:
                settings, random_states = before.changed_settings(), before.changed_random_states()
                if not seeded:  # the noise is then torch's own
                    random_states = [name for name in random_states if not name.startswith("torch")]
                values = before.changed_values()
                before.restore_process()
                if not isinstance(error, WatchedLawBroken):
                    when = "" if error is None else " when an error passed through it"
                    for law, changed in ((SETTINGS, settings), (RANDOM_STATES, random_states), (UNTOUCHED, values)):
                        self._watch(law, not changed, f"the attack changed {', '.join(changed)}{when}")

    def _check_result(self, result: Tensor, tensors: dict[str, Tensor]) -> None:
        self._watch(RESULT, isinstance(result, Tensor), f"it returned a {type(result).__name__}")
        self._watch(RESULT, not result.requires_grad, "the result requires a gradient: it is still part of a graph")
        for name, tensor in tensors.items():
            apart = result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            self._watch(RESULT, apart or not result.numel(), f"the result lies in the memory of {name}")


class TwoClasses:
    """An objective as the decision of a model of two logits: zero for the true class, the objective for the other."""

    def __init__(self, objective: Objective, n: int) -> None:
        self.objective, self.labels = objective, torch.zeros(n, dtype=torch.int64)

    def model(self, images: Tensor) -> Tensor:
        """Images -> logits (n, 2)."""
        value = self.objective(images)
        return torch.stack((torch.zeros_like(value), value), 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The objective: the margin of the decision."""
        return self.objective(images)

    def success(self, images: Tensor) -> Tensor:
        """(n,) bool: is the decision wrong?"""
        return self.objective(images) > 0

    def select(self, index: Tensor) -> TwoClasses:
        """The same for as many images as `index` has."""
        return TwoClasses(self.objective, len(index))


def _resized(threat: Any, eps: float | Tensor) -> Any:
    """The threat model with another eps; one that confines another (Masked) passes it on."""
    if any(option.name == "eps" for option in dataclasses.fields(threat)):
        return dataclasses.replace(threat, eps=eps)
    return dataclasses.replace(threat, threat=_resized(threat.threat, eps))
