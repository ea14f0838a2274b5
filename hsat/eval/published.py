"""The attacks of the published evaluation, by any of the names they go under."""

from __future__ import annotations

from collections.abc import Sequence

from hsat.attacks import BIM, FFGSM, FGSM, MIFGSM, PGD, Linf
from hsat.eval.records import eps_text
from hsat.types import Attack

ALIASES = {
    "pgd": "PGD",
    "pgd_r": "PGD",
    "pgd_knn": "PGD",
    "bim": "BIM",
    "bim_r": "BIM",
    "bimr_knn": "BIM",
    "mifgsm": "MIFGSM",
    "mifgsm_r": "MIFGSM",
    "mifgsn_r": "MIFGSM",
    "mifgsmr_knn": "MIFGSM",
    "ffgsm": "FFGSM",
    "ffgsm_r": "FFGSM",
    "ffgsmr": "FFGSM",
    "ffgsmr_knn": "FFGSM",
    "fgsm": "FGSM",
}


def paper_attacks(
    eps_values: Sequence[float] = (4 / 255, 8 / 255),
    *,
    steps: int = 10,
    step_size: float = 2 / 255,
    names: Sequence[str] = ("pgd", "bim", "mifgsm"),
    random_start: bool | None = True,
    ffgsm_step: float | None = 10 / 255,
) -> dict[str, Attack]:
    """Linf attacks as the published evaluation runs them, {"PGD-4": ..., "BIM-4": ...}, all with a random start.

    eps_values: fractions of the pixel range; a column's name carries eps in grey levels.  names: of the paper, its
    README or its code, in either case (pgd_r, bimr_knn, mifgsn_r, ...).  BIM with a random start is PGD, kept because
    the paper's tables have both rows.  FFGSM takes the published step of 10/255 whatever eps is; FGSM has no start.

    random_start: of PGD, BIM and MI-FGSM; None lets each begin as its own paper says (PGD at a random point, the others
    at the images).  ffgsm_step: None is 1.25 eps, as in FFGSM's own paper.  Raises ValueError for an unknown name.
    """
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    attacks: dict[str, Attack] = {}
    for eps in eps_values:
        for kind in kinds:
            attacks[f"{kind}-{eps_text(eps).removesuffix('/255')}"] = _attack(
                kind, Linf(eps), steps, step_size, random_start=random_start, ffgsm_step=ffgsm_step
            )
    return attacks


def _kind(name: str) -> str:
    kind = ALIASES.get(name.strip().lower())
    if kind is None:
        raise ValueError(f"unknown attack {name!r}; choose from {', '.join(ALIASES)}")
    return kind


def _attack(
    kind: str, threat: Linf, steps: int, step_size: float, *, random_start: bool | None, ffgsm_step: float | None
) -> Attack:
    if kind == "FFGSM":
        return FFGSM(threat, step_size=ffgsm_step)
    if kind == "FGSM":
        return FGSM(threat)
    attacks: dict[str, type[PGD] | type[BIM] | type[MIFGSM]] = {"PGD": PGD, "BIM": BIM, "MIFGSM": MIFGSM}
    start = kind == "PGD" if random_start is None else random_start
    return attacks[kind](threat, step_size=step_size, steps=steps, random_start=start)
