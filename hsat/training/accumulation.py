"""One optimiser step from several parts of a batch, with the loss and the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.training.gradients import check_trainable
from hsat.training.step import (
    Autocast,
    Loss,
    StepResult,
    attack_batch,
    check_step,
    embed_in_train_mode,
    local_loss,
    total_loss,
    unwrap_parallel,
    use_branch,
)
from hsat.types import Attack, HierarchicalBatch


@dataclass(frozen=True)
class SplitBatch:
    """A batch, and the same images cut into parts.

    Attributes:
        whole: The images of this rank; of them only the ids are used.
        parts: Batches of the same images in the same order.

    Raises:
        ValueError: If the parts hold another number of images than the whole.
    """

    whole: HierarchicalBatch
    parts: tuple[HierarchicalBatch, ...]

    def __post_init__(self) -> None:
        count = sum(map(len, self.parts))
        if count != len(self.whole):
            raise ValueError(f"the parts hold {count} images and the batch {len(self.whole)}")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SplitBatch:
        """The same on another device; nothing is counted again.

        Args:
            device: Where the tensors go.
            non_blocking: As in `torch.Tensor.to`.

        Returns:
            The whole and its parts, there.
        """
        parts = [part.to(device, non_blocking=non_blocking) for part in self.parts]
        return SplitBatch(self.whole.to(device, non_blocking=non_blocking), tuple(parts))


def split_batch(batch: HierarchicalBatch, parts: int) -> SplitBatch:
    """A batch as `parts` batches of equally many consecutive images.

    Ids are counted, so split before the batch goes to a GPU.

    Args:
        batch: On the CPU.
        parts: How many.

    Returns:
        The batch and its parts.

    Raises:
        ValueError: Where the images do not divide.
    """
    if parts < 1 or len(batch) % parts:
        raise ValueError(f"{len(batch)} images cannot be split into {parts} equal parts")
    size = len(batch) // parts
    cuts = [slice(at, at + size) for at in range(0, len(batch), size)]
    return SplitBatch(
        batch,
        tuple(
            HierarchicalBatch(
                batch.images[cut],
                batch.patch[cut],
                batch.slide[cut],
                batch.patient[cut],
                None if batch.label is None else batch.label[cut],
            )
            for cut in cuts
        ),
    )


def accumulated_step(
    model: nn.Module,
    loss: Loss,
    attack: Attack | None,
    batch: SplitBatch,
    *,
    inner_loss: Loss | None = None,
    clean_weight: float = 0.0,
    autocast: Autocast = nullcontext,
    generator: torch.Generator | None = None,
    ids: Tensor | None = None,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> StepResult:
    """`adversarial_step` and its backward pass in the memory of one part: all images are negatives of one another.

    Each part is attacked by itself (negatives of the inner loss lie within the part).  Then, after GradCache
    (Gao et al., arXiv:2101.06983, section 3): all embeddings are computed without a graph, the loss of all of them
    gives the gradient of each embedding, and a second forward pass, part by part, carries it to the parameters.  So
    gradients are those of the whole batch; it costs one more forward pass.  Gradients are added to `.grad`; the
    returned loss is detached.  Random layers draw the same in both passes.

    Layers that look at the batch see one part at a time.  BatchNorm's running statistics move once per step, by the
    mean of what the parts would have moved them by, which is what as many ranks do
    (`hsat.distributed.average_statistics`).

    Args:
        model: As in `adversarial_step`; under DistributedDataParallel gradients are exchanged with the last part alone.
        loss: As in `adversarial_step`; with gather=True it takes in other ranks, too.
        attack: As in `adversarial_step`.
        batch: What `split_batch` gives.
        inner_loss: As in `adversarial_step`.
        clean_weight: As in `adversarial_step`.
        autocast: As in `adversarial_step`.
        generator: As in `adversarial_step`.
        ids: (n,) for the whole batch, as in `adversarial_step`.
        scale: What is applied to the loss before backward, such as GradScaler.scale.

    Returns:
        The losses of all parts together, detached.

    Raises:
        ValueError: If the model is in eval mode, its embeddings have no gradient, or clean_weight lies outside [0, 1].
    """
    check_step(model, clean_weight)
    whole, parts = batch.whole, batch.parts
    share = 1.0 if attack is None else clean_weight
    passes: dict[str, list[Tensor]] = {}
    if attack is not None and share < 1:
        inner = local_loss(loss if inner_loss is None else inner_loss)
        passes["pgd"] = _attack_parts(model, inner, attack, parts, autocast=autocast, generator=generator, ids=ids)
    if share > 0:
        passes["normal"] = [part.images for part in parts]
    weights = {"pgd": 1 - share, "normal": share}
    states = _RandomStates(whole.images.device)
    rows = _embed_passes(unwrap_parallel(model), passes, autocast=autocast, states=states)
    terms = {name: loss(z, whole) for name, z in rows.items()}
    total = torch.stack([weights[name] * total_loss(value) for name, value in terms.items()]).sum()
    gradients = torch.autograd.grad(scale(total), list(rows.values()))
    sizes = [len(part) for part in parts]
    grads = {name: torch.split(grad, sizes) for name, grad in zip(rows, gradients, strict=True)}
    _second_pass(model, passes, grads, autocast=autocast, states=states)
    x_adv = torch.cat(passes["pgd"]) if "pgd" in passes else None
    return StepResult(total.detach(), terms.get("normal"), terms.get("pgd"), x_adv)


def _attack_parts(
    model: nn.Module,
    loss: Loss,
    attack: Attack,
    parts: Sequence[HierarchicalBatch],
    *,
    autocast: Autocast,
    generator: torch.Generator | None,
    ids: Tensor | None,
) -> list[Tensor]:
    part_ids = [None] * len(parts) if ids is None else torch.split(ids, [len(part) for part in parts])
    return [
        attack_batch(model, loss, attack, part, autocast=autocast, generator=generator, ids=own)
        for part, own in zip(parts, part_ids, strict=True)
    ]


def _embed_passes(
    encoder: nn.Module, passes: Mapping[str, Sequence[Tensor]], *, autocast: Autocast, states: _RandomStates
) -> dict[str, Tensor]:
    """Embeddings of each pass as leaves that want a gradient; the statistics of BatchNorm are left as they were."""
    embeddings = {}
    with _keep_statistics(encoder), torch.no_grad():
        for name, images in passes.items():
            rows = []
            for place, part in enumerate(images):
                states.store((name, place))
                with use_branch(encoder, name), autocast():
                    rows.append(embed_in_train_mode(encoder, part))
            embeddings[name] = torch.cat(rows).requires_grad_()
    return embeddings


def _second_pass(
    model: nn.Module,
    passes: Mapping[str, Sequence[Tensor]],
    grads: Mapping[str, Sequence[Tensor]],
    *,
    autocast: Autocast,
    states: _RandomStates,
) -> None:
    """Carry the gradient of each embedding to the parameters, part by part."""
    encoder, count = unwrap_parallel(model), len(next(iter(passes.values())))
    statistics = _MeanStatistics(encoder)
    for place in range(count):
        last = place == count - 1
        quiet = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            sums = []
            for name, images in passes.items():
                states.restore((name, place))
                with use_branch(encoder, name), autocast():
                    z = model(images[place])
                if not z.requires_grad:
                    check_trainable(encoder)
                    raise ValueError(
                        f"the embeddings of {type(encoder).__name__} have no gradient, so a step would train nothing:"
                        " is its output detached, or computed under torch.no_grad()?"
                    )
                sums.append((z * grads[name][place].to(z.dtype)).sum())
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
        statistics.add()
    statistics.apply()


class _RandomStates:
    """Where torch's global generators stood before each forward pass, so that the second one draws the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._states: dict[tuple[str, int], list[Tensor]] = {}

    def store(self, key: tuple[str, int]) -> None:
        on_device = [] if self._device is None else [torch.cuda.get_rng_state(self._device)]
        self._states[key] = [torch.get_rng_state(), *on_device]

    def restore(self, key: tuple[str, int]) -> None:
        torch.set_rng_state(self._states[key][0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._states[key][1], self._device)


class _MeanStatistics:
    """The mean of a module's buffers over parts that each start from the same ones; counters are those of one part."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]
        self._count = 0

    def add(self) -> None:
        """Take in what the buffers hold now, and put back what they held."""
        self._count += 1
        with torch.no_grad():
            for buffer, total, before in zip(self._buffers, self._sums, self._before, strict=True):
                if buffer.is_floating_point():
                    total.add_(buffer)
                else:
                    total.copy_(buffer)
                buffer.copy_(before)

    def apply(self) -> None:
        """Give the buffers their mean."""
        with torch.no_grad():
            for buffer, total in zip(self._buffers, self._sums, strict=True):
                buffer.copy_(total / self._count if buffer.is_floating_point() else total)


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Whatever happens to the module's buffers inside the block is undone after it."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)
