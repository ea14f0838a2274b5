"""The recipes that benchmarks/recipes.py compares: the comparators, and the trials for a tuned HSAT and for HSAT+.

python benchmarks/recipe_candidates.py    # the list, in Markdown
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hsat.training import InnerAttackConfig, TrainConfig

PAINTED, EBHI = "painted", "ebhi"
IMAGE_SIZES = {PAINTED: 48, EBHI: 64}
CHECK = 9
"""Passes of a check of the guard: eight attack steps, and three forwards that count as one."""


@dataclass(frozen=True)
class Recipe:
    """A training whose options are to be compared.

    Attributes:
        family: "HiDisc", "HSAT", "tuned HSAT" or "HSAT+".
        change: What distinguishes it, in words.
        options: Of `TrainConfig`, nested; `views` is merged with the common ones.
        trials: The cohorts on which it is a trial.
        head: The projection head.
        activation: "" for the backbone's own, or the name of a module of torch.nn in place of its ReLUs.
        norm: "none", pixels as they are, or "image", each image's channels by their own mean and std.
        input_size: Side to which the encoder resizes its images; 0: as they are.
        warm: Share of the passes that go to a training without attack before this one.
        idea: It is one of the ideas for tissue, tried after the eight trials.
        held_out: Share of the training patients that are held out; the encoder that is best on them is taken.
        remedy: It is one of those tried at 4x, where HSAT+ without augmentation got worse.
    """

    family: str
    change: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[str, ...] = ()
    head: str = "linear"
    activation: str = ""
    norm: str = "none"
    input_size: int = 0
    warm: float = 0.0
    idea: bool = False
    held_out: float = 0.0
    remedy: bool = False

    @property
    def passes_per_batch(self) -> float:
        """Forward and backward passes of a batch; the checks of the guard have their share."""
        attack = self.config(PAINTED, steps=1, seed=0).attack
        if attack.name == "none":
            return 1.0
        if attack.name != "free":
            return attack.steps + 1.0
        return attack.replays + (CHECK / attack.check_every if attack.check_every else 0.0)

    def config(self, cohort: str, *, steps: int, seed: int) -> TrainConfig:
        """The options of a training on one of the cohorts."""
        common: dict[str, Any] = {
            "batch_patients": 8,
            "save_every": steps,
            "steps": steps,
            "seed": seed,
            "channels_last": True,
        }
        views = {"image_size": IMAGE_SIZES[cohort], "augmentation": "he" if cohort == EBHI else "v0"}
        given = dict(self.options)
        views |= given.pop("views", {})
        return TrainConfig(**common | given, views=views)

    def without_attack(self, cohort: str, *, steps: int, seed: int) -> TrainConfig:
        """The options of a training without attack that goes before, at the same loss."""
        config = self.config(cohort, steps=steps, seed=seed)
        return config.model_copy(update={"attack": InnerAttackConfig(name="none")})


def pgd(steps: int) -> dict[str, Any]:
    """PGD whose steps together are 1.25 eps, as the paper's five of 2/255 are."""
    return {"name": "pgd", "steps": steps, "step_size": 10 / steps / 255}


def fast(steps: int, **more: Any) -> dict[str, Any]:
    """Options of a tuned HSAT: fewer steps, so more batches, and temperature .6."""
    return {"attack": pgd(steps), "temperature": 0.6} | more


