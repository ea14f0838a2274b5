"""An encoder of your own: wrap an nn.Module, train it in a plain loop, attack it.

Run it as it is: `python examples/own_encoder.py` takes seconds, on synthetic patches in runs/example-cohort.
"""

import torch
from torch import nn

from hsat.attacks import PGD, Linf
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
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_whitebox
from hsat.losses import HiDiscLoss
from hsat.models import wrap_encoder
from hsat.report import markdown_table
from hsat.training import adversarial_step

SIZE, STEPS = 32, 12


class SmallNetwork(nn.Module):
    """Yours: images (n, 3, h, w), already normalised, to one feature vector each (n, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, 3, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The mean of the last layer over all places of an image."""
        return self.second(torch.relu(self.norm(self.first(images)))).relu().mean((2, 3))


torch.manual_seed(0)
cohort = read_opensrh(write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=SIZE))
views = HierarchicalDataset(cohort, "train", image_size=SIZE, slides=2, patches=2, views=2, transform="v0")
sampler = PatientBatchSampler(cohort, "train", batch_patients=4)
loader = hierarchical_loader(views, sampler)

encoder = wrap_encoder(SmallNetwork(), mean=0.2, std=0.2, head=16)  # pixels in [0, 1]; it normalises inside
optimizer, loss = torch.optim.AdamW(encoder.parameters(), lr=2e-3), HiDiscLoss()
attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)  # None trains the baseline

encoder.train()
done = 0
while done < STEPS:
    sampler.set_epoch(done // sampler.batches_per_epoch, strength=1.0)
    for batch in loader:
        step = adversarial_step(encoder, loss, attack, batch, generator=torch.Generator().manual_seed(done))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        done += 1
        print(f"step {done}: loss {step.loss.item():.3f}")
        if done == STEPS:
            break

bank = patch_loader(PatchDataset(cohort, "train", image_size=SIZE), batch_size=32)
queries = patch_loader(PatchDataset(cohort, "val", image_size=SIZE), batch_size=32)
result = evaluate_whitebox(
    encoder.eval(),
    bank,
    queries,
    {"PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=10)},
    classifier=KNNClassifier(k=10),
    scoring=Scoring(bootstrap=200),
    run=RunOptions(seed=0),
    provenance=Provenance(model="SmallNetwork"),
)
print(markdown_table(result.records))
