"""One optimiser step from several parts of a batch, with the loss and the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hsat.training.gradients import check_trainable
from hsat.training.step import Loss, StepResult, attacked, embedded, local_loss, statistics_of, total_of, unwrapped
from hsat.types import Attack, HierarchicalBatch

Autocast = Callable[[], AbstractContextManager[Any]]


def split_batch(batch: HierarchicalBatch, parts: int) -> list[HierarchicalBatch]:
    """`parts` batches of equally many consecutive images.  Ids are counted, so split before the batch goes to a GPU.

    Raises ValueError where the images do not divide.
    """
    if parts < 1 or len(batch) % parts:
        raise ValueError(f"{len(batch)} images cannot be split into {parts} equal parts")
    size = len(batch) // parts
    cuts = [slice(at, at + size) for at in range(0, len(batch), size)]
    return [
        HierarchicalBatch(
            batch.images[cut],
            batch.patch[cut],
            batch.slide[cut],
            batch.patient[cut],
            None if batch.label is None else batch.label[cut],
        )
        for cut in cuts
    ]


def accumulated_step(  # noqa: PLR0913
    model: nn.Module,
    loss: Loss,
    attack: Attack | None,
    batch: HierarchicalBatch,
    parts: Sequence[HierarchicalBatch],
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
    mean of what the parts would have moved them by, which is what as many ranks do (`average_statistics`).

    batch: the images of this rank; only its ids are used.  parts: the same images in the same order, as `split_batch`
    gives them.  loss with gather=True takes in other ranks, too; under DistributedDataParallel gradients are exchanged
    with the last part alone.  scale: what is applied to the loss before backward, such as GradScaler.scale.
    ids: (n,) for the whole batch.  The rest is as in `adversarial_step`.

    Raises ValueError if the parts are not the batch, the model is in eval mode, its embeddings have no gradient, or
    clean_weight lies outside [0, 1].
    """
    if not 0 <= clean_weight <= 1:
        raise ValueError(f"clean_weight is the share of the clean loss and must lie in [0, 1], got {clean_weight}")
    if not model.training:
        raise ValueError(f"{type(model).__name__} is in eval mode; call .train() on it before training steps")
    if sum(map(len, parts)) != len(batch):
        raise ValueError(f"the parts hold {sum(map(len, parts))} images and the batch {len(batch)}")
    share = 1.0 if attack is None else clean_weight
    passes: dict[str, list[Tensor]] = {}
    if attack is not None and share < 1:
        inner = local_loss(loss if inner_loss is None else inner_loss)
        passes["pgd"] = _attacked_parts(model, inner, attack, parts, autocast=autocast, generator=generator, ids=ids)
    if share > 0:
        passes["normal"] = [part.images for part in parts]
    weights = {"pgd": 1 - share, "normal": share}
    states = _RandomStates(batch.images.device)
    rows = _embeddings(unwrapped(model), passes, autocast=autocast, states=states)
    terms = {name: loss(z, batch) for name, z in rows.items()}
    total = torch.stack([weights[name] * total_of(value) for name, value in terms.items()]).sum()
    wanted = torch.autograd.grad(scale(total), list(rows.values()))
    sizes = [len(part) for part in parts]
    grads = {name: torch.split(grad, sizes) for name, grad in zip(rows, wanted, strict=True)}
    _second_pass(model, passes, grads, autocast=autocast, states=states)
    x_adv = torch.cat(passes["pgd"]) if "pgd" in passes else None
    return StepResult(total.detach(), terms.get("normal"), terms.get("pgd"), x_adv)


def _attacked_parts(
    model: nn.Module,
    loss: Loss,
    attack: Attack,
    parts: Sequence[HierarchicalBatch],
    *,
    autocast: Autocast,
    generator: torch.Generator | None,
    ids: Tensor | None,
) -> list[Tensor]:
    own = [None] * len(parts) if ids is None else torch.split(ids, [len(part) for part in parts])
    return [
        attacked(model, loss, attack, part, autocast=autocast, generator=generator, ids=mine)
        for part, mine in zip(parts, own, strict=True)
    ]


def _embeddings(
    encoder: nn.Module, passes: Mapping[str, Sequence[Tensor]], *, autocast: Autocast, states: _RandomStates
) -> dict[str, Tensor]:
    """Embeddings of each pass as leaves that want a gradient; the statistics of BatchNorm are left as they were."""
    found = {}
    with kept_statistics(encoder), torch.no_grad():
        for name, images in passes.items():
            rows = []
            for place, part in enumerate(images):
                states.take((name, place))
                with statistics_of(encoder, name), autocast():
                    rows.append(embedded(encoder, part))
            found[name] = torch.cat(rows).requires_grad_()
    return found


def _second_pass(
    model: nn.Module,
    passes: Mapping[str, Sequence[Tensor]],
    grads: Mapping[str, Sequence[Tensor]],
    *,
    autocast: Autocast,
    states: _RandomStates,
) -> None:
    """Carry the gradient of each embedding to the parameters, part by part."""
    encoder, count = unwrapped(model), len(next(iter(passes.values())))
    moved = _Mean(encoder)
    for place in range(count):
        last = place == count - 1
        quiet = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
            sums = []
            for name, images in passes.items():
                states.give((name, place))
                with statistics_of(encoder, name), autocast():
                    z = model(images[place])
                if not z.requires_grad:
                    check_trainable(encoder)
                    raise ValueError(
                        f"the embeddings of {type(encoder).__name__} have no gradient, so a step would train nothing:"
                        " is its output detached, or computed under torch.no_grad()?"
                    )
                sums.append((z * grads[name][place].to(z.dtype)).sum())
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
        moved.add()
    moved.put()


class _RandomStates:
    """Where torch's global generators stood before each forward pass, so that the second one draws the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._found: dict[tuple[str, int], list[Tensor]] = {}

    def take(self, key: tuple[str, int]) -> None:
        on_device = [] if self._device is None else [torch.cuda.get_rng_state(self._device)]
        self._found[key] = [torch.get_rng_state(), *on_device]

    def give(self, key: tuple[str, int]) -> None:
        torch.set_rng_state(self._found[key][0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._found[key][1], self._device)


class _Mean:
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

    def put(self) -> None:
        """Give the buffers their mean."""
        with torch.no_grad():
            for buffer, total in zip(self._buffers, self._sums, strict=True):
                buffer.copy_(total / self._count if buffer.is_floating_point() else total)


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Whatever happens to the module's buffers inside the block is undone after it."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)
