"""How fast this checkout is beside another one: steps, attacks, evaluations, losses and kNN, in turn in one run.

    git worktree add ../before 91c38be
    python benchmarks/compare_checkouts.py ../before . --turns 9 --out benchmarks/results/compare_checkouts.json

Each checkout has one process, which waits while the other one works.  Every turn does a piece of work in both, the one
that begins alternates, and a ratio is OLD's CPU seconds by NEW's in the same turn: above 1 this checkout is faster.
Shown are the medians of the ratios, with their quartiles.  Only calls that both editions have in common are timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORKS = {
    "step, resnet18, 16 x 64 px": "adversarial_step with PGD-5 on the hierarchical loss, backward and AdamW",
    "step, resnet50, 16 x 64 px": "the same",
    "attack, resnet18, 16 x 64 px": "PGD-10 on the drift of the features",
    "evaluation, resnet18, 64 x 64 px": "evaluate_whitebox, PGD-10 on the features, bank of 64",
    "HiDiscLoss, 512 x 128": "forward and backward, ten times",
    "kNN predict, 10,000 x 2048": "256 queries, k = 200",
    "kNN predict_proba, 10,000 x 2048": "the same",
}


def first_of(name: str, *modules: str) -> Any:
    """A name from the first of these modules that has it; later editions moved some."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


def images(count: int, side: int) -> torch.Tensor:
    """Seeded images (count, 3, side, side)."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def step_work(backbone: str) -> Callable[[], object]:
    """One training step on 16 images of 64 px."""
    from hsat import PGD, HiDiscLoss, HierarchicalBatch, Linf, adversarial_step, build_encoder

    encoder = build_encoder(backbone, seed=0).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    batch = HierarchicalBatch.from_grid(images(16, 64).view(2, 2, 2, 2, 3, 64, 64))
    attack, loss = PGD(Linf(8 / 255), step_size=2 / 255, steps=5), HiDiscLoss()

    def work() -> object:
        optimizer.zero_grad(set_to_none=True)
        result = adversarial_step(encoder, loss, attack, batch, generator=torch.Generator().manual_seed(1))
        result.loss.backward()
        optimizer.step()
        return result

    return work


def attack_work() -> Callable[[], object]:
    """PGD-10 on 16 images of 64 px."""
    from hsat import PGD, Linf, build_encoder, feature_drift, frozen

    encoder, x = build_encoder("resnet18", seed=0).eval(), images(16, 64)
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=10)

    def work() -> object:
        with frozen(encoder):
            objective = feature_drift(encoder.features, x)
            return attack(x, objective, generator=torch.Generator().manual_seed(1))

    return work


def evaluation_work() -> Callable[[], object]:
    """A white-box evaluation of 64 queries with a bank of 64."""
    from hsat import PGD, HierarchicalBatch, Linf, build_encoder, evaluate_whitebox

    encoder, ids = build_encoder("resnet18", seed=0).eval(), torch.arange(64)

    class Batches(list):  # type: ignore[type-arg]
        """A loader whose images have classes with names."""

        class dataset:
            class_names = ("a", "b")
            cohort = None
            split = ""

    def batches(first: int) -> Batches:
        shift = ids + first
        batch = HierarchicalBatch(images(64, 64), shift, shift // 4, shift // 8, shift // 8 % 2)
        return Batches([batch])

    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=10)}
    return lambda: evaluate_whitebox(encoder, batches(0), batches(1000), attacks, target="features")


def loss_work() -> Callable[[], object]:
    """The loss of 512 embeddings, ten times."""
    from hsat import HiDiscLoss, Levels

    ids = torch.arange(512)
    levels, loss = Levels(ids // 2, ids // 4, ids // 8), HiDiscLoss()
    z = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def work() -> None:
        for _ in range(10):
            loss(z, levels).total.backward()

    return work


def knn_work(method: str) -> Callable[[], object]:
    """256 queries against 10,000 rows."""
    from hsat import EmbeddingTable

    settings = first_of("KNNClassifier", "hsat.classifiers", "hsat.eval")
    generator = np.random.default_rng(0)

    def table(rows: int) -> EmbeddingTable:
        z, ids = generator.normal(size=(rows, 2048)).astype(np.float32), np.arange(rows)
        return EmbeddingTable(z, ids % 5, ids, ids, ids, tuple("abcde"))

    fitted, queries = settings(k=200).fit(table(10_000)), table(256)
    return lambda: getattr(fitted, method)(queries)


MAKERS: dict[str, Callable[[], Callable[[], object]]] = dict(
    zip(
        WORKS,
        (
            lambda: step_work("resnet18"),
            lambda: step_work("resnet50"),
            attack_work,
            evaluation_work,
            loss_work,
            lambda: knn_work("predict"),
            lambda: knn_work("predict_proba"),
        ),
        strict=True,
    )
)


def serve() -> None:
    """Time pieces of work as they are asked for on standard input, one answer a line."""
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    works: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in works:
            works[name] = MAKERS[name]()
            works[name]()  # warms caches
        begin, wall = time.process_time(), time.perf_counter()
        works[name]()
        print(json.dumps([time.process_time() - begin, time.perf_counter() - wall]), flush=True)


class Checkout:
    """A process that works with the hsat of one checkout."""

    def __init__(self, folder: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )

    def seconds(self, name: str) -> float:
        """CPU seconds of one piece of work."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the process of {self.process.args} ended at {name!r}; see what it wrote")
        return float(json.loads(answer)[0])


def compare(old: Path, new: Path, *, turns: int, threads: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of OLD's seconds by NEW's, by piece of work."""
    pair = Checkout(old, threads), Checkout(new, threads)
    results = {}
    for name in WORKS:
        ratios, seconds = [], []
        for turn in range(turns):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            measured = {which: pair[which].seconds(name) for which in order}
            ratios.append(measured[0] / measured[1])
            seconds.append(measured[1])
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {"ratio": middle, "low": low, "high": high, "seconds": statistics.median(seconds)}
        print(f"{name:36} {middle:5.2f}  ({low:.2f} to {high:.2f})   {statistics.median(seconds):.3f} s", flush=True)
    return results


def commit_of(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Read the options, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("new", type=Path, nargs="?", default=Path(), help="this checkout")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.old is None:
        parser.error("name the other checkout")
    results = compare(options.old, options.new, turns=options.turns, threads=options.threads)
    if options.out:
        about = {"old": commit_of(options.old), "new": commit_of(options.new), "turns": options.turns}
        about |= {"threads": options.threads, "torch": torch.__version__, "machine": platform.processor()}
        options.out.write_text(json.dumps({"about": about, "works": WORKS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
