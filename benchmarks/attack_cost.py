"""What an attack costs: hsat against the published recipe, side by side in one process.

The recipe is written out below as plainly as its paper describes it: the training attack runs backward into every
parameter at each step and forms three separate SupCon losses; the evaluation attack embeds the clean batch again at
each step.  Variants take turns, and ratios are taken within a turn, so that a machine whose speed drifts does not
decide; the median over turns is what counts.  Ratios below the aim are printed as they are.

    python benchmarks/attack_cost.py --out benchmarks/results/attack_cost.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hsat
from hsat.attacks import PGD, Linf, feature_drift, hierarchical
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder, frozen
from hsat.types import HierarchicalBatch

EPS, STEP = 8 / 255, 2 / 255
AIMS = {
    "training attack, resnet18, 16 x 3x64x64": 1.5,
    "training attack, resnet50, 16 x 3x96x96": 1.35,
    "evaluation attack, resnet18, 16 x 3x64x64": 1.3,
    "evaluation attack, resnet50, 16 x 3x96x96": 1.3,
    "HiDiscLoss forward and backward, 512 x 128": 2.0,
}


def separate_supcon(z: Tensor, rows: int, temperature: float = 0.07) -> Tensor:
    """One SupCon pass as the recipe forms it, with its own similarities and mask; `rows` groups of equal size."""
    n = len(z)
    group = torch.arange(rows, device=z.device).repeat_interleave(n // rows)
    mask = (group[:, None] == group[None, :]).float()
    logits = z @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask) - torch.eye(n, device=z.device)
    mask = mask * others
    log_prob = logits - torch.log((logits.exp() * others).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def separate_hidisc(z: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The sum of three separate passes, patient, slide and patch."""
    p, s, k, _ = shape
    return separate_supcon(z, p) + separate_supcon(z, p * s) + separate_supcon(z, p * s * k)


def published_training_attack(model: nn.Module, x: Tensor, shape: tuple[int, int, int, int], steps: int) -> Tensor:
    """PGD on the hierarchical loss with loss.backward() into all parameters."""
    delta = torch.rand_like(x) * 2 * EPS - EPS
    delta.requires_grad_()
    for _ in range(steps):
        loss = separate_hidisc(model(x + delta), shape)
        loss.backward()
        delta.data = (delta + STEP * delta.grad.sign()).clamp(-EPS, EPS)
        delta.data = (x + delta.data).clamp(0, 1) - x
        delta.grad.zero_()
        model.zero_grad()
    return (x + delta).detach()


def published_evaluation_attack(model: nn.Module, x: Tensor, steps: int, eps: float = EPS) -> Tensor:
    """PGD on the cosine drift with the clean batch embedded anew at each step (without a graph)."""
    adv = (x + torch.rand_like(x) * 2 * eps - eps).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        with torch.no_grad():
            clean = model(x)
        cost = -F.cosine_similarity(model(adv), clean).sum()
        (grad,) = torch.autograd.grad(cost, adv)
        adv = adv.detach() + STEP * grad.sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1).detach()
    return adv


def timed(function: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, as the mean of several in a row."""
    gc.collect()
    begin = clock()
    for _ in range(calls):
        function()
    return (clock() - begin) / calls


def compare(
    variants: dict[str, Callable[[], object]],
    turns: int,
    calls: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = True,
) -> dict[str, object]:
    """Seconds per variant and, for all but the first, the ratio first / variant of each turn."""
    for function in variants.values() if warm else ():
        function()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns):
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in order:
            seconds[name].append(timed(variants[name], calls, clock))
    first, *others = variants
    ratios = {name: [a / b for a, b in zip(seconds[first], seconds[name], strict=True)] for name in others}
    return {
        "seconds": {k: spread(v) for k, v in seconds.items()},
        "times faster": {k: spread(v) for k, v in ratios.items()},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "turns": len(values)}


def attack_variants(name: str, side: int, *, training: bool) -> dict[str, Callable[[], object]]:
    """Recipe, hsat, and both in channels_last."""
    shape = (2, 2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, 3, side, side, generator=generator)
    loss = HiDiscLoss()
    found: dict[str, Callable[[], object]] = {}
    for suffix, layout in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
        model = build_encoder(name, seed=0).eval().to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        batch = HierarchicalBatch.from_grid(images.unflatten(0, shape)).replace(images=images)

        def recipe(model=model, images=images) -> object:
            if training:
                return published_training_attack(model, images, shape, 5)
            return published_evaluation_attack(model, images, 10)

        def ours(model=model, images=images, batch=batch) -> object:
            with frozen(model):
                if training:
                    attack, objective = PGD(Linf(EPS), step_size=STEP, steps=5), hierarchical(model, loss, batch)
                else:
                    attack, objective = PGD(Linf(EPS), step_size=STEP, steps=10), feature_drift(model, images)
                return attack(images, objective, generator=torch.Generator().manual_seed(1))

        found |= {f"published recipe{suffix}": recipe, f"hsat{suffix}": ours}
    return found


def loss_variants() -> dict[str, Callable[[], object]]:
    """Three separate passes, and one HiDiscLoss, on 512 x 128 embeddings, forward and backward."""
    shape = (64, 2, 2, 2)
    z = F.normalize(torch.randn(512, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    levels = HierarchicalBatch.from_grid(torch.zeros(*shape, 1, 1, 1)).levels
    loss = HiDiscLoss()

    def separate() -> object:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(separate_hidisc(F.normalize(leaf, dim=1), shape), leaf)

    def together() -> object:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, levels).total, leaf)

    return {"three separate passes": separate, "hsat": together}


def main() -> None:
    """Run everything, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--only", default="", help="measure the rows whose title holds this, keep the others of --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {}
    if options.only and options.out and options.out.exists():
        results = json.loads(options.out.read_text())["results"]
    for title, aim in AIMS.items():
        if options.only not in title:
            continue
        kind, *rest = title.split(", ")
        if kind.endswith("attack"):
            variants = attack_variants(rest[0], int(rest[1].split("x")[-1]), training=kind.startswith("training"))
            found = compare(variants, options.turns)
        else:
            found = compare(loss_variants(), 3 * options.turns, calls=10)  # milliseconds each
        ratio = found["times faster"]["hsat"]
        results[title] = found | {"aim": aim, "reached": ratio["median"] >= aim}
        verdict = "reached" if ratio["median"] >= aim else "NOT reached"
        sys.stdout.write(
            f"{title}: {ratio['median']:.2f}x [{ratio['min']:.2f}, {ratio['max']:.2f}] (aim {aim}x, {verdict})\n"
        )
        sys.stdout.flush()
    about = {
        "hsat": hsat.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "dtype": "float32",
    }
    if options.out:
        options.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
