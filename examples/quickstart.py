"""hsat in your own loop: your model, your loss, and an attack that knows neither.

A synthetic cohort, a small network, a hierarchical loss of your own making, PGD on it, and an honest check at the end.
"""

import sys

import torch
from torch import nn

from hsat import data
from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import metrics
from hsat.losses import supcon_loss
from hsat.models import frozen, wrap_encoder

if "--help" in sys.argv:
    raise SystemExit(print(__doc__))
STEPS = 40
torch.manual_seed(0)
cohort = data.read_opensrh(data.write_synthetic_cohort("runs/synthetic-0"))
patches = data.HierarchicalDataset(cohort, "train", image_size=32, transform="v0")
sampler = data.PatientBatchSampler(cohort, "train", batch_patients=4)
loader = data.hierarchical_loader(patches, sampler)

network = nn.Sequential(  # any nn.Module that gives one vector per image
    nn.Conv2d(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
    nn.Conv2d(24, 48, 3, stride=2), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
encoder = wrap_encoder(network, mean=0.2, std=0.2, head=32)  # pixels stay in [0, 1]; normalisation happens inside
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)


def my_loss(z: torch.Tensor, batch: data.HierarchicalBatch) -> torch.Tensor:
    """Any function of embeddings and ids: here slides count double."""
    return supcon_loss(z, batch.patch) + 2 * supcon_loss(z, batch.slide) + supcon_loss(z, batch.patient)


for step in range(STEPS):
    sampler.set_epoch(step)
    batch = next(iter(loader))
    generator = torch.Generator().manual_seed(step)
    with frozen(encoder):  # the attack climbs my_loss in eval mode; weights and statistics stay as they are
        x_adv = attack(batch.images, lambda v, b=batch: my_loss(encoder(v), b), generator=generator)
    loss = my_loss(encoder(x_adv), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: adversarial loss {loss:.3f}")

val, train = (data.PatchDataset(cohort, split, image_size=32) for split in ("val", "train"))
knn = KNNClassifier(k=20).fit(embed(encoder, data.patch_loader(train, batch_size=64)))
for name, chosen in (("clean", None), ("PGD-8", PGD(Linf(8 / 255), step_size=2 / 255, steps=10))):
    table = embed(encoder, data.patch_loader(val, batch_size=64), attack=chosen)
    print(f"{name}: patch accuracy {metrics(knn.predict_proba(table), table.label).accuracy:.2f}")
