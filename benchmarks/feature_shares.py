"""Does an encoder's feature space tell the patient or the class?  Why HSAT+ without augmentation gets worse at 4x.

Of the variance of the unit features of training patches, the share that lies between patients, and of the variance of
the patients' means the share that lies between classes; beside it the accuracy of the kNN vote (k = 20) for training
patients, whose own patches are left out of the bank, and for new patients.  Reads the encoders that
benchmarks/recipes.py left in its folder of runs; painted tissue.

    python benchmarks/feature_shares.py --runs DIR    # writes benchmarks/results/feature_shares.json and .md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from colour_shares import share_between
from recipe_candidates import IMAGE_SIZES, PAINTED, RECIPES
from recipes import BACKBONES, RESULTS, Run, build, open_cohort, read_results

from hsat.classifiers import KNNClassifier
from hsat.data import Cohort, PatchDataset, patch_loader
from hsat.embedding import embed
from hsat.models import Encoder
from hsat.run_folder import installed_versions, write_json
from hsat.types import EmbeddingTable


def joint_share(rows: np.ndarray, groups: np.ndarray) -> float:
    """Of the variance of rows, all columns together, the share that lies between groups.

    Args:
        rows: (n, d).
        groups: (n,).
    """
    moving = rows[:, rows.var(0) > 0].astype(np.float64)
    return float(np.average(share_between(moving, groups), weights=moving.var(0)))


def feature_shares(train: EmbeddingTable, val: EmbeddingTable) -> dict[str, float]:
    """Shares and accuracies.

    Args:
        train: The bank, each patient of one class.
        val: New patients.
    """
    who = np.unique(train.patient)
    classes = np.array([train.label[train.patient == one][0] for one in who])
    means = np.stack([train.z[train.patient == one].mean(0) for one in who])
    right = np.concatenate([decide(train[train.patient != one], train[train.patient == one]) for one in who])
    return {
        "patients_share": joint_share(train.z, train.patient),
        "classes_share": joint_share(means, classes),
        "other_training_patients": float(right.mean()),
        "new_patients": float(decide(train, val).mean()),
    }


def decide(bank: EmbeddingTable, queries: EmbeddingTable) -> np.ndarray:
    """Which queries the vote is right for."""
    vote = KNNClassifier(k=20).fit(bank)
    return np.asarray(vote.predict_proba(queries).argmax(1) == queries.label)


def measure(encoder: Encoder, cohort: Cohort) -> dict[str, float]:
    """Of an encoder on a cohort."""
    train, val = (
        embed(encoder, patch_loader(PatchDataset(cohort, split, image_size=IMAGE_SIZES[PAINTED]), batch_size=64))
        for split in ("train", "val")
    )
    return feature_shares(train, val)


def document(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    head = ["seed", "recipe", "compute", "variance between patients", "of patients' means, between classes"]
    head += ["right: training patients, without their own patches", "right: new patients"]
    about = "Written by `benchmarks/feature_shares.py`: painted tissue, unit features of clean patches; in %."
    lines = ["# Do features tell the patient or the class?", "", about]
    lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in found["encoders"]:
        numbers = [f"{100 * value:.1f}" for value in row["shares"].values()]
        compute = f"{row['multiple']:g}x" if row["multiple"] else "untrained"
        lines.append(f"| {' | '.join([str(row['seed']), row['recipe'], compute, *numbers])} |")
    return "\n".join([*lines, "", f"Versions: {found['versions']}.", ""])


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="of benchmarks/recipes.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "feature_shares.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [Run(**one["run"]) for key, one in read_results(options.results).items() if "failure" not in one]
    files = {run: options.runs / "encoders" / f"{run.key}.pt" for run in runs if run.cohort == PAINTED}
    rows: list[dict[str, Any]] = []
    for run, file in sorted(files.items(), key=lambda item: (item[0].index, item[0].recipe, item[0].multiple)):
        if not file.exists():
            continue
        cohort = open_cohort(run, options.runs, None)
        encoder = build(RECIPES[run.recipe], BACKBONES["cpu"], seed=run.index)
        about = {"seed": run.index, "recipe": f"{RECIPES[run.recipe].family}: {RECIPES[run.recipe].change}"}
        if run.index not in {row["seed"] for row in rows}:
            shares = measure(encoder.eval(), cohort)
            rows.append({"seed": run.index, "recipe": "any", "multiple": 0, "shares": shares})
        encoder.load_state_dict(torch.load(file, weights_only=True))
        rows.append(about | {"multiple": run.multiple, "shares": measure(encoder.eval(), cohort)})
        print(json.dumps(rows[-1]))
    found = {"versions": installed_versions(), "encoders": rows}
    write_json(options.out.with_suffix(".json"), found)
    options.out.write_text(document(found))


if __name__ == "__main__":
    main()
