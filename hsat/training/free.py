"""Free adversarial training: one backward pass gives the gradient of the parameters and that of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hsat.attacks.initialization import check_start, random_start
from hsat.attacks.loop import broadcast_size, check_finite
from hsat.attacks.threat import require_images
from hsat.training.step import Autocast, Loss, StepResult, Terms, check_train_mode, outer_loss_terms, total_loss
from hsat.types import HierarchicalBatch, ThreatModel


def free_replays(
    model: nn.Module,
    loss: Loss,
    batch: HierarchicalBatch,
    *,
    threat: ThreatModel,
    replays: int,
    step_size: float | Tensor | None = None,
    autocast: Autocast = nullcontext,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    ids: Tensor | None = None,
) -> Iterator[StepResult]:
    """The same minibatch `replays` times, each time at the perturbation that the pass before it has improved.

    Shafahi et al., arXiv:1904.12843, algorithm 1.  Each result is one outer pass on x_adv, the loss to call backward
    on; that backward also gives the gradient of the images, with which they move before the next result,
    x_adv <- project(x_adv + step_size * ascent(gradient)).  A replay costs one forward and one backward, and is one
    step of the optimiser:

        for result in free_replays(model, loss, batch, threat=Linf(8 / 255), replays=4, generator=generator):
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()

    The model is in train mode in every pass and each pass moves BatchNorm statistics: there is no inner pass that could
    be in eval mode.  The first point is a random one of the feasible set, or `start`, projected.  The paper carries the
    perturbation over from the minibatch before, which belongs to other images; a random one is as good a start
    (arXiv:2001.03994, section 4) and keeps runs resumable.
    Under DistributedDataParallel the images of a rank move along the gradient of what all ranks descend: with a loss
    with gather=True they see the negatives of all ranks, and ranks compute what one process computes.

    Args:
        model: As in `adversarial_step`; dual BatchNorm uses the branch "pgd".
        loss: As in `adversarial_step`.
        batch: The images of this rank.
        threat: The feasible set.
        replays: How often the minibatch is used, at least once.
        step_size: In units of the threat model's norm; None is eps, as in the paper.
        autocast: As in `adversarial_step`.
        generator: Source of the random start.
        start: First point (n, c, h, w) in place of a random one.
        ids: (n,), by which an image's noise is drawn, whichever rank has it.

    Yields:
        The result of each replay.

    Raises:
        ValueError: For replays < 1, a model in eval mode or a start of another shape.
        RuntimeError: When the next result is asked for and backward was not called.
        FloatingPointError: Naming images whose gradient is not finite.
    """
    if isinstance(replays, bool) or not isinstance(replays, int) or replays < 1:
        raise ValueError(f"replays must be a whole number >= 1, got {replays!r}")
    check_train_mode(model)
    check_start(start, batch.images)
    x = require_images(batch.images.detach(), threat)
    if start is None:
        first = random_start(x, threat, generator=generator, ids=ids, restart=0)
    else:
        first = start.detach().to(x)
    project = threat.projection_at(x)
    size = threat.eps if step_size is None else step_size

    def terms_of(images: Tensor) -> Terms:
        return outer_loss_terms(model, loss, batch.replace(images=images), autocast=autocast, norm_branch="pgd")

    return _replay(terms_of, threat, project, replays=replays, size=size, point=first.to(x.dtype))


def _replay(
    terms_of: Callable[[Tensor], Terms],
    threat: ThreatModel,
    project: Callable[[Tensor], Tensor],
    *,
    replays: int,
    size: float | Tensor,
    point: Tensor,
) -> Iterator[StepResult]:
    dtype = point.dtype
    work = torch.promote_types(dtype, torch.float32)
    for replay in range(replays):
        x_adv = project(point.to(dtype)).detach()
        leaf = x_adv.clone().requires_grad_()
        terms = terms_of(leaf)
        yield StepResult(total_loss(terms), None, terms, x_adv)
        if replay == replays - 1:
            return
        if leaf.grad is None:
            raise RuntimeError(
                "the images have no gradient yet: call result.loss.backward() on each result before asking for the next"
            )
        check_finite(~leaf.grad.isfinite().flatten(1).all(1))
        y = x_adv.to(work)
        point = project(y + broadcast_size(size, y) * threat.steepest_ascent(leaf.grad.to(work)))
