"""The same attack, other arithmetic: records of an evaluation under another convention, without attacking again."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hsat.eval.conventions import Absent, Compat, How, Keys, resolve_arithmetic
from hsat.eval.measuring import measure_levels, measured_record
from hsat.eval.records import Record
from hsat.eval.scoring import METRICS

if TYPE_CHECKING:
    from hsat.eval.whitebox import WhiteboxResult


def rescore(
    result: WhiteboxResult,
    *,
    how: How | None = None,
    absent: Absent | None = None,
    keys: Keys | None = None,
    compat: Compat | None = None,
) -> WhiteboxResult:
    """The result with records of another arithmetic; embeddings, scores and examples are the same.

    how, absent, keys, compat: see `score_levels`.  compat="paper" chooses the published arithmetic only: the target
    that was attacked stays.  Values, intervals (same seed, same resamples) and n are computed anew, and the settings of
    each record name the arithmetic.  Records of other metrics than those of `metrics` are left out.
    """
    arithmetic = resolve_arithmetic(compat, how=how, absent=absent, keys=keys)
    found = []
    places: dict[tuple[str, int], dict[str, Record]] = {}
    for record in result.records:
        if record.metric in METRICS:
            places.setdefault((record.attack_name, record.k), {})[record.level] = record
    for (name, k), heads in places.items():
        first = next(iter(heads.values()))
        levels = measure_levels(
            result.scores[name][k],
            result.tables[name],
            class_names=result.class_names,
            arithmetic=arithmetic,
            bootstrap=int(first.settings["bootstrap"]),
            seed=first.seed,
        )
        for level, (measured, intervals) in levels.items():
            settings = heads[level].settings | dataclasses.asdict(arithmetic) | {"compat": compat or ""}
            head = dataclasses.replace(heads[level], n=measured.n, settings=settings)
            found += [measured_record(head, metric, getattr(measured, metric), intervals[metric]) for metric in METRICS]
    return dataclasses.replace(result, records=tuple(found))
