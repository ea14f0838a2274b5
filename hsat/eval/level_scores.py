"""Clean metrics at patch, slide and patient level from embeddings alone: a bank, queries, and no encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor

from hsat.classifiers import KNNClassifier
from hsat.eval.evaluation import Evaluation, ScoredClassifier, ScoresKey, fit_bank, score_queries
from hsat.eval.metrics import METRICS
from hsat.eval.options import Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.records import Record
from hsat.eval.result_files import SavedResult, save_conditions
from hsat.eval.runner import CLEAN, Condition
from hsat.eval.tables import ABSENT, Table
from hsat.eval.whitebox import condition_records
from hsat.types import Classifier, EmbeddingTable, FittedClassifier, SlideClassifier

if TYPE_CHECKING:
    from pandas import DataFrame

Bank = EmbeddingTable | FittedClassifier | Sequence[EmbeddingTable] | Sequence[FittedClassifier]

OWN_PATIENTS = (
    "every query is a patient of its own: the three levels coincide, and the intervals are too narrow unless these are"
    " different people"
)


@dataclass(frozen=True, eq=False, repr=False)
class LevelScores(SavedResult):
    """The result of `score_levels`: what `evaluate_whitebox` says of clean queries.

    Attributes:
        records: One per classifier, level and metric.
        tables: The queries, under the name "clean".
        scores: Class scores (n, classes) by classifier, its k for a kNN, else its settings as text, under "clean".
        class_names: The classes of the classifiers.
    """

    records: tuple[Record, ...]
    tables: dict[str, EmbeddingTable]
    scores: dict[str, dict[ScoresKey, np.ndarray]]
    class_names: tuple[str, ...]

    @property
    def examples(self) -> Mapping[str, Tensor]:
        """No images: there are embeddings alone."""
        return {}

    @property
    def example_rows(self) -> Sequence[int]:
        """Rows of no images."""
        return ()

    @property
    def outcomes(self) -> Mapping[str, EnsembleOutcome]:
        """Of no attacks."""
        return {}

    def table(self, *, metrics: Sequence[str] = ("accuracy", "mca")) -> Table:
        """A row per classifier, level and metric: value, 95 % interval and chance in percent, and the rows it is of.

        Args:
            metrics: Which, of "accuracy", "mca", "map", "top2" and "top3".

        Returns:
            The table, with the flags of the records below it; it is Markdown as text, and has `to_latex`, `to_csv`,
            `to_html` and `to_frame`.

        Raises:
            ValueError: For an unknown metric.
        """
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"unknown metrics {unknown}; choose from {list(METRICS)}")
        chosen = [record for record in self.records if record.metric in metrics]
        several = len({record.classifier for record in chosen}) > 1
        rows = [
            (
                *((record.classifier,) if several else ()),
                record.level,
                record.metric,
                *map(_percent, (record.value, record.low, record.high, record.chance)),
                str(record.n),
            )
            for record in chosen
        ]
        head = (*(("classifier",) if several else ()), "level", "metric", "value", "low", "high", "chance", "n")
        notes = dict.fromkeys(flag for record in chosen for flag in record.flags)
        notes |= dict.fromkeys(
            f"no interval: {reason}" for record in chosen if (reason := record.settings.get("no_interval"))
        )
        first = self.records[0]
        details = f" ({'' if several else f'{first.classifier}, '}%, intervals from resampled patients)"
        return Table(head, rows, first.model or "Clean queries", details, notes=tuple(notes))

    def to_frame(self, *, metrics: Sequence[str] = ("accuracy", "mca")) -> DataFrame:
        """`table` as a DataFrame of pandas, which the extra `frames` brings.

        Args:
            metrics: See `table`.

        Returns:
            The DataFrame; numbers in percent.
        """
        return self.table(metrics=metrics).to_frame()

    def to_latex(self, *, metrics: Sequence[str] = ("accuracy", "mca")) -> str:
        """`table` as a `tabular` with the rules of booktabs.

        Args:
            metrics: See `table`.

        Returns:
            LaTeX text.
        """
        return self.table(metrics=metrics).to_latex()

    def _write(self, folder: Path) -> None:
        """Records, scores and evidence."""
        save_conditions(folder, [self])

    def __str__(self) -> str:
        return str(self.table())


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def score_levels(
    bank: Bank,
    queries: EmbeddingTable,
    *,
    classifier: Classifier | Sequence[Classifier] | None = None,
    scoring: Scoring = Scoring(),
    seed: int = 0,
    provenance: Provenance = Provenance(),
) -> LevelScores:
    """How often a classifier of embeddings is right about patches, slides and patients, with intervals and chance.

    The numbers that `evaluate_whitebox` gives for clean queries, from tables alone: no encoder and no images are
    needed.  Classes are matched by name.  Records carry flags where a result is doubtful: a bank that shares patients
    with the queries, a class that it lacks, an accuracy below chance, and queries each of which is a patient of its
    own, which is what a table without patients has.

    Args:
        bank: What decides: a table, several of one cohort, or a classifier that is fitted already, or several.
        queries: What is decided on, embedded by the same encoder.
        classifier: Fitted on the bank, one or several; None is KNNClassifier(), and what a fitted classifier has.
        scoring: How embeddings become numbers; its layer is only stated.
        seed: Of the resampled patients.
        provenance: What records say of the encoder; by default its name is that of the queries' table.

    Returns:
        Records, scores, and the table of them.

    Raises:
        ValueError: For tables of different encoders, a class that the bank does not know, a classifier beside a fitted
            one, and what the classifier raises.
        TypeError: For anything but tables and classifiers of embeddings.

    Example:
        >>> z, label = np.eye(4)[[0, 0, 1, 1, 2, 3]], ["a", "a", "b", "b", "a", "b"]
        >>> bank = EmbeddingTable.from_arrays(z[:4], label[:4], patients=["1", "1", "2", "2"])
        >>> queries = EmbeddingTable.from_arrays(z[:4], label[:4], patients=["3", "3", "4", "4"])
        >>> result = score_levels(bank, queries, classifier=KNNClassifier(k=1))
        >>> {record.level: record.value for record in result.records if record.metric == "accuracy"}
        {'patch': 1.0, 'slide': 1.0, 'patient': 1.0}
    """
    if not isinstance(queries, EmbeddingTable):
        raise TypeError(f"the queries must be an EmbeddingTable, as embed or from_arrays gives, got {type(queries)}")
    provenance = replace(provenance, model=provenance.model or queries.encoder)
    evaluation = Evaluation(lambda images: images, Target(), scoring, RunOptions(seed=seed), provenance)
    several = tuple(bank) if isinstance(bank, Sequence) else (bank,)
    table: EmbeddingTable | None = None
    if several and all(isinstance(one, EmbeddingTable) for one in several):
        tables = cast(Sequence[EmbeddingTable], several)
        table = tables[0] if len(tables) == 1 else EmbeddingTable.concat(tables)
        _check_encoders(table, queries)
        classifiers = fit_bank(KNNClassifier() if classifier is None else classifier, table)
    else:
        classifiers = _as_scored(several, classifier)
        held = getattr(classifiers[0].fitted, "table", None)
        table = held if isinstance(held, EmbeddingTable) else None
    names = classifiers[0].fitted.class_names
    template = evaluation.template(table, queries, names, loader=None)
    flags = (OWN_PATIENTS,) if 1 < len(np.unique(queries.patient)) == len(queries) else ()
    template = replace(
        template, flags=(*template.flags, *flags), settings={**template.settings, "layer": scoring.layer}
    )
    scores = score_queries(classifiers, queries)
    records = condition_records(
        CLEAN, Condition.of(queries), None, queries, scores, classifiers=classifiers, template=template
    )
    shown = replace(queries, encoder=provenance.model)
    return LevelScores(tuple(records), {CLEAN: shown}, {CLEAN: scores}, names)


def _check_encoders(bank: EmbeddingTable, queries: EmbeddingTable) -> None:
    if bank.encoder and queries.encoder and bank.encoder != queries.encoder:
        raise ValueError(
            f"the bank was embedded by {bank.encoder!r} and the queries by {queries.encoder!r}; embeddings of different"
            " encoders cannot be compared"
        )


def _as_scored(fitted: Sequence[object], classifier: object) -> tuple[ScoredClassifier, ...]:
    """Fitted classifiers as `fit_bank` gives them."""
    for one in fitted:
        if isinstance(one, SlideClassifier) and not isinstance(one, FittedClassifier):
            raise TypeError(
                f"{one!r} decides about slides, not patches; hsat.eval.cross_validate_slides or"
                " hsat.classifiers.predict_slides scores it"
            )
        if not isinstance(one, FittedClassifier):
            raise TypeError(
                f"the bank must be an EmbeddingTable or a fitted classifier, got {one!r:.80}; write"
                " score_levels(bank, queries, classifier=KNNClassifier(k=20))"
            )
    if not fitted:
        raise ValueError("the bank is empty: no table and no fitted classifier is given")
    if classifier is not None:
        raise ValueError("the bank is a classifier that is fitted already; leave out classifier=, or give the table")
    known = cast(Sequence[FittedClassifier], fitted)
    if any(one.class_names != known[0].class_names for one in known):
        raise ValueError(f"the fitted classifiers have different classes: {[one.class_names for one in known]}")
    settings = [cast(Classifier, getattr(one, "settings", one)) for one in known]
    return tuple(
        ScoredClassifier(stated, one, attacked=number == 0)
        for number, (stated, one) in enumerate(zip(settings, known, strict=True))
    )
