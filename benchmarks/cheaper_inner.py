"""Robust accuracy against training time: the paper's inner maximisation and the cheaper ones, on the synthetic cohort.

Every training uses the recipe `demo` (hsat/recipes) and differs in its inner maximisation alone.  Time is
CPU time of the training process, which a busy machine changes less than the clock on the wall.  All encoders are
attacked with PGD, 10 steps of 2/255, at 8/255, on the features that kNN (k = 20) reads.  Warm starts need fixed pixels
and are compared without augmentation.

    OMP_NUM_THREADS=1 python benchmarks/cheaper_inner.py --seeds 0 1      # about 15 CPU minutes

Finished runs are kept in --runs and not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hsat.classifiers import KNNClassifier
from hsat.cli.train import Train, train
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import RunOptions, Scoring, evaluate_whitebox, paper_attacks
from hsat.models import load_encoder
from hsat.recipes import read_recipe
from hsat.run_folder import installed_versions, write_json

ROOT = Path(__file__).resolve().parents[1]


def pgd(steps: int, name: str = "pgd") -> list[str]:
    """PGD whose steps together are 1.25 eps, as the paper's five of 2/255 are."""
    return ["--attack.name", name, "--attack.steps", str(steps), "--attack.step_size", f"{10 / steps / 255}"]


def free(replays: int) -> list[str]:
    """Free training."""
    return ["--attack.name", "free", "--attack.replays", str(replays)]


STILL, STILL_NAME = ["--data.augmentation", "none"], "no augmentation"
DEFAULT = "PGD-5 (the paper's)"
UNCHANGED = f"PGD-5, {STILL_NAME}"  # what training without augmentation, which alone changes results, is compared with
VARIANTS: dict[str, list[str]] = {
    DEFAULT: pgd(5),
    "PGD-3": pgd(3),
    "PGD-2": pgd(2),
    "FGSM-RS, unchecked": ["--attack.name", "fgsm_rs", "--attack.check_every", "0"],
    "FGSM-RS, checked": ["--attack.name", "fgsm_rs"],
    "N-FGSM, checked": ["--attack.name", "nfgsm"],
    "Free-4, as many optimiser steps": [*free(4), "--train.steps", "{quarter}"],
    "Free-4, as many batches": free(4),
    "no attack": ["--attack.name", "none"],
    UNCHANGED: [*pgd(5), *STILL],
    "PGD-2, no augmentation": [*pgd(2), *STILL],
    "PGD-2 from warm starts, no augmentation": [*pgd(2, "warm"), *STILL],
}


def folder_of(name: str, seed: int, runs: Path) -> Path:
    """Where a variant is kept."""
    return runs / f"{re.sub('[^A-Za-z0-9-]+', '_', name)}-{seed}"


def run_one(name: str, seed: int, runs: Path, steps: int) -> dict[str, Any]:
    """Train and evaluate one variant; kept beside the encoder."""
    out = folder_of(name, seed, runs)
    if (done := out / "result.json").exists():
        return json.loads(done.read_text())
    recipe = read_recipe("demo")
    size = recipe["data"]["image_size"]
    root = write_synthetic_cohort(runs / f"cohort-{seed}", seed=seed)
    argv = ["--data.root", str(root), "--out", str(out), "--seed", str(seed), "--quiet", "true"]
    argv += ["--train.steps", str(steps)]
    argv += [part.format(quarter=steps // 4) for part in VARIANTS[name]]
    begin = time.process_time()
    encoder = load_encoder(train(Train.load(argv, recipe=recipe)))
    seconds = time.process_time() - begin
    cohort = read_opensrh(root)
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=size), batch_size=64) for split in ("train", "val")
    )
    attacks = paper_attacks((8 / 255,), names=("pgd",))
    found = evaluate_whitebox(
        encoder,
        bank,
        queries,
        attacks,
        classifier=KNNClassifier(k=20),
        target="features",
        scoring=Scoring(bootstrap=0),
        run=RunOptions(seed=seed, noise=False),
    )
    value = {(r.attack_name, r.metric): r.value for r in found.records if r.level == "patch"}
    result = {
        "seconds": seconds,
        "clean": value["clean", "accuracy"],
        "robust": value["PGD-8", "accuracy"],
        "robust MCA": value["PGD-8", "mca"],
        "single-step share": shares(out / "train.csv"),
    }
    write_json(done, result)
    return result


