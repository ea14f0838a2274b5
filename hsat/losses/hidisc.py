"""HiDisc: hierarchical discrimination, a SupCon term per level of the hierarchy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hsat.losses.gather import gather_images
from hsat.losses.supcon import check_temperature, count_groups, group_terms, unit_rows
from hsat.types import LEVELS, HierarchicalBatch, Levels

_LETTERS = {"p": "patient", "s": "slide", "pt": "patch"}
_CODES = ("p_s_pt", "p_s", "p_pt", "s_pt", "p", "s", "pt")


class HiDiscTerms(NamedTuple):
    """Scalars: total is the weighted sum; patch, slide and patient are not weighted, zero where not computed.

    Attributes:
        total: (), patch weight * patch + slide weight * slide + patient weight * patient.
        patch: (), the loss whose positives are views of one patch.
        slide: (), the loss whose positives are patches of one slide.
        patient: (), the loss whose positives are patches of one patient.
    """

    total: Tensor
    patch: Tensor
    slide: Tensor
    patient: Tensor


@dataclass(frozen=True, kw_only=True)
class HiDiscLoss:
    """Weighted sum of SupCon losses whose positives share a patch, a slide, a patient (arXiv:2303.01605, section 3).

    Called on embeddings z (n, d), of any scale, and their Levels or HierarchicalBatch (whose images are not looked
    at), it returns HiDiscTerms in float32, or float64 for float64 embeddings, forward and backward whatever autocast
    says.  At each level the denominator runs over all other images, and the mean over the images that have a positive;
    see `supcon_loss`.  One matrix of similarities serves the three levels.  Nothing is read from the device.

    Positives are pairs of equal ids.  With the slot ids of `HierarchicalBatch.from_grid` the values are those of the
    published code; with true ids a slide or patch that was drawn twice is a positive, where the published code counts
    it as a negative (deliberate).

    With gather=True and several ranks, each rank computes the same loss over all images, and its gradient is such that
    the mean over ranks which DistributedDataParallel takes is the gradient in one process.  Every rank must call it;
    ranks may hold different numbers of images, which are read from the device once per call.  With one rank, or
    without a process group, it is the plain loss.

    Attributes:
        patch: Weight of the patch term, finite and not negative.  At least one of the three weights is above zero; a
            level of weight zero is not computed and its term is a zero.
        slide: Weight of the slide term.
        patient: Weight of the patient term.
        temperature: One for all levels; a tensor () is learned.
        gather: Use the images of all ranks of the default process group as positives and negatives.

    Raises:
        ValueError: For a level with weight but without a positive pair, for shapes that disagree and for weights or
            temperatures out of range.
        TypeError: For ids that are neither Levels nor a HierarchicalBatch.

    References:
        Jiang et al., Hierarchical Discriminative Learning, arXiv:2303.01605, section 3.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> ids = torch.tensor([0, 0, 1, 1])
        >>> terms = HiDiscLoss(patch=1, slide=1, patient=2, temperature=1.0)(z, Levels(ids, ids, ids))
        >>> round(terms.patch.item(), 4), round(terms.total.item(), 4)
        (0.5514, 2.2058)
    """

    patch: float = 1.0
    slide: float = 1.0
    patient: float = 1.0
    temperature: float | Tensor = 0.07
    gather: bool = False

    def __post_init__(self) -> None:
        for level in LEVELS:
            weight = getattr(self, level)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of a level must be finite and at least 0, got {level}={weight}")
        if not any(getattr(self, level) for level in LEVELS):
            raise ValueError(f"all weights are zero, so there is nothing to compute; give one of {LEVELS} a weight")
        check_temperature(self.temperature)

    @classmethod
    def from_code(cls, code: str, **options: Any) -> HiDiscLoss:
        """The loss named by a code of the published scripts: p is patient, s is slide, pt is patch, joined by "_".

        Args:
            code: Such as "p_s_pt" (all levels) or "s_pt" (slide and patch).
            options: The fields of HiDiscLoss; the levels of the code have weight 1 unless given, the others 0.

        Returns:
            The loss.

        Raises:
            ValueError: For an unknown code, or a weight given to a level that the code leaves out.

        Example:
            >>> HiDiscLoss.from_code("s_pt")
            HiDiscLoss(patch=1.0, slide=1.0, patient=0.0, temperature=0.07, gather=False)
        """
        if code not in _CODES:
            raise ValueError(
                f"unknown loss code {code!r}; the codes are {', '.join(_CODES)} (p patient, s slide, pt patch)"
            )
        chosen = {_LETTERS[letter] for letter in code.split("_")}
        for level in LEVELS:
            if level not in chosen and options.get(level):
                raise ValueError(
                    f"{level}={options[level]} was given, but the code {code!r} leaves the {level} level out"
                )
        return cls(**({level: float(level in chosen) for level in LEVELS} | options))

    def __call__(self, z: Tensor, batch: Levels | HierarchicalBatch) -> HiDiscTerms:
        """The terms of embeddings z (n, d) with the ids of `batch`."""
        levels = batch.levels if isinstance(batch, HierarchicalBatch) else batch
        if not isinstance(levels, Levels):
            raise TypeError(f"HiDiscLoss needs Levels or a HierarchicalBatch beside z, got {type(batch).__name__}")
        unit = unit_rows(z)
        if len(unit) != len(levels):
            raise ValueError(f"{len(unit)} embeddings but ids for {len(levels)} images; z needs one row per image")
        weighted = [level for level in LEVELS if getattr(self, level)]
        ids = [getattr(levels, level).to(unit.device) for level in weighted]
        if self.gather:
            unit, ids = gather_images(unit, ids)
        for level, group in zip(weighted, ids, strict=True):
            # A pair on this rank is a pair among all ranks; only without one do the gathered ids have to be read.
            if levels.anchors[level] == 0 and count_groups(group) == len(group):
                self._refuse(level, len(group))
        values = dict(zip(weighted, group_terms(unit, ids, temperature=self.temperature).unbind(), strict=True))
        zero = unit.new_zeros(())
        terms = {level: values.get(level, zero) for level in LEVELS}
        total = sum((getattr(self, level) * values[level] for level in weighted), zero)
        return HiDiscTerms(total=total, **terms)

    def _refuse(self, level: str, n: int) -> None:
        raise ValueError(
            f"the {level} term (weight {getattr(self, level)}) has no positive pair: the {n} images lie in {n} groups"
            f" of one; draw at least two images per {level}, or set {level}=0"
        )
