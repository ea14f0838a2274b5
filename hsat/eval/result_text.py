"""What results of evaluations say of themselves at a prompt: few lines, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hsat.eval.records import Record
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
    return f"{100 * record.value:.1f} %"


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
