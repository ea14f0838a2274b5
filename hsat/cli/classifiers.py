"""Which classifier of embeddings a command attacks and measures: --classifier, --k, --temperature, --C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, field_validator

from hsat.classifiers import KNNClassifier, LinearProbe, NearestCentroid
from hsat.cli.options import Counts, say, split_commas
from hsat.data import Cohort, PatchDataset
from hsat.training.config import written
from hsat.types import Classifier

ClassifierName = Literal["knn", "linear", "centroid"]
ClassifierNames = Annotated[list[ClassifierName], BeforeValidator(split_commas)]
PAPER_K = 200
_SHARE = 20  # of the bank's rows, at least, for each neighbour


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


def default_k(bank: PatchDataset) -> int:
    """Neighbours where nobody gave a number: 200 for OpenSRH, as published; fewer for other banks.

    A vote of 200 in a small bank is the share of each class in it, whatever the query.  So other banks get
    min(200, smallest class, rows // 20), and at least 1.  The synthetic cohort has the files of OpenSRH and not its
    size, and is one of the others.

    Args:
        bank: The clean training patches.
    """
    if is_opensrh(bank.cohort):
        return PAPER_K
    label = bank.cohort.label[bank.rows]
    smallest = int(np.unique(label, return_counts=True)[1].min(initial=PAPER_K))
    return min(PAPER_K, smallest, max(1, len(bank.rows) // _SHARE))


def is_opensrh(cohort: Cohort) -> bool:
    """Whether this is OpenSRH: SRH patches laid out as published, that hsat did not paint."""
    meta = cohort.root / "meta"
    return cohort.kind == "srh" and (meta / "opensrh.json").is_file() and not (meta / "synthetic.json").is_file()


def describe_classifiers(records: Sequence[Any]) -> list[str]:
    """The classifiers that records were measured by, for run.json: k stands there even where nobody typed it."""
    return list(dict.fromkeys(record.classifier for record in records if record.classifier))


def say_default_k(loader: HasDataset) -> int:
    """The default, after a line on standard error about where it comes from."""
    bank = cast(PatchDataset, loader.dataset)
    k = default_k(bank)
    if is_opensrh(bank.cohort):
        say(f"kNN with k = {k}, as published; --k sets another number")
    else:
        say(
            f"kNN with k = {k}: one in {_SHARE} of {len(bank.rows)} bank patches, no more than the smallest class has"
            f" and at most {PAPER_K}; --k sets another number"
        )
    return k