def shares(path: Path) -> list[float]:
    """The safeguard's findings, each once."""
    with path.open(newline="") as file:
        found = [float(row["single_step_share"]) for row in csv.DictReader(file) if row.get("single_step_share")]
    return [a for a, b in zip(found, [None, *found], strict=False) if a != b]


def sentence(name: str, runs: list[dict[str, Any]], default: list[dict[str, Any]]) -> list[str]:
    """The row of one variant: everything in the mean and by seed."""

    def both(key: str) -> str:
        values = [100 * run[key] for run in runs]
        return f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"

    seconds = [run["seconds"] for run in runs]
    faster = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(default, runs, strict=True))
    smallest = [min(run["single-step share"], default=None) for run in runs]
    share = ", ".join("-" if s is None else f"{s:.2f}" for s in smallest)
    return [name, f"{statistics.mean(seconds):.0f}", f"{faster:.2f}x", both("robust"), both("clean"), share]


def report(results: dict[str, list[dict[str, Any]]], steps: int, seeds: list[int]) -> str:
    """The table and who dominates the default."""
    head = ["inner maximisation", "training, CPU s", "faster", "PGD-8 accuracy, %", "clean, %", "least share"]
    lines = [
        "# Cheaper inner maximisation",
        "",
        f"`python benchmarks/cheaper_inner.py --seeds {' '.join(map(str, seeds))}`: the demo's recipe, {steps} batches,"
        " one thread.  Means over the seeds, in brackets each seed; a seed has its own cohort, weights and draws."
        "  The last column is the smallest share of PGD's rise in loss that the single step reached in a check.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    lines += [f"| {' | '.join(sentence(name, runs, results[DEFAULT]))} |" for name, runs in results.items()]
    for base in (DEFAULT, UNCHANGED):
        rivals = [name for name in results if name != base and (name.endswith(STILL_NAME) == (base == UNCHANGED))]
        found = [name for name in rivals if dominates(results[name], results[base])] if base in results else []
        lines += [
            "",
            f"Cheaper and, in every seed, no worse than {base} in clean and robust accuracy:"
            f" {', '.join(found) if found else 'none'}.",
        ]
    return "\n".join(lines) + "\n"


def dominates(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> bool:
    """Whether each run is cheaper than that of the same seed, and no worse."""
    return all(
        run["robust"] >= other["robust"] and run["clean"] >= other["clean"] and run["seconds"] < other["seconds"]
        for run, other in zip(runs, base, strict=True)
    )


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Robust accuracy against training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, runs) in enumerate(results.items()):
        marker = "osD^vP*Xhd<>"[number % 12]
        points = [(run["seconds"], 100 * run["robust"]) for run in runs]
        colour = pyplot.get_cmap("tab20")(number)
        axes.plot(*zip(*points, strict=True), marker, label=name, color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="training, CPU seconds", ylabel="kNN accuracy under PGD at 8/255, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--runs", type=Path, default=Path("runs/cheaper_inner"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cheaper_inner")
    parser.add_argument("--finished", action="store_true", help="only the table, of variants that every seed has")
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in VARIANTS:
        if options.finished and not all(
            (folder_of(name, seed, options.runs) / "result.json").exists() for seed in options.seeds
        ):
            continue
        runs = [run_one(name, seed, options.runs, options.steps) for seed in options.seeds]
        sys.stderr.write(f"{name}: {[(round(run['seconds']), round(run['robust'], 3)) for run in runs]}\n")
        results[name] = runs
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = report(results, options.steps, options.seeds)
    options.out.with_suffix(".md").write_text(text)
    content = {"about": {"versions": installed_versions(), "threads": torch.get_num_threads()}, "results": results}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    plot(results, options.out.with_suffix(".png"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
