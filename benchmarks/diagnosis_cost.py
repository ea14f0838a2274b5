"""What the diagnosis of masked gradients adds to an evaluation, in CPU seconds.

    OMP_NUM_THREADS=1 python benchmarks/diagnosis_cost.py --patches 254 --diagnose 31

Patches of a synthetic cohort, three attacks at two eps, an untrained network.  The evaluation without diagnosis, and
the one with it, run in turn; the share is that of the diagnosis in the whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.embedding import embed
from hsat.eval import RunOptions, Scoring, evaluate_whitebox, paper_attacks
from hsat.models import build_encoder


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of each run, without and with the diagnosis."""
    with tempfile.TemporaryDirectory() as folder:
        patients = 4
        patches = -(-options.patches // (2 * 2 * 2)) + 1
        root = write_synthetic_cohort(
            folder, classes=("hgg", "normal"), patients_per_class=patients, patches=patches, size=options.size
        )
        cohort = read_opensrh(root).with_split(val_fraction=0.5, seed=0)
        bank, queries = (PatchDataset(cohort, split, image_size=options.size) for split in ("train", "val"))
        torch.manual_seed(0)
        encoder = build_encoder(options.backbone, mean=0.5, std=0.25)
        table = embed(encoder, patch_loader(bank, batch_size=64))
        few = queries.subset(range(min(len(queries), options.patches)))
        attacks = paper_attacks(names=options.attacks.split(","), steps=10)
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(options.repeats):
            for name, count in (("without", 0), ("with", options.diagnose)):
                begin = time.process_time()
                result: Any = evaluate_whitebox(
                    encoder,
                    table,
                    patch_loader(few, batch_size=64),
                    attacks,
                    classifier=KNNClassifier(k=20),
                    target=options.target,
                    scoring=Scoring(bootstrap=0),
                    run=RunOptions(diagnose=count),
                )
                seconds[name].append(time.process_time() - begin)
        print(f"{len(few)} patches of {options.size} pixels, {options.diagnose} diagnosed, {len(attacks)} attacks")
        print({flag for record in result.records for flag in record.flags})
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=254)
    parser.add_argument("--diagnose", type=int, default=31)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--attacks", default="pgd,bim,mifgsm")
    parser.add_argument("--target", default="decision")
    parser.add_argument("--repeats", type=int, default=1)
    seconds = measure(parser.parse_args())
    without, whole = (statistics.median(values) for values in seconds.values())
    share = (whole - without) / whole
    print(f"without {without:.1f} s, with {whole:.1f} s of CPU time: the diagnosis takes {share:.0%} of the whole")


if __name__ == "__main__":
    main()
