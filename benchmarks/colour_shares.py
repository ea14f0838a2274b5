"""Does the colour of patches tell the patient or the class?  When to try norm="image" (docs/recipes.md).

Of every patch the mean and the standard deviation of each channel; of their variance over all patches, the share that
lies between patients, and of the variance of the patients' means the share that lies between classes, beside what
random classes would have.  Where colour tells patients apart and not classes, an encoder that is trained to tell
patients apart learns the stain.

    python benchmarks/colour_shares.py --data DIR    # writes benchmarks/results/colour_shares.json and .md
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsat.classifiers import KNNClassifier
from hsat.data import Cohort, PatchDataset, patch_loader, read_cohort, read_opensrh, write_synthetic_cohort
from hsat.eval import RunOptions, Scoring, evaluate_whitebox
from hsat.models import build_encoder
from hsat.run_folder import installed_versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"
STATISTICS = ("mean red", "mean green", "mean blue", "std red", "std green", "std blue")


def share_between(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Of the variance of each column, the share that lies between groups: 1 - within / total.

    Args:
        values: (n, d).
        groups: (n,).
    """
    total = np.square(values - values.mean(0)).sum(0)
    within = sum(np.square(values[groups == one] - values[groups == one].mean(0)).sum(0) for one in np.unique(groups))
    return np.asarray(1 - within / total)


def colour_shares(cohort: Cohort, *, image_size: int) -> dict[str, Any]:
    """The shares of all patches of both splits, and the accuracy of untrained encoders with and without colour."""
    parts, patients, labels = [], [], []
    for split in ("train", "val"):
        for batch in patch_loader(PatchDataset(cohort, split, image_size=image_size), batch_size=64):
            pixels = batch.images.flatten(2).double()
            parts.append(torch.cat([pixels.mean(2), pixels.std(2)], 1).numpy())
            patients += batch.patient.tolist()
            labels += batch.label.tolist()
    values, who, what = np.concatenate(parts), np.array(patients), np.array(labels)
    first = [np.flatnonzero(who == one)[0] for one in np.unique(who)]
    means = np.stack([values[who == one].mean(0) for one in np.unique(who)])
    classes = what[first]
    found: dict[str, Any] = {"patches": len(values), "patients": len(means), "image_size": image_size}
    found["patients_share"] = dict(zip(STATISTICS, share_between(values, who).tolist(), strict=True))
    found["classes_share"] = dict(zip(STATISTICS, share_between(means, classes).tolist(), strict=True))
    found["classes_share_by_chance"] = (len(np.unique(classes)) - 1) / (len(means) - 1)
    found["untrained"] = {norm: untrained(cohort, norm, image_size=image_size) for norm in ("none", "image")}
    return found


def untrained(cohort: Cohort, norm: str, *, image_size: int) -> float:
    """Clean accuracy of patches by the vote of 20 neighbours in the features of a random network, mean of three."""
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=image_size), batch_size=64) for split in ("train", "val")
    )
    accuracies = []
    for seed in range(3):
        encoder = build_encoder("test_resnet", head=None, norm=norm, seed=seed).eval()
        result = evaluate_whitebox(
            encoder,
            bank,
            queries,
            {},
            classifier=KNNClassifier(k=20),
            scoring=Scoring(bootstrap=0),
            run=RunOptions(noise=False),
        )
        accuracies += [one.value for one in result.records if (one.level, one.metric) == ("patch", "accuracy")]
    return float(np.mean(accuracies))


def document(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["# Does colour tell the patient or the class?", "", "Written by `benchmarks/colour_shares.py`.", ""]
    for cohort, one in found["cohorts"].items():
        lines += [
            f"## {cohort}: {one['patches']} patches of {one['patients']} patients, {one['image_size']} pixels",
            "",
        ]
        lines += ["| of each patch | variance between patients, % | of patients' means, between classes, % |"]
        lines += ["| --- | --- | --- |"]
        for name in STATISTICS:
            shares = one["patients_share"][name], one["classes_share"][name]
            lines.append(f"| {name} | {100 * shares[0]:.0f} | {100 * shares[1]:.0f} |")
        raw, own = (100 * one["untrained"][norm] for norm in ("none", "image"))
        lines += [
            "",
            f"Random classes would have {100 * one['classes_share_by_chance']:.0f} %.  An untrained `test_resnet` is"
            f" right for {raw:.1f} % of patches (20 neighbours, mean of three), and for {own:.1f} % with"
            ' `norm="image"`.',
            "",
        ]
    return "\n".join([*lines, f"Versions: {found['versions']}.", ""])


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folders class/patient/slide/patch; painted tissue alone without")
    parser.add_argument("--image-size", type=int, default=64, help="to which the patches of --data are resized")
    parser.add_argument("--out", type=Path, default=RESULTS / "colour_shares.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"versions": installed_versions(), "cohorts": {}}
    with tempfile.TemporaryDirectory() as folder:
        painted = read_opensrh(write_synthetic_cohort(Path(folder) / "cohort", seed=0))
        found["cohorts"]["Painted tissue"] = colour_shares(painted, image_size=48)
    if options.data is not None:
        cohort = read_cohort(options.data, "folders").with_split(val_fraction=0.3, seed=0)
        found["cohorts"][options.data.name] = colour_shares(cohort, image_size=options.image_size)
    write_json(options.out.with_suffix(".json"), found)
    options.out.write_text(document(found))


if __name__ == "__main__":
    main()
