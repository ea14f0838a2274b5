"""How many passes attacks make for each image, counted on a stand-in, and how many images a diagnosis can afford."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import margin
from hsat.classifiers import DecisionModel, NearestCentroid
from hsat.embedding import attack_unscored
from hsat.eval.masking import FULL_STEPS, POINTS, QUERIES, UNBOUNDED_SIZES, is_plain, same_climb
from hsat.types import Attack, EmbeddingTable, Objective

SHARE = 0.25  # of an evaluation that its diagnosis may take
LEAST_DIAGNOSED, MOST_DIAGNOSED = 8, 32
_BACKWARD = 2  # forward passes that a backward pass costs, where nothing was measured
_STAND_IN_SIDE = 16  # pixels of the images on which passes are counted


def affordable_diagnosis(images: int, attacks: Mapping[str, Attack]) -> int:
    """So many images that their diagnosis takes at most a quarter of an evaluation of these attacks.

    By passes, so that the number depends on the settings alone; at least 8, with which gross masking is seen, and at
    most 32.

    Args:
        images: Queries of the evaluation.
        attacks: By name.
    """
    counted = [count_passes(attack) for attack in attacks.values()]
    evaluation = images * (1 + sum(1 + forwards + _BACKWARD * backwards for forwards, backwards in counted))
    forwards, backwards = diagnosis_passes([attack for attack in attacks.values() if is_diagnosed(attack)])
    each = forwards + _BACKWARD * backwards
    fitting = int(evaluation * SHARE / (1 - SHARE) / each) if each else MOST_DIAGNOSED
    return min(MOST_DIAGNOSED, max(LEAST_DIAGNOSED, fitting))


def is_diagnosed(attack: Attack) -> bool:
    """Whether an evaluation diagnoses this attack."""
    from hsat.eval.diagnostics import can_diagnose

    return can_diagnose(attack)


def diagnosis_passes(attacks: Sequence[Attack]) -> tuple[int, int]:
    """Forward and backward passes per image, at most, of the diagnosis of these attacks on one model."""
    if not attacks:
        return 0, 0
    different = {same_climb(attack): attack for attack in attacks}.values()
    threats = {repr(getattr(attack, "threat", None)) for attack in attacks}
    climbs = 0
    for attack in different:
        steps, restarts = getattr(attack, "steps", None), getattr(attack, "restarts", 1)
        if not isinstance(steps, int):
            climbs += 1
        elif is_plain(attack):
            climbs += 2 * steps
        else:
            climbs += restarts * (1 + steps // 2 + 3 * steps)
    unbounded = len(UNBOUNDED_SIZES) * FULL_STEPS
    searches = 2 * POINTS + QUERIES + 7
    forwards = climbs + 6 * len(different) + searches * len(threats) + 2 * unbounded + 4
    return forwards, climbs + unbounded


def count_passes(attack: Attack, *, classes: int = 2, of_slides: bool = False) -> tuple[int, int]:
    """Forward and backward passes per image of an attack, at most.

    Args:
        attack: Any attack.
        classes: Number of classes, on which a targeted attack may depend.
        of_slides: Whether its objective is one number for all images, as that of a slide.

    Returns:
        Both, counted on a stand-in that never gives way; of an attack that only fits images of another shape, such as
        one with a mask, what its settings say.
    """
    model = DecisionModel(_StandIn(max(2, classes)), NearestCentroid().fit(_stand_in_bank(max(2, classes))), wide=True)
    images = torch.linspace(0.2, 0.8, 3 * _STAND_IN_SIDE**2).reshape(1, 3, _STAND_IN_SIDE, _STAND_IN_SIDE)
    decision, ids = margin(model.eval(), torch.zeros(1, dtype=torch.int64)), torch.zeros(1, dtype=torch.int64)
    objective: Objective = (lambda shown: decision(shown).sum()) if of_slides else decision
    try:
        result = attack_unscored(attack, images, objective, generator=torch.Generator().manual_seed(0), ids=ids)
    except (ValueError, RuntimeError, TypeError, IndexError):  # such as a mask of another size
        return _stated_passes(attack)
    if result.members is None:
        return int(result.forwards), int(result.backwards)
    return sum(one.forwards for one in result.members), sum(one.backwards for one in result.members)


def _stated_passes(attack: Attack) -> tuple[int, int]:
    """What the settings of an attack say of its passes; those of the attack inside for one in another space."""
    inner = getattr(attack, "attack", attack)
    steps = getattr(inner, "steps", 0) * getattr(inner, "restarts", 1)
    return steps, steps


class _StandIn(nn.Module):
    """An encoder of no cost whose decisions stay: the first class, and a little of the others that images can move."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes

    def features(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) -> (n, classes)."""
        middle = 1e-3 * (images.mean((1, 2, 3)) - 0.3)
        others = [middle * (place + 1) / self._classes for place in range(self._classes - 1)]
        return torch.stack((torch.ones_like(middle), *others), 1)

    def forward(self, images: Tensor) -> Tensor:
        """The same."""
        return self.features(images)


def _stand_in_bank(classes: int) -> EmbeddingTable:
    index = np.arange(classes)
    return EmbeddingTable(np.eye(classes), index, index, index, index, tuple(map(str, index)))
