"""HSAT+ against HiDisc, HSAT and a tuned HSAT at equal compute: patch accuracy when the decision is attacked.

A run trains an encoder and attacks its decisions; what it found is one file in benchmarks/results/recipes, and a run
whose file exists is not repeated.  Trials choose the options of "tuned HSAT" and of "HSAT+", as many of each, on
painted seed 0 and on EBHI split 0, by PGD-10 on the kNN vote at the primary radius.  Finalists meet on other seeds and
on all splits under `AttackEnsemble.standard`.  The primary measure, fixed beforehand: patch accuracy under the
ensemble at 4/255 (EBHI: 2/255), kNN decision, k = 20, all patches, paired over patients.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --size cpu --stages trial final
    OMP_NUM_THREADS=1 python benchmarks/recipes.py --size cpu --stages trial final --ebhi DIR
    python benchmarks/recipes_report.py    # the tables and the plot

All recipes of a comparison have the same number of passes: a pass is one forward and one backward of one batch of 64
images, so that PGD with s steps takes s + 1 a batch and free training one a replay.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_candidates import EBHI, IMAGE_SIZES, OURS, PAINTED, RECIPES, TUNED, Recipe

from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.classifiers import KNNClassifier, LinearProbe
from hsat.data import (
    Cohort,
    PatchDataset,
    PatchStore,
    patch_loader,
    read_cohort,
    read_opensrh,
    write_patch_store,
    write_synthetic_cohort,
)
from hsat.eval import RunOptions, Scoring, WhiteboxResult, evaluate_whitebox
from hsat.models import Encoder, build_encoder, load_encoder
from hsat.run_folder import installed_versions, read_training_log, write_json
from hsat.training import Trainer
from hsat.types import Attack, Classifier

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/recipes"
RADII = {PAINTED: (4, 8), EBHI: (2, 4)}
"""In 255ths; the first is the primary one."""
PASSES = {"minutes": {PAINTED: 24, EBHI: 24}, "cpu": {PAINTED: 1440, EBHI: 1200}, "gpu": {PAINTED: 40_000, EBHI: 6000}}
"""Of a run at 1x."""
BACKBONES = {"minutes": "test_resnet", "cpu": "test_resnet", "gpu": "resnet18"}
SHIPPED = {PAINTED: "plus", EBHI: "plus-image"}
"""What `hsat train --recipe hsat-plus` has, on H&E with `--model.norm image`, where the trials chose another one."""
TRIAL = 0.5
"""Trials have half of the passes of 1x."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        recipe: Its key in `RECIPES`.
        cohort: "painted" or "ebhi".
        index: The painted cohort's seed, or the split; weights, draws and attacks have the same seed.
        stage: "trial", "idea" and "remedy" attack with PGD-10, "final" with the ensemble as well.
        multiple: Of the passes of 1x.
        equal: What is equal to HSAT at this multiple: "passes", or "seconds" of the CPU.
        backbone: Name of the network; "" is that of the size.
    """

    recipe: str
    cohort: str
    index: int
    stage: str
    multiple: float = 1
    equal: str = "passes"
    backbone: str = ""

    @property
    def key(self) -> str:
        """Names the file of the result."""
        parts = [self.stage, self.cohort, str(self.index), self.recipe, f"{self.multiple:g}x"]
        parts += [self.equal] if self.equal != "passes" else []
        return "-".join([*parts, self.backbone] if self.backbone else parts)


def planned(stages: list[str], chosen: Mapping[str, Mapping[str, str]], *, ebhi: bool) -> Iterator[Run]:
    """The runs in the order of their worth; finalists by what the trials chose so far.

    Args:
        stages: "trial", "idea", "remedy", "final", "shipped", "seconds", "growth", "resnet10t".
        chosen: By cohort and family, the recipe that the trials chose.
        ebhi: Whether that cohort is there.
    """
    for cohort in (PAINTED, EBHI) if ebhi else (PAINTED,):
        indices = (3, 4, 5) if cohort == PAINTED else (0, 1, 2, 3, 4)
        pair = [chosen[cohort][name] for name in (TUNED, OURS) if name in chosen[cohort]]
        if "trial" in stages:
            yield Run("hidisc", cohort, 0, "trial", TRIAL / 6)  # it takes no choice: how fast it is, for equal seconds
            families = [
                [name for name, one in RECIPES.items() if cohort in one.trials and one.family == family]
                for family in (TUNED, OURS)
            ]
            in_turn = itertools.chain.from_iterable(zip(*families, strict=True))
            yield from (Run(name, cohort, 0, "trial", TRIAL) for name in in_turn)
            yield Run("hsat", cohort, 0, "trial", TRIAL)
        if "idea" in stages:
            yield from (Run(name, cohort, 0, "idea", multiple) for name, multiple in ideas_of(cohort))
        if "remedy" in stages and cohort == PAINTED:
            remedies = [name for name, one in RECIPES.items() if one.remedy]
            yield from (Run(name, cohort, 0, "remedy", 4) for name in (*pair[::-1], *remedies, SHIPPED[cohort]))
        if "final" in stages:
            for index in indices:
                yield from (Run(name, cohort, index, "final") for name in ("hsat", *pair))
                yield Run("hidisc", cohort, index, "final", equal="seconds")
        if "shipped" in stages and SHIPPED[cohort] not in pair:
            multiples = (1, 4) if cohort == PAINTED else (1,)  # at 4x as the remedy that it turned out to be
            yield from (Run(SHIPPED[cohort], cohort, index, "final", times) for times in multiples for index in indices)
        if "seconds" in stages:
            yield from (Run(name, cohort, index, "final", equal="seconds") for index in indices for name in pair)
        if "growth" in stages:
            some = indices if cohort == PAINTED else (0,)
            names = ("hsat", *pair)
            yield from (Run(name, cohort, i, "final", times) for times in (2, 4) for i in some for name in names)
        if "resnet10t" in stages and cohort == EBHI:
            yield from (Run(name, cohort, i, "final", backbone="resnet10t") for i in (0, 1) for name in pair)


def ideas_of(cohort: str) -> list[tuple[str, float]]:
    """Names and multiples: the ideas for tissue on EBHI, and what standardised images do to the other recipes."""
    if cohort == PAINTED:
        return [("plus-image-plain", TRIAL), ("tuned-image-plain", TRIAL)]
    names = [(name, TRIAL) for name, one in RECIPES.items() if one.idea]
    return [*names, ("hsat-image", TRIAL), ("hidisc-image", TRIAL / 6)]


def choose(results: Mapping[str, Mapping[str, Any]], cohort: str) -> dict[str, str]:
    """The best trial of each family: highest at the primary radius, then at the next one, then clean.

    On EBHI the ideas are trials, too, as many for each family.

    Args:
        results: By key.
        cohort: The cohort.

    Returns:
        By family; families without a finished trial are left out.
    """
    best: dict[str, tuple[tuple[float, ...], str]] = {}
    for result in results.values():
        stages = ("trial", "idea") if cohort == EBHI else ("trial",)
        if result["run"]["cohort"] != cohort or result["run"]["stage"] not in stages or "failure" in result:
            continue
        conditions = [*(f"PGD-10 {radius}/255" for radius in RADII[cohort]), "clean"]
        rank = tuple(result["accuracy"]["knn"][name]["patch"] for name in conditions)
        family = result["family"]
        if family not in best or rank > best[family][0]:
            best[family] = (rank, result["run"]["recipe"])
    return {family: name for family, (_, name) in best.items()}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every finished run, by key."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))}


def open_cohort(run: Run, runs: Path, ebhi: Path | None) -> Cohort:
    """The patches of a run, with its split."""
    if run.cohort == PAINTED:
        return read_opensrh(write_synthetic_cohort(runs / f"cohort-{run.index}", seed=run.index))
    assert ebhi is not None
    return read_cohort(ebhi, "folders").with_split(val_fraction=0.3, seed=run.index)


def build(recipe: Recipe, backbone: str, *, seed: int) -> Encoder:
    """The network before training."""
    options: dict[str, Any] = {"norm": recipe.norm, "input_size": recipe.input_size or None, "seed": seed}
    if recipe.head == "none":
        encoder = build_encoder(backbone, head=None, **options)
    else:
        encoder = build_encoder(backbone, head=recipe.head, embedding_dim=128, **options)
    if recipe.activation:
        replace_activations(encoder.backbone, getattr(torch.nn, recipe.activation))
    return encoder


def replace_activations(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Put another activation in place of every ReLU."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ReLU):
            setattr(module, name, kind())
        else:
            replace_activations(child, kind)


def train(
    run: Run, cohort: Cohort, *, steps: int, backbone: str, out: Path, store: PatchStore | None
) -> tuple[Encoder, dict[str, Any]]:
    """The trained encoder, and what the training took and found."""
    recipe = RECIPES[run.recipe]
    encoder = build(recipe, backbone, seed=run.index)
    begin = cpu_seconds()
    if first := round(recipe.warm * steps * recipe.passes_per_batch):
        clean = recipe.without_attack(run.cohort, steps=first, seed=run.index)
        Trainer(encoder, cohort, clean, out=out / "warm", store=store).fit()
        steps -= math.ceil(first / recipe.passes_per_batch)
    config = recipe.config(run.cohort, steps=steps, seed=run.index)
    if recipe.held_out:
        names = ("train", "tune")
        cohort = cohort.with_split(val_fraction=recipe.held_out, seed=run.index, names=names, of="train")
    kept = Trainer(encoder, cohort, config, out=out / "run", store=store).fit()
    if recipe.held_out:
        encoder.load_state_dict(load_encoder(kept).state_dict())
    seconds = cpu_seconds() - begin
    log = read_training_log(out / "run/train.csv")
    facts: dict[str, Any] = {"config": config.model_dump(mode="json"), "head": recipe.head, "backbone": backbone}
    facts |= {"steps": steps, "passes": first + steps * recipe.passes_per_batch, "train_cpu_seconds": seconds}
    facts |= {name: sorted({*log[name]}) for name in ("single_step_share", "free_share") if name in log}
    return encoder.eval(), facts


def cpu_seconds() -> float:
    """CPU time of this process so far, of user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def evaluate(run: Run, encoder: Encoder, cohort: Cohort, *, size: str) -> dict[str, Any]:
    """Accuracies at three levels and every patch's decision; by the kNN vote, in the final by a linear probe too."""
    bank, queries = (
        patch_loader(PatchDataset(cohort, split, image_size=IMAGE_SIZES[run.cohort]), batch_size=64)
        for split in ("train", "val")
    )
    begin = cpu_seconds()
    found: dict[str, Any] = {"accuracy": {}, "right": {}}
    classifiers: dict[str, Classifier] = {"knn": KNNClassifier(k=20), "linear": LinearProbe()}
    if run.stage != "final":
        del classifiers["linear"]
    for name, classifier in classifiers.items():
        result = evaluate_whitebox(
            encoder,
            bank,
            queries,
            attacks_of(run, name, size=size),
            classifier=classifier,
            scoring=Scoring(bootstrap=0),
            run=RunOptions(seed=run.index, noise=False),
        )
        found["accuracy"][name], found["right"][name] = accuracies(result), decisions(result)
    table = result.tables["clean"]
    found |= {"patients": " ".join(map(str, table.patient)), "n": len(table), "eval_cpu_seconds": cpu_seconds() - begin}
    found["chance"] = float(np.bincount(table.label).max() / len(table))
    return found


