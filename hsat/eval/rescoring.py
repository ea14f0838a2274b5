"""The same attack, other arithmetic: records of an evaluation under another scoring, without attacking again."""

from __future__ import annotations

import dataclasses

from hsat.eval.evaluation import arithmetic_settings
from hsat.eval.options import Scoring
from hsat.eval.records import Record, measure_levels
from hsat.eval.scoring import METRICS
from hsat.eval.whitebox import WhiteboxResult


def rescore(result: WhiteboxResult, scoring: Scoring) -> WhiteboxResult:
    """The result with records of another arithmetic; embeddings, scores and examples are the same.

    Values, intervals (same seed, same resamples) and n are computed anew, and the settings of each record name the
    arithmetic.  Records of other metrics than those of `metrics` are left out.

    Args:
        result: What `evaluate_whitebox` gave.
        scoring: The arithmetic; its layer and bootstrap do not apply.
    """
    arithmetic = arithmetic_settings(scoring)
    records: list[Record] = []
    heads: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in result.records:
        if record.metric in METRICS:
            heads.setdefault((record.attack_name, record.classifier, record.k), {})[record.level] = record
    for (name, classifier, k), by_level in heads.items():
        first = next(iter(by_level.values()))
        scores = result.scores[name]
        levels = measure_levels(
            scores[k] if k in scores else scores[classifier],
            result.tables[name],
            class_names=result.class_names,
            scoring=dataclasses.replace(scoring, bootstrap=int(first.settings["bootstrap"])),
            seed=first.seed,
        )
        for level, (measured, intervals) in levels.items():
            head = by_level[level]
            rest = {key: value for key, value in head.settings.items() if key not in ("interval", "no_interval")}
            for metric in METRICS:
                interval = intervals[metric]
                word = "no_interval" if interval.low is None else "interval"
                settings = rest | arithmetic | ({word: interval.reason} if interval.reason else {})
                records.append(
                    dataclasses.replace(
                        head,
                        metric=metric,
                        value=getattr(measured, metric),
                        low=interval.low,
                        high=interval.high,
                        n=measured.n,
                        settings=settings,
                    )
                )
    return dataclasses.replace(result, records=tuple(records))
