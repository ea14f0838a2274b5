"""Records of scores of slides, at the levels slide and patient."""

from __future__ import annotations

import numpy as np

from hsat.eval.confidence import bootstrap_intervals
from hsat.eval.metrics import METRICS, metrics
from hsat.eval.pooling import LevelRows, pool
from hsat.eval.records import AttackFacts, ClassifierFacts, Record, RecordTemplate


def slide_records(
    template: RecordTemplate, facts: AttackFacts, classifier: ClassifierFacts, rows: LevelRows
) -> list[Record]:
    """One record per level and metric.

    A patient's score is the mean of the slides' scores.  Slides of one patient that are of several classes have no
    common decision: then there is no patient level.

    Args:
        template: What all records have in common.
        facts: The condition.
        classifier: The slide classifier.
        rows: Scores (g, classes), labels (g,) and patients (g,) of the slides.
    """
    scoring, levels = template.scoring, {"slide": rows}
    pairs = np.unique(np.stack((rows.patients, rows.labels)), axis=1)
    if pairs.shape[1] == len(np.unique(rows.patients)):
        pooled = pool(rows.scores, rows.patients, rows.labels, pooling=scoring.pooling)
        assert pooled.labels is not None  # labels were given
        levels["patient"] = LevelRows(pooled.scores, pooled.labels, pooled.groups)
    records = []
    for level, (scores, labels, patients) in levels.items():
        measured = metrics(scores, labels, absent_classes=scoring.absent_classes)
        intervals = bootstrap_intervals(
            scores,
            labels,
            patients,
            generator=np.random.default_rng(template.seed),
            resamples=scoring.bootstrap,
            absent_classes=scoring.absent_classes,
        )
        records += [
            template.build(
                facts,
                classifier,
                level=level,
                metric=metric,
                value=getattr(measured, metric),
                n=measured.n,
                interval=intervals[metric],
                chance=measured.chance[metric],
            )
            for metric in METRICS
        ]
    return records