def attacks_of(run: Run, decision: str, *, size: str) -> dict[str, Attack]:
    """PGD-10 on the decision at both radii; in the final also the ensemble on the kNN vote, at the primary radius."""
    radii = RADII[run.cohort]
    attacks: dict[str, Attack] = {
        f"PGD-10 {radius}/255": PGD(Linf(radius / 255), step_size=radius / 4 / 255, steps=10) for radius in radii
    }
    if run.stage == "final" and decision == "knn":
        strength = {"steps": 3, "queries": 5} if size == "minutes" else {}
        attacks[f"ensemble {radii[0]}/255"] = AttackEnsemble.standard(Linf(radii[0] / 255), **strength)
    return attacks


def accuracies(result: WhiteboxResult) -> dict[str, dict[str, float]]:
    """By condition and level."""
    found: dict[str, dict[str, float]] = {}
    for record in result.records:
        if record.metric == "accuracy":
            found.setdefault(record.attack_name, {})[record.level] = record.value
    return found


def decisions(result: WhiteboxResult) -> dict[str, str]:
    """By condition, a digit for every patch in the order of the loader: 1 where the decision is right."""
    found = {}
    for name, table in result.tables.items():
        (scores,) = result.scores[name].values()
        found[name] = "".join(map(str, (scores.argmax(1) == table.label).astype(int)))
    return found


