"""Does the hierarchy help?  HiDisc, HSAT-Patch, HSAT-Slide and HSAT with equal numbers of images (the paper's Table 3).

Each seed has its own synthetic cohort, weights, draws and attack starts.  All four methods see the same number of
images per step and the same number of steps; HSAT-Patch draws one patch per patient and four times the patients,
HSAT-Slide one patch per slide and twice the patients.  Every encoder is attacked with PGD (10 steps of 2/255) on its
embedding, as in the paper, and on its features.  Whatever order comes out is written down, with the paired differences.

    python benchmarks/ablation_levels.py                     # "small": three seeds, about half an hour on one core
    python benchmarks/ablation_levels.py --scale night       # a night on a CPU
    python benchmarks/ablation_levels.py --scale gpu --device cuda
    python benchmarks/ablation_levels.py --report            # only write the tables again, from finished runs

Finished trainings and evaluations are kept in --runs and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from hsat.classifiers import KNNClassifier
from hsat.cli.options import device_of
from hsat.cli.train import Train, train
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.eval import Provenance, Record, RunOptions, evaluate_whitebox, paper_attacks, read_records, write_records
from hsat.models import checkpoint_hash, load_encoder
from hsat.run_folder import installed_versions

ROOT = Path(__file__).resolve().parents[1]

METHODS = {  # name: (attacked, patients in units of the batch, slides, patches)
    "HiDisc": (False, 1, 2, 2),
    "HSAT-Patch": (True, 4, 1, 1),
    "HSAT-Slide": (True, 2, 2, 1),
    "HSAT": (True, 1, 2, 2),
}
ORDER = ("HSAT-Patch", "HSAT-Slide", "HSAT")  # from worst to best in the paper
PAPER = {"patch": (50.29, 55.07, 56.97), "slide": (60.70, 69.32, 71.21), "patient": (60.00, 68.33, 70.00)}
TARGETS = ("embedding", "features")


@dataclass(frozen=True)
class Scale:
    """How large the comparison is."""

    backbone: str
    size: int
    patients_per_class: int
    patches: int
    batch_patients: int
    steps: int
    seeds: int
    precision: str = "32"


SCALES = {
    "small": Scale("test_resnet", 48, 20, 4, 8, 240, 3),
    "night": Scale("resnet10t", 64, 40, 8, 8, 2000, 5),
    "gpu": Scale("resnet50", 224, 60, 12, 16, 10_000, 5, "bf16"),
}


def cohort_of(scale: Scale, runs: Path, seed: int) -> Path:
    """The folder of this seed's synthetic cohort, written if it is not there."""
    return write_synthetic_cohort(
        runs / f"cohort-{seed}",
        seed=seed,
        patients_per_class=scale.patients_per_class,
        patches=scale.patches,
        size=scale.size,
    )


def trained(name: str, scale: Scale, root: Path, out: Path, *, seed: int, device: str) -> Path:
    """The final encoder of one method and seed; training resumes where it was interrupted."""
    if not (final := out / "final.safetensors").exists():
        attacked, times, slides, patches = METHODS[name]
        layer = {
            "data": {
                "root": str(root),
                "image_size": scale.size,
                "tune_fraction": 0,
                "slides": slides,
                "patches": patches,
            },
            "model": {"backbone": scale.backbone},
            "attack": {"name": "pgd" if attacked else "none"},
            "train": {
                "steps": scale.steps,
                "batch_patients": times * scale.batch_patients,
                "save_every": max(1, scale.steps // 10),
                "precision": scale.precision,
            },
        }
        argv = ["--out", str(out), "--seed", str(seed), "--device", device, "--resume", "true", "--quiet", "true"]
        train(Train.load(argv, recipe=layer))
    return final


def evaluated(name: str, checkpoint: Path, root: Path, scale: Scale, *, seed: int, device: str) -> list[Record]:
    """Records of one encoder under both targets, kept beside the encoder."""
    path = checkpoint.parent / "records.jsonl"
    if path.exists():
        return list(read_records(path))
    cohort = read_opensrh(root)
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=scale.size), batch_size=64) for split in ("train", "val")
    )
    encoder = load_encoder(checkpoint).to(device_of(device))
    records: list[Record] = []
    for target in TARGETS:
        found = evaluate_whitebox(
            encoder,
            bank,
            queries,
            paper_attacks((4 / 255, 8 / 255), names=("pgd",)),
            classifier=KNNClassifier(k=20),
            target=target,
            run=RunOptions(seed=seed, noise=target == TARGETS[0]),
            provenance=Provenance(model=name, checkpoint=checkpoint_hash(checkpoint)),
        )
        records += found.records
    write_records(path, records)
    return records


def values(records: list[Record], model: str, level: str, *, target: str, attack: str, metric: str) -> list[float]:
    """One number per seed, in the order of the seeds."""
    wanted = (model, level, target, attack, metric)
    return [r.value for r in records if (r.model, r.level, r.target, r.attack_name, r.metric) == wanted]