def plus(attack: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Options of HSAT+ with changes."""
    free = {"name": "free", "replays": 4, "check_every": 50} | dict(attack or {})
    return {"attack": free, "temperature": 0.6, "layer": "features"} | more


def idea(family: str, change: str, **more: Any) -> Recipe:
    """An idea for tissue: a tuned HSAT at the rate of its best trial, or HSAT+, with a change of the network."""
    options, head = (fast(2, lr=2e-3), "linear") if family == TUNED else (plus(), "none")
    return Recipe(family, change, options, head=head, idea=True, **more)


PLAIN = {"views": {"augmentation": "none"}}
SMALL = {"eps": 4 / 255}
MANY = {"batch_patients": 16, "views": {"views": 1}, "loss": "p_s"}
"""Twice the patients and one view of each patch, whose own level then has no positives: as many images."""
TUNED, OURS, BOTH = "tuned HSAT", "HSAT+", (PAINTED, EBHI)
RECIPES: dict[str, Recipe] = {
    "hidisc": Recipe("HiDisc", "no attack", {"attack": {"name": "none"}}),
    "hsat": Recipe("HSAT", "as published: PGD-5, temperature .07"),
    "tuned-pgd2": Recipe(TUNED, "PGD-2, temperature .6", fast(2), BOTH),
    "tuned-pgd2-plain": Recipe(TUNED, "PGD-2, temperature .6, no augmentation", fast(2) | PLAIN, BOTH),
    "tuned-warm": Recipe(TUNED, "temperature .6", {"temperature": 0.6}, BOTH),
    "tuned-warm-plain": Recipe(TUNED, "temperature .6, no augmentation", {"temperature": 0.6} | PLAIN, (PAINTED,)),
    "tuned-plain": Recipe(TUNED, "no augmentation", PLAIN, (PAINTED,)),
    "tuned-pgd2-cool": Recipe(TUNED, "PGD-2, temperature .3, no augmentation", fast(2, temperature=0.3) | PLAIN, BOTH),
    "tuned-pgd2-rate": Recipe(TUNED, "PGD-2, temperature .6, lr 2e-3", fast(2, lr=2e-3), BOTH),
    "tuned-pgd1": Recipe(TUNED, "PGD-1, temperature .6", fast(1), (PAINTED,)),
    "tuned-small": Recipe(TUNED, "eps 4/255 in training", {"attack": SMALL | {"step_size": 1 / 255}}, (EBHI,)),
    "tuned-pgd2-small": Recipe(
        TUNED,
        "PGD-2, temperature .6, eps 4/255 in training",
        {"attack": pgd(2) | SMALL | {"step_size": 2.5 / 255}, "temperature": 0.6},
        (EBHI,),
    ),
    "tuned-pgd2-small-plain": Recipe(
        TUNED,
        "PGD-2, temperature .6, eps 4/255 in training, no augmentation",
        {"attack": pgd(2) | SMALL | {"step_size": 2.5 / 255}, "temperature": 0.6} | PLAIN,
        (EBHI,),
    ),
    "plus": Recipe(OURS, "Free-4, temperature .6, loss on the unit features", plus(), BOTH, head="none"),
    "plus-small": Recipe(OURS, "eps 4/255 in training", plus(SMALL), (EBHI,), head="none"),
    "plus-many": Recipe(OURS, "16 patients x 1 view", plus({"levels": "p_s"}) | MANY, BOTH, head="none"),
    "plus-plain": Recipe(OURS, "no augmentation", plus() | PLAIN, BOTH, head="none"),
    "plus-small-many": Recipe(
        OURS,
        "eps 4/255 in training, 16 patients x 1 view",
        plus(SMALL | {"levels": "p_s"}) | MANY,
        (EBHI,),
        head="none",
    ),
    "plus-pgd2": Recipe(OURS, "PGD-2 in place of Free-4", fast(2, layer="features"), BOTH, head="none"),
    "plus-smooth": Recipe(OURS, "SiLU in place of ReLU", plus(), BOTH, head="none", activation="SiLU"),
    "plus-hot": Recipe(OURS, "temperature 1", plus(temperature=1.0), (PAINTED,), head="none"),
    "plus-rate": Recipe(OURS, "lr 2e-3", plus(lr=2e-3), BOTH, head="none"),
    "plus-free8": Recipe(OURS, "Free-8", plus({"replays": 8}), (PAINTED,), head="none"),
    "tuned-image": idea(TUNED, "PGD-2, temperature .6, lr 2e-3, images standardised", norm="image"),
    "plus-image": idea(OURS, "images standardised", norm="image"),
    "tuned-image-smooth": idea(TUNED, "as before, images standardised, SiLU", norm="image", activation="SiLU"),
    "plus-image-smooth": idea(OURS, "images standardised, SiLU", norm="image", activation="SiLU"),
    "tuned-half": idea(TUNED, "PGD-2, temperature .6, lr 2e-3, half the resolution inside", input_size=32),
    "plus-half": idea(OURS, "half the resolution inside", input_size=32),
    "tuned-warmed": idea(TUNED, "PGD-2, temperature .6, lr 2e-3, first a seventh without attack", warm=1 / 7),
    "plus-warmed": idea(OURS, "first a seventh without attack", warm=1 / 7),
    "hsat-image": Recipe("HSAT", "images standardised", norm="image"),
    "hidisc-image": Recipe("HiDisc", "images standardised", {"attack": {"name": "none"}}, norm="image"),
    "tuned-image-plain": Recipe(
        TUNED, "PGD-2, temperature .6, no augmentation, images standardised", fast(2) | PLAIN, norm="image"
    ),
    "plus-image-plain": Recipe(OURS, "no augmentation, images standardised", plus() | PLAIN, head="none", norm="image"),
    "plus-head-plain": Recipe(
        OURS, "loss on a linear head, no augmentation", plus(layer="embedding") | PLAIN, remedy=True
    ),
    "plus-plain-held": Recipe(
        OURS,
        "no augmentation, the best encoder by held-out patients",
        plus() | PLAIN,
        head="none",
        held_out=0.2,
        remedy=True,
    ),
}
"""The trials of a cohort are those of the families "tuned HSAT" and "HSAT+" that name it, eight of each."""


def main() -> None:
    """Print the list."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = [
        "| recipe | family | what distinguishes it | passes a batch | trial on |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, recipe in RECIPES.items():
        cells = [name, recipe.family, recipe.change, f"{recipe.passes_per_batch:g}", ", ".join(recipe.trials)]
        lines.append(f"| {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
