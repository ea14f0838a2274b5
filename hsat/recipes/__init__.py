"""Recipes: the options of a training as YAML files, and the numbers of the paper."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

SCALES = ("demo", "cpu", "paper")
EXPERIMENTS = tuple(f"experiment-{number}" for number in range(1, 15))
NAMES = ("hsat", "hidisc", "hsat-plus", "demo", *EXPERIMENTS)
ALIASES = {"hidisc": "experiment-1", "hsat": "experiment-2"}
PAPER_NUMBERS = "paper_numbers.yaml"

_PATIENTS = 16  # per batch in the experiments with all levels
_KEPT = {  # of an experiment at a smaller scale; what makes it this experiment, and not its size
    "data": ("slides", "patches", "views", "augmentation", "dynamic"),
    "model": ("head", "embedding_dim", "head_hidden", "dual_norm"),
    "attack": ("name", "levels", "replays", "check_every"),
    "train": ("loss", "clean", "layer"),
}
_PLUS = "hsat-plus"
_LONGER = 1.4  # times HSAT's steps, whose six passes a batch HSAT+ makes 4.2 of: as many passes


def read_recipe(name: str, *, scale: str = "paper") -> dict[str, dict[str, Any]]:
    """The options of a recipe, nested as `hsat train` takes them.

    Args:
        name: "hsat", "hidisc", "demo" or "experiment-1" to "experiment-14" (docs/experiments.md), or "hsat-plus"
            (docs/recipes.md), which takes as many passes as "hsat" at every scale.
        scale: "paper" is the published size, for OpenSRH and GPUs.  "demo" has the size of the demo: minutes on two
            cores, for the synthetic cohort.  "cpu" lies between: some hours on a CPU, for a cohort of one's own.

    Returns:
        {"data": {...}, "model": {...}, "attack": {...}, "train": {...}}

    Raises:
        ValueError: For an unknown name or scale.

    Example:
        >>> read_recipe("hidisc")["attack"], read_recipe("hsat")["attack"]["eps"]
        ({'name': 'none'}, '8/255')
        >>> read_recipe("hsat", scale="demo")["train"]["steps"]
        240
    """
    if name not in NAMES:
        known = ", ".join([*NAMES[: -len(EXPERIMENTS)], "experiment-1 ... experiment-14"])
        raise ValueError(f"no recipe is called {name!r}; there are {known}")
    if scale not in SCALES:
        raise ValueError(f"no scale is called {scale!r}; there are {', '.join(SCALES)}")
    if name == "demo":
        name, scale = "hsat", "demo"
    whole = _read(f"{ALIASES.get(name, name)}.yaml")
    whole.get("data", {}).pop("root", None)
    if scale == "paper":
        return whole
    size = _read(f"{scale}.yaml")
    for section, options in _KEPT.items():
        kept = {key: whole[section][key] for key in options if key in whole.get(section, {})}
        size[section] = size.get(section, {}) | kept
    if name == _PLUS:
        size["train"] |= {
            "temperature": whole["train"]["temperature"],
            "steps": round(_LONGER * size["train"]["steps"]),
        }
    size["train"]["batch_patients"] *= whole["train"]["batch_patients"] // _PATIENTS  # fewer views of more patients
    return size


def read_paper_numbers() -> dict[str, Any]:
    """The printed numbers of the paper's tables.

    Returns:
        By the number of the table: its title, levels, columns, metrics and rows, as in paper_numbers.yaml.

    Example:
        >>> read_paper_numbers()[1]["rows"][0]["printed"]["patch"]["PGD-8"]  # HiDisc: accuracy, mean class accuracy
        [5.52, 5.01]
    """
    return _read(PAPER_NUMBERS)


def _read(file: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content
