"""Held-out evaluation during a training, by which the best encoder is chosen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Literal

import numpy as np
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import BadPatch, Cohort, PatchDataset, PatchStore, patch_loader
from hsat.distributed import row_share
from hsat.embedding import embed, gather_table
from hsat.models import branch, is_dual, trained_branch
from hsat.types import Attack, EmbeddingTable

Validation = Callable[[nn.Module], dict[str, float]]
"""Encoder -> numbers by name; the entry "score" decides which encoder is the best, the others go to train.csv."""

HELD_OUT = "tune"
_BATCH = 64


def held_out_validation(
    cohort: Cohort,
    *,
    image_size: int,
    split: str = HELD_OUT,
    patches: int = 512,
    eps: float = 4 / 255,
    k: int = 20,
    robust: bool = True,
    workers: int = 0,
    store: PatchStore | None = None,
    on_bad: Literal["raise", "replace"] = "raise",
) -> Validation:
    """A function that measures an encoder by kNN on held-out patients; the bank is the training split.

    Several ranks share the work and get the same numbers: each embeds whole batches of its own, and all get all rows.
    With dual BatchNorm one branch serves bank, queries and attack: the trained one.

    Args:
        cohort: With the splits "train" and `split`.
        image_size: Side of the images.
        split: The held-out patients.
        patches: Held-out patches that are looked at, the same ones every time; the bank takes four times as many.
        eps: Radius of the attack: PGD with five steps of half of it, on the features.
        k: Neighbours.
        robust: The score is the mean of accuracy and mean class accuracy under attack; if False, on clean patches.
        workers: Processes that read patches.
        store: The cohort's patch store.
        on_bad: What to do with patches of the bank that cannot be read: "replace" leaves them out, with a warning.
            Held-out patches are never replaced, for the numbers would not be those of the split.

    Returns:
        encoder -> tune_clean_accuracy, tune_clean_mca, tune_robust_accuracy, tune_robust_mca and score.

    Raises:
        ValueError: Patches that it would look at cannot be read; all are named, before anything is trained.
    """
    attack = PGD(Linf(eps), step_size=eps / 2, steps=5)
    datasets = {}
    for name, count in (("train", 4 * patches), (split, patches)):
        dataset = PatchDataset(cohort, name, image_size=image_size, store=store)
        chosen = np.random.default_rng(0).permutation(len(dataset))[:count]
        chosen = np.sort(chosen)
        bad = _unreadable(dataset, chosen)
        if bad and (name == split or on_bad == "raise"):
            raise ValueError(_bad_files(cohort, name, bad, len(chosen)))
        if bad:
            warnings.warn(f"{_bad_files(cohort, name, bad, len(chosen))}; the bank is without them", stacklevel=2)
        datasets[name] = dataset.subset(np.array([item for item in chosen if int(item) not in bad], dtype=np.int64))

    def embed_shared(encoder: nn.Module, name: str, attack: Attack | None) -> EmbeddingTable:
        dataset = datasets[name]
        share = dataset.subset(row_share(len(dataset), batch_size=_BATCH))
        if not len(share):
            return gather_table(None)
        on_gpu = next(encoder.parameters()).is_cuda
        loader = patch_loader(share, batch_size=_BATCH, workers=workers, pin_memory=on_gpu)
        return gather_table(embed(encoder, loader, attack=attack))

    def validate(encoder: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        with branch(encoder, trained_branch(encoder)) if is_dual(encoder) else nullcontext():
            bank = embed_shared(encoder, "train", None)
            knn = KNNClassifier(k=min(k, len(bank))).fit(bank)
            for name, chosen_attack in (("clean", None), ("robust", attack)):
                table = embed_shared(encoder, split, chosen_attack)
                accuracy, mca = score_predictions(knn.predict_proba(table).argmax(1), table.label)
                values |= {f"tune_{name}_accuracy": accuracy, f"tune_{name}_mca": mca}
        kind = "robust" if robust else "clean"
        values["score"] = float(np.mean([values[f"tune_{kind}_accuracy"], values[f"tune_{kind}_mca"]]))
        return values

    return validate


def _unreadable(dataset: PatchDataset, items: np.ndarray) -> dict[int, BadPatch]:
    """The items that cannot be read, and why."""

    def read(item: int) -> BadPatch | None:
        try:
            dataset[item]
        except BadPatch as error:
            return error
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        errors = pool.map(read, items.tolist())
        return {int(item): error for item, error in zip(items, errors, strict=True) if error is not None}


def _bad_files(cohort: Cohort, split: str, bad: Mapping[int, BadPatch], count: int) -> str:
    named = "; ".join(str(error) for error in list(bad.values())[:20]) + ("; ..." if len(bad) > 20 else "")
    return (
        f"{len(bad)} of the {count} patches of split {split!r} that held-out evaluations look at cannot be read:"
        f" {named}. Mend them or leave them out: hsat check {cohort.root} lists all bad files for --data.exclude"
        " (in Python: cohort.without(cohort.check_files().paths()))"
    )


def score_predictions(predicted: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean class accuracy (mean recall of the classes that occur) of predictions (n,) for labels (n,)."""
    right = predicted == label
    return float(right.mean()), float(np.mean([right[label == one].mean() for one in np.unique(label)]))
