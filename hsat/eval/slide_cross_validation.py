"""Cross-validation of slide classifiers: every slide is decided by one that never saw its patient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hsat.classifiers import bags_of, predict_slides
from hsat.embedding import LoaderInfo
from hsat.eval.evaluation import Evaluation
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.pooling import LevelRows
from hsat.eval.records import AttackFacts, ClassifierFacts, Record
from hsat.eval.runner import CLEAN
from hsat.eval.slide_records import slide_records
from hsat.types import EmbeddingTable, SlideClassifier


class SlideLearner(Protocol):
    """Settings of a slide classifier, such as `hsat.classifiers.ABMIL`."""

    def fit(self, bank: EmbeddingTable) -> SlideClassifier:
        """A classifier of slides, trained on the slides of this table."""


@dataclass(frozen=True, eq=False)
class SlideCrossValidation:
    """The result of `cross_validate_slides`; rows are slides by ascending id.

    Attributes:
        records: Metrics with intervals over patients, at the levels slide and, where slides of a patient agree about
            the class, patient.
        slide: (g,) ids.
        label: (g,) classes, indices of `class_names`.
        patient: (g,) ids.
        fold: (g,) the fold that the slide was held out in.
        scores: (g, classes) float64, by the classifier that saw no slide of the slide's patient.
        classifiers: One per fold.
        class_names: The classes.
    """

    records: tuple[Record, ...]
    slide: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    fold: np.ndarray
    scores: np.ndarray
    classifiers: tuple[SlideClassifier, ...]
    class_names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of the slides that are decided rightly."""
        return float((self.scores.argmax(1) == self.label).mean())


def cross_validate_slides(
    classifier: SlideLearner,
    table: EmbeddingTable,
    *,
    folds: int = 5,
    scoring: Scoring = Scoring(),
    seed: int = 0,
    provenance: Provenance = Provenance(),
) -> SlideCrossValidation:
    """Train on all folds but one, decide the slides of that one, and so on: out-of-fold predictions of all slides.

    Whole patients are dealt out, at random and alike by class (a patient with slides of several classes by the class
    of most of them), so that no patient is trained on and decided.

    Args:
        classifier: Settings with `fit(table)`, such as ABMIL().
        table: Embeddings of patches, with their lengths where the classifier reads raw features.
        folds: How many, at least 2.
        scoring: Bootstrap, and how slides become patients.
        seed: Of the folds and of the bootstrap; the training has a seed of its own.
        provenance: What records say of the encoder.

    Returns:
        Predictions, folds, the classifiers, and records.

    Raises:
        ValueError: For fewer than two folds, for a class with fewer patients than folds, naming it, and what `fit`
            raises.
    """
    bags = [bag._replace(rows=bag.rows[:0]) for bag in bags_of(table, reads="unit")]
    slide, label, patient = (np.array([getattr(bag, name) for bag in bags]) for name in ("slide", "label", "patient"))
    fold = np.full(len(bags), -1)
    scores = np.full((len(bags), len(table.class_names)), np.nan)
    fitted: list[SlideClassifier] = []
    for number, held_out in enumerate(_fold_patients(label, patient, table.class_names, folds=folds, seed=seed)):
        mine, rows = np.isin(patient, held_out), np.isin(table.patient, held_out)
        fitted.append(classifier.fit(table[~rows]))
        fold[mine], scores[mine] = number, predict_slides(fitted[-1], table[rows])
    evaluation = Evaluation(lambda images: images, Target(), scoring, RunOptions(seed=seed), provenance)
    info = LoaderInfo(class_names=table.class_names, cohort=table.cohort, split=table.split)
    template = evaluation.template(None, info, table.class_names, loader=None)
    facts = AttackFacts(name=CLEAN, settings={"cross_validation_folds": folds})
    about = ClassifierFacts(name=repr(classifier))
    records = slide_records(template, facts, about, LevelRows(scores, label, patient))
    return SlideCrossValidation(
        records=tuple(records),
        slide=slide,
        label=label,
        patient=patient,
        fold=fold,
        scores=scores,
        classifiers=tuple(fitted),
        class_names=table.class_names,
    )


def _fold_patients(
    label: np.ndarray, patient: np.ndarray, class_names: tuple[str, ...], *, folds: int, seed: int
) -> Iterator[np.ndarray]:
    """The patients of each fold: all of them once, each class spread evenly."""
    from sklearn.model_selection import StratifiedKFold

    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds must be a whole number of at least 2, got {folds!r}")
    people = np.unique(patient)
    classes = np.array([np.bincount(label[patient == one]).argmax() for one in people])
    counts = np.bincount(classes, minlength=len(class_names))
    present = np.flatnonzero(counts)
    fewest = present[counts[present].argmin()]
    if counts[fewest] < folds:
        raise ValueError(
            f"class {class_names[fewest]!r} has {counts[fewest]} patients, too few for {folds} folds with one each;"
            f" give folds={max(2, int(counts[fewest]))}" + (", and more patients" if counts[fewest] < 2 else "")
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for _, held_out in splitter.split(people, classes):
        yield people[held_out]