def steps_of(run: Run, results: Mapping[str, Mapping[str, Any]], size: str) -> int:
    """Batches: those of the passes, or of the CPU seconds that HSAT took on the same cohort.

    Raises:
        LookupError: Where the runs that tell the seconds are missing.
    """
    passes = PASSES[size][run.cohort] * run.multiple
    steps = max(1, int(passes / RECIPES[run.recipe].passes_per_batch))
    if run.equal == "passes":
        return steps
    mine, hsat = (seconds_per_batch(results, name, run.cohort) for name in (run.recipe, "hsat"))
    return max(1, round(passes / RECIPES["hsat"].passes_per_batch * hsat / mine))


def seconds_per_batch(results: Mapping[str, Mapping[str, Any]], recipe: str, cohort: str) -> float:
    """CPU seconds of a training by its batches, over the finished runs of the study's first backbone.

    Raises:
        LookupError: Where there is none.
    """
    done = [
        (result["train_cpu_seconds"], result["steps"])
        for result in results.values()
        if (result["run"]["recipe"], result["run"]["cohort"], result["run"]["backbone"]) == (recipe, cohort, "")
        and "train_cpu_seconds" in result
    ]
    if not done:
        raise LookupError(f"no run tells how many seconds {recipe} takes on {cohort}")
    seconds, steps = map(sum, zip(*done, strict=True))
    return seconds / steps


