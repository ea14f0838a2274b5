"""What one HSAT training step costs on a GPU: hsat against the published recipe, and both against the chip.

The step is the whole one: inner attack of 5 steps, forward and backward on the adversarial images, AdamW.  The images
are on the device already, so reading and augmenting them is left out.  The recipe (attack_cost.py) runs backward into
every parameter at each inner step; its noise, like ours, is drawn on the device.  Variants take turns in alternating
order, each turn with one step that is not timed; CUDA events time the others, and ratios are taken within a turn.

Fraction of peak: the operations of the step's convolutions and matrix products (by the formulas of
torch.utils.flop_counter, of what is computed: ours leaves out gradients of weights in the attack), over the median
time, over the peak of the chip for the number format: for bfloat16 and TF32 the dense figure of the tensor cores, for
float32 that of the ordinary cores.  Peak memory is what a step takes beyond the weights and optimiser states of all
variants.

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --peak bfloat16=989 tf32=495 float32=67      # a chip that the table does not know
    python benchmarks/gpu_step.py --device cpu --side 32 --patients 2 --backbone resnet18 --turns 2      # does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attack_cost import EPS, STEP, processor, published_training_attack, separate_hidisc, spread
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import hsat
from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder
from hsat.training import adversarial_step
from hsat.types import HierarchicalBatch

RESULTS = Path(__file__).parent / "results" / "gpu_step.json"
GRID = (2, 2, 2)  # slides, patches, views of each patient
INNER_STEPS = 5
AIM = 4.0
PEAKS = {  # TFLOP/s as the makers' data sheets give them, without sparsity; the first name that fits counts
    "H200": {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4},
    "H100 PCIe": {"float32": 51.2, "tf32": 378.0, "bfloat16": 756.0},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5},
    "H100": {"float32": 66.9, "tf32": 494.7, "bfloat16": 989.4},
    "A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
    "A10": {"float32": 31.2, "tf32": 62.5, "bfloat16": 125.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "bfloat16": 362.0},
    "L4": {"float32": 30.3, "tf32": 60.0, "bfloat16": 121.0},
    "RTX 4090": {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.2},
    "RTX 3090": {"float32": 35.6, "tf32": 35.6, "bfloat16": 71.2},
}


@dataclass(frozen=True)
class Variant:
    """How a step is computed."""

    published: bool = False
    tf32: bool = False
    half: bool = False
    channels_last: bool = False
    compiled: bool = False

    @property
    def numbers(self) -> str:
        """The format of convolutions and matrix products."""
        return "bfloat16" if self.half else "tf32" if self.tf32 else "float32"


RECIPE, RECIPE_TF32 = "published recipe, float32", "published recipe, TF32"
BEST = "hsat, bfloat16, channels_last, compiled"
VARIANTS = {
    RECIPE: Variant(published=True),
    RECIPE_TF32: Variant(published=True, tf32=True),
    "hsat, float32": Variant(),
    "hsat, TF32": Variant(tf32=True),
    "hsat, bfloat16": Variant(half=True),
    "hsat, bfloat16, channels_last": Variant(half=True, channels_last=True),
    BEST: Variant(half=True, channels_last=True, compiled=True),
}


def step_of(variant: Variant, x: Tensor, shape: tuple[int, int, int, int], *, backbone: str) -> Callable[[], Tensor]:
    """One training step as a function; the encoder, the optimiser and the layout are its own.  Returns the loss."""
    device, layout = x.device, torch.channels_last if variant.channels_last else torch.contiguous_format
    model = build_encoder(backbone, seed=0).to(device, memory_format=layout).train()
    images = x.contiguous(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda" and not variant.published)
    if variant.compiled:
        model.compile()
    compute = partial(_published, model, images, shape) if variant.published else _ours(variant, model, images, shape)

    def step() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.tf32
        loss = compute()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _published(model: nn.Module, images: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    model.eval()
    adversarial = published_training_attack(model, images, shape, INNER_STEPS)
    model.train()
    return separate_hidisc(model(adversarial), shape)


def _ours(variant: Variant, model: nn.Module, images: Tensor, shape: tuple[int, int, int, int]) -> Callable[[], Tensor]:
    batch = HierarchicalBatch.from_grid(images.unflatten(0, shape)).replace(images=images)
    loss, attack = HiDiscLoss(), PGD(Linf(EPS), step_size=STEP, steps=INNER_STEPS)
    autocast = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=variant.half)
    generator = torch.Generator(images.device).manual_seed(1)
    return lambda: adversarial_step(model, loss, attack, batch, autocast=autocast, generator=generator).loss


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of one step, a multiply-add being two."""
    hook = register_module_forward_pre_hook(_without_leaves)
    try:
        with FlopCounterMode(display=False) as counter:
            step()
    finally:
        hook.remove()
    return counter.get_total_flops()


