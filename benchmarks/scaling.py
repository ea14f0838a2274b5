"""How the cost of an attack grows: time with images and with steps (linear), memory with steps (flat).

Each point is a process of its own, so that its peak memory is that of this attack alone; memory is what the peak rises
above the loaded network and images.  Time is CPU time of one thread, in the median of several calls.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/results/scaling
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import hsat
from hsat.attacks import PGD, Linf, hierarchical
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder, frozen
from hsat.types import HierarchicalBatch

IMAGES, STEPS = (16, 32, 64, 128), (1, 2, 5, 10, 20, 40)
FIXED_IMAGES, FIXED_STEPS = 32, 5


def peak() -> int:
    """Largest resident memory of this process so far, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def resident() -> int:
    """Resident memory now, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def measure(images: int, steps: int, side: int, calls: int) -> dict[str, float]:
    """CPU seconds and extra peak memory of the inner maximisation on resnet18."""
    x = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    model, loss = build_encoder("resnet18", seed=0).eval(), HiDiscLoss()
    batch = HierarchicalBatch.from_grid(x.unflatten(0, (images // 8, 2, 2, 2)))
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=steps)
    before, seconds = resident(), []
    with frozen(model):
        for call in range(calls):
            begin = time.process_time()
            attack(x, hierarchical(model, loss, batch), generator=torch.Generator().manual_seed(call))
            seconds.append(time.process_time() - begin)
    return {"images": images, "steps": steps, "seconds": statistics.median(seconds), "bytes": peak() - before}


def fitted(xs: list[float], ys: list[float]) -> dict[str, float]:
    """Least-squares line and its share of explained variance."""
    slope, intercept = statistics.linear_regression(xs, ys)
    return {"slope": slope, "intercept": intercept, "r2": statistics.correlation(xs, ys) ** 2}


def plot(points: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Three panels: time by images, time by steps, memory by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = (
        ("by images", "images", "seconds", 1.0, f"CPU seconds, {FIXED_STEPS} steps"),
        ("by steps", "steps", "seconds", 1.0, f"CPU seconds, {FIXED_IMAGES} images"),
        ("by steps", "steps", "bytes", 2.0**20, f"extra memory, MiB, {FIXED_IMAGES} images"),
    )
    for axis, (group, key, value, unit, label) in zip(axes, panels, strict=True):
        axis.plot([p[key] for p in points[group]], [p[value] / unit for p in points[group]], "o-")
        axis.set(xlabel=key, ylabel=label)
        axis.set_ylim(0, 1.15 * max(p[value] / unit for p in points[group]))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure all points in processes of their own, fit, plot, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", type=int, nargs=2, help="images and steps: measure one point in this process")
    options = parser.parse_args()
    if options.point:
        sys.stdout.write(json.dumps(measure(*options.point, options.side, options.calls)))
        return
    points: dict[str, list[dict[str, float]]] = {}
    for group, pairs in (
        ("by images", [(n, FIXED_STEPS) for n in IMAGES]),
        ("by steps", [(FIXED_IMAGES, s) for s in STEPS]),
    ):
        points[group] = []
        for images, steps in pairs:
            command = [sys.executable, __file__, "--point", str(images), str(steps)]
            command += ["--side", str(options.side), "--calls", str(options.calls)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            points[group].append(json.loads(found))
            sys.stdout.write(f"{group}: {found}\n")
            sys.stdout.flush()
    memory = [p["bytes"] for p in points["by steps"]]
    verdict = {
        "seconds by images": fitted([p["images"] for p in points["by images"]], column(points, "by images")),
        "seconds by steps": fitted([p["steps"] for p in points["by steps"]], column(points, "by steps")),
        "largest over smallest memory, by steps": max(memory) / min(memory),
    }
    sys.stdout.write(json.dumps(verdict, indent=1) + "\n")
    if options.out:
        about = {
            "hsat": hsat.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "load average": os.getloadavg(),
            "attack": "PGD on the hierarchical loss, resnet18",
            "side": options.side,
        }
        content = {"about": about, "verdict": verdict, "points": points}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(points, options.out.with_suffix(".png"))


def column(points: dict[str, list[dict[str, float]]], group: str) -> list[float]:
    """The seconds of a group."""
    return [p["seconds"] for p in points[group]]


if __name__ == "__main__":
    main()