def do_run(run: Run, results: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The result of a run; one that ends in an error is a result, too."""
    backbone = run.backbone or BACKBONES[options.size]
    recipe = RECIPES[run.recipe]
    result: dict[str, Any] = {"run": dataclasses.asdict(run), "family": recipe.family, "change": recipe.change}
    result |= {"size": options.size, "versions": installed_versions(), "commit": options.commit}
    steps = steps_of(run, results, options.size)
    try:
        cohort = open_cohort(run, options.runs, options.ebhi)
        packed = options.runs / "packed"  # what a training reads of EBHI: the same pixels, sooner
        store = write_patch_store(cohort, packed) if run.cohort == EBHI else None
        with tempfile.TemporaryDirectory() as folder:
            encoder, facts = train(run, cohort, steps=steps, backbone=backbone, out=Path(folder), store=store)
        result |= facts | {"cohort_fingerprint": cohort.fingerprint()}
        keep = options.runs / "encoders" / f"{run.key}.pt"
        keep.parent.mkdir(parents=True, exist_ok=True)
        torch.save(encoder.state_dict(), keep)
        result |= evaluate(run, encoder, cohort, size=options.size)
    except (FloatingPointError, RuntimeError, ValueError) as error:
        traceback.print_exc()
        result["failure"] = f"{type(error).__name__}: {error}"
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(PASSES), default="cpu")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["trial", "final"],
        help="trial idea final shipped seconds growth resnet10t remedy",
    )
    parser.add_argument("--ebhi", type=Path, help="folders class/patient/slide/patch of H&E patches; left out without")
    parser.add_argument("--only", default="", help="runs whose key has this regular expression")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="cohorts and encoders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a file per run")
    parser.add_argument("--commit", help="of the code; asked of git where it is not given")
    return parser.parse_args()


def main() -> None:
    """Make the runs that are missing."""
    options = parse()
    torch.set_num_threads(1)
    options.commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    options.out.mkdir(parents=True, exist_ok=True)
    while run := next_run(options):
        begin = time.process_time()
        result = do_run(run, read_results(options.out), options)
        write_json(options.out / f"{run.key}.json", result)
        seconds, shown = time.process_time() - begin, result.get("failure") or result["accuracy"]["knn"]
        sys.stderr.write(f"{run.key}: {seconds:.0f} s: {shown}\n")


def next_run(options: argparse.Namespace) -> Run | None:
    """The first run that is planned, wanted, possible and has no result."""
    results = read_results(options.out)
    chosen = {cohort: choose(results, cohort) for cohort in (PAINTED, EBHI)}
    for run in planned(options.stages, chosen, ebhi=options.ebhi is not None):
        if run.key in results or not re.search(options.only, run.key):
            continue
        try:
            steps_of(run, results, options.size)
        except LookupError:
            continue
        return run
    return None


if __name__ == "__main__":
    main()