def _without_leaves(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a module, none of them a leaf that requires grad: a view computes nothing.

    The counter watches modules and their inputs, and torch cannot watch leaves while gradients of the images alone
    are taken.  This hook is registered first, so that it comes before the counter's.
    """
    return tuple(
        value.view_as(value) if isinstance(value, Tensor) and value.is_leaf and value.requires_grad else value
        for value in inputs
    )


def seconds_of(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of one step, as the mean of several in a row after one that is not timed."""
    step()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begin) / steps
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin_event.record()
    for _ in range(steps):
        step()
    end_event.record()
    torch.cuda.synchronize(device)
    return begin_event.elapsed_time(end_event) / 1000 / steps


class Memory:
    """The most that was allocated on the device inside the block, beyond what was held before; None on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.taken = device, None

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.taken = torch.cuda.max_memory_allocated(self.device) - self.held


def measure(
    steps: dict[str, Callable[[], object]], *, turns: int, calls: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int | None], dict[str, str]]:
    """Seconds of each turn and peak memory by variant, and why a variant fell out (memory)."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, int | None] = dict.fromkeys(steps)
    fallen: dict[str, str] = {}
    for turn in range(-1, turns):  # turn -1 warms up and compiles
        for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            if name in fallen:
                continue
            try:
                with Memory(device) as peak:
                    found = seconds_of(steps[name], calls if turn >= 0 else 1, device)
            except torch.OutOfMemoryError as error:
                fallen[name] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
                continue
            if turn >= 0:
                seconds[name].append(found)
                memory[name] = peak.taken
        sys.stdout.write(f"turn {turn + 1} of {turns}\n")
        sys.stdout.flush()
    return seconds, memory, fallen


def summary(
    seconds: dict[str, list[float]],
    memory: dict[str, int | None],
    flops: dict[str, int],
    *,
    images: int,
    peaks: dict[str, float],
) -> dict[str, dict[str, Any]]:
    """Numbers of each variant that was measured."""
    found: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        if not times:
            continue
        numbers, median = VARIANTS[name].numbers, statistics.median(times)
        rate = flops[name] / median / 1e12
        row = {
            "number format": numbers,
            "seconds per step": spread(times),
            "images per second": images / median,
            "operations per step": flops[name],
            "TFLOP/s": rate,
            "fraction of peak": rate / peaks[numbers] if numbers in peaks else None,
            "peak memory in bytes": memory[name],
        }
        for other in (RECIPE, RECIPE_TF32):
            if seconds.get(other) and len(seconds[other]) == len(times):
                row[f"times faster than {other}"] = spread([a / b for a, b in zip(seconds[other], times, strict=True)])
        found[name] = row
    return found


def peaks_of(device: torch.device, given: list[str]) -> dict[str, float]:
    """TFLOP/s by number format: what was given, else the table's; empty for an unknown chip."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = dict(next((peaks for chip, peaks in PEAKS.items() if re.search(rf"\b{chip}\b(?!.*Laptop)", name)), {}))
    for text in given:
        key, _, value = text.partition("=")
        if key not in ("float32", "tf32", "bfloat16"):
            raise SystemExit(f"error: --peak takes float32=, tf32= or bfloat16= in TFLOP/s, got {text!r}")
        try:
            found[key] = float(value)
        except ValueError:
            raise SystemExit(f"error: --peak {key}= needs a number of TFLOP/s, got {value!r}") from None
    return found


def table(results: dict[str, dict[str, Any]], fallen: dict[str, str]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| variant | ms per step | images/s | TFLOP/s | of peak | memory | times the recipe (float32) | (TF32) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        time_of, share, taken = row["seconds per step"], row["fraction of peak"], row["peak memory in bytes"]
        ratios = [row.get(f"times faster than {other}") for other in (RECIPE, RECIPE_TF32)]
        cells = [
            name,
            f"{1e3 * time_of['median']:.1f} [{1e3 * time_of['min']:.1f}, {1e3 * time_of['max']:.1f}]",
            f"{row['images per second']:.0f}",
            f"{row['TFLOP/s']:.1f}",
            "?" if share is None else f"{100 * share:.0f} %",
            "?" if taken is None else f"{taken / 1e9:.1f} GB",
            *("?" if r is None else f"{r['median']:.2f} [{r['min']:.2f}, {r['max']:.2f}]" for r in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name}: {reason}" for name, reason in fallen.items()]
    return "\n".join(lines)


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """Whether the aim was reached, in words."""
    ratio = results.get(BEST, {}).get(f"times faster than {RECIPE}")
    if ratio is None:
        return f"The aim, {AIM:g} times the published recipe in float32, was not measured: {BEST} did not run."
    reached = "reached" if ratio["median"] >= AIM else "NOT reached"
    return f"Aim: {AIM:g} times the published recipe in float32; {BEST}: {ratio['median']:.2f} times, {reached}."


def about(device: torch.device, options: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    """Machine, versions and settings."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "hsat": hsat.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load average": os.getloadavg(),
        "backbone": options.backbone,
        "side": options.side,
        "patients": options.patients,
        "images": options.patients * 8,
        "steps per turn": options.calls,
        "cudnn.benchmark": options.cudnn_benchmark,
        "peak TFLOP/s, dense": peaks,
    }


