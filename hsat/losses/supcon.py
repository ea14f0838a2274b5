"""The supervised contrastive loss, for one grouping of the images or for several that share their similarities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
LEAST_TEMPERATURE = 1e-30  # as of kNN: a similarity over less is no float32


def supcon_loss(z: Tensor, group: Tensor | np.ndarray | Sequence[int], *, temperature: float | Tensor = 0.07) -> Tensor:
    """Supervised contrastive loss with the sum over positives outside the logarithm, averaged over anchors.

    Equation 2 of arXiv:2004.11362: with s_ij = cos(z_i, z_j) / temperature, anchor i costs
    log(sum of exp s_ij over j != i) minus the mean of s_ip over its positives p.

    Differentiable twice.  Non-finite embeddings give a non-finite loss: looking for them would stop the device.
    Where `group` lies on a device, that device is read once, to see that there is a positive.

    Deviations from the published code: an anchor without a positive is left out of the mean (there it gives NaN), and
    there is no base temperature (there the loss is multiplied by temperature / base_temperature, by default with equal
    values, which is this loss).

    Args:
        z: (n, d) floats of any scale; rows are normalised here, an all-zero row stays zero.
        group: (n,) ints (a tensor, an array or a list); images with equal ids are positives of each other, never of
            themselves.
        temperature: At least 1e-30; a tensor () is learned: it gets a gradient, too.

    Returns:
        A scalar in float32, or in float64 for float64 embeddings, whatever autocast says, forward and backward.

    Raises:
        ValueError: When shapes disagree, no id occurs twice, or the temperature is below 1e-30 or not finite.
        TypeError: For embeddings that are not floats or ids that are not integers.

    References:
        Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, equation 2.

    Example:
        Four images, two of each group; the groups are orthogonal, so each anchor costs log(1 + 2 / e):

        >>> z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> round(supcon_loss(z, [0, 0, 1, 1], temperature=1.0).item(), 4)
        0.5514
        >>> math.isclose(0.5514, math.log(1 + 2 / math.e), abs_tol=1e-4)
        True
    """
    check_temperature(temperature)
    unit = unit_rows(z)
    ids = _as_ids(group)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"group must hold integer ids, got {ids.dtype}")
    if ids.shape != (len(z),):
        raise ValueError(
            f"{len(z)} embeddings but group has shape {tuple(ids.shape)}; expected ({len(z)},), one id each"
        )
    groups = count_groups(ids)
    if groups == len(ids):
        raise ValueError(
            f"SupCon has no positive pair: the {len(ids)} images lie in {groups} groups of one;"
            " draw at least two images of a group"
        )
    return group_terms(unit, [ids], temperature=temperature)[0]


def _as_ids(group: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    try:
        return torch.as_tensor(group)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"group must hold integer ids, got {type(group).__name__} that torch cannot read ({error}); number text ids"
            " first: np.unique(ids, return_inverse=True)[1]"
        ) from error


def count_groups(ids: Tensor) -> int:
    """How many different ids there are; reads the device."""
    return int(torch.unique(ids).numel())


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError unless the temperature is a positive finite number that similarities can be divided by."""
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
    value = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    if not (math.isfinite(value) and value >= LEAST_TEMPERATURE):
        raise ValueError(
            f"temperature must be a positive finite number, got {value}; the usual value is 0.07 (least:"
            f" {LEAST_TEMPERATURE})"
        )


