"""How much lower an ensemble of attacks finds robust accuracy than the paper's three attacks, on the demo's encoders.

    hsat demo
    python benchmarks/ensemble.py --demo runs/demo --out benchmarks/results/strongest.md

The paper's attacks and the ensemble run in calls of their own, on all validation patches; what is finished in --runs is
not run again.  "worst of three" counts a patch as robust if none of the paper's attacks breaks it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hsat
from hsat.eval import load_scores, read_records

ROOT = Path(__file__).resolve().parents[1]
PAPER = ("PGD", "BIM", "MIFGSM")


def evaluate(demo: Path, runs: Path, k: int, seed: int) -> None:
    """The two evaluations, each in a folder of its own."""
    files = ",".join(f"{name}={demo / name.lower() / 'final.safetensors'}" for name in ("HiDisc", "HSAT"))
    for attacks in (",".join(PAPER).lower(), "ensemble"):
        out = runs / ("paper" if attacks != "ensemble" else attacks)
        if (out / "records.jsonl").exists():
            continue
        command = [sys.executable, "-m", "hsat", "evaluate", "--checkpoint", files, "--out", str(out)]
        command += ["--attacks", attacks, "--target", "features", "--k", str(k), "--seed", str(seed)]
        command += ["--data.image_size", "48", "--resume"]
        command += ["--cache", str(runs / "cache"), "--noise", "false", "--diagnose", "0", "--gallery", "0", "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def robust_to_all(runs: Path, model: str, eps: str, k: int) -> dict[int, bool]:
    """By patch: is it recognised under each of the paper's attacks?"""
    standing: dict[int, bool] = {}
    for table in load_scores(runs / "paper" / "scores.npz"):
        if table.model == model and table.k == k and table.condition in [f"{name}-{eps}" for name in PAPER]:
            right = table.scores.argmax(1) == table.label
            for patch, kept in zip(table.patch.tolist(), right.tolist(), strict=True):
                standing[patch] = standing.get(patch, True) and kept
    return standing


def compare(runs: Path, k: int) -> list[dict[str, Any]]:
    """One row for each encoder and radius; accuracies as shares."""
    records = [r for name in ("paper", "ensemble") for r in read_records(runs / name / "records.jsonl")]
    numbers = {(r.model, r.attack_name): r for r in records if (r.level, r.metric, r.k) == ("patch", "accuracy", k)}
    with (runs / "ensemble" / "ensemble.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for model in dict.fromkeys(model for model, _ in numbers):
        for eps in ("4", "8"):
            three = robust_to_all(runs, model, eps, k)
            mine = {
                int(r["patch"]): r["broken_by"] == ""
                for r in rows
                if (r["model"], r["attack"]) == (model, f"ensemble-{eps}")
            }
            single = [numbers[model, f"{name}-{eps}"].value for name in PAPER]
            ensemble, worst = (float(np.mean(list(each.values()))) for each in (mine, three))
            row = {"encoder": model, "eps": f"{eps}/255", "patches": len(mine), "clean": numbers[model, "clean"].value}
            row |= dict(zip(PAPER, single, strict=True)) | {"worst of three": worst, "ensemble": ensemble}
            row |= {"lower by": min(single) - ensemble}
            row |= {"weaker on": sum(mine[patch] and not three[patch] for patch in three)}
            members = numbers[model, f"ensemble-{eps}"].settings["members"]
            found.append(row | {"newly broken": {name: each["newly_broken"] for name, each in members.items()}})
    return found


def summary(rows: list[dict[str, Any]], runs: Path) -> str:
    """The table, and what it rests on."""
    lines = ["| encoder | eps | clean | PGD | BIM | MI-FGSM | worst of three | ensemble | lower by | weaker on |"]
    lines.append("|" + " --- |" * 10)
    for row in rows:
        shown = " | ".join(
            f"{100 * row[name]:.1f}" for name in ("clean", *PAPER, "worst of three", "ensemble", "lower by")
        )
        lines.append(f"| {row['encoder']} | {row['eps']} | {shown} | {row['weaker on']} patches |")
    table = (runs / "ensemble" / "table.md").read_text()
    return "\n".join(lines) + "\n\n" + table[table.index("\n**ensemble-") + 1 :]


def main() -> None:
    """Evaluate what is missing, then write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ensemble_benchmark"))
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/strongest.md")
    options = parser.parse_args()
    evaluate(options.demo, options.runs, options.k, options.seed)
    head = (
        "# The ensemble of attacks on the demo's encoders\n\n"
        f"Patch accuracy in %, k = {options.k}, attacks on the features, all validation patches of the synthetic cohort"
        f" of seed {options.seed}.\n`lower by`: points below the lowest of the paper's three attacks; `weaker on`:"
        " patches that are robust to the ensemble\nand broken by one of the three.  Accuracies on tissue will differ."
        "\n\n"
    )
    rows = compare(options.runs, options.k)
    text = head + summary(rows, options.runs)
    options.out.write_text(text)
    about = {"hsat": hsat.__version__, "torch": torch.__version__, "k": options.k, "seed": options.seed}
    options.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
