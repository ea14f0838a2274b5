"""One step of adversarial training: attack the batch, then the losses to descend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.attacks import hierarchical
from hsat.losses import HiDiscTerms
from hsat.models import branch, frozen, is_dual
from hsat.types import Attack, HierarchicalBatch

Loss = Callable[[Tensor, HierarchicalBatch], HiDiscTerms | Tensor]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StepResult(NamedTuple):
    """loss: the scalar to call backward on.  clean, adversarial: what the loss gave, None for a pass that was not made.

    x_adv: (n, c, h, w) adversarial images, detached, or None without an attack.
    """

    loss: Tensor
    clean: Any
    adversarial: Any
    x_adv: Tensor | None


def adversarial_step(
    model: nn.Module,
    loss: Loss,
    attack: Attack | None,
    batch: HierarchicalBatch,
    *,
    inner_loss: Loss | None = None,
    clean_weight: float = 0.0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
) -> StepResult:
    """Forward part of one training step (arXiv:2503.10629, section 2); the caller does backward and the optimiser.

    The attack maximises `inner_loss` (default: `loss`) of the batch, with the model in eval mode and its parameters
    frozen; then the model, in train mode, is run on the adversarial images and, where clean_weight > 0, on the clean
    ones, in this order and in separate passes.  result.loss = clean_weight * clean + (1 - clean_weight) * adversarial.
    BatchNorm statistics move in these passes only.  A pass of weight 0 is not made; at clean_weight=1 nor is the
    attack.  attack=None is the baseline without attack: the loss is the clean one, and clean_weight is not looked at.

    model: images -> embeddings, in train mode (frozen parts may be in eval mode).  DistributedDataParallel is unwrapped
    for the attack, so the inner steps wait for no other rank; an inner loss with `gather=True` is used without it.
    Build it with broadcast_buffers=False: torch 2.8 refuses a backward pass through two passes with one between.
    A model with dual BatchNorm uses the branch "pgd" for the attack and the adversarial pass, "normal" for the clean.
    loss, inner_loss: (embeddings, batch) -> terms with `.total`, such as HiDiscLoss, or a scalar; HiDiscLoss.from_code
    gives the inner losses of the paper's ablations.
    autocast: makes the context for every pass, such as partial(torch.autocast, "cuda", torch.bfloat16).
    generator, start, ids: handed to the attack.  ids: (n,), by which an image's noise is drawn, whichever rank has it;
    the batch's own patch ids would not do, for the views of a patch share theirs and would share their noise.

    Raises ValueError if the model is in eval mode or clean_weight lies outside [0, 1].
    """
    if not 0 <= clean_weight <= 1:
        raise ValueError(f"clean_weight is the share of the clean loss and must lie in [0, 1], got {clean_weight}")
    if not model.training:
        raise ValueError(f"{type(model).__name__} is in eval mode; call .train() on it before training steps")
    share = 1.0 if attack is None else clean_weight
    x_adv = clean = adversarial = None
    if attack is not None and share < 1:
        inner = local_loss(loss if inner_loss is None else inner_loss)
        how = {"generator": generator, "start": start} | ({} if ids is None else {"ids": ids})
        x_adv = attacked(model, inner, attack, batch, autocast=autocast, **how)
        adversarial = outer_terms(model, loss, batch.replace(images=x_adv), autocast=autocast, statistics="pgd")
    if share > 0:
        clean = outer_terms(model, loss, batch, autocast=autocast, statistics="normal")
    total: Tensor
    if adversarial is None:
        assert clean is not None  # one of the two has weight
        total = total_of(clean)
    elif clean is None:
        total = total_of(adversarial)
    else:
        total = share * total_of(clean) + (1 - share) * total_of(adversarial)
    return StepResult(total, clean, adversarial, x_adv)


def attacked(
    model: nn.Module,
    loss: Loss,
    attack: Attack,
    batch: HierarchicalBatch,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    **how: Any,
) -> Tensor:
    """The adversarial images of a batch; `how` is handed to the attack."""
    encoder = unwrapped(model)
    with statistics_of(encoder, "pgd"), frozen(encoder), autocast():
        return attack(batch.images, hierarchical(encoder, loss, batch), **how)


def outer_terms(
    model: nn.Module,
    loss: Loss,
    batch: HierarchicalBatch,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    statistics: str,
) -> HiDiscTerms | Tensor:
    """What the loss gives for a batch in a pass with gradients to everything; `statistics` is the BatchNorm branch."""
    with statistics_of(unwrapped(model), statistics), autocast():
        return loss(embedded(model, batch.images), batch)


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    """`model(images)` in train mode; ValueError, naming the layers, where BatchNorm cannot take statistics of them."""
    try:
        z: Tensor = model(images)
    except ValueError as error:
        names = [name for name, layer in model.named_modules() if isinstance(layer, _BATCH_NORMS) and layer.training]
        if not names or "more than 1 value per channel" not in str(error):  # torch's words for it
            raise
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"BatchNorm ({shown}) is in train mode and takes mean and variance over the images of a pass; a pass of"
            f" {len(images)} image(s) leaves it one value per channel. Give at least two images at a time (a larger"
            " batch, fewer parts), or put those layers in eval mode"
        ) from error
    return z


def total_of(terms: HiDiscTerms | Tensor) -> Tensor:
    """The scalar to descend or climb."""
    return terms if isinstance(terms, Tensor) else terms.total


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local_loss(loss: Loss) -> Loss:
    """The loss on this rank's images only."""
    if getattr(loss, "gather", False) and dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        return dataclasses.replace(loss, gather=False)
    return loss


def statistics_of(encoder: nn.Module, name: str) -> AbstractContextManager[Any]:
    """The named BatchNorm branch of a dual encoder for a while; nothing for other models."""
    return branch(encoder, name) if is_dual(encoder) else ExitStack()
