"""What an evaluation costs: hsat in one pass against the published procedure, three attacks at two radii.

The published procedure is written out below as plainly as its paper describes it: every attack has its own run, which
embeds the bank anew, and embeds the clean batch again at each step.  Both start at the same points and have to end with
the same numbers.  Variants take turns; seconds are of this process's CPU time, so that a busy machine counts for less.

    python benchmarks/evaluation_engine.py --out benchmarks/results/evaluation_engine.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hsat
from hsat.attacks.starts import random_start
from hsat.eval import KNNClassifier, evaluate_whitebox, paper_attacks
from hsat.models import build_encoder
from hsat.types import EmbeddingTable, HierarchicalBatch

AIM = 1.4


class Batches(list):  # type: ignore[type-arg]
    """Batches in memory, with what an evaluation asks a loader's dataset for."""

    dataset = SimpleNamespace(class_names=("a", "b", "c"), split="")


def batches(n: int, side: int, *, seed: int, first: int, size: int) -> Batches:
    """Noisy patches of three tints."""
    generator = torch.Generator().manual_seed(seed)
    found = Batches()
    for begin in range(first, first + n, size):
        ids = torch.arange(begin, min(begin + size, first + n))
        tint = torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.6, 0.5], [0.5, 0.5, 0.4]])[ids % 3]
        noise = torch.rand(len(ids), 3, side, side, generator=generator) - 0.5
        found.append(HierarchicalBatch((tint[:, :, None, None] + 0.4 * noise).clamp(0, 1), ids, ids, ids, ids % 3))
    return found


def published(encoder: nn.Module, bank: Batches, queries: Batches, attacks: dict[str, Any], target: str) -> Any:
    """One run per attack: bank, attack with the clean embedding at each step, embedding, vote."""
    scored = encoder.features
    moved = encoder if target == "embedding" else encoder.features
    found = {}
    for name, attack in attacks.items():
        with torch.no_grad():
            rows = torch.cat([scored(batch.images) for batch in bank])
        ids = np.concatenate([batch.patch.numpy() for batch in bank])
        table = EmbeddingTable(rows.numpy(), ids % 3, ids, ids, ids, ("a", "b", "c"))
        knn, z = KNNClassifier(k=20).fit(table), []
        for batch in queries:
            x_adv = published_attack(moved, batch, attack)
            with torch.no_grad():
                z.append(scored(x_adv))
        found[name] = knn.predict(torch.cat(z))
    return found


def published_attack(moved: Callable[[Tensor], Tensor], batch: HierarchicalBatch, attack: Any) -> Tensor:
    """Sign steps on the cosine distance, with momentum for MI-FGSM; starts are those of hsat."""
    x, eps = batch.images, attack.threat.eps
    generator = torch.Generator().manual_seed(0)
    adv = random_start(x, attack.threat, generator=generator, ids=batch.patch, restart=0)
    momentum = torch.zeros_like(x)
    for _ in range(attack.steps):
        adv.requires_grad_()
        with torch.no_grad():
            clean = moved(x)
        cost = (1 - F.cosine_similarity(moved(adv), clean)).sum()
        (grad,) = torch.autograd.grad(cost, adv)
        if hasattr(attack, "decay"):
            momentum = attack.decay * momentum + grad / grad.abs().mean((1, 2, 3), keepdim=True)
            grad = momentum
        adv = adv.detach() + attack.step_size * grad.sign()
        adv = (x + (adv - x).clamp(-eps, eps)).clamp(0, 1).detach()
    return adv


def ours(encoder: nn.Module, bank: Batches, queries: Batches, attacks: dict[str, Any], target: str) -> Any:
    """The same predictions from one call."""
    result = evaluate_whitebox(encoder, bank, queries, attacks, target=target, k=20, bootstrap=0)
    return {name: result.scores[name][20].argmax(1) for name in attacks}


def measure(backbone: str, side: int, queries: int, *, turns: int, layout: torch.memory_format, target: str) -> Any:
    """CPU seconds of both, their ratio turn by turn, and how many predictions agree."""
    encoder = build_encoder(backbone, embedding_dim=32, seed=0).eval().to(memory_format=layout)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    asked = batches(queries, side, seed=1, first=0, size=16)
    bank = batches(4 * queries, side, seed=2, first=10_000, size=16)
    attacks = paper_attacks((4 / 255, 8 / 255))
    seconds: dict[str, list[float]] = {"published": [], "hsat": []}
    found: dict[str, Any] = {}
    for turn in range(turns):
        order = [("published", published), ("hsat", ours)]
        for name, function in order if turn % 2 == 0 else order[::-1]:
            begin = time.process_time()
            found[name] = function(encoder, bank, asked, attacks, target)
            seconds[name].append(time.process_time() - begin)
    ratios = [a / b for a, b in zip(seconds["published"], seconds["hsat"], strict=True)]
    differing = {name: int((found["hsat"][name] != found["published"][name]).sum()) for name in attacks}
    return {
        "cpu seconds": seconds,
        "times faster": {"median": statistics.median(ratios), "all": ratios},
        "predictions that differ": differing,
        "accuracy": {name: float((found["hsat"][name] == np.arange(queries) % 3).mean()) for name in attacks},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--targets", default="features,embedding")
    parser.add_argument("--layouts", default="contiguous_format,channels_last")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for target in options.targets.split(","):
        for layout in options.layouts.split(","):
            chosen = getattr(torch, layout)
            found = measure(
                options.backbone, options.side, options.queries, turns=options.turns, layout=chosen, target=target
            )
            results[f"{target}, {layout}"] = found | {"aim": AIM, "reached": found["times faster"]["median"] >= AIM}
            sys.stdout.write(
                f"{target}, {layout}: {found['times faster']['median']:.2f}x (aim {AIM}x),"
                f" {sum(found['predictions that differ'].values())} predictions differ\n"
            )
            sys.stdout.flush()
            about = {"hsat": hsat.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
            asked = {"backbone": options.backbone, "side": options.side, "queries": options.queries, "bank": 4}
            if options.out:
                options.out.write_text(json.dumps({"about": about | asked, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
