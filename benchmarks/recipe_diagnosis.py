"""Does HSAT+ hide its gradients?  Signs of masking on an encoder that benchmarks/recipes.py trained.

More steps and restarts should take little more; a large ball should leave nothing; images made on other encoders and a
search without gradients should do less than the attack on the encoder itself; attacks inside a certified radius should
change no smoothed decision.

    OMP_NUM_THREADS=1 python benchmarks/recipe_diagnosis.py --runs runs/recipes --seed 3
    OMP_NUM_THREADS=1 python benchmarks/recipe_diagnosis.py --runs runs/recipes --seed 0 --ebhi DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_candidates import EBHI, IMAGE_SIZES, OURS, PAINTED, RECIPES, TUNED
from recipes import BACKBONES, RADII, RESULTS, Run, build, choose, cpu_seconds, open_cohort, read_results

from hsat.attacks import PGD, Linf, Square
from hsat.classifiers import KNNClassifier
from hsat.data import Cohort, PatchDataset, patch_loader
from hsat.eval import (
    CheckOptions,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    check_certificates,
    evaluate_transfer,
    evaluate_whitebox,
)
from hsat.models import Encoder
from hsat.run_folder import installed_versions, write_json
from hsat.types import Attack

LARGE = (16, 32, 64, 128, 255)
"""Radii in 255ths of the sweep up to the whole pixel range."""


def attacks(cohort: str) -> dict[str, Attack]:
    """The white-box attacks and the search without gradients."""
    found: dict[str, Attack] = {}
    for radius in RADII[cohort]:
        ball = Linf(radius / 255)
        found |= {f"{radius}/255, {n} steps": PGD(ball, step_size=radius / 4 / 255, steps=n) for n in (10, 50, 100)}
        found[f"{radius}/255, 20 steps, 5 restarts"] = PGD(ball, step_size=radius / 4 / 255, steps=20, restarts=5)
        found[f"{radius}/255, Square, 1000 queries"] = Square(ball, queries=1000)
    for radius in LARGE:
        found[f"{radius}/255, 20 steps"] = PGD(Linf(radius / 255), step_size=radius / 8 / 255, steps=20)
    return found


def patches(cohort: Cohort, split: str, count: int | None, *, side: int) -> Any:
    """A loader of a split, thinned evenly."""
    dataset = PatchDataset(cohort, split, image_size=side)
    if count is not None and count < len(dataset):
        dataset = dataset.subset(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    return patch_loader(dataset, batch_size=64)


def diagnose(
    encoder: Encoder, others: Mapping[str, Encoder], cohort: Cohort, options: argparse.Namespace
) -> dict[str, Any]:
    """What each attack leaves, the flags of hsat's own diagnosis, and the certificates."""
    name = cohort_of(options)
    side = IMAGE_SIZES[name]
    bank, queries = patches(cohort, "train", None, side=side), patches(cohort, "val", options.patches, side=side)
    run = RunOptions(seed=options.seed, noise=False, diagnose=min(32, options.patches))
    scoring, vote = Scoring(bootstrap=0), KNNClassifier(k=20)
    chosen = {key: attack for key, attack in attacks(name).items() if not options.short or "10 steps" in key}
    white = evaluate_whitebox(encoder, bank, queries, chosen, classifier=vote, scoring=scoring, run=run)
    left = {one.attack_name: one.value for one in white.records if (one.level, one.metric) == ("patch", "accuracy")}
    found: dict[str, Any] = {"left": left, "flags": []}
    found["flags"] = sorted({f"{one.attack_name}: {flag}" for one in white.records for flag in one.flags})
    encoders = {"target": encoder, **others}
    stronger = f"{RADII[name][1]}/255, 10 steps"
    made = {stronger: attacks(name)[stronger]}
    transfer = evaluate_transfer(
        encoders,
        bank,
        queries,
        made,
        pairs=[(surrogate, "target") for surrogate in others],
        classifier=vote,
        scoring=scoring,
        run=RunOptions(seed=options.seed, noise=False),
    )
    found["transfer"] = {
        one.surrogate: one.value
        for one in transfer.records
        if one.surrogate in others and (one.level, one.metric, one.model) == ("patch", "accuracy", "target")
    }
    some = patches(cohort, "val", min(16, options.patches), side=side)
    certified = certify(
        encoder, bank, some, Smoothing(sigma=0.1, selection=16, samples=200, seed=options.seed), classifier=vote
    )
    check = check_certificates(encoder, certified, some, options=CheckOptions(samples=200))
    found["certificates"] = {"tested": check.tested, "changed": check.changed}
    return found


def cohort_of(options: argparse.Namespace) -> str:
    """Its name."""
    return EBHI if options.ebhi else PAINTED


def load(recipe: str, options: argparse.Namespace) -> Encoder:
    """An encoder that the study trained."""
    run = Run(recipe, cohort_of(options), options.seed, options.stage, options.multiple)
    encoder = build(RECIPES[recipe], BACKBONES["cpu"], seed=options.seed)
    encoder.load_state_dict(torch.load(options.runs / "encoders" / f"{run.key}.pt", weights_only=True))
    return encoder.eval()


def main() -> None:
    """Diagnose the winner of a cohort's trials, with published HSAT and the tuned one as surrogates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="of benchmarks/recipes.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--ebhi", type=Path, help="diagnose the winner on this cohort")
    parser.add_argument("--seed", type=int, default=3, help="of the painted cohort, or the split of EBHI")
    parser.add_argument("--stage", default="final")
    parser.add_argument("--multiple", type=float, default=1)
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--short", action="store_true", help="a few attacks only, to try it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, chosen = cpu_seconds(), choose(read_results(options.results), cohort_of(options))
    encoders = {name: load(recipe, options) for name, recipe in (("HSAT", "hsat"), (TUNED, chosen[TUNED]))}
    cohort = open_cohort(Run(chosen[OURS], cohort_of(options), options.seed, options.stage), options.runs, options.ebhi)
    found = diagnose(load(chosen[OURS], options), encoders, cohort, options)
    about = {"recipe": chosen[OURS], "seed": options.seed, "patches": options.patches, "versions": installed_versions()}
    name = "diagnosis_ebhi.json" if options.ebhi else "diagnosis.json"
    write_json(options.results / name, about | found | {"cpu_seconds": cpu_seconds() - begin})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
