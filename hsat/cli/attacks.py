"""Which threat model --threat names, which attacks --attacks names, and the attacks of an evaluation under both."""

from __future__ import annotations

import dataclasses
import difflib
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from hsat.attacks import (
    APGD,
    DIFGSM,
    L2,
    NIFGSM,
    TIFGSM,
    VMIFGSM,
    AttackEnsemble,
    Linf,
    RandomNoise,
    RawChannels,
    Reparametrized,
    Square,
    Stains,
)
from hsat.attacks.threat import eps_text
from hsat.cli.options import parse_pixels, split_commas
from hsat.data import Cohort, srh_to_rgb
from hsat.eval import ensemble_attacks, paper_attacks
from hsat.eval.paper_attacks import ALIASES
from hsat.training.config import parse_fraction
from hsat.types import Attack, ThreatModel
from hsat.untrusted import shown

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
        numbers = [parse_fraction(part) if isinstance(part, str) else float(part) for part in split_commas(value)]
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise ValueError(f"write fractions such as 8/255 or numbers such as 0.03; got {shown(value)}") from error
    if not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"radii are finite and not negative; got {value!r}")
    return numbers


Lengths = Annotated[list[float], BeforeValidator(lengths)]


def check_radii(threat: Threat, eps_values: list[float]) -> list[float]:
    """The radii; ValueError for one above the pixel range where eps is a share of it."""
    return [parse_pixels(eps) for eps in eps_values] if threat in ("linf", "raw_srh") else eps_values


@dataclass(frozen=True)
class AttackNumbers:
    """What --threat, --eps, --steps and --step_size say of an attack.

    Attributes:
        ball: Where it may go, in the space of the threat model.
        steps: Gradient steps.
        step_size: Size of a step.
        of_pixels: Whether it is the published threat model, with its published constants.
    """

    ball: ThreatModel
    steps: int
    step_size: float
    of_pixels: bool


@dataclass(frozen=True)
class NamedAttack:
    """An attack of --attacks.

    Attributes:
        title: What columns of tables call it.
        text: A line that says what it does.
        make: Makes it; None for ensembles, which are made after all others.
    """

    title: str
    text: str
    make: Callable[[AttackNumbers], Attack] | None = None


def _published(name: str) -> Callable[[AttackNumbers], Attack]:
    """An attack of the published evaluation in the space of a threat model."""

    def make(numbers: AttackNumbers) -> Attack:
        options: dict[str, Any] = {} if numbers.of_pixels else {"ffgsm_step": None}
        ((_, attack),) = paper_attacks(
            (1.0,), steps=numbers.steps, step_size=numbers.step_size, names=(name,), **options
        ).items()
        inside: Attack = dataclasses.replace(attack, threat=numbers.ball)  # type: ignore[type-var]
        return inside

    return make


def _momentum(kind: type[NIFGSM] | type[DIFGSM] | type[TIFGSM] | type[VMIFGSM]) -> Callable[[AttackNumbers], Attack]:
    return lambda numbers: kind(numbers.ball, step_size=numbers.step_size, steps=numbers.steps)


QUERIES_PER_STEP = 100
"""Of Square, whose queries cost a forward pass each: 1,000 at the default of 10 steps."""

