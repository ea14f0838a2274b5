"""Random noise of the same size: what every attack has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count

from hsat.attacks import InSpace, RandomNoise
from hsat.eval.records import eps_text
from hsat.types import Attack


def with_noise(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks, after one RandomNoise for each threat model among them.

    Noise is called "noise-8" after its eps, "noise-L2-0.5" where that name is taken, and numbered where that one is.
    An attack `InSpace` gets noise in that space.  Attacks without a threat model get none.
    """
    found: dict[str, Attack] = {}
    for attack in attacks.values():
        quiet = _noise_like(attack)
        if quiet is None or quiet in found.values():
            continue
        in_space = isinstance(quiet, InSpace)
        place = type(quiet.space if in_space else quiet.threat).__name__  # type: ignore[union-attr]
        eps = eps_text(quiet.eps if in_space else quiet.threat.eps).removesuffix("/255")  # type: ignore[union-attr]
        longer = f"noise-{place}-{eps}"
        names = chain((f"noise-{eps}", longer), (f"{longer} ({number})" for number in count(2)))
        found[next(name for name in names if name not in found)] = quiet
    return found | dict(attacks)


def _noise_like(attack: Attack) -> RandomNoise | InSpace | None:
    """Random noise under the attack's threat model, in its own space; None where it has no threat model."""
    if isinstance(attack, InSpace):
        inner = _noise_like(attack.attack)
        return None if inner is None else InSpace(attack.space, inner)
    threat = getattr(attack, "threat", None)
    return None if threat is None else RandomNoise(threat)
