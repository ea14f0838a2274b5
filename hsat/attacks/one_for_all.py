"""A fitted universal perturbation: an attack that adds the same delta to every image."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsat.attacks import radius, starts
from hsat.attacks.composing import Success
from hsat.attacks.named import unguided_result
from hsat.attacks.threat import L2, Linf
from hsat.files import write_file
from hsat.types import AttackResult, Objective
from hsat.untrusted import check_regular, strict_json

FORMAT = "hsat universal perturbation 1"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FittedUniversal:
    """An attack that adds one delta (1, c, h, w) to every image and projects; it asks nobody for gradients.

    threat: what the projection keeps to.  settings: repr of the UniversalPerturbation that found it.  history: mean
    objective of each pass while it was found.  note: what it was made on.
    `start`, `generator` and `ids` change nothing, since nothing is drawn; `success` is asked once, about the result.
    Raises ValueError for images of another size than delta's, naming both.
    """

    threat: Linf | L2
    delta: Tensor
    settings: str = ""
    history: tuple[float, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.delta.ndim != 4 or len(self.delta) != 1 or not bool(self.delta.isfinite().all()):
            raise ValueError(f"delta must be (1, c, h, w) and finite, got shape {tuple(self.delta.shape)}")
        object.__setattr__(self, "delta", self.delta.detach().clone())

    @property
    def random_start(self) -> bool:
        """False: nothing is drawn when it is applied."""
        return False

    @property
    def uses_objective(self) -> bool:
        """False: the objective is not asked."""
        return False

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Success | None = None,
    ) -> Tensor:
        """project(x + delta), same shape, dtype and device as x, detached."""
        starts.check_ids(ids, len(x))
        starts.check_start(start, x)
        if x.ndim != 4 or x.shape[1:] != self.delta.shape[1:]:
            raise ValueError(
                f"this perturbation is for images of shape (n, {', '.join(map(str, self.delta.shape[1:]))}); got"
                f" {tuple(x.shape)}. Fit another one at that size, or resize the images"
            )
        x = x.detach()
        work = torch.promote_types(x.dtype, torch.float32)
        moved = x.to(work) + self.delta.to(x.device, work)
        return self.threat.project(moved.to(x.dtype), x)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Success | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The same with the objective's value at the images and at the perturbed images; see `unguided_result`."""
        x_adv = self(x, objective, start=start, ids=ids)
        return unguided_result(x_adv, x, objective, success=success, score=score)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write delta and everything about it as safetensors; the file appears whole or not at all."""
        from safetensors.torch import save

        eps = self.threat.eps
        tensors = {"delta": self.delta.cpu().contiguous()} | ({"eps": eps.cpu()} if isinstance(eps, Tensor) else {})
        about = {
            "threat": type(self.threat).__name__,
            "eps": None if isinstance(eps, Tensor) else eps,
            "low": self.threat.low,
            "high": self.threat.high,
            "settings": self.settings,
            "history": self.history,
            "note": self.note,
        }
        return write_file(path, save(tensors, metadata={"format": FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedUniversal:
        """Read what `save` wrote.  Raises FileNotFoundError, or ValueError naming the file for anything else."""
        from safetensors import SafetensorError, safe_open

        check_regular(path, kind="universal perturbation")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, wanted {FORMAT!r}")
            about: dict[str, Any] = strict_json(metadata["about"], where="about", depth=3, containers=10)
            kinds: dict[str, type[Linf | L2]] = {"Linf": Linf, "L2": L2}
            eps = tensors["eps"] if about["eps"] is None else about["eps"]
            return cls(
                threat=kinds[about["threat"]](eps, low=about["low"], high=about["high"]),
                delta=tensors["delta"],
                settings=about["settings"],
                history=tuple(about["history"]),
                note=about["note"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a universal perturbation that hsat saved: {error}") from error

    def __repr__(self) -> str:
        found = f"tensor(shape={tuple(self.delta.shape)}, sha256={radius.digest(self.delta)[:8]})"
        return f"FittedUniversal(threat={self.threat!r}, delta={found}, settings={self.settings!r}, note={self.note!r})"
