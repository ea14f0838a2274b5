"""An attack of another library as an attack of hsat, and the model of logits that the library gets."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hsat.attacks.initialization import check_ids, check_start
from hsat.attacks.threat import check_threat, detach_images, require_images
from hsat.types import AttackResult, DecisionObjective, Objective, SuccessTest, ThreatModel


@dataclass(eq=False)
class Subject:
    """A model under attack by another library, and what was counted.

    Attributes:
        model: Images (n, c, h, w) -> logits (n, classes).
        images: (n, c, h, w), the batch that is attacked; its dtype and device are those that the model gets.
        forwards: Images that went through the model.
        backwards: Images whose gradient was taken.
        zero_gradient: (n,) int64, how often an image's gradient was exactly zero; counted where the library asks for
            the whole batch at once.
    """

    model: Callable[[Tensor], Tensor]
    images: Tensor
    forwards: int = 0
    backwards: int = 0
    zero_gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.zero_gradient = torch.zeros(len(self.images), dtype=torch.int64, device=self.images.device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits in the dtype and on the device of these images; FloatingPointError where they are not finite."""
        self.forwards += len(images)
        logits = self.model(images.to(self.images))
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite; a library's attack can do nothing with them")
        return logits.to(images)

    def gradient(self, images: Tensor, logits: Tensor, slope: Tensor) -> Tensor:
        """The gradient (n, c, h, w) of the images; slope: (n, classes), that of the logits."""
        if not logits.requires_grad:
            raise RuntimeError("the model gives no gradient of its images; only attacks without gradients can be used")
        (grad,) = torch.autograd.grad(logits, images, slope, retain_graph=True)
        self.backwards += len(images)
        if bool(slope.isfinite().all()) and not bool(grad.isfinite().all()):
            rows = (~grad.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise FloatingPointError(f"the model's gradient is not finite at images {rows} of what the library asked")
        if len(images) == len(self.images):
            flat = (grad == 0).flatten(1).all(1) & (slope != 0).any(1)
            self.zero_gradient += flat.to(self.zero_gradient)
        return grad


class LogitModel(nn.Module):
    """Images -> logits of the model that is attacked at the moment, as a module without parts.

    Libraries switch models to eval or train, clear their gradients, and call `backward()`, which fills the gradients of
    every parameter.  Here there is nothing to switch or to clear, and gradients end at the images: the model that is
    measured stays as it is.  It gets the images in the dtype and on the device of the batch; the logits come back in
    those of what was asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # libraries look for the device of a parameter
        self._subjects: list[Subject] = []
        self.eval()

    @contextmanager
    def attached(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Iterator[Subject]:
        """Meanwhile this module is `model`, attacked at `images` (n, c, h, w); gives what is counted."""
        subject = Subject(model, images)
        self._subjects.append(subject)
        self.to(images.device)
        try:
            yield subject
        finally:
            self._subjects.pop()

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) -> logits (n, classes); gradients reach the images and nothing else."""
        if not self._subjects:
            raise RuntimeError("this model stands in for the one that hsat attacks, and there is none at the moment")
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _Logits.apply(images, self._subjects[-1])
            return logits
        with torch.no_grad():
            return self._subjects[-1].logits(images)


class _Logits(torch.autograd.Function):
    """Logits whose graph ends here, so that no parameter of the model gets a gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, subject: Subject) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            logits = subject.logits(leaf)
        ctx.leaf, ctx.logits, ctx.subject = leaf, logits, subject
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        subject: Subject = ctx.subject
        return subject.gradient(ctx.leaf, ctx.logits, slopes[0]), None


Perturb = Callable[[LogitModel, Tensor, Tensor, ThreatModel], Tensor]
"""(model of logits, images (n, c, h, w), labels (n,), threat model) -> images, as the library gives them."""


@dataclass(frozen=True, repr=False)
class LibraryAttack:
    """An attack of another library; `from_torchattacks`, `from_foolbox` and `from_art` make it.

    It attacks a model of logits, and so needs a `DecisionObjective` (`margin`, `dlr`, `classification`), of which it
    takes model and labels; what it maximises is its own affair.  In evaluations that is target="decision".

    - *Threat model.*  Its images are compared with their projection, without tolerance.  Those that differ are replaced
      by it; value and success are those of the projected images.  `AttackResult.outside` says how far each was off.
      Images with NaN or infinity are replaced by the clean ones.
    - *Randomness.*  Libraries draw from the global generators of torch, numpy and Python.  These are seeded for the
      call by the seed of `generator`, the attack's name and `ids`, and set back afterwards: the same batch gives the
      same bytes.  With other batches the noise differs.  An attack that seeds a generator of its own keeps to that; one
      that takes its seed from the system (ART's HopSkipJump) cannot be repeated.
    - *Model.*  It gets a stand-in (`LogitModel`), so that modes, gradients and buffers of the model stay.
    - `start` is refused, since libraries choose their own; `success` is asked once, at the end.

    Attributes:
        library: "torchattacks", "foolbox" or "art".
        settings: The complete settings of the attack, as text.
        threat: What its images are held to.
        version: Of the library.
        random_start: Whether it begins at a random point; None where it does not say.
        perturb: Calls the library.
        model: What the library calls its model.
    """

    library: str
    settings: str
    threat: ThreatModel
    _: KW_ONLY
    version: str = ""
    random_start: bool | None = None
    perturb: Perturb = field(compare=False)
    model: LogitModel = field(compare=False, default_factory=LogitModel)

    def __post_init__(self) -> None:
        check_threat(self.threat)

    def __repr__(self) -> str:
        return f"from_{self.library}({self.settings}, threat={self.threat!r}, version={self.version!r})"

    @property
    def name(self) -> str:
        """The attack without its settings, such as "torchattacks.PGD"."""
        return f"{self.library}.{self.settings.partition('(')[0]}"

    @property
    def needs_decision(self) -> bool:
        """True: it attacks a model of logits, which only a `DecisionObjective` has."""
        return True

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Adversarial images, same shape, dtype and device as x, detached; see `run` for the arguments."""
        result = self.run(x, objective, start=start, generator=generator, ids=ids, success=success, score=False)
        return result.x_adv

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The attack with its record.

        Args:
            x: (n, c, h, w) floats in the threat model's range.
            objective: A `DecisionObjective`.
            start: Must be None.
            generator: Source of the seed (torch's global one if None).
            ids: (n,) ints; the seed then depends on the generator's initial seed and on these.
            success: (x_adv) -> (n,) bool, asked about the final images.
            score: False saves the last pass; `value` is then not the value at x_adv.

        Returns:
            The result; passes are counted as the library makes them, a pass of a part of the batch as that part.

        Raises:
            ValueError: For images out of range, a `start`, an objective that is no decision, or images of another shape
                from the library.
            RuntimeError: Under inference_mode.
            FloatingPointError: For logits or gradients of the model that are not finite.
        """
        check_ids(ids, len(x))
        check_start(start, x)
        self._check_call(objective, start)
        inside = require_images(detach_images(x).clone(), self.threat)
        labels, n = objective.labels.to(inside.device), len(inside)  # type: ignore[attr-defined]  # checked above
        with torch.no_grad():
            start_value = objective(inside).detach()
        with (
            seeded(self._seed(generator, ids), inside.device),
            torch.enable_grad(),
            self.model.attached(objective.model, inside) as subject,  # type: ignore[attr-defined]
        ):
            seen = inside.clone().to(torch.promote_types(inside.dtype, torch.float32))
            raw = self.perturb(self.model, seen, labels, self.threat) if n else seen
        x_adv, outside = self._put_back(raw, inside)
        with torch.no_grad():
            return AttackResult(
                x_adv=x_adv,
                value=objective(x_adv).detach() if score else start_value,
                start_value=start_value,
                zero_gradient=subject.zero_gradient,
                success=None if success is None else success(x_adv),
                forwards=-(-subject.forwards // max(1, n)) + 1 + score,
                backwards=-(-subject.backwards // max(1, n)),
                outside=outside,
            )

    def _check_call(self, objective: Objective, start: Tensor | None) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "attacks need gradients, which inference_mode forbids; use torch.no_grad() around them instead"
            )
        if start is not None:
            raise ValueError(f"{self.name} begins where {self.library} lets it begin; it cannot take a start")
        if not isinstance(objective, DecisionObjective):
            kind = type(objective).__name__
            raise ValueError(
                f"{self.name} attacks a model of logits, and {kind} has none: give a decision, such as"
                ' margin(DecisionModel(encoder, fitted), labels); in evaluations that is target="decision"'
            )

    def _seed(self, generator: torch.Generator | None, ids: Tensor | None) -> int:
        """The seed of this call."""
        if ids is None:
            device = "cpu" if generator is None else generator.device
            return int(torch.randint(2**62, (), generator=generator, device=device))
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        text = f"{seed}/{self.name}/{ids.tolist()}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2

    def _put_back(self, raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest feasible images, and (n,) float64, how far a pixel of each image was from there."""
        if raw.shape != x.shape:
            raise ValueError(f"{self.name} gave images of shape {tuple(raw.shape)} for {tuple(x.shape)}")
        images = raw.detach().to(x)
        finite = images.isfinite().flatten(1).all(1)
        images = torch.where(finite[:, None, None, None], images, x)
        x_adv = self.threat.project(images, x).to(x.dtype)
        distance = (images.double() - x_adv.double()).abs().flatten(1)
        outside = distance.amax(1) if distance.numel() else distance.sum(1)
        return x_adv, torch.where(finite, outside, torch.inf)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python; set them and the filters of warnings back afterwards."""
    of_numpy, of_python = np.random.get_state(legacy=False), random.getstate()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
