"""Which threat model --threat names, and the attacks of an evaluation under it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hsat.attacks import L2, AttackEnsemble, Linf, RawChannels, Reparametrized, Stains
from hsat.attacks.threat import eps_text
from hsat.cli.options import parse_pixels, split_commas
from hsat.data import Cohort, srh_to_rgb
from hsat.eval import ensemble_attacks, paper_attacks
from hsat.types import Attack

Threat = Literal["linf", "l2", "raw_srh", "stain", "stain_image"]
EPS = {
    "linf": [4 / 255, 8 / 255],  # a share of the pixel range, on every channel that the encoder sees
    "l2": [0.5, 1.0],  # a Euclidean length in units of the pixel range, of a whole patch
    "raw_srh": [4 / 255, 8 / 255],  # a share of the 16-bit range, on the two recorded channels
    "stain": [0.05, 0.1],  # an optical density, of haematoxylin and of eosin at every pixel
    "stain_image": [0.1, 0.2],  # the same for the whole patch at once
}
"""The radii that are measured when none are given, and what they mean."""


def lengths(value: Any) -> list[float]:
    """Radii of any size; `check_radii` knows which threat models allow more than 1.

    Args:
        value: A text such as "8/255,1.5", or numbers.

    Returns:
        The radii.

    Raises:
        ValueError: For other texts, and for negative or infinite radii.
    """
    try:
        numbers = [float(Fraction(part) if isinstance(part, str) else part) for part in split_commas(value)]
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise ValueError(f"write fractions such as 8/255 or numbers such as 0.03; got {value!r}") from error
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"radii are finite and not negative; got {value!r}")
    return numbers


Lengths = Annotated[list[float], BeforeValidator(lengths)]


def check_radii(threat: Threat, eps_values: list[float]) -> list[float]:
    """The radii; ValueError for one above the pixel range where eps is a share of it."""
    return [parse_pixels(eps) for eps in eps_values] if threat in ("linf", "raw_srh") else eps_values


def attacks_under(
    threat: Threat, eps_values: Sequence[float], *, names: Sequence[str], steps: int, step_size: float | None
) -> dict[str, Attack]:
    """The paper's attacks under a threat model.

    Args:
        threat: What the attacks may change.
        eps_values: Radii in the unit of the threat model.
        names: Such as pgd, bim and mifgsm.
        steps: Gradient steps.
        step_size: Size of a step; None is eps / 4.

    Returns:
        {"PGD-8": ...} or {"PGD-l2-1": ...}
    """
    attacks: dict[str, Attack] = {}
    for eps in eps_values:
        size = eps / 4 if step_size is None else step_size
        if threat == "linf":
            attacks |= paper_attacks((eps,), steps=steps, step_size=size, names=names)
            continue
        models: dict[str, Any] = {"l2": L2, "raw_srh": Linf}
        ball = models[threat](eps) if threat in models else Linf(eps, low=-max(1.0, eps), high=max(1.0, eps))
        for name, attack in paper_attacks((1.0,), steps=steps, step_size=size, names=names, ffgsm_step=None).items():
            inside = dataclasses.replace(attack, threat=ball)  # type: ignore[type-var]
            title = f"{name.partition('-')[0]}-{threat}-{eps_text(eps).removesuffix('/255')}"
            attacks[title] = _in_space(threat, inside)
    return attacks


def ensembles_under(
    threat: Threat, eps_values: Sequence[float], *, steps: int, step_size: float | None
) -> dict[str, AttackEnsemble]:
    """The ensembles under a ball of pixels.

    Args:
        threat: "linf" or "l2".
        eps_values: Radii.
        steps: Gradient steps of the drift attacks.
        step_size: Size of a step; None is eps / 4.

    Returns:
        {"ensemble-8": ...} or {"ensemble-l2-1": ...}

    Raises:
        ValueError: For other threat models.
    """
    if threat == "linf":
        return ensemble_attacks(eps_values, steps=steps, step_size=step_size)
    if threat != "l2":
        raise ValueError(f"--attacks ensemble needs a ball of pixels: --threat linf or l2, not {threat}")
    return {
        f"ensemble-l2-{eps_text(eps).removesuffix('/255')}": AttackEnsemble(L2(eps), steps=steps, step_size=step_size)
        for eps in eps_values
    }


def _in_space(threat: Threat, attack: Any) -> Attack:
    if threat == "raw_srh":
        return Reparametrized(RawChannels(srh_to_rgb), attack)
    if threat == "l2":
        return attack  # type: ignore[no-any-return]
    return Reparametrized(Stains(per_pixel=threat == "stain"), attack)


def check_threat(threat: Threat, cohort: Cohort) -> None:
    """Check that a threat model fits the cohort's kind of image.

    Raises:
        ValueError: For raw channels of colour images, and stains of SRH patches.
    """
    if threat == "raw_srh" and cohort.kind != "srh":
        raise ValueError("--threat raw_srh is for SRH patches of two recorded channels; these are colour images")
    if threat.startswith("stain") and cohort.kind != "rgb":
        raise ValueError("--threat stain is for stained colour images; SRH patches have no stains. Use raw_srh or linf")
