"""Transfer as a matrix of surrogates and targets: a Markdown table and a heat map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsat.eval.records import Record
from hsat.eval.reporting.figures import _figure, _save
from hsat.eval.tables import table_row
from hsat.eval.transfer_drops import OTHERS
from hsat.types import LEVELS

_TITLES = {"accuracy": "Acc", "mca": "MCA", "accuracy_drop": "Acc-D", "mca_drop": "MCA-D"}
_AVERAGE = "mean of the others"


def transfer_table(
    records: Sequence[Record],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy_drop", "mca_drop"),
    intervals: bool = False,
) -> str:
    """One Markdown table per level, attack and k: rows are surrogates, columns are targets.

    A cell holds the drops of the target, clean minus attacked, in points of %, in the order given, joined by " / ", and
    with intervals=True each with its 95 % interval.  The first row has the clean numbers; the last has the mean drop
    over the surrogates other than the target itself.  White-box cells, where the surrogate is the target, are in
    italics.  Below stand the flags of the records.  Raises ValueError if no record fits.
    """
    wanted = [r for r in records if r.level in levels and r.metric in metrics and r.surrogate]
    if not wanted:
        raise ValueError(
            f"none of the {len(records)} records is a transfer at a level of {list(levels)} with a metric of"
            f" {list(metrics)}; evaluate_transfer makes them"
        )
    parts = []
    for level in levels:
        here = [record for record in wanted if record.level == level]
        for name, k in dict.fromkeys((record.attack_name, record.k) for record in here):
            clean = [r for r in records if (r.level, r.k, r.surrogate) == (level, k, "")]
            mine = [record for record in here if (record.attack_name, record.k) == (name, k)]
            parts.append(_table(f"{level.capitalize()} level, {name}, k = {k}", mine, clean, metrics, intervals))
    return "\n\n".join([*parts, *_remarks(wanted)]) + "\n"


def _table(
    title: str, records: Sequence[Record], clean: Sequence[Record], metrics: Sequence[str], intervals: bool
) -> str:
    targets = list(dict.fromkeys(record.model for record in records))
    surrogates = list(dict.fromkeys(record.surrogate for record in records))
    surrogates.sort(key=lambda name: name == OTHERS)
    named = " / ".join(_TITLES.get(name, name) for name in metrics)
    moved = ", ".join(dict.fromkeys(record.target for record in records))
    sizes = ", ".join(map(str, dict.fromkeys(record.n for record in records)))
    lines = [f"**{title}** ({named}, %; attacks on the {moved}; n = {sizes})", ""]
    lines += [table_row(["surrogate ↓ target →", *targets]), "|" + " --- |" * (len(targets) + 1)]
    undropped = [metric.removesuffix("_drop") for metric in metrics]
    if plain := [record for record in clean if record.metric in undropped]:
        cells = [_cell([r for r in plain if r.model == name], undropped, intervals) for name in targets]
        lines.append(table_row([f"clean {' / '.join(_TITLES.get(name, name) for name in undropped)}", *cells]))
    for surrogate in surrogates:
        mine = [record for record in records if record.surrogate == surrogate]
        cells = [_cell([r for r in mine if r.model == name], metrics, intervals) for name in targets]
        cells = [f"*{cell}*" if name == surrogate else cell for name, cell in zip(targets, cells, strict=True)]
        lines.append(table_row([_AVERAGE if surrogate == OTHERS else surrogate, *cells]))
    return "\n".join(lines)


def _cell(records: Sequence[Record], metrics: Sequence[str], intervals: bool) -> str:
    parts = []
    for name in metrics:
        found = next((record for record in records if record.metric == name), None)
        if found is None:
            parts.append("–")
        elif intervals and found.low is not None and found.high is not None:
            parts.append(f"{_points(found.value)} [{_points(found.low)}, {_points(found.high)}]")
        else:
            parts.append(_points(found.value))
    return " / ".join(parts) if any(part != "–" for part in parts) else "–"


def _points(share: float) -> str:
    return f"{100 * share:.1f}".replace("-0.0", "0.0") if abs(share) < 0.001 else f"{100 * share:.1f}"


def _remarks(records: Sequence[Record]) -> list[str]:
    lines = dict.fromkeys(
        f"- {record.surrogate} → {record.model}, {record.attack_name}: {flag}"
        for record in records
        if record.surrogate != OTHERS
        for flag in record.flags
    )
    notes = dict.fromkeys(f"- {r.attack_name}: {r.settings['note']}" for r in records if r.settings.get("note"))
    return ["\n".join((*notes, *lines))] if notes or lines else []


def plot_transfer(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    *,
    attack: str | None = None,
    metric: str = "accuracy_drop",
    levels: Sequence[str] = LEVELS,
    k: int | None = None,
) -> Path:
    """A heat map per level: the drop of each target (columns) under each surrogate's images (rows), in points of %.

    attack: the name of one attack; None takes that of the largest eps, the first where several share it.  k: None takes
    the largest.  The numbers stand in the cells; dark is a small drop.  A frame marks the white-box cells, and the row
    below the line is the mean over the surrogates other than the target.  The colours can be told apart with every
    common form of colour blindness, and in grey.  Raises ValueError if no record fits, ImportError without matplotlib.
    """
    found = [r for r in records if r.metric == metric and r.surrogate and r.level in levels]
    largest = max((record.k for record in found), default=0) if k is None else k
    strongest = max(found, key=lambda record: record.eps_value, default=None)
    name = attack if attack is not None or strongest is None else strongest.attack_name
    found = [record for record in found if record.k == largest and record.attack_name == name]
    if not found:
        raise ValueError(
            f"none of the {len(records)} records is a transfer with {metric!r}, k={largest}, attack {name!r}"
        )
    drawn = [level for level in levels if any(record.level == level for record in found)]
    targets = list(dict.fromkeys(record.model for record in found))
    surrogates = sorted(dict.fromkeys(record.surrogate for record in found), key=lambda each: each == OTHERS)
    values = {(r.level, r.surrogate, r.model): 100 * r.value for r in found}
    span = (min(0.0, *values.values()), max(1.0, *values.values()))
    width, height = 1.6 + 0.85 * len(targets), 1.5 + 0.6 * len(surrogates)
    figure, panels = _figure(len(drawn), size=(width * len(drawn) + 1.2, height))
    for panel, level in zip(panels, drawn, strict=True):
        grid = [[values.get((level, surrogate, target), np.nan) for target in targets] for surrogate in surrogates]
        image = _draw(panel, np.array(grid), surrogates, targets, span)
        panel.set_title(f"{level} level", fontsize="medium")
    panels[0].set_ylabel("attacked on (framed: itself)")
    figure.colorbar(image, ax=panels, label=f"{_TITLES.get(metric, metric)} under {name} (points of %)")
    return _save(figure, path)


def _draw(
    panel: Any, grid: np.ndarray, surrogates: Sequence[str], targets: Sequence[str], span: tuple[float, float]
) -> Any:
    from matplotlib.patches import Rectangle

    image = panel.imshow(grid, cmap="cividis", vmin=span[0], vmax=span[1], aspect="auto")
    middle = (span[0] + span[1]) / 2
    for (i, j), value in np.ndenumerate(grid):
        text = "–" if np.isnan(value) else _points(value / 100)
        panel.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black")
        if surrogates[i] == targets[j]:
            panel.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor="#D55E00", linewidth=2))
    tilt = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, targets)) > 8 else {}
    panel.set_xticks(range(len(targets)), targets, **tilt)
    panel.set_yticks(range(len(surrogates)), [_AVERAGE if name == OTHERS else name for name in surrogates])
    if OTHERS in surrogates:
        panel.axhline(len(surrogates) - 1.5, color="white", linewidth=4)
    panel.set_xlabel("measured on")
    panel.label_outer()  # the rows are named once, at the left
    return image
