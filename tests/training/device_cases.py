"""What is run to see where a device is waited for: every attack and objective, losses, steps, an evaluation.

A case is a function of a Place, the device with everything that the case needs already there, and returns tensors.
test_device_reads.py runs the cases on the CPU and counts reads; tests/gpu/test_gpu.py runs them on a GPU and counts
what the host waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks import (
    APGD,
    BIM,
    DIFGSM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    NFGSM,
    NIFGSM,
    PGD,
    TIFGSM,
    VMIFGSM,
    Linf,
    Masked,
    RandomNoise,
    RawChannels,
    Reparametrized,
    Square,
    Stains,
    UniversalPerturbation,
    aggregate_margin,
    classification,
    dlr,
    feature_drift,
    hierarchical,
    margin,
    match_features,
    objective_from,
    worst_case,
)
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.data import augment_batch, build_transform, srh_to_rgb
from hsat.distributed import global_indices
from hsat.eval import Provenance, Scoring, evaluate_whitebox
from hsat.losses import HiDiscLoss, supcon_loss
from hsat.models import frozen, wrap_encoder
from hsat.training import (
    OverfittingGuard,
    SplitBatch,
    WarmStarts,
    accumulated_step,
    adversarial_step,
    free_replays,
    split_batch,
)
from hsat.types import EmbeddingTable, HierarchicalBatch

LOSS = HiDiscLoss()
EPS = 8 / 255
STEPS = {"step_size": 2 / 255, "steps": 3}
ATTACKS: dict[str, Any] = {
    "PGD": PGD(Linf(EPS), **STEPS),
    "PGD, 2 restarts": PGD(Linf(EPS), **STEPS, restarts=2),
    "PGD, eps per channel": PGD(Linf(torch.tensor([0.01, 0.02, 0.03]).view(1, 3, 1, 1)), **STEPS),
    "PGD, L2": PGD(L2(0.5), step_size=0.2, steps=3),
    "PGD, L2, eps per image": PGD(L2(torch.linspace(0.1, 0.8, 16)), step_size=0.2, steps=3),
    "PGD, masked": PGD(Masked(Linf(EPS), torch.arange(64).view(8, 8) % 3 > 0), **STEPS),
    "FGSM": FGSM(Linf(EPS)),
    "FFGSM": FFGSM(Linf(EPS)),
    "BIM": BIM(Linf(EPS), **STEPS),
    "MIFGSM": MIFGSM(Linf(EPS), **STEPS),
    "MIFGSM, random start": MIFGSM(Linf(EPS), **STEPS, random_start=True),
    "NIFGSM": NIFGSM(Linf(EPS), **STEPS, scales=2, random_start=True),
    "DIFGSM": DIFGSM(Linf(EPS), **STEPS, random_start=True),
    "TIFGSM": TIFGSM(Linf(EPS), **STEPS, size=3, random_start=True),
    "VMIFGSM": VMIFGSM(Linf(EPS), **STEPS, samples=2, random_start=True),
    "APGD": APGD(Linf(EPS), steps=5),
    "Square": Square(Linf(EPS), queries=8),
    "NFGSM": NFGSM(Linf(EPS)),
    "RandomNoise": RandomNoise(Linf(EPS)),
    "raw channels": Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(0.05), step_size=0.02, steps=3)),
    "stains": Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), step_size=0.04, steps=3)),
}

MORE = {  # case: (reads of the device, why); all others: one for an attack, none for a loss
    "from the images: BIM": (2, "is any image stationary at the first step?"),
    "from the images: FGSM": (2, "the same"),
    "from the images: MIFGSM": (2, "the same"),
    "attack: raw channels": (3, "are the images what two channels can make, and in range?"),
    "attack: stains": (2, "are the images in range?"),
    "objective: objective_from": (4, "supcon_loss on bare ids looks for a pair at each of three steps"),
    "float16 images": (4, "the scale is halved where a gradient overflows, at each of three steps"),
    "success": (9, "images stop one by one"),
    "step, parts": (2, "two parts, two attack calls"),
    "free": (3, "are the images in range, and the gradients finite before each of two moves?"),
    "worst_case": (2, "two attacks"),
}
FREELY = {"evaluation", "warm starts", "safeguard", "universal"}  # between steps, or once per batch
FREELY |= {"objective: kNN", "aggregate margin"}  # neighbours are ordered by numpy at every step
COPIES = {  # case: (copies to the device that block, why)
    "augmentation: static": (7, "white noise replayed from the CPU; a GPU draws its own"),
    "augmentation: v0": (7, "the same"),
}


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh())
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))


def batch_of() -> HierarchicalBatch:
    raw = torch.rand(16, 2, 8, 8, generator=seeded()) * 0.6  # srh images, so that raw channels can be had back
    return HierarchicalBatch.from_grid(srh_to_rgb(raw).unflatten(0, (2, 2, 2, 2)), torch.arange(2))


def sent(batch: HierarchicalBatch, device: torch.device) -> HierarchicalBatch:
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


class Place:
    """A device with everything that a case needs already there; `forget` is called where its preparation ends."""

    def __init__(self, device: torch.device, *, forget: Callable[[], None] = lambda: None) -> None:
        self.device, self.forget = device, forget
        self.on_cpu = batch_of()
        self.model = network().to(device)
        self.batch = sent(self.on_cpu, device)
        self.labels = (torch.arange(16) % 3).to(device)

    def decision(self) -> DecisionModel:
        """The model under a kNN vote of three classes."""
        index = np.arange(40)
        rows = torch.rand(40, 5, generator=seeded(2)) - 0.5
        bank = EmbeddingTable(rows.numpy(), index % 3, index, index, index, ("a", "b", "c"))
        return DecisionModel(self.model, KNNClassifier(k=5).fit(bank))

    def attack(self, attack: Any, make: Callable[[Place], Any], **options: Any) -> Tensor:
        with frozen(self.model):
            objective = make(self)
            self.forget()
            return attack(self.batch.images, objective, generator=seeded(), **options)


def drift(place: Place) -> Any:
    return feature_drift(place.model, place.batch.images)


def levels(place: Place) -> Any:
    return hierarchical(place.model, LOSS, place.batch)


OBJECTIVES: dict[str, Callable[[Place], Any]] = {
    "drift": drift,
    "hierarchical": levels,
    "classification": lambda place: classification(place.model, place.labels),
    "margin": lambda place: margin(place.model, place.labels),
    "dlr": lambda place: dlr(place.model, place.labels),
    "guide": lambda place: match_features(place.model, place.model(place.batch.images.flip(0)).detach()),
    "kNN": lambda place: margin(place.decision(), place.labels),
    "objective_from": lambda place: objective_from(place.model, supcon_loss, place.batch.patient),
}


def step(place: Place, function: Callable[..., Any], *, scale: float = 1.0, **options: Any) -> dict[str, Any]:
    model = place.model.train()
    result = function(model, LOSS, ATTACKS["PGD"], place.batch, generator=seeded(), **options)
    if result.loss.requires_grad:
        result.loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {"loss": result.loss.detach(), "grad": model[0].weight.grad.clone(), "x_adv": result.x_adv}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return found


def in_parts(place: Place, model: Any, *args: Any, **options: Any) -> Any:
    *args, batch = args
    batch = SplitBatch(batch, tuple(sent(part, place.device) for part in split_batch(place.on_cpu, 2).parts))
    place.forget()  # the loader's part: batches check their ids where they are made, on the CPU
    return accumulated_step(model, *args, batch, ids=global_indices(16, rank=0), **options)


def free(place: Place) -> list[Tensor]:
    model = place.model.train()
    found = []
    for result in free_replays(model, LOSS, place.batch, threat=Linf(EPS), replays=3, generator=seeded()):
        result.loss.backward()
        found.append(result.x_adv)
    return found


def loss_and_gradient(place: Place) -> list[Tensor]:
    z = place.model(place.batch.images).detach().requires_grad_()
    terms = LOSS(z, place.batch)
    (grad,) = torch.autograd.grad(terms.total, z)
    return [*(t.detach() for t in terms), grad]


def until(place: Place, attack: Any) -> Tensor:
    """With images that stop early; here the host has to ask."""
    objective = classification(place.model, place.labels)
    with frozen(place.model):
        return attack(place.batch.images, objective, generator=seeded(), success=lambda v: place.model(v)[:, 0] > 0.1)


def half(place: Place, dtype: torch.dtype) -> Tensor:
    with frozen(place.model):
        x = place.batch.images.to(dtype)
        objective = lambda v: place.model(v.float()).square().sum(1)
        place.forget()
        return ATTACKS["PGD, L2"](x, objective, generator=seeded())


def augmented(place: Place, *, name: str) -> Tensor:
    pipeline = build_transform(name, image_size=8, strength=0.9)
    patches = list(place.batch.images[::2])
    return augment_batch(patches, pipeline, list(range(16)), source=[i // 2 for i in range(16)], replay_noise=True)


def encoder_of(place: Place) -> nn.Module:
    backbone = network()
    encoder = wrap_encoder(backbone, mean=0.5, std=0.25, head=nn.Linear(5, 4))
    return encoder.to(place.device)


def evaluated(place: Place) -> list[Any]:
    encoder, batch = encoder_of(place), place.on_cpu
    others = HierarchicalBatch(
        batch.images.flip(0), *(i + 100 for i in (batch.patch, batch.slide, batch.patient)), batch.label
    )
    if place.device.type != "cpu":
        batch, others = batch.pin_memory(), others.pin_memory()
    attacks = {"PGD-8": ATTACKS["PGD"], "MIFGSM-8": ATTACKS["MIFGSM, random start"], "PGD-l2": ATTACKS["PGD, L2"]}
    found = evaluate_whitebox(
        encoder,
        [others],
        [batch],
        attacks,
        classifier=KNNClassifier(k=3),
        target="features",
        scoring=Scoring(bootstrap=0),
        provenance=Provenance(class_names=("a", "b")),
    )
    return [torch.from_numpy(found.tables[name].z) for name in found.tables] + [
        torch.tensor([record.value for record in found.records])
    ]


def warm(place: Place) -> list[Tensor]:
    starts, threat = WarmStarts(), Linf(EPS)
    starts.keep(place.batch, (place.batch.images + 0.01).clamp(0, 1))
    return [starts.points(place.batch, threat, generator=seeded())]


def safeguarded(place: Place) -> list[Tensor]:
    guard = OverfittingGuard(NFGSM(Linf(EPS)), ATTACKS["PGD"], check_every=1)
    return [torch.tensor(guard.measure(place.model, LOSS, place.batch, generator=seeded()))]


def universal(place: Place) -> Tensor:
    fit = UniversalPerturbation(threat=Linf(EPS), step_size=2 / 255, epochs=2)
    with frozen(place.model):
        found = fit.fit([place.batch], place.model, generator=seeded(), device=place.device)
        return found(place.batch.images, drift(place))


def ensemble(place: Place) -> Tensor:
    parts = worst_case(ATTACKS["PGD"], (ATTACKS["APGD"], lambda x: feature_drift(place.model, x)))
    return place.attack(parts, OBJECTIVES["margin"])


def cases() -> dict[str, Callable[[Place], Any]]:
    found: dict[str, Callable[[Place], Any]] = {}
    for name, attack in ATTACKS.items():
        found[f"attack: {name}"] = lambda place, attack=attack: place.attack(attack, drift)
    for name, make in OBJECTIVES.items():
        found[f"objective: {name}"] = lambda place, make=make: place.attack(ATTACKS["PGD"], make)
    found["ids"] = lambda place: place.attack(ATTACKS["PGD"], levels, ids=global_indices(16, rank=0))
    found["start"] = lambda place: place.attack(ATTACKS["PGD"], levels, start=place.batch.images + 0.01)
    found["bfloat16 images"] = partial(half, dtype=torch.bfloat16)
    found["float16 images"] = partial(half, dtype=torch.float16)
    found["success"] = partial(until, attack=ATTACKS["PGD"])
    found["loss"] = loss_and_gradient
    found["step"] = partial(step, function=adversarial_step)
    found["step, clean and adversarial"] = partial(step, function=adversarial_step, clean_weight=0.5)
    found["step, parts"] = lambda place: step(place, partial(in_parts, place), clean_weight=0.5)
    found["free"] = free
    for name in ("BIM", "FGSM", "MIFGSM"):
        found[f"from the images: {name}"] = lambda place, name=name: place.attack(ATTACKS[name], levels)
    found["aggregate margin"] = lambda place: place.attack(
        ATTACKS["PGD"], lambda p: aggregate_margin(p.decision(), p.batch.patient, p.batch.label)
    )
    for name in ("none", "static", "v0", "v1"):
        found[f"augmentation: {name}"] = partial(augmented, name=name)
    found["evaluation"] = evaluated
    found["warm starts"] = warm
    found["safeguard"] = safeguarded
    found["universal"] = universal
    found["worst_case"] = ensemble
    return found
