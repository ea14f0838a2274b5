"""Several classifiers on one bank: fitted with one index, answered from one search."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from hsat.classifiers.base import Queries
from hsat.classifiers.knn import FittedKNN, KNNClassifier, clip_k
from hsat.types import Classifier, EmbeddingTable, FittedClassifier

Item = TypeVar("Item")


def fit_classifiers(classifiers: Sequence[Classifier], bank: EmbeddingTable) -> list[FittedClassifier]:
    """Fit classifiers on one bank, in their order.

    kNN classifiers whose settings differ in k and temperature only share one index, which is built once, and one
    search, for the largest k.
    """
    fitted: list[FittedClassifier | None] = [None] * len(classifiers)

    def index_settings(classifier: Classifier) -> Hashable:
        return replace(classifier, k=1, temperature=1.0) if isinstance(classifier, KNNClassifier) else id(classifier)

    for places in _group(classifiers, index_settings):
        members = [classifiers[place] for place in places]
        if not all(isinstance(member, KNNClassifier) for member in members):
            fitted[places[0]] = members[0].fit(bank)
            continue
        settings = [member for member in members if isinstance(member, KNNClassifier)]
        largest = max(settings, key=lambda member: member.k).fit(bank)
        for place, member in zip(places, settings, strict=True):
            k = member.k if member.k == largest.settings.k else clip_k(member.k, len(bank))
            fitted[place] = replace(largest, settings=member, k=min(k, len(bank)))
    return [classifier for classifier in fitted if classifier is not None]


def predict_scores(fitted: Sequence[FittedClassifier], z: Queries) -> list[np.ndarray]:
    """Class scores of each classifier, (n, classes) float64 in their order: what its `predict_proba` gives.

    kNN classifiers that share a bank, an index and a search are answered from one search.
    """
    scores: list[np.ndarray | None] = [None] * len(fitted)

    def search(classifier: FittedClassifier) -> Hashable:
        return classifier.search_key if isinstance(classifier, FittedKNN) else id(classifier)

    for places in _group(fitted, search):
        members = [fitted[place] for place in places]
        largest = max(members, key=lambda member: getattr(member, "k", 0))
        if len(members) == 1 or not isinstance(largest, FittedKNN):
            scores[places[0]] = members[0].predict_proba(z)
            continue
        neighbours = largest.neighbours(z)
        for place, member in zip(places, members, strict=True):
            assert isinstance(member, FittedKNN)
            scores[place] = member.score(neighbours)
    return [score for score in scores if score is not None]


def _group(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[list[int]]:
    """Places of the items with equal keys, in the order in which the keys come first."""
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key(item), []).append(place)
    return list(groups.values())
