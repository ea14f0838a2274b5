"""Which classifier of embeddings a command attacks and measures: --classifier, --k, --temperature, --C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, cast

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from hsat.classifiers import KNNClassifier, LinearProbe, NearestCentroid
from hsat.cli.options import Counts, say, split_commas
from hsat.data import PatchDataset
from hsat.eval.default_neighbours import default_k, explain_default_k
from hsat.training.config import written
from hsat.types import Classifier

ClassifierName = Literal["knn", "linear", "centroid"]
ClassifierNames = Annotated[list[ClassifierName], BeforeValidator(split_commas)]


class ClassifierOptions(BaseModel):
    """What evaluations by a bank are told of the classifier."""

    classifier: ClassifierNames = Field(
        written("knn"),
        validate_default=True,
        description="knn, linear (a linear probe) or centroid; several with commas between: the first is attacked",
    )
    k: Counts = Field(
        [],
        description="neighbours; several with commas between; if not given, 200 for OpenSRH, else at most one in 20 of"
        " the bank and no more than its smallest class has",
    )
    temperature: float = Field(0.07, gt=0, description="of the kNN vote, and of centroids")
    C: float = Field(1.0, gt=0, description="of the linear probe: less is smoother")

    @field_validator("classifier")
    @classmethod
    def _once_each(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(names))

    @field_validator("k", mode="before")
    @classmethod
    def _one_or_several(cls, counts: object) -> object:
        return [counts] if isinstance(counts, int) else counts

    @field_validator("k")
    @classmethod
    def _at_least_one(cls, counts: list[int]) -> list[int]:
        if wrong := [k for k in counts if k < 1]:
            raise ValueError(f"k must be at least 1, got {wrong[0]}")
        return counts


class HasDataset(Protocol):
    """A loader over a `PatchDataset`."""

    @property
    def dataset(self) -> object: ...  # noqa: D102


def choose_classifiers(options: ClassifierOptions, bank: HasDataset) -> list[Classifier]:
    """The classifiers that the options name; the first is attacked.

    What the options do not say of k is said on standard error.

    Args:
        options: The options.
        bank: The loader of the clean training patches.
    """
    classifiers: list[Classifier] = []
    for name in options.classifier:
        if name == "linear":
            classifiers.append(LinearProbe(C=options.C))
        elif name == "centroid":
            classifiers.append(NearestCentroid(temperature=options.temperature))
        else:
            counts = options.k or [say_default_k(bank)]
            classifiers += [KNNClassifier(k=k, temperature=options.temperature) for k in counts]
    return classifiers


def choose_classifier(options: ClassifierOptions, bank: HasDataset) -> Classifier:
    """The one classifier that the options name.

    Raises:
        ValueError: For several.
    """
    for option in ("classifier", "k"):
        if len(given := getattr(options, option)) > 1:
            raise ValueError(f"this command takes one classifier; --{option} has {','.join(map(str, given))}")
    return choose_classifiers(options, bank)[0]


def describe_classifiers(records: Sequence[Any]) -> list[str]:
    """The classifiers that records were measured by, for run.json: k stands there even where nobody typed it."""
    return list(dict.fromkeys(record.classifier for record in records if record.classifier))


def say_default_k(loader: HasDataset) -> int:
    """The default, after a line on standard error about where it comes from."""
    bank = cast(PatchDataset, loader.dataset)
    say(f"{explain_default_k(bank)}; --k sets another number")
    return default_k(bank)