def write(path: Path, content: dict[str, Any], text: str) -> None:
    """Both files, each whole or not at all."""
    for target, what in ((path, json.dumps(content, indent=1) + "\n"), (path.with_suffix(".md"), text)):
        partial_file = target.with_name(f".{target.name}.partial")
        partial_file.write_text(what)
        partial_file.replace(target)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--side", type=int, default=300, help="pixels")
    parser.add_argument("--patients", type=int, default=16, help="8 images each")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name holds one of these")
    parser.add_argument("--compile", action="store_true", help="the compiled variant on the CPU, too (minutes)")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="for all variants alike")
    parser.add_argument("--peak", nargs="*", default=[], help="TFLOP/s, such as bfloat16=989 tf32=495 float32=67")
    parser.add_argument("--out", type=Path, help="JSON file, with a .md beside it; on CUDA results/gpu_step.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parsed(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; --device cpu runs the same (no figures worth keeping)")
    device, shape = torch.device(options.device), (options.patients, *GRID)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    x = torch.rand(options.patients * 8, 3, options.side, options.side, generator=torch.Generator().manual_seed(0))
    chosen = {
        name: variant
        for name, variant in VARIANTS.items()
        if (not options.only or any(part in name for part in options.only))
        and (device.type == "cuda" or options.compile or not variant.compiled)
    }
    if not chosen:
        raise SystemExit(f"error: no variant is named like {options.only}; there are {list(VARIANTS)}")
    out, peaks = options.out or (RESULTS if device.type == "cuda" else None), peaks_of(device, options.peak)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    x = x.to(device)
    steps = {name: step_of(variant, x, shape, backbone=options.backbone) for name, variant in chosen.items()}
    described = about(device, options, peaks)
    flops = counted(chosen, x, shape, backbone=options.backbone)
    seconds, memory, fallen = measure(steps, turns=options.turns, calls=options.calls, device=device)
    results = summary(seconds, memory, flops, images=len(x), peaks=peaks)
    text = page(described, table(results, fallen), verdict(results))
    sys.stdout.write(text)
    if out is not None:
        write(out, {"about": described, "results": results, "fell out": fallen}, text)


def counted(
    variants: dict[str, Variant], x: Tensor, shape: tuple[int, int, int, int], *, backbone: str
) -> dict[str, int]:
    """Operations by variant.  The number format changes none of them, so the recipe and hsat are counted once each.

    Counted with one patient, whose step costs its share but for the tiny products of the losses; on the same device.
    """
    few = x[: len(x) // shape[0]]
    each = {
        published: operations(step_of(Variant(published=published), few, (1, *shape[1:]), backbone=backbone)) * shape[0]
        for published in {variant.published for variant in variants.values()}
    }
    return {name: each[variant.published] for name, variant in variants.items()}


def page(described: dict[str, Any], results: str, aim: str) -> str:
    """The Markdown page."""
    return (
        f"# One training step on {described['device']}\n\n"
        f"{described['backbone']}, {described['patients']} patients x 8 images of {described['side']} pixels;"
        f" torch {described['torch']}, CUDA {described['cuda']}. Median [min, max] over turns that alternate.\n"
        "Peak is dense: tensor cores for TF32 and bfloat16, ordinary cores for float32. Memory is what a step takes\n"
        "beyond weights and optimiser states. Made by `python benchmarks/gpu_step.py`, which says what is measured.\n\n"
        f"{results}\n\n{aim}\n"
    )


if __name__ == "__main__":
    main()
