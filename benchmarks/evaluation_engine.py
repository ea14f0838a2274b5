"""What an evaluation costs: hsat in one pass against the published procedure, three attacks at two radii.

The published procedure is written out below as plainly as its paper describes it: every attack has its own run, which
embeds the bank anew, and embeds the clean batch again at each step.  Both start at the same points and have to end with
the same numbers.  Variants take turns; seconds are of this process's CPU time, so that a busy machine counts for less.
Choices that move last bits (channels_last, bfloat16, folded BatchNorm) are measured apart, against hsat in float32.

    python benchmarks/evaluation_engine.py --out benchmarks/results/evaluation_engine.json
"""

from __future__ import annotations

import argparse
import copy
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
from hsat.attacks.initialization import random_start
from hsat.classifiers import KNNClassifier
from hsat.eval import RunOptions, Scoring, evaluate_whitebox, paper_attacks
from hsat.models import build_encoder, fold_batchnorm
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
    result = evaluate_whitebox(
        encoder,
        bank,
        queries,
        attacks,
        classifier=KNNClassifier(k=20),
        target=target,
        scoring=Scoring(bootstrap=0),
        run=RunOptions(noise=False),
    )
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
        "accuracy": accuracies(found["hsat"], queries),
    }


def ways(backbone: str, side: int, queries: int, *, turns: int) -> Any:
    """Choices that move last bits, each apart and all together, against float32 as it is; hsat on both sides."""
    encoder = build_encoder(backbone, embedding_dim=32, seed=0).eval()
    copied, last = copy.deepcopy(encoder), torch.channels_last
    models = {"float32": encoder, "channels_last": copied.to(memory_format=last), "bfloat16": encoder}
    models |= {"fold_batchnorm": fold_batchnorm(encoder), "all three": fold_batchnorm(encoder).to(memory_format=last)}
    asked = batches(queries, side, seed=1, first=0, size=16)
    bank = batches(4 * queries, side, seed=2, first=10_000, size=16)
    attacks = paper_attacks((4 / 255, 8 / 255))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    found: dict[str, Any] = {}
    for turn in range(turns):
        for name in list(models) if turn % 2 == 0 else list(models)[::-1]:
            half = name in ("bfloat16", "all three")
            begin = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found[name] = ours(models[name], bank, asked, attacks, "features")
            seconds[name].append(time.process_time() - begin)
    rows = {}
    for name in models:
        ratios = [a / b for a, b in zip(seconds["float32"], seconds[name], strict=True)]
        differing = {attack: int((found[name][attack] != found["float32"][attack]).sum()) for attack in attacks}
        rows[name] = {
            "cpu seconds": seconds[name],
            "times faster": {"median": statistics.median(ratios), "all": ratios},
            "predictions that differ": differing,
            "accuracy": accuracies(found[name], queries),
        }
    return rows


def accuracies(found: dict[str, Any], queries: int) -> dict[str, float]:
    """Accuracy under each attack; the classes of `batches` go round."""
    return {name: float((predicted == np.arange(queries) % 3).mean()) for name, predicted in found.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--targets", default="features,embedding")
    parser.add_argument("--layouts", default="contiguous_format,channels_last")
    parser.add_argument("--ways", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    size = (options.backbone, options.side, options.queries)
    about = {"hsat": hsat.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    about |= {"backbone": options.backbone, "side": options.side, "queries": options.queries, "bank": 4}
    for target in filter(None, options.targets.split(",")):
        for layout in options.layouts.split(","):
            found = measure(*size, turns=options.turns, layout=getattr(torch, layout), target=target)
            reached = {"aim": AIM, "reached": found["times faster"]["median"] >= AIM}
            results[f"{target}, {layout}"] = found | reached
            say(f"{target}, {layout}", found)
            write(options.out, {"about": about, "results": results})
    if options.ways:
        found = ways(*size, turns=options.turns)
        for name, row in found.items():
            say(name, row)
        write(options.out, {"about": about, "results": results, "other last bits, against float32": found})


def say(name: str, found: dict[str, Any]) -> None:
    """One line about one measurement."""
    differ = sum(found["predictions that differ"].values())
    sys.stdout.write(f"{name}: {found['times faster']['median']:.2f}x, {differ} predictions differ\n")
    sys.stdout.flush()


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Results so far, for those who do not wait for the end."""
    if path:
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
