"""What kNN costs: predictions beside torch.mm with topk, and steps of an attack on a decision by a large bank.

Predictions: the contenders answer the same queries in turn, again and again, so that a busy machine slows all of them;
the ratio is that of the medians of CPU time.  Steps: PGD climbs the margin of a `DecisionModel`, whose bank is in
memory or in a file; memory is what the process holds for itself (RssAnon, sampled) above what it held before the
classifier was fitted, when the bank was there already.

    OMP_NUM_THREADS=1 python benchmarks/knn_steps.py --out benchmarks/results/knn_steps.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from large_banks import CLASSES, TEMPERATURE, K, Memory, answerer, half_of, threads, write_bank

from hsat.attacks import PGD, Linf, margin
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.types import EmbeddingTable


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of all threads, and seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def time_predictions(folder: Path, rows: int, width: int, count: int, repeats: int) -> dict[str, object]:
    """Medians of the contenders in turn, and how many times faster than torch.mm with topk."""
    write_bank(folder / "bank", rows, width, 1)
    write_bank(folder / "queries", count, width, 2)
    table, queries = EmbeddingTable.load(folder / "bank"), np.load(folder / "queries" / "z.npy")
    knn = KNNClassifier(k=K, temperature=TEMPERATURE).fit(table)
    plain, _ = answerer("mm", table)
    work = {
        "torch.mm + topk": lambda: plain(queries),
        "predict": lambda: knn.predict(queries),
        "predict_proba": lambda: knn.predict_proba(queries),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, call in work.items():
            measured = spent(call)
            if repeat:  # the first sets up libraries
                times[name].append(measured)
    cpu = {name: statistics.median(one for one, _ in pairs) for name, pairs in times.items()}
    return {
        name: {
            "cpu_seconds": cpu[name],
            "seconds": statistics.median(wall for _, wall in pairs),
            "times_faster": cpu["torch.mm + topk"] / cpu[name],
        }
        for name, pairs in times.items()
    }


def time_steps(bank: Path, mapped: bool, width: int, images: int, steps: int) -> dict[str, object]:
    """Seconds of a step and memory of an attack on the decision by a bank of 4-byte floats."""
    table = EmbeddingTable.load(bank, memory_map=mapped)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(8))
    encoder = torch.nn.Sequential(net, torch.nn.Flatten(), torch.nn.Linear(512, width)).eval().requires_grad_(False)
    x, labels = torch.rand(images, 3, 32, 32), torch.arange(images) % CLASSES
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=steps)
    with Memory() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a bank on disk says that it is read at every step
        model = DecisionModel(encoder, KNNClassifier(k=K, temperature=TEMPERATURE).fit(table))
        objective = margin(model, labels)
        first, _ = spent(lambda: objective(x))
        cpu, wall = spent(lambda: attack(x, objective, generator=torch.Generator().manual_seed(0)))
    return {
        "first_call_cpu_seconds": first,
        "cpu_seconds_per_step": cpu / steps,
        "seconds_per_step": wall / steps,
        "own_mib_beside_the_bank": memory.peak["RssAnon"] - memory.start["RssAnon"],
        "bank_mib": table.z.nbytes / 2**20,
    }


def markdown(about: dict[str, object], predictions: dict[str, object], steps: dict[str, object]) -> str:
    """The results as tables."""
    lines = [
        "# kNN: predictions and steps",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in about.items()),
    ]
    for size, contenders in predictions.items():
        lines += ["", f"## {size}", "", "| | CPU ms | ms | times faster |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {1e3 * one['cpu_seconds']:.0f} | {1e3 * one['seconds']:.0f} | {one['times_faster']:.2f} |"
            for name, one in contenders.items()
        ]
    for size, banks in steps.items():
        lines += ["", f"## Attack: {size}", ""]
        lines += [
            "| bank | CPU s per step | s per step | first call, CPU s | MiB beside the bank |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {one['cpu_seconds_per_step']:.2f} | {one['seconds_per_step']:.2f}"
            f" | {one['first_call_cpu_seconds']:.2f} | {one['own_mib_beside_the_bank']:.0f} |"
            for name, one in banks.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="of the bank of predictions")
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--step-rows", type=int, default=250_000, help="of the bank of the attack; 0 leaves it out")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the banks are written meanwhile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    about: dict[str, object] = {
        "k": K,
        "queries": options.queries,
        "threads": threads(),
        "load_before": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "versions": {module.__name__: module.__version__ for module in (torch, np)},
    }
    predictions: dict[str, object] = {}
    steps: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for width in options.widths:
            folder = Path(scratch) / str(width)
            predictions[f"{options.rows} x {width}"] = time_predictions(
                folder, options.rows, width, options.queries, options.repeats
            )
        if options.step_rows:
            width, bank = options.widths[0], Path(scratch) / "large"
            write_bank(bank, options.step_rows, width, 1)
            for file in half_of(bank).iterdir():
                file.unlink()  # room on the disk
            steps[f"{options.step_rows} x {width}, {options.images} images"] = {
                name: time_steps(bank, mapped, width, options.images, options.steps)
                for name, mapped in (("in a file", True), ("in memory", False))
            }
    about["load_after"] = os.getloadavg()[0]
    text = markdown(about, predictions, steps)
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(
            json.dumps({"about": about, "predictions": predictions, "steps": steps}, indent=1) + "\n"
        )
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