def table(records: list[Record], target: str) -> list[str]:
    """Accuracy / MCA in % under clean, PGD-4 and PGD-8: mean and range over the seeds."""
    lines = [f"**Attacks on the {target}** (accuracy / MCA, %, mean [lowest, highest seed])", ""]
    lines += ["| level | method | clean | PGD-4 | PGD-8 |", "| --- | --- | --- | --- | --- |"]
    for level in PAPER:
        for name in METHODS:
            cells = []
            for attack in ("clean", "PGD-4", "PGD-8"):
                parts = []
                for metric in ("accuracy", "mca"):
                    found = [100 * v for v in values(records, name, level, target=target, attack=attack, metric=metric)]
                    parts.append(f"{statistics.mean(found):.1f} [{min(found):.1f}, {max(found):.1f}]")
                cells.append(" / ".join(parts))
            lines.append(f"| {level} | {name} | " + " | ".join(cells) + " |")
    return lines


def verdicts(records: list[Record], target: str, attack: str) -> dict[str, dict[str, object]]:
    """By level: the means in the paper's order, the differences seed by seed, and whether the order is the paper's."""
    found: dict[str, dict[str, object]] = {}
    for level in PAPER:
        rows = [
            values(records, name, level, target=target, attack=attack, metric="accuracy") for name in (*ORDER, "HiDisc")
        ]
        means = [statistics.mean(row) for row in rows]
        steps = [[b - a for a, b in zip(low, high, strict=True)] for low, high in pairwise(rows[:3])]
        found[level] = {
            "means": dict(zip((*ORDER, "HiDisc"), means, strict=True)),
            "slide minus patch": steps[0],
            "patient minus slide": steps[1],
            "paper_order_of_means": means[0] < means[1] < means[2],
            "seeds_in_paper_order": sum(a > 0 and b > 0 for a, b in zip(*steps, strict=True)),
            "every HSAT variant beats HiDisc": all(mean > means[3] for mean in means[:3]),
        }
    return found


def sentences(judged: dict[str, dict[str, object]], target: str, seeds: int) -> list[str]:
    """The verdicts in words, the paper's numbers beside ours."""
    lines = []
    for level, found in judged.items():
        means = " / ".join(f"{100 * found['means'][name]:.1f}" for name in ORDER)
        printed = " / ".join(f"{value:.1f}" for value in PAPER[level])
        steps = "; ".join(
            f"{name} {', '.join(f'{100 * d:+.1f}' for d in found[name])}"
            for name in ("slide minus patch", "patient minus slide")
        )
        lines.append(
            f"- {target}, {level} level, PGD-8 accuracy of {' / '.join(ORDER)}: {means} (paper {printed});"
            f" by seed: {steps}; the order of the means is"
            f" {'' if found['paper_order_of_means'] else 'NOT '}the paper's,"
            f" that of {found['seeds_in_paper_order']} of {seeds} seeds is."
        )
    return lines


def write_report(records: list[Record], scale: Scale, name: str, out: Path) -> str:
    """The tables and verdicts as Markdown and JSON; returns the Markdown."""
    lines = [
        "# Levels of the hierarchy",
        "",
        f"`python benchmarks/ablation_levels.py --scale {name}`: {scale.backbone} at {scale.size} pixels,"
        f" {scale.steps} steps of {8 * scale.batch_patients} images, {scale.seeds} seeds,"
        f" {scale.patients_per_class} patients per class of the synthetic cohort (30 % of them validate), k = 20."
        " Differences between seeds include those between their cohorts.",
        "",
    ]
    judged = {target: verdicts(records, target, "PGD-8") for target in TARGETS}
    for target in TARGETS:
        lines += [*table(records, target), "", *sentences(judged[target], target, scale.seeds), ""]
    text = "\n".join(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    about = {
        "scale": asdict(scale),
        "versions": installed_versions(),
        "device": records[0].settings.get("device", "cpu"),
    }
    out.with_suffix(".json").write_text(json.dumps({"about": about, "verdicts": judged}, indent=1) + "\n")
    return text


def main() -> None:
    """Train, evaluate, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation_levels"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ablation_levels")
    parser.add_argument("--report", action="store_true", help="only write the tables again")
    options = parser.parse_args()
    scale, records = SCALES[options.scale], []
    for seed in range(scale.seeds):
        runs = options.runs / options.scale
        root = cohort_of(scale, runs, seed)
        for name in METHODS:
            out = runs / f"{name}-{seed}"
            if options.report and not (out / "records.jsonl").exists():
                raise SystemExit(f"error: {out} has no records yet; run without --report first")
            checkpoint = trained(name, scale, root, out, seed=seed, device=options.device)
            records += evaluated(name, checkpoint, root, scale, seed=seed, device=options.device)
            sys.stderr.write(f"{name}, seed {seed}: done\n")
    sys.stdout.write(write_report(records, scale, options.scale, options.out) + "\n")


if __name__ == "__main__":
    main()
