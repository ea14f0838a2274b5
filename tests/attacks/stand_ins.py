"""Stand-ins for attacks of other libraries: their public calls, and all the harm that they do to a model on the way."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

EPS = 8 / 255


def noisy_step(model, x, labels, eps, random_start=True):
    """One signed step of eps from noise of all three generators' kind, with gradients left in the model."""
    model.train()
    model.zero_grad()
    noise = torch.rand_like(x) + torch.from_numpy(np.random.rand(*x.shape)).to(x) - 1
    start = (x + eps * noise * random_start).detach().requires_grad_()
    F.cross_entropy(model(start), labels).backward()
    return (x + (start - x + eps * start.grad.sign()).clamp(-eps, eps)).clamp(0, 1).detach()


class Torchattack:
    """As torchattacks has them: made with a model, called with images and labels."""

    def __init__(self, model, eps=EPS, random_start=True, norm="Linf", result=None):
        self.attack, self.model, self.device, self.model_name = "Torchattack", model, None, type(model).__name__
        self.attack_mode, self.targeted, self.normalization_used, self._private = "default", False, None, object()
        self.supported_mode, self.eps, self.random_start, self.norm = ["default"], eps, random_start, norm
        self.result = result

    def set_model(self, model):
        self.model = model

    def set_device(self, device):
        self.device = device

    def __call__(self, images, labels):
        x_adv = noisy_step(self.model, images.to(self.device), labels, self.eps, self.random_start)
        return x_adv if self.result is None else self.result(x_adv)


class Foolbox:
    """As foolbox has them: knows neither model nor eps, called with both."""

    distance = SimpleNamespace(p=float("inf"))

    def __init__(self, steps=1, random_start=True):
        self.steps, self.random_start = steps, random_start

    def __call__(self, model, inputs, criterion, *, epsilons):
        low, high = model.bounds
        assert inputs.min() >= low and inputs.max() <= high and isinstance(epsilons, float)
        clipped = noisy_step(model.model, inputs, criterion, epsilons, self.random_start)
        return clipped + 1, clipped, model.model(clipped).argmax(1) != criterion


class Evasion:
    """As ART has them: made with a classifier, called with arrays."""

    attack_params = ("norm", "eps", "targeted", "num_random_init", "summary_writer")

    def __init__(self, estimator, norm=np.inf, eps=EPS, targeted=False, num_random_init=1, summary_writer=False):
        self.estimator, self.norm, self.eps, self.targeted = estimator, norm, eps, targeted
        self.num_random_init, self.summary_writer = num_random_init, None

    def generate(self, x, y=None, **options):
        assert x.dtype == y.dtype == np.float32 and y.shape == (len(x), self.estimator.nb_classes)
        labels = torch.from_numpy(y.argmax(1)).to(self.estimator.device)
        images = torch.from_numpy(x).to(self.estimator.device)
        return noisy_step(self.estimator.model, images, labels, self.eps, bool(self.num_random_init)).cpu().numpy()


class Classifier:
    def __init__(self, model, loss, input_shape, nb_classes, *, clip_values, device_type):
        assert isinstance(model, torch.nn.Module) and clip_values == (0.0, 1.0) and len(input_shape) == 3
        self.model, self.nb_classes, self.device = model, nb_classes, torch.device(device_type.replace("gpu", "cuda"))


def install(monkeypatch):
    """Put stand-ins for foolbox and ART where they are imported from."""
    foolbox = ModuleType("foolbox")
    foolbox.PyTorchModel = lambda model, bounds, device: SimpleNamespace(model=model, bounds=bounds, device=device)
    classification = ModuleType("art.estimators.classification")
    classification.PyTorchClassifier = Classifier
    modules = {"foolbox": foolbox, "art": ModuleType("art"), "art.estimators": ModuleType("art.estimators")}
    for name, module in (modules | {"art.estimators.classification": classification}).items():
        monkeypatch.setitem(sys.modules, name, module)
