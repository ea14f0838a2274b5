"""Options that the evaluations share: scoring, running, provenance, and what the attacks maximise."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from hsat.embedding import Layer
from hsat.types import EmbeddingFunction

Pooling = Literal["mean", "paper"]
AbsentClasses = Literal["skip", "zero"]
GroupBy = Literal["id", "id_and_label"]
TargetName = Literal["decision", "features", "embedding"]
PAPER_BRANCH = "paper"


def check_choice(name: str, value: object, choices: Any) -> None:
    """ValueError naming the option and its choices; choices: a Literal."""
    if value not in (allowed := get_args(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How embeddings become numbers.

    Attributes:
        layer: What the classifier reads, "features" (backbone) or "embedding" (projected).
        pooling: How patches' scores become those of a slide or patient: "mean", or "paper", see `pool`.
        absent_classes: What a class that is predicted and never true does to the mean class accuracy: "skip", or "zero"
            as the published code has it, see `metrics`.
        group_by: What makes a slide or patient one group: its "id", or "id_and_label" as the published code has it.
        bootstrap: Resamples of patients for the intervals; 0 for none.

    Raises:
        ValueError: For a value that is none of the choices.
    """

    layer: Layer = "features"
    pooling: Pooling = "mean"
    absent_classes: AbsentClasses = "skip"
    group_by: GroupBy = "id"
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        choices = {"layer": Layer, "pooling": Pooling, "absent_classes": AbsentClasses, "group_by": GroupBy}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        _check_count("bootstrap", self.bootstrap)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How an evaluation runs; none of it changes a number but the seed.

    Attributes:
        seed: Of the attacks' noise and of the bootstrap.
        device: Where images go; None: where the encoder is.
        cache_dir: A folder that keeps the embeddings of banks and clean queries for the next evaluation, where encoder
            and loaders can say what they are (modules; unshuffled loaders over a PatchDataset without transform).
        resume_dir: A folder that keeps every finished batch.  After an interruption, even by kill -9, the same call
            goes on from there and ends with the same records; a folder of other settings is refused.  It may be
            resumed with a different number of ranks.
        noise: Measure one random point of each threat model, too.
        diagnose: Look for masked gradients on that many queries per attack; 0 for none.
        keep_examples: At most so many images of each condition to keep in the result: the first of each class, then the
            second of each, and so on, and of none more than its share.
        progress: Show progress bars.

    Raises:
        ValueError: For a negative seed, diagnose or keep_examples.
    """

    seed: int = 0
    device: torch.device | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    resume_dir: str | os.PathLike[str] | None = None
    noise: bool = True
    diagnose: int = 0
    keep_examples: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "diagnose", "keep_examples"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What records say of the encoder that is measured.

    Attributes:
        model: Its name.
        checkpoint: What identifies its weights, such as the SHA-256 of a file.
        class_names: Names of the classes, for loaders that do not know theirs.
        training: What it was trained on, `kind`, `image_size` and `patients` as in encoder files (docs/files.md); by
            default what the file of its weights states.
    """

    model: str = ""
    checkpoint: str = ""
    class_names: Sequence[str] | None = None
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Target:
    """What the attacks of an evaluation maximise.

    Attributes:
        objective: "decision": the margin of the classifier that scores, against the true class.  "features" or
            "embedding": the cosine drift of that layer from its clean value, without labels.
        branch: For an encoder with dual BatchNorm, the branch that the attacks go through; None is the one that is
            scored.  "paper" is the published choice: "pgd" for such an encoder, and nothing for others.

    Raises:
        ValueError: For an unknown objective.
    """

    objective: TargetName = "decision"
    branch: str | None = None

    def __post_init__(self) -> None:
        check_choice("target", self.objective, TargetName)

    @classmethod
    def of(cls, target: Target | str) -> Target:
        """A target, also from its name alone.

        Args:
            target: A target, which is given back, or the name of an objective.

        Returns:
            The target.
        """
        return target if isinstance(target, Target) else cls(target)  # type: ignore[arg-type]  # checked there

    def branch_of(self, encoder: EmbeddingFunction) -> str | None:
        """The branch of this encoder that attacks go through; None is the one that is active.

        Args:
            encoder: The encoder that is attacked.

        Returns:
            Name of the branch; None is the one that is active.
        """
        if self.branch != PAPER_BRANCH:
            return self.branch
        from hsat.models import is_dual

        return "pgd" if isinstance(encoder, nn.Module) and is_dual(encoder) else None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Options that belong together."""

    target: Target
    scoring: Scoring


PAPER = Preset(
    target=Target("embedding", branch=PAPER_BRANCH),
    scoring=Scoring(pooling="paper", absent_classes="zero", group_by="id_and_label"),
)
"""The published evaluation: attacks move the projected embedding, and the published arithmetic makes the numbers."""


def software_versions() -> dict[str, str]:
    """Versions of what a number depends on; libraries that are not installed are left out."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name, package in (
        ("hsat", "hsat"),
        ("scipy", "scipy"),
        ("faiss", "faiss-cpu"),
        ("timm", "timm"),
        ("torchvision", "torchvision"),
    ):
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