ENSEMBLE = "ensemble"
ATTACKS = {
    "pgd": NamedAttack("PGD", "gradient steps from a random point", _published("pgd")),
    "bim": NamedAttack("BIM", "PGD once more, for the paper's tables: BIM with a random start", _published("bim")),
    "mifgsm": NamedAttack("MIFGSM", "gradient steps with momentum, from a random point", _published("mifgsm")),
    "fgsm": NamedAttack("FGSM", "one step of size eps from the image", _published("fgsm")),
    "ffgsm": NamedAttack("FFGSM", "one step from a random point", _published("ffgsm")),
    "apgd": NamedAttack(
        "APGD",
        "Auto-PGD, which finds its own step size; worth 50 steps or more",
        lambda numbers: APGD(numbers.ball, steps=numbers.steps),
    ),
    "nifgsm": NamedAttack("NIFGSM", "momentum with a look ahead; carries over to other encoders", _momentum(NIFGSM)),
    "difgsm": NamedAttack("DIFGSM", "momentum through resized images; carries over", _momentum(DIFGSM)),
    "tifgsm": NamedAttack("TIFGSM", "momentum with blurred gradients; carries over", _momentum(TIFGSM)),
    "vmifgsm": NamedAttack("VMIFGSM", "momentum with 20 more gradients a step; carries over", _momentum(VMIFGSM)),
    "square": NamedAttack(
        "Square",
        f"search by values alone, without gradients; {QUERIES_PER_STEP} queries for every step of --steps",
        lambda numbers: Square(numbers.ball, queries=QUERIES_PER_STEP * numbers.steps, area=0.3),
    ),
    "noise": NamedAttack(
        "noise", "a random point: no attack, what others have to beat", lambda numbers: RandomNoise(numbers.ball)
    ),
    ENSEMBLE: NamedAttack(ENSEMBLE, "several attacks in turn; a patch is robust only if all of them fail"),
}
"""All attacks by the name that --attacks takes."""

PUBLISHED = "pgd,bim,mifgsm"
"""The attacks of the paper's tables, the default under --preset paper."""


def describe_attacks() -> str:
    """All names with a line each."""
    width = max(map(len, ATTACKS))
    return "\n".join(f"{name:<{width}}  {one.text}" for name, one in ATTACKS.items())


def check_names(names: list[str]) -> list[str]:
    """The names, in small letters.

    Args:
        names: Of attacks, or "list".

    Returns:
        The names; those of the paper and its code stay as they are.

    Raises:
        SystemExit: For "list", after all attacks are printed.
        ValueError: For an unknown name, with the nearest one and all others.
    """
    names = [name.strip().lower() for name in names]
    if "list" in names:
        print(describe_attacks())
        raise SystemExit(0)
    known = [*ATTACKS, *ALIASES]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            listed = textwrap.indent(describe_attacks(), "    ")
            raise ValueError(f"got the unknown attack {name!r}{hint} Choose from\n{listed}")
    return names


AttackNames = Annotated[list[str], BeforeValidator(split_commas), AfterValidator(check_names)]


def attacks_under(
    threat: Threat, eps_values: Sequence[float], *, names: Sequence[str], steps: int, step_size: float | None
) -> dict[str, Attack]:
    """The attacks of these names under a threat model; ensembles come last, since they take the others into account.

    Args:
        threat: What the attacks may change.
        eps_values: Radii in the unit of the threat model.
        names: Keys of `ATTACKS`, or other names of the paper's attacks.
        steps: Gradient steps.
        step_size: Size of a step; None is eps / 4.

    Returns:
        {"PGD-8": ...} or {"PGD-l2-1": ...}
    """
    kinds = [ATTACKS.get(name) or ATTACKS[ALIASES[name].lower()] for name in check_names(list(names))]
    attacks: dict[str, Attack] = {}
    for eps in eps_values:
        balls: dict[str, Any] = {"linf": Linf, "l2": L2, "raw_srh": Linf}
        ball = balls[threat](eps) if threat in balls else Linf(eps, low=-max(1.0, eps), high=max(1.0, eps))
        size = eps / 4 if step_size is None else step_size
        numbers = AttackNumbers(ball, steps, size, of_pixels=threat == "linf")
        for kind in dict.fromkeys(kinds):
            if kind.make is not None:
                attacks[_column(kind.title, threat, eps)] = _in_space(threat, kind.make(numbers))
    if ATTACKS[ENSEMBLE] in kinds:
        attacks |= ensembles_under(threat, eps_values, steps=steps, step_size=step_size)
    return attacks


def _column(title: str, threat: Threat, eps: float) -> str:
    """What tables call an attack: PGD-8, PGD-l2-1; noise as the baselines that are measured anyway."""
    size = eps_text(eps).removesuffix("/255")
    return f"{title}-{size}" if threat == "linf" or title == ATTACKS["noise"].title else f"{title}-{threat}-{size}"


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
    if threat in ("linf", "l2"):
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