def unit_rows(z: Tensor) -> Tensor:
    """Rows of z (n, d) divided by their length, in float32 or wider; a zero row stays zero.

    They are divided by the power of two below their largest value first, so that no length overflows or vanishes: that
    loses no digit, and a factor which is constant on a row changes no gradient.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"embeddings must be a tensor (n, d), got {type(z).__name__}")
    if z.ndim != 2:
        hint = "; squeeze the axis of size one" if 1 in z.shape[1:-1] else ""
        raise ValueError(f"embeddings must be (n, d), one row per image; got shape {tuple(z.shape)}{hint}")
    if not z.dtype.is_floating_point:
        raise TypeError(f"embeddings must be floats, got {z.dtype}")
    wide = z if z.dtype == torch.float64 else z.float()
    integer, exponent = _EXPONENT[wide.dtype]
    largest = wide.detach().abs().amax(1, keepdim=True)
    power = (largest.view(integer) & exponent).view(wide.dtype).clamp_min(torch.finfo(wide.dtype).tiny)
    return F.normalize(wide / torch.where(largest == 0, 1.0, power), dim=1)


def group_terms(unit: Tensor, groups: Sequence[Tensor], *, temperature: float | Tensor) -> Tensor:
    """SupCon of every grouping: rows unit (n, d), used as they come, and k id tensors (n,) give k losses (k,).

    The similarities and the denominators are formed once for all groupings.  The sum of an anchor's similarities to
    its positives is its product with the sum of its group's rows, so a further grouping costs n*d and not n*n.
    A grouping without any positive gives NaN: the callers refuse it, where no read of the device is needed.
    On CUDA the sums over groups are bit-reproducible under torch.use_deterministic_algorithms(True) only.
    """
    slots = torch.stack([_slots(ids.to(unit.device)) for ids in groups])
    if isinstance(temperature, Tensor):  # similarities over it are those of rows over its root, which carry a gradient
        unit, temperature = unit / temperature.to(unit).reshape(()).sqrt(), 1.0
    losses: Tensor = _GroupTerms.apply(unit, slots, temperature)
    return losses


def _slots(ids: Tensor) -> Tensor:
    """The ids renumbered into [0, n), equal where they were equal; torch.unique would read the device."""
    ordered, order = torch.sort(ids)
    steps = torch.zeros_like(order)
    steps[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(order).scatter_(0, order, steps.cumsum(0))


def _similarities(unit: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Similarities of all pairs over the temperature, -inf for an image with itself, and log(sum exp) of each row."""
    logits = (unit @ unit.T).div_(temperature).fill_diagonal_(-torch.inf)
    return logits, logits.logsumexp(1, keepdim=True)


def _pull(unit: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each image's positives (n, d), zero where it has none, and each anchor's share in the loss (n, 1)."""
    n = len(unit)
    size = unit.new_zeros(n).index_add_(0, slot, unit.new_ones(n))
    others = (size[slot] - 1).unsqueeze(1)
    sums = torch.zeros_like(unit).index_add(0, slot, unit)
    counted = (others > 0).to(unit.dtype)
    return (sums[slot] - unit) / others.clamp_min(1) * counted, counted / counted.sum()


class _GroupTerms(torch.autograd.Function):
    """The losses (k,) of rows (n, d) and slots (k, n).

    By hand because autograd's matrix products run in half precision when backward is called under autocast, and
    because one product then serves both sides of the similarity matrix.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, slots: Tensor, temperature: float) -> Tensor:
        with torch.autocast(unit.device.type, enabled=False):
            logits, log_sum = _similarities(unit, temperature)
            pulls, shares = (torch.stack(parts) for parts in zip(*(_pull(unit, slot) for slot in slots), strict=True))
            agreement = (unit * pulls).sum(2, keepdim=True) / temperature
            losses = ((log_sum - agreement) * shares).sum((1, 2))
        ctx.temperature = temperature
        ctx.save_for_backward(unit, slots, logits, log_sum, pulls, shares)
        return losses

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        unit, slots, logits, log_sum, pulls, shares = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        with torch.autocast(unit.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph=True: what was saved is cut off from the rows
                logits, log_sum = _similarities(unit, temperature)
                pulls = torch.stack([_pull(unit, slot)[0] for slot in slots])
            weights = grad[:, None, None] * shares
            push = (logits - log_sum).exp() * weights.sum(0)
            return ((push + push.T) @ unit - 2 * (weights * pulls).sum(0)) / temperature, None, None
