"""One step of adversarial training: attack the batch, then the losses to descend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.attacks import hierarchical
from hsat.losses import HiDiscTerms
from hsat.models import branch, frozen, is_dual
from hsat.models.dual_norm import BatchNorm
from hsat.quantities import fields_repr
from hsat.types import Attack, HierarchicalBatch

Terms = HiDiscTerms | Tensor
Loss = Callable[[Tensor, HierarchicalBatch], Terms]
Autocast = Callable[[], AbstractContextManager[object]]


class StepResult(NamedTuple):
    """What a training step computed.

    Attributes:
        loss: The scalar to call backward on.
        clean: What the loss gave for the clean images; None for a pass that was not made.
        adversarial: What it gave for the adversarial ones; None for a pass that was not made.
        x_adv: Adversarial images (n, c, h, w), detached; None without an attack.
    """

    loss: Tensor
    clean: Terms | None
    adversarial: Terms | None
    x_adv: Tensor | None

    def __repr__(self) -> str:
        return fields_repr(self, self._fields)


def adversarial_step(
    model: nn.Module,
    loss: Loss,
    attack: Attack | None,
    batch: HierarchicalBatch,
    *,
    inner_loss: Loss | None = None,
    clean_weight: float = 0.0,
    autocast: Autocast = nullcontext,
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

    Args:
        model: Images -> embeddings, in train mode (frozen parts may be in eval mode).  DistributedDataParallel is
            unwrapped for the attack, so the inner steps wait for no other rank.  Build it with broadcast_buffers=False:
            torch 2.8 refuses a backward pass through two passes with one between.  A model with dual BatchNorm uses the
            branch "pgd" for the attack and the adversarial pass, "normal" for the clean.
        loss: (embeddings, batch) -> terms with `.total`, such as HiDiscLoss, or a scalar.
        attack: The inner maximisation; None is the baseline without attack.
        batch: The images of this rank.
        inner_loss: What the attack maximises; by default `loss`.  With `gather=True` it is used without it.
            HiDiscLoss.from_code gives the inner losses of the paper's ablations.
        clean_weight: Share of the clean loss, in [0, 1].
        autocast: Makes the context for every pass, such as partial(torch.autocast, "cuda", torch.bfloat16).
        generator: Source of the attack's noise.
        start: Where the attack starts (n, c, h, w).
        ids: (n,), by which an image's noise is drawn, whichever rank has it; the batch's own patch ids would not do,
            for the views of a patch share theirs and would share their noise.

    Returns:
        The loss to call backward on, the terms of the passes that were made, and the adversarial images.

    Raises:
        ValueError: If the model is in eval mode or clean_weight lies outside [0, 1].

    References:
        Malik et al., Hierarchical Self-Supervised Adversarial Training, arXiv:2503.10629, section 2.

    Example:
        >>> from hsat import HiDiscLoss, Linf, PGD
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.rand(2, 1, 1, 2, 3, 4, 4, generator=generator)  # patients, slides, patches, views
        >>> batch = HierarchicalBatch.from_grid(images)
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
        >>> attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
        >>> step = adversarial_step(encoder, HiDiscLoss(), attack, batch, generator=generator)
        >>> step.loss.backward()
        >>> step.x_adv.shape, bool((step.x_adv.double() - batch.images.double()).abs().max() <= 8 / 255)
        (torch.Size([4, 3, 4, 4]), True)
    """
    check_step(model, clean_weight)
    share = 1.0 if attack is None else clean_weight
    x_adv = clean = adversarial = None
    if attack is not None and share < 1:
        inner = local_loss(loss if inner_loss is None else inner_loss)
        x_adv = attack_batch(model, inner, attack, batch, autocast=autocast, generator=generator, start=start, ids=ids)
        adversarial = outer_loss_terms(model, loss, batch.replace(images=x_adv), autocast=autocast, norm_branch="pgd")
    if share > 0:
        clean = outer_loss_terms(model, loss, batch, autocast=autocast, norm_branch="normal")
    if adversarial is None:
        assert clean is not None  # one of the two has weight
        total = total_loss(clean)
    elif clean is None:
        total = total_loss(adversarial)
    else:
        total = share * total_loss(clean) + (1 - share) * total_loss(adversarial)
    return StepResult(total, clean, adversarial, x_adv)


