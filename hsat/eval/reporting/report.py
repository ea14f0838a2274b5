"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsat.eval.records import Record, software_versions
from hsat.eval.reporting.charts import Figure, training_figures
from hsat.eval.reporting.evidence import Evidence
from hsat.eval.reporting.findings import (
    Doubt,
    Outcome,
    flags_of,
    is_noise,
    other_sentence,
    outcome_of,
    sentence,
    signs_of,
)
from hsat.eval.reporting.grouping import Setting, setting_of, unique
from hsat.eval.reporting.page_sections import (
    Block,
    Provenance,
    TransferBlock,
    block_of,
    provenance_of,
    transfer_block_of,
)
from hsat.eval.reporting.page_tables import Table, differences_of, effort_table
from hsat.eval.reporting.run_folders import RunFolder, branches_apart, open_runs
from hsat.files import write_file

_PAGE = Path(__file__).parent / "page"
_TARGETS = {"knn": "Attacks on the vote of the nearest neighbours", "any": "Certificates, which hold for any attack"}


@dataclass(frozen=True)
class Summary:
    """One sentence about one block, and the models' outcomes that it speaks of."""

    heading: str
    k: int
    text: str
    outcomes: tuple[Outcome, ...]


def write_report(
    runs: Iterable[str | Path],
    path: str | os.PathLike[str],
    *,
    title: str = "Robustness report",
    k: int | None = None,
    metric: str = "accuracy",
) -> Path:
    """Write one HTML page about run folders: no scripts, no network, no other files; it appears whole or not at all.

    runs: folders that the example scripts wrote (records.jsonl, run.json, train.csv, evidence/), or a folder of those.
    What a folder does not hold is listed on the page, with what makes it.  k: the number of neighbours that summary and
    figures speak of; None is the first in the records.  metric: "accuracy" or "mca", for summary, curves and doubts.

    Numbers of different cohorts, splits, targets, banks or arithmetic are never put into one table; runs that differ in
    nothing but seed and weights become mean and standard deviation.  A record that is given twice counts once.  A model
    that was measured in several branches of dual BatchNorm stands there once for each.

    Raises ValueError for a path that is no run folder, damaged files, an unknown metric and a k that no record has, and
    ImportError without jinja2.
    """
    if metric not in ("accuracy", "mca"):
        raise ValueError(f"metric must be 'accuracy' or 'mca', got {metric!r}")
    folders = branches_apart(open_runs(runs))
    if not folders:
        raise ValueError("no run folders; give at least one")
    page = _render(_contents(folders, title=title, k=k, metric=metric))
    return write_file(path, page)


def _contents(folders: Sequence[RunFolder], *, title: str, k: int | None, metric: str) -> dict[str, Any]:
    records = unique(record for folder in folders for record in folder.records)
    transfers = [record for folder in folders for record in folder.records if folder.is_transfer]
    transfers = list(unique(transfers))
    direct = list(unique(record for folder in folders for record in folder.records if not folder.is_transfer))
    if k is not None and records and k not in {record.k for record in records}:
        raise ValueError(f"no record has k={k}; the runs hold k = {sorted({record.k for record in records})}")
    styles = {model: index for index, model in enumerate(dict.fromkeys(record.model for record in direct))}
    blocks, summaries, doubts = [], [], flags_of(records)
    groups = _by_setting(direct)
    for number, (setting, group) in enumerate(groups.items()):
        evidence = [each for folder in folders for each in _evidence_of(folder, setting)]
        chosen = _chosen_k(group, k)
        heading = describe_setting(setting, groups)
        blocks.append(
            block_of(
                group,
                evidence,
                heading=heading,
                anchor=f"numbers-{number + 1}",
                k=chosen,
                styles=styles,
                metric=metric,
            )
        )
        mine = [r for r in group if (r.level, r.metric, r.k) == ("patch", metric, chosen)]
        per_model = [[r for r in mine if r.model == model] for model in dict.fromkeys(r.model for r in mine)]
        outcomes = tuple(outcome_of(rows) for rows in per_model)
        summaries.append(Summary(heading, chosen, _said(outcomes, group, k=chosen, metric=metric), outcomes))
        doubts += [sign for rows in per_model for sign in signs_of(rows)]
    return {
        "title": title,
        "summaries": summaries,
        "doubts": doubts,
        "notes": _notes(records),
        "blocks": blocks,
        "transfers": _transfer_blocks(transfers, k),
        "effort": effort_table(records),
        "differences": _differences(folders, metric=metric, k=k),
        "has_noise": any(map(is_noise, records)),
        "training": _training(folders),
        "provenance": [provenance_of(folder) for folder in folders],
        "has_records": bool(records),
        "styles": styles,
        "version": software_versions().get("hsat", "(not installed)"),
    }


