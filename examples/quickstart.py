"""hsat in your own loop: your model, your loss, and an attack that knows neither.

A synthetic cohort, a small network, a hierarchical loss of your own making, PGD on it, and an honest check at the end.
"""

from __future__ import annotations

import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.data import (
    Cohort,
    HierarchicalDataset,
    PatchDataset,
    PatientBatchSampler,
    hierarchical_loader,
    patch_loader,
    write_synthetic_cohort,
)
from hsat.eval import KNNClassifier, embed, metrics
from hsat.losses import supcon_loss
from hsat.models import frozen, wrap_encoder

STEPS = 40
torch.manual_seed(0)
cohort = Cohort.from_opensrh(write_synthetic_cohort("runs/synthetic-0"))
patches = HierarchicalDataset(cohort, "train", image_size=32, augmentation="v0")
sampler = PatientBatchSampler(cohort, "train", batch_patients=4)
loader = hierarchical_loader(patches, sampler)

network = nn.Sequential(  # any nn.Module that gives one vector per image
    nn.Conv2d(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
    nn.Conv2d(24, 48, 3, stride=2), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
encoder = wrap_encoder(network, mean=0.2, std=0.2, head=32)  # pixels stay in [0, 1]; normalisation happens inside
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)


def my_loss(z: torch.Tensor, batch) -> torch.Tensor:
    """Any function of embeddings and ids: here slides count double."""
    return supcon_loss(z, batch.patch) + 2 * supcon_loss(z, batch.slide) + supcon_loss(z, batch.patient)


for step in range(STEPS):
    sampler.set_epoch(step)
    batch = next(iter(loader))
    with frozen(encoder):  # the attack climbs my_loss in eval mode; weights and statistics stay as they are
        x_adv = attack(
            batch.images, lambda v, b=batch: my_loss(encoder(v), b), generator=torch.Generator().manual_seed(step)
        )
    loss = my_loss(encoder(x_adv), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: adversarial loss {loss:.3f}")

bank, queries = (patch_loader(PatchDataset(cohort, split, image_size=32), batch_size=64) for split in ("train", "val"))
knn = KNNClassifier(k=20).fit(embed(encoder, bank))
for name, chosen in (("clean", None), ("PGD-8", PGD(Linf(8 / 255), step_size=2 / 255, steps=10))):
    table = embed(encoder, queries, attack=chosen)
    print(f"{name}: patch accuracy {metrics(knn.predict_proba(table), table.label).accuracy:.2f}")
