"""What results of evaluations say of themselves at a prompt: few lines, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hsat.eval.records import Record
from hsat.eval.tables import ABSENT, Table
from hsat.quantities import LINE_WIDTH, clip_lines


class HasRecords(Protocol):
    """The result of an evaluation."""

    @property
    def records(self) -> Sequence[Record]: ...  # noqa: D102


def result_repr(result: HasRecords) -> str:
    """A result in at most 10 lines: what was measured, and the number of each condition at the level of patches.

    It serves as `__repr__` of the results, whose tables and images would fill pages.

    Args:
        result: The result.

    Returns:
        The text.
    """
    records = result.records
    if not records:
        return f"{type(result).__name__} without records"
    models = list(dict.fromkeys(record.model or "(unnamed model)" for record in records))
    first = records[0]
    metric = "accuracy" if any(record.metric == "accuracy" for record in records) else first.metric
    level = "patch" if any(record.level == "patch" for record in records) else first.level
    here = [record for record in records if (record.metric, record.level) == (metric, level)]
    head = f"{type(result).__name__} of {_some(models)}: {len(records)} records"
    if first.classifier:
        head += f", {first.classifier}"
    lines = [head, f"{level} {metric} of {here[0].n}:"]
    for model in dict.fromkeys(record.model for record in here):
        mine = [record for record in here if record.model == model and record.classifier == here[0].classifier]
        numbers = [f"{_condition(one)} {_number(one)}" for one in mine]
        name = f"{model}: " if len(models) > 1 else ""
        lines.append(_fitting(f"  {name}", numbers))
    return clip_lines("\n".join(lines))


def _condition(record: Record) -> str:
    name = record.attack_name or "clean"
    return f"{name} from {record.surrogate}" if record.surrogate else name


def _number(record: Record) -> str:
    return f"{record.value:.3g}" if record.metric == "drift" else f"{100 * record.value:.1f} %"


def _some(names: Sequence[str], most: int = 3) -> str:
    listed = ", ".join(name if len(name) <= 30 else f"{name[:27]}..." for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _fitting(start: str, parts: Sequence[str], most: int = 3 * LINE_WIDTH) -> str:
    """As many parts as have room; the number of the others."""
    text = start
    for place, part in enumerate(parts):
        if len(text) + len(part) > most:
            return f"{text} and {len(parts) - place} more"
        text += part if place == 0 else f", {part}"
    return text


def result_html(result: HasRecords) -> str:
    """A result as a table for notebooks: a row per condition, a column per level, of the first classifier.

    It serves as `_repr_html_` of results.

    Args:
        result: The result.

    Returns:
        HTML text.
    """
    from html import escape

    records = [record for record in result.records if record.metric in ("accuracy", "drift")]
    if not records:
        return f"<pre>{escape(repr(result))}</pre>"
    first = records[0]
    mine = [one for one in records if (one.classifier, one.k, one.metric) == (first.classifier, first.k, first.metric)]
    levels = list(dict.fromkeys(one.level for one in mine))
    rows = []
    for model, name in dict.fromkeys((one.model, _condition(one)) for one in mine):
        here = {one.level: one for one in mine if (one.model, _condition(one)) == (model, name)}
        rows.append((model, name, *(_interval(here[level]) if level in here else ABSENT for level in levels)))
    notes = [] if not first.classifier else [f"classifier: {first.classifier}"]
    unit = "%" if first.metric == "accuracy" else "1 - cos"
    caption = f"{type(result).__name__}: {first.metric}, {unit}, with 95 % intervals"
    return Table(("model", "condition", *levels), rows, caption, notes=notes).to_html()


def _interval(record: Record) -> str:
    scale, digits = (100.0, ".1f") if record.metric == "accuracy" else (1.0, ".3g")
    shown = f"{scale * record.value:{digits}}"
    if record.low is None or record.high is None:
        return shown
    return f"{shown} [{scale * record.low:{digits}}, {scale * record.high:{digits}}]"
