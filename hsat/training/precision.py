"""How a training computes: number formats, the optimiser, compiled code, memory."""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hsat.models import DualBatchNorm, Encoder
from hsat.training import largest_batch, memory_text, parse_memory, peak_memory
from hsat.cli.ranks import Ranks

if TYPE_CHECKING:
    from hsat.cli.train import TrainHSAT

FORMATS = {"bf16": torch.bfloat16, "16": torch.float16}


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context of every pass through the encoder."""
    dtype = FORMATS.get(precision, torch.bfloat16)
    return partial(torch.autocast, device.type, dtype, enabled=precision in FORMATS)


def scaler_of(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; does nothing for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "16")


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused: one pass over weights, gradients and moments instead of a dozen, on CPUs and GPUs."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused or None)


def in_parallel(model: Encoder, settings: TrainHSAT) -> DistributedDataParallel:
    """The encoder with gradients averaged over the ranks.

    A branch of dual BatchNorm that this run never uses gets no gradient, for which the ranks would wait in vain.
    Buffers are not broadcast: a pass may follow another before the backward pass; see `average_statistics`.
    """
    if not settings.train.clean:
        unused = 1 if settings.attack.name == "none" else 0  # bn_list is (normal, pgd)
        for layer in model.modules():
            if isinstance(layer, DualBatchNorm):
                layer.bn_list[unused].requires_grad_(False)
    known = inspect.signature(DistributedDataParallel).parameters  # newer versions of torch call the option otherwise
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False})


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile calls of the model, for outer and inner passes; keys of the state dict stay.

    Where its graph breaks, torch says itself under TORCH_LOGS=graph_breaks.  ValueError without a compiler for C++,
    which torch.compile needs on the CPU.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("--train.compile needs a compiler for C++ (g++ or clang++), and none is in the PATH")
    model.compile()


def out_of_memory(error: BaseException, settings: TrainHSAT) -> str:
    """What to lower when memory is used up, with the values at hand."""
    train, data = settings.train, settings.data
    images = train.batch_patients * data.slides * data.patches * data.views
    return (
        f"out of memory ({str(error).strip().splitlines()[0]}). A step holds {images} images of"
        f" {data.image_size} x {data.image_size}. Raise --train.accumulate (now {train.accumulate}; the same negatives"
        f" in less memory) or lower --train.batch_patients (now {train.batch_patients}), --data.slides ({data.slides}),"
        f" --data.patches ({data.patches}), --data.views ({data.views}) or --data.image_size ({data.image_size});"
        f" --train.precision bf16 halves the activations (now {train.precision})"
    )


def go_on_finite(settings: TrainHSAT, argv: list[str]) -> str:
    """After a number that was not finite: what to change, and the command that goes on so.

    argv: the options of the run.  The same ones would compute the same numbers and end in the same place.
    """
    if settings.train.precision == "16":
        reason, changed = "bf16 has the range of float32, which float16 lacks", {"train.precision": "bf16"}
    else:
        reason, changed = "a lower learning rate may avoid it", {"train.lr": f"{settings.train.lr / 10:g}"}
    names = {**dict.fromkeys(settings.change), **changed}
    values = {f"--{name}": value for name, value in changed.items()} | {"--change": ",".join(names)}
    words = _without(argv, {*values, "--resume"})
    words = [*words, "--resume", *(word for pair in values.items() for word in pair)]
    command = shlex.join([*_launcher(), os.path.relpath(Path(__file__).with_name("train_hsat.py")), *words])
    return f"The same options would come to the same step again; {reason}. To go on:\n  {command}"


def _without(argv: list[str], names: set[str]) -> list[str]:
    """The options but for these and their values."""
    kept, drop = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if name in names:
            drop = not equals
        elif word.startswith("--") or not drop:
            kept.append(word)
            drop = False
    return kept


def _launcher() -> list[str]:
    """The words before the script's name."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    several = [] if machines == "1" else [f"--nnodes={machines}", "..."]
    return ["torchrun", *several, f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]


def check_memory(settings: TrainHSAT, ranks: Ranks, *, before: int) -> str | None:
    """After the first step: a sentence about its peak and --train.max_memory, or None where no limit was given."""
    if settings.train.max_memory is None:
        return None
    limit, peak = parse_memory(settings.train.max_memory), peak_memory(ranks.device)
    text = f"peak memory of the first step: {memory_text(peak)} of --train.max_memory {memory_text(limit)}"
    if peak <= limit:
        return text
    groups = ranks.size * settings.train.accumulate
    fits = largest_batch(settings.train.batch_patients // groups, before=before, peak=peak, limit=limit) * groups
    if before >= limit:
        return f"{text}; {memory_text(before)} were in use before it, by program and encoder: no batch would fit"
    if not fits:
        return (
            f"{text}; not even one patient at a time fits: lower --data.image_size, or use a smaller --model.backbone"
        )
    return f"{text}; about --train.batch_patients {fits} would fit, or raise --train.accumulate"