def _said(outcomes: Sequence[Outcome], records: Sequence[Record], *, k: int, metric: str) -> str:
    return sentence(outcomes, metric=metric) if outcomes else other_sentence([r for r in records if r.k == k])


def _by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    groups: dict[Setting, list[Record]] = {}
    for record in records:
        groups.setdefault(setting_of(record), []).append(record)
    return groups


def _transfer_blocks(records: Sequence[Record], k: int | None) -> list[TransferBlock]:
    groups = _by_setting(records)
    return [
        transfer_block_of(group, heading=describe_setting(setting, groups), k=_chosen_k(group, k))
        for setting, group in groups.items()
    ]


def _chosen_k(records: Sequence[Record], k: int | None) -> int:
    return k if k is not None and any(record.k == k for record in records) else records[0].k


def _evidence_of(folder: RunFolder, setting: Setting) -> list[Evidence]:
    """A folder's evidence for its own records of this setting; another cohort's has the same model and weights."""
    known = {(r.model, r.target, r.checkpoint) for r in folder.records if setting_of(r) == setting}
    return [each for each in folder.evidence if (each.model, each.target, each.checkpoint) in known]


def describe_setting(setting: Setting, among: Iterable[Setting] = ()) -> str:
    """A setting in words; what all of `among` share and nobody needs to tell them apart is left out."""
    others = list(among)

    def differs(name: str) -> bool:
        return len({getattr(other, name) for other in others}) > 1

    cohort = f"cohort {setting.cohort[:12]}" if setting.cohort else "unnamed cohort"
    target = _TARGETS.get(setting.target, f"Attacks on the {setting.target}")
    parts = [target, cohort + (f" ({setting.split})" if setting.split else "")]
    if differs("arithmetic"):
        parts.append(f"arithmetic: {setting.arithmetic or 'not recorded'}")
    if differs("layer"):
        parts.append(f"kNN on the {setting.layer}")
    if differs("temperature"):
        parts.append(f"temperature {setting.temperature:g}")
    if differs("bank_rows") or differs("bank_cohort") or differs("bank_split"):
        bank = f" of {setting.bank_cohort[:12]}" if setting.bank_cohort != setting.cohort else ""
        split = f" ({setting.bank_split})" if setting.bank_split else ""
        parts.append(f"bank of {setting.bank_rows} patches{bank}{split}")
    if differs("index"):
        parts.append(f"index {setting.index or 'exact'}")
    if differs("convention"):
        parts.append(f"convention: {setting.convention or 'not one of a comparison'}")
    return ", ".join(parts)


def _notes(records: Sequence[Record]) -> list[str]:
    """What a reader must know about the conditions and is no reason for doubt."""
    notes: dict[str, None] = {}
    for record in records:
        if note := record.settings.get("note"):
            notes[f"{record.attack_name}: {note}."] = None
        layer = record.settings.get("layer")
        if record.attack and layer and layer != record.target:
            notes[
                f"Attacks on the {record.target} are measured by a classifier that reads the {layer}:"
                f" an attack on the {layer} may leave less."
            ] = None
    return list(notes)


def _differences(folders: Sequence[RunFolder], *, metric: str, k: int | None) -> list[tuple[str, Table]]:
    """A table for each run that compared its models, by the run's name."""
    found = []
    for folder in folders:
        chosen = k if k is not None else next((each.k for each in folder.differences), 0)
        table = differences_of(folder.differences, metric=metric, k=chosen)
        if table:
            found.append((folder.path.name, table))
    return found


def _training(folders: Sequence[RunFolder]) -> list[tuple[str, tuple[Figure, ...]]]:
    found = [(folder.path.name, training_figures(folder.training, name=folder.path.name)) for folder in folders]
    return [(name, figures) for name, figures in found if figures]


def _render(contents: Mapping[str, Any]) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError('the report needs jinja2: pip install "hsat[report]"') from error
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((_PAGE / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template("report.html").render(**contents, style=style, raw=Markup)
    return page.lstrip()


__all__ = ["Block", "Doubt", "Provenance", "Table", "describe_setting", "write_report"]
