"""Which names of the paper a file of weights would fit: for errors that say what to type instead."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from hsat.models.dual_norm import convert_to_dual
from hsat.models.naming import best_naming
from hsat.models.zoo import PAPER_NAMES, Architecture, create_backbone

SMALLEST = 100  # tensors; every backbone of the paper has more


def fitting_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of `PAPER_NAMES` whose backbone has exactly the names and shapes that the file has, in their order.

    Where the file's names say whether pixels were normalised, only names that agree.  Backbones are built without
    storage for this, once per process: a second or two.
    """
    if len(state) < SMALLEST:
        return []
    shapes = Counter(tuple(value.shape) for value in state.values())
    found = []
    for name, architecture in PAPER_NAMES.items():
        target = _backbone(_first_of_kind(name))
        if Counter(tuple(value.shape) for value in target.values()) - shapes:
            continue
        naming = best_naming(state, target)
        fits = {naming(key): value for key, value in state.items()}
        zoo, normalises = naming.layout == "published zoo", architecture.normalisation is not None
        agrees = zoo == normalises or not naming.layout.startswith("published")
        if agrees and all(key in fits and fits[key].shape == value.shape for key, value in target.items()):
            found.append(name)
    return found


def alike_names(name: str) -> list[str]:
    """The other names of `PAPER_NAMES` that stand for a backbone of the same names and shapes."""
    wanted = _shapes(name)
    return [other for other in PAPER_NAMES if other != name and _shapes(other) == wanted]


def _shapes(name: str) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in _backbone(_first_of_kind(name)).items()}


def _first_of_kind(name: str) -> str:
    """The first name with the same architecture, so that each is built once."""

    def kind(architecture: Architecture) -> tuple[object, ...]:
        return architecture.timm, architecture.options, architecture.dual

    return next(other for other, found in PAPER_NAMES.items() if kind(found) == kind(PAPER_NAMES[name]))


@functools.cache
def _backbone(name: str) -> dict[str, Tensor]:
    """The state of a name's backbone, under the encoder's names, on the meta device."""
    with torch.device("meta"):
        backbone = create_backbone(PAPER_NAMES[name], pretrained=False)
        backbone = convert_to_dual(backbone) if PAPER_NAMES[name].dual else backbone
    return {f"backbone.{entry}": value for entry, value in backbone.state_dict().items()}