def check_step(model: nn.Module, clean_weight: float) -> None:
    """Check model and weight before a step.

    Raises:
        ValueError: For a model in eval mode or a clean_weight outside [0, 1].
    """
    if not 0 <= clean_weight <= 1:
        raise ValueError(f"clean_weight is the share of the clean loss and must lie in [0, 1], got {clean_weight}")
    check_train_mode(model)


def check_train_mode(model: nn.Module) -> None:
    """Check that a model is in train mode.

    Raises:
        ValueError: For a model in eval mode.
    """
    if not model.training:
        raise ValueError(f"{type(model).__name__} is in eval mode; call .train() on it before training steps")


def attack_batch(
    model: nn.Module,
    loss: Loss,
    attack: Attack,
    batch: HierarchicalBatch,
    *,
    autocast: Autocast,
    generator: torch.Generator | None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """The adversarial images of a batch.

    Args:
        model: Images -> embeddings; unwrapped and frozen meanwhile.
        loss: (embeddings, batch) -> what the attack maximises.
        attack: The inner maximisation.
        batch: The images of this rank.
        autocast: Makes the context of the passes.
        generator: Handed to the attack, as start and ids are.
        start: Where the attack starts (n, c, h, w).
        ids: (n,), by which an image's noise is drawn.

    Returns:
        (n, c, h, w), detached.
    """
    encoder = unwrap_parallel(model)
    with use_branch(encoder, "pgd"), frozen(encoder), autocast():
        objective = hierarchical(encoder, loss, batch)
        return attack(batch.images, objective, generator=generator, start=start, ids=ids)


def outer_loss_terms(
    model: nn.Module,
    loss: Loss,
    batch: HierarchicalBatch,
    *,
    autocast: Autocast,
    norm_branch: str,
) -> Terms:
    """What the loss gives for a batch in a pass with gradients to everything.

    Args:
        model: Images -> embeddings.
        loss: (embeddings, batch) -> terms or a scalar.
        batch: The images, clean or adversarial.
        autocast: Makes the context of the pass.
        norm_branch: The branch of a dual BatchNorm.

    Returns:
        The terms.
    """
    with use_branch(unwrap_parallel(model), norm_branch), autocast():
        return loss(embed_in_train_mode(model, batch.images), batch)


def embed_in_train_mode(model: nn.Module, images: Tensor) -> Tensor:
    """`model(images)` in train mode.

    Raises:
        ValueError: Where BatchNorm cannot take statistics of the images, naming the layers.
    """
    try:
        z: Tensor = model(images)
    except ValueError as error:
        names = [name for name, layer in model.named_modules() if isinstance(layer, BatchNorm) and layer.training]
        if not names or "more than 1 value per channel" not in str(error):  # torch's words for it
            raise
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"BatchNorm ({shown}) is in train mode and takes mean and variance over the images of a pass; a pass of"
            f" {len(images)} image(s) leaves it one value per channel. Give at least two images at a time (a larger"
            " batch, fewer parts), or put those layers in eval mode"
        ) from error
    return z


def total_loss(terms: Terms) -> Tensor:
    """The scalar to descend or climb."""
    return terms if isinstance(terms, Tensor) else terms.total


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local_loss(loss: Loss) -> Loss:
    """The loss on this rank's images only."""
    if getattr(loss, "gather", False) and dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        return dataclasses.replace(loss, gather=False)
    return loss


def use_branch(encoder: nn.Module, name: str) -> AbstractContextManager[object]:
    """The named BatchNorm branch of a dual encoder for a while; nothing for other models."""
    return branch(encoder, name) if is_dual(encoder) else ExitStack()
