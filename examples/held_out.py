"""The held-out evaluation that chooses the best encoder."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.data import Cohort, PatchDataset, PatchStore, patch_loader
from hsat.distributed import row_share
from hsat.embedding import gather_table
from hsat.eval import KNNClassifier, embed, metrics
from hsat.models import branch, is_dual, save_encoder, trained_branch
from hsat.run_folder import write_json
from hsat.types import Attack, EmbeddingTable
from runs import Run

if TYPE_CHECKING:
    from train_hsat import TrainHSAT
    from trainer import Trainer

BATCH = 64


def held_out_accuracy(
    encoder: nn.Module, cohort: Cohort, settings: TrainHSAT, *, packed: PatchStore | None = None
) -> dict[str, float]:
    """Clean and PGD-5 kNN patch accuracy and MCA on held-out patients; the bank is the training split.

    Several ranks share the work and get the same numbers: each embeds whole batches of its own, and all get all rows.
    With dual BatchNorm one branch serves bank, queries and attack: "pgd", or "normal" in a baseline without attack.
    """
    with branch(encoder, trained_branch(encoder)) if is_dual(encoder) else nullcontext():
        return _held_out(encoder, cohort, settings, packed)


def _held_out(encoder: nn.Module, cohort: Cohort, settings: TrainHSAT, packed: PatchStore | None) -> dict[str, float]:
    eps, size = settings.train.eval_eps, settings.train.eval_patches
    attack = PGD(Linf(eps), step_size=eps / 2, steps=5)
    datasets = {}
    for split in ("train", "tune"):
        dataset = PatchDataset(cohort, split, image_size=settings.data.image_size, store=packed)
        chosen = np.random.default_rng(0).permutation(len(dataset))[: size if split == "tune" else 4 * size]
        datasets[split] = dataset.subset(np.sort(chosen))
    bank = _embedded(encoder, datasets["train"], None, settings)
    knn = KNNClassifier(k=min(settings.train.k, len(bank))).fit(bank)
    found = {}
    for name, chosen_attack in (("clean", None), ("robust", attack)):
        table = _embedded(encoder, datasets["tune"], chosen_attack, settings)
        result = metrics(knn.predict_proba(table), table.label)
        found |= {f"tune_{name}_accuracy": result.accuracy, f"tune_{name}_mca": result.mca}
    return found


def _embedded(encoder: nn.Module, dataset: PatchDataset, attack: Attack | None, settings: TrainHSAT) -> EmbeddingTable:
    dataset = dataset.subset(row_share(len(dataset), batch_size=BATCH))
    if not len(dataset):
        return gather_table(None)
    on_gpu = next(encoder.parameters()).is_cuda
    loader = patch_loader(dataset, batch_size=BATCH, workers=settings.data.workers, pin_memory=on_gpu)
    return gather_table(embed(encoder, loader, attack=attack))


def keep_best(trainer: Trainer, run: Run, row: dict[str, Any], fingerprint: str) -> None:
    """Write the encoder when its held-out score is the highest so far.

    The score is the mean of accuracy and MCA under attack; for a training without attack, that on clean patches.
    """
    kind = "clean" if trainer.settings.attack.name == "none" else "robust"
    score = float(np.mean([row[f"tune_{kind}_accuracy"], row[f"tune_{kind}_mca"]]))
    if score > trainer.best:
        trainer.best = score
        if not trainer.ranks.first:
            return
        about = {"step": trainer.step, "cohort": fingerprint, f"held_out_{kind}": score}
        save_encoder(trainer.model, run.out / "best.safetensors", metadata=about)
        write_json(run.out / "best.json", about | {key: value for key, value in row.items() if key.startswith("tune")})
