"""The attacks of the published evaluation, by any of the names they go under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count

from hsat.attacks import BIM, FFGSM, FGSM, MIFGSM, PGD, AttackEnsemble, Linf, RandomNoise, Reparametrized
from hsat.attacks.threat import eps_text
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


def ensemble_attacks(
    eps_values: Sequence[float] = (4 / 255, 8 / 255),
    *,
    steps: int = 10,
    step_size: float | None = 2 / 255,
    decision_steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    queries: int = 1000,
) -> dict[str, AttackEnsemble]:
    """Linf ensembles {"ensemble-4": ..., "ensemble-8": ...}: `AttackEnsemble.standard` but for the drift members.

    Their steps and step_size are those of `paper_attacks`, so that attacks of the same call count as members.
    """
    return {
        f"ensemble-{eps_text(eps).removesuffix('/255')}": AttackEnsemble(
            Linf(eps),
            steps=steps,
            step_size=step_size,
            decision_steps=decision_steps,
            restarts=restarts,
            targets=targets,
            queries=queries,
        )
        for eps in eps_values
    }


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


def add_noise_baselines(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks, after one RandomNoise for each threat model among them.

    Noise is called "noise-8" after its eps, "noise-L2-0.5" where that name is taken, and numbered where that one is.
    An attack `Reparametrized` gets noise in that space.  Attacks without a threat model get none.
    """
    chosen: dict[str, Attack] = {}
    for attack in attacks.values():
        noise = noise_like(attack)
        if noise is None or noise in chosen.values():
            continue
        in_space = isinstance(noise, Reparametrized)
        place = type(noise.space if in_space else noise.threat).__name__  # type: ignore[union-attr]
        eps = eps_text(noise.eps if in_space else noise.threat.eps).removesuffix("/255")  # type: ignore[union-attr]
        longer = f"noise-{place}-{eps}"
        names = chain((f"noise-{eps}", longer), (f"{longer} ({number})" for number in count(2)))
        chosen[next(name for name in names if name not in chosen)] = noise
    return chosen | dict(attacks)


def noise_like(attack: Attack) -> RandomNoise | Reparametrized | None:
    """Random noise under the attack's threat model, in its own space; None where it has no threat model."""
    if isinstance(attack, Reparametrized):
        inner = noise_like(attack.attack)
        return None if inner is None else Reparametrized(attack.space, inner)
    threat = getattr(attack, "threat", None)
    return None if threat is None else RandomNoise(threat)
