"""Small evaluations and trainings in this process, whose numbers are committed: the one file here that names hsat.

Everything is drawn on the CPU from seed 0 and computed in float64 from weights that numpy draws.  In float32 another
processor's last bits turn signs of gradients, and after a dozen steps single patches fall or stand by them (measured:
one patch in one of ten numbers, and 2 % of a loss); in float64 the numbers are those of any processor and torch.  The
kNN vote is float32 as ever.  A renamed class or option is renamed here; the keys of what comes out stay.

Run as a program, for compare.sh, it writes the arrays behind the numbers into the folder `out`: embeddings of attacked
images, counts of noisy votes, scores of transfers, of which the commands write less.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsat.attacks import FFGSM, PGD, AttackEnsemble, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import (
    HierarchicalDataset,
    PatchDataset,
    PatientBatchSampler,
    hierarchical_loader,
    patch_loader,
    read_opensrh,
    write_synthetic_cohort,
)
from hsat.eval import (
    PAPER,
    CertifyOptions,
    PatchBudget,
    Provenance,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    evaluate_budget,
    evaluate_transfer,
    evaluate_whitebox,
    paper_attacks,
    pool,
)
from hsat.losses import HiDiscLoss
from hsat.models import build_encoder, set_branch
from hsat.training import WarmStarts, adversarial_step, free_replays
from hsat.types import HierarchicalBatch

SIZE, STEPS, COUNTED = 24, 10, 5  # pixels; steps of the encoders that are evaluated; steps whose losses are committed
PGD_2 = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
COMMON: dict[str, Any] = {"classifier": KNNClassifier(k=5), "scoring": Scoring(bootstrap=0)}
QUIET = RunOptions(noise=False)
TARGETS = {"features": ("features", 8 / 255), "embedding": ("embedding", 8 / 255), "decision": ("decision", 2 / 255)}
Values = dict[str, tuple[float, int]]  # value and number of rows
Losses = dict[str, list[float]]
Arrays = dict[str, np.ndarray]


class Doubled:
    """A loader whose images are float64."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.dataset = loader, loader.dataset

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        return (batch.replace(images=batch.images.double()) for batch in self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class SmallCohort:
    """A synthetic cohort of 3 classes and 12 patients: 54 patches to train on and as bank, 18 queries."""

    def __init__(self, folder: Path) -> None:
        root = write_synthetic_cohort(
            folder, classes=("hgg", "lgg", "normal"), patients_per_class=4, slides=2, patches=3, size=SIZE, seed=0
        )
        self.cohort = read_opensrh(root)
        self.bank = Doubled(patch_loader(PatchDataset(self.cohort, "train", image_size=SIZE), batch_size=18))
        self.queries = Doubled(patch_loader(PatchDataset(self.cohort, "val", image_size=SIZE), batch_size=7))
        self.augmented, self.plain = self._batches("v0", COUNTED), self._batches("none", STEPS)

    def _batches(self, augmentation: str, count: int) -> list[HierarchicalBatch]:
        """The first batches, of 3 patients each."""
        views = HierarchicalDataset(self.cohort, "train", image_size=SIZE, transform=augmentation, seed=0)
        sampler = PatientBatchSampler(self.cohort, "train", batch_patients=3, seed=0)
        loader = Doubled(hierarchical_loader(views, sampler))
        batches: list[HierarchicalBatch] = []
        for epoch in range(count):
            sampler.set_epoch(epoch, strength=1.0, start_batch=0)
            batches += islice(loader, count - len(batches))
        return batches


def new_encoder(*, dual_norm: bool) -> Any:
    """timm's smallest residual network with a projection to 16 numbers, its weights drawn by numpy."""
    encoder = build_encoder("test_resnet", head="linear", embedding_dim=16, dual_norm=dual_norm, seed=0).double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim > 1:
                scale = (2 / weight[0].numel()) ** 0.5
                weight.copy_(torch.from_numpy(rng.standard_normal(weight.shape)) * scale)
    return encoder


class Training:
    """An encoder, its optimiser and its losses so far."""

    def __init__(self, *, dual_norm: bool = False) -> None:
        self.encoder = new_encoder(dual_norm=dual_norm).train()
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)
        self.losses: list[float] = []

    def descend(self, loss: torch.Tensor) -> None:
        """One step of the optimiser."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def run(self, batches: Iterable[HierarchicalBatch], attack: Any, **options: Any) -> Training:
        """One step on each batch, with the options of `adversarial_step`."""
        for batch in batches:
            result = adversarial_step(self.encoder, HiDiscLoss(), attack, batch, generator=self.generator, **options)
            self.descend(result.loss)
        return self


def _free(cohort: SmallCohort) -> Training:
    training = Training()
    for batch in cohort.plain[:COUNTED]:
        for result in free_replays(
            training.encoder, HiDiscLoss(), batch, threat=PGD_2.threat, replays=2, generator=training.generator
        ):
            training.descend(result.loss)
    return training


def _warm(cohort: SmallCohort) -> Training:
    """From the third batch on, patches come again and start where they ended."""
    training, starts = Training(), WarmStarts()
    for batch in cohort.plain[:COUNTED]:
        start = starts.points(batch, PGD_2.threat, generator=training.generator)
        result = adversarial_step(
            training.encoder, HiDiscLoss(), PGD_2, batch, generator=training.generator, start=start
        )
        starts.keep(batch, result.x_adv)
        training.descend(result.loss)
    return training


def trainings(cohort: SmallCohort) -> dict[str, Training]:
    """Every kind of training; the first three long enough that attacks on their encoders succeed in part."""
    long, short = cohort.plain, cohort.plain[:COUNTED]
    slides = HiDiscLoss(patch=0, slide=1, patient=0)
    return {
        "hsat": Training().run(long, PGD_2),
        "hidisc": Training().run(long, None),
        "dual norm": Training(dual_norm=True).run(long, PGD_2, clean_weight=0.3),
        "clean and adversarial": Training().run(short, PGD_2, clean_weight=0.3),
        "attack on slides": Training().run(short, PGD_2, inner_loss=slides),
        "one step": Training().run(short, FFGSM(PGD_2.threat)),
        "augmented": Training().run(cohort.augmented, None),  # in float32 until here: no sign of a gradient hangs on it
        "free": _free(cohort),
        "warm": _warm(cohort),
    }


class Evaluations:
    """Accuracies as {"whitebox features / hsat / PGD-8 / patch": (0.5, 18), ...}, and the arrays behind them."""

    def __init__(self, cohort: SmallCohort, encoders: Mapping[str, Any]) -> None:
        self.cohort, self.encoders = cohort, encoders
        self.values: Values = {}
        self.arrays: Arrays = {}
        for name, (target, eps) in TARGETS.items():
            self.whitebox(f"whitebox {name}", "hsat", _attacks(eps), target=target, run=RunOptions())
        for name in ("hsat", "dual"):
            scoring = replace(PAPER.scoring, bootstrap=0)
            self.whitebox("whitebox paper", name, _attacks(12 / 255), target=PAPER.target, scoring=scoring)
        ensemble = {"ensemble": AttackEnsemble(Linf(2 / 255), steps=2, decision_steps=4, restarts=1, queries=10)}
        surrogates = {"hidisc": encoders["hidisc"]}
        self.whitebox("whitebox ensemble", "hsat", ensemble, target="features", surrogates=surrogates)
        self.transfer()
        self.budget(level="patient", order="worst")
        self.budget(level="slide", order="random")
        self.certify()

    def whitebox(self, title: str, name: str, attacks: Mapping[str, Any], **options: Any) -> None:
        """One evaluation of one encoder."""
        result = evaluate_whitebox(
            self.encoders[name],
            self.cohort.bank,
            self.cohort.queries,
            attacks,
            **COMMON | {"run": QUIET, "provenance": Provenance(model=name)} | options,
        )
        self.note(title, result.records)
        for condition, table in result.tables.items():
            self.arrays[f"{title} / {name} / {condition} / z"] = np.asarray(table.z)
            scores = next(iter(result.scores[condition].values()))
            self.arrays[f"{title} / {name} / {condition} / scores"] = scores
            for how in ("mean", "paper"):
                pooled = pool(scores, table.patient, table.label, pooling=how).scores
                self.arrays[f"{title} / {name} / {condition} / {how} of patients"] = pooled

    def transfer(self) -> None:
        """Between two encoders."""
        pair = {name: self.encoders[name] for name in ("hsat", "hidisc")}
        attack = {"PGD-12": PGD(Linf(12 / 255), step_size=6 / 255, steps=4)}
        result = evaluate_transfer(pair, self.cohort.bank, self.cohort.queries, attack, target="features", **COMMON)
        self.note("transfer", result.records)
        for key, by_k in result.attacked.items():
            self.arrays[f"transfer / {' / '.join(key)}"] = next(iter(by_k.values()))

    def budget(self, *, level: Any, order: Any) -> None:
        """The attack on the decision, and how many patches it takes."""
        attack = PGD(Linf(2 / 255), step_size=1 / 255, steps=4)
        result = evaluate_budget(
            self.encoders["hsat"],
            self.cohort.bank,
            self.cohort.queries,
            attack,
            budget=PatchBudget(level=level, order=order),
            provenance=Provenance(model="hsat"),
            **COMMON,
        )
        self.note(f"budget {order}", result.records)
        self.arrays[f"budget {order} / z"] = np.asarray(result.attacked.z)
        self.arrays[f"budget {order} / needed"] = np.asarray(result.needed)

    def certify(self) -> None:
        """By few noisy copies."""
        smoothing = Smoothing(sigma=0.1, selection=5, samples=25, alpha=0.05, seed=0)
        result = certify(
            self.encoders["hsat"],
            self.cohort.bank,
            self.cohort.queries,
            smoothing,
            options=CertifyOptions(radii=(0.0, 0.03, 0.06, 0.09, 0.12)),
            provenance=Provenance(model="hsat"),
            **COMMON,
        )
        self.note("certify", result.records)
        self.arrays |= {"certify / counts": result.counts, "certify / selected": result.selected}
        self.arrays |= {f"certify / radius / {level}": found.radius for level, found in result.levels.items()}

    def note(self, title: str, records: Iterable[Any]) -> None:
        """Keep the accuracies of these records."""
        for record in records:
            if record.metric in ("accuracy", "accuracy_drop", "certified_accuracy"):
                encoders = f"{record.surrogate} to {record.model}" if record.surrogate else record.model
                key = f"{title} / {encoders} / {record.attack_name} / {record.level}"
                self.values[key] = (round(record.value, 9), record.n)


def _attacks(eps: float) -> dict[str, Any]:
    return paper_attacks((eps,), steps=4, step_size=eps / 2, names=("pgd", "mifgsm"))


def measure() -> tuple[Values, Losses, Arrays]:
    """All numbers: accuracies, losses, and arrays.  On one thread, whose sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cohort = SmallCohort(Path(folder) / "cohort")
            done = trainings(cohort)
            set_branch(done["dual norm"].encoder, "normal")  # as published: scored there, attacked in the branch "pgd"
            names = {"hsat": "hsat", "hidisc": "hidisc", "dual": "dual norm"}
            evaluations = Evaluations(cohort, {name: done[kind].encoder.eval() for name, kind in names.items()})
            arrays = {f"losses / {kind}": np.array(training.losses) for kind, training in done.items()}
            losses = {kind: training.losses[:COUNTED] for kind, training in done.items()}
            return evaluations.values, losses, evaluations.arrays | arrays
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    Path("out").mkdir()
    np.savez("out/arrays.npz", **{key.replace("/", "|"): array for key, array in measure()[2].items()})
