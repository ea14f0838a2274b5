"""Other libraries: hsat's decisions under their attacks, their attacks in hsat's evaluations, hsat inside Lightning.

Run it as it is: `python examples/other_libraries.py` takes seconds, on synthetic patches in runs/example-cohort.  It
uses what is installed of torchattacks, foolbox, ART and Lightning, and says what to install for the rest.
"""

import warnings
from importlib.util import find_spec

import torch
from torch import nn

from hsat import data, embed, evaluate_whitebox, from_art, from_foolbox, from_torchattacks, wrap_encoder
from hsat.attacks import PGD, Linf
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.losses import HiDiscLoss
from hsat.report import markdown_table
from hsat.training import adversarial_step

INSTALL = {"torchattacks": "--no-deps torchattacks requests", "art": "adversarial-robustness-toolbox"}
THERE = {name: find_spec(name) is not None for name in ("lightning", "torchattacks", "foolbox", "art")}
print("\n".join(f"{name} is missing: pip install {INSTALL.get(name, name)}" for name in THERE if not THERE[name]))

torch.manual_seed(0)
ball, numbers, knn = Linf(8 / 255), {"step_size": 2 / 255, "steps": 5}, KNNClassifier(k=10)
cohort = data.read_opensrh(data.write_synthetic_cohort("runs/example-cohort", patients_per_class=4, patches=3, size=32))
layers = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
encoder = wrap_encoder(nn.Sequential(*layers), mean=0.2, std=0.2, head=16)  # pixels in [0, 1]; it normalises inside
if THERE["lightning"]:
    import lightning

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    views = data.HierarchicalDataset(cohort, "train", image_size=32, slides=2, patches=2, views=2, transform="v0")
    sampler = data.PatientBatchSampler(cohort, "train", batch_patients=4)

    class HSAT(lightning.LightningModule):
        """Hierarchical adversarial training: the attack and the loss are hsat's, the loop is Lightning's."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.loss, self.attack = encoder, HiDiscLoss(), PGD(ball, **numbers)

        def training_step(self, batch: data.HierarchicalBatch, _: int) -> torch.Tensor:
            """The loss of the adversarial images."""
            sampler.set_epoch(self.global_step, strength=1.0)
            generator = torch.Generator().manual_seed(self.global_step)
            return adversarial_step(self.encoder, self.loss, self.attack, batch, generator=generator).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Any optimiser."""
            return torch.optim.AdamW(self.encoder.parameters(), lr=2e-3)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_steps=12, accelerator="cpu", **quiet).fit(HSAT(), data.hierarchical_loader(views, sampler))

train, val = (data.PatchDataset(cohort, split, image_size=32) for split in ("train", "val"))
bank, queries = (data.patch_loader(patches, batch_size=32) for patches in (train, val))
model = DecisionModel(encoder, knn.fit(embed(encoder, bank))).eval()  # images -> logits, as any library wants them
images, labels = next((batch.images, batch.label) for batch in queries)
attacks, found = {"PGD-8": PGD(ball, **numbers)}, {}
if THERE["torchattacks"]:  # every library: the decision under its attack, then its attack in hsat's evaluation
    import torchattacks

    found["torchattacks"] = (pgd := torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=5))(images, labels)
    attacks["torchattacks PGD"] = from_torchattacks(pgd)
if THERE["foolbox"]:
    import foolbox

    pgd, wrapped = foolbox.attacks.LinfPGD(abs_stepsize=2 / 255, steps=5), foolbox.PyTorchModel(model, (0, 1), "cpu")
    found["foolbox"] = pgd(wrapped, images, labels, epsilons=8 / 255)[1]
    attacks["foolbox PGD"] = from_foolbox(pgd, ball)
if THERE["art"]:
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    sizes = {"input_shape": (3, 32, 32), "nb_classes": len(cohort.class_names), "clip_values": (0, 1)}
    classifier = PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), device_type="cpu", **sizes)
    fgsm = FastGradientMethod(classifier, eps=8 / 255)
    found["ART"] = torch.from_numpy(fgsm.generate(images.numpy(), nn.functional.one_hot(labels).numpy()))
    attacks["ART FGSM"] = from_art(fgsm)
print({name: f"{(model(x_adv).argmax(1) == labels).float().mean():.0%} of a batch" for name, x_adv in found.items()})
print(markdown_table(evaluate_whitebox(encoder, bank, queries, attacks, classifier=knn).records))
