"""HiDisc on bright-field patches under several augmentations: how well a kNN vote decides on held-out patients.

Every run trains the same network on the same draws of patients with one augmentation, and embeds the held-out patients.
Runs are written one by one, and are not repeated when the script is started again.

    python benchmarks/augmentation.py --data DIR --out benchmarks/results/augmentation.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hsat import embed
from hsat.classifiers import KNNClassifier
from hsat.data import Cohort, PatchDataset, patch_loader, read_cohort
from hsat.eval import metrics
from hsat.models import build_encoder
from hsat.training import TrainConfig, Trainer, ViewConfig

AUGMENTATIONS = ("he", "v0", "v1", "none")


def train_and_score(cohort: Cohort, name: str, *, split: int, options: argparse.Namespace) -> dict[str, object]:
    """One run: accuracies of the held-out patches by the votes of 20 training patches, and each patch's scores."""
    torch.set_num_threads(1)
    cohort = cohort.with_split(val_fraction=0.3, seed=split)
    encoder = build_encoder(options.backbone, embedding_dim=64, seed=split)
    views = ViewConfig(image_size=options.image_size, augmentation=name)
    config = TrainConfig.hidisc(
        steps=options.steps, batch_patients=8, views=views, seed=split, save_every=options.steps
    )
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(encoder, cohort, config, out=folder).fit()
    seconds = time.process_time() - begin
    tables = []
    for part in ("train", "val"):
        dataset = PatchDataset(cohort, part, image_size=options.image_size)
        tables.append(embed(encoder, patch_loader(dataset, batch_size=64), layer="features"))
    scores = KNNClassifier(k=20).fit(tables[0]).predict_proba(tables[1])
    measured = metrics(scores, tables[1].label)
    return {
        "accuracy": measured.accuracy,
        "mca": measured.mca,
        "n": measured.n,
        "cpu_seconds": seconds,
        "right": (scores.argmax(1) == tables[1].label).astype(int).tolist(),
        "patient": tables[1].patient.tolist(),
        "chance": float(np.bincount(tables[1].label).max() / len(tables[1].label)),
    }


def difference(runs: dict[str, dict[str, object]], name: str, against: str, splits: int) -> str:
    """Mean difference over patients of all splits with its 95 % bootstrap interval, in points."""
    gaps = []
    for split in range(splits):
        one, other = (runs[f"{which}-{split}"] for which in (name, against))
        gap = np.array(one["right"]) - np.array(other["right"])
        patient = np.array(one["patient"])
        gaps += [(gap[patient == who].sum(), (patient == who).sum()) for who in np.unique(patient)]
    pairs = np.array(gaps, dtype=float)
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(0, len(pairs), (5000, len(pairs)))].sum(1)
    low, high = np.quantile(100 * drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return f"{100 * pairs[:, 0].sum() / pairs[:, 1].sum():+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(about: dict[str, object], runs: dict[str, dict[str, object]], names: list[str], splits: int) -> str:
    """The runs as a table."""
    lines = ["# HiDisc under several augmentations, bright-field patches", ""]
    lines += [*(f"- {name.replace('_', ' ')}: {value}" for name, value in about.items()), ""]
    lines += [
        "| augmentation | " + " | ".join(f"split {i}" for i in range(splits)) + " | mean | minus v0 | CPU s a run |"
    ]
    lines += ["| --- " * (splits + 4) + "|"]
    for name in names:
        mine = [runs[f"{name}-{split}"] for split in range(splits)]
        cells = [f"{100 * run['accuracy']:.1f}" for run in mine]
        mean = f"{100 * np.mean([run['accuracy'] for run in mine]):.1f}"
        gap = "" if name == "v0" else difference(runs, name, "v0", splits)
        seconds = f"{np.mean([run['cpu_seconds'] for run in mine]):.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {gap} | {seconds} |")
    chance = [100 * runs[f"{names[0]}-{split}"]["chance"] for split in range(splits)]
    lines.append(f"| chance | {' | '.join(f'{value:.1f}' for value in chance)} | {np.mean(chance):.1f} | | |")
    return "\n".join([*lines, "", "Patch accuracy in %, k = 20, features; intervals over patients of all splits.", ""])


def main() -> None:
    """Make the runs that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folders class/patient/slide/patch")
    parser.add_argument("--layout", default="folders")
    parser.add_argument("--names", nargs="+", default=[*AUGMENTATIONS])
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cohort = read_cohort(options.data, options.layout)
    about = {
        "patches": len(cohort),
        "patients": len(cohort.patient_names),
        "backbone": options.backbone,
        "image_size": options.image_size,
        "steps": f"{options.steps} of 8 patients x 2 slides x 2 patches x 2 views",
        "machine": f"{os.cpu_count()} cores, one thread a run, torch {torch.__version__}, {platform.machine()}",
    }
    runs: dict[str, dict[str, object]] = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    for split in range(options.splits):
        for name in options.names:
            if f"{name}-{split}" not in runs:
                runs[f"{name}-{split}"] = train_and_score(cohort, name, split=split, options=options)
                options.out.write_text(json.dumps({"about": about, "runs": runs}) + "\n")
    options.out.with_suffix(".md").write_text(markdown(about, runs, options.names, options.splits))


if __name__ == "__main__":
    main()
