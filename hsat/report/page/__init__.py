"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsat.embedding import LAYERS
from hsat.eval import Record, Table
from hsat.eval.doubts import Flag, cross_attack_flags, is_noise, record_flags
from hsat.eval.options import software_versions
from hsat.files import write_file
from hsat.report.aggregation import EvaluationSetting, describe_setting, drop_duplicates, group_by_setting
from hsat.report.artifacts import Artifacts
from hsat.report.page.figures import PageFigure, training_figures
from hsat.report.page.sections import TransferSection, numbers_section, run_provenance, transfer_section
from hsat.report.page.tables import effort_table, page_differences_table
from hsat.report.run_folders import RunFolder, open_runs, split_by_branch
from hsat.report.summary import RobustnessSummary, certificate_sentence, summarize_model, summary_sentence

_PAGE = Path(__file__).parent


@dataclass(frozen=True)
class SettingSummary:
    """One sentence about the numbers of one setting, and the models that it speaks of."""

    heading: str
    k: int
    text: str
    models: tuple[RobustnessSummary, ...]


def write_report(
    runs: Iterable[str | Path],
    path: str | os.PathLike[str],
    *,
    title: str = "Robustness report",
    k: int | None = None,
    metric: str = "accuracy",
) -> Path:
    """Write one HTML page about run folders: no scripts, no network, no other files; it appears whole or not at all.

    Numbers of different cohorts, splits, targets, banks or arithmetic are never put into one table; runs that differ in
    nothing but seed and weights become mean and standard deviation.  A record that is given twice counts once.  A model
    that was measured in several branches of dual BatchNorm stands there once for each.

    Args:
        runs: Folders that the commands wrote (records.jsonl, run.json, train.csv, evidence/), or a folder of
            those.  What a folder does not hold is listed on the page, with what makes it.
        path: The page.
        title: Its title.
        k: The number of neighbours that summary and figures speak of; None is the first in the records.
        metric: "accuracy" or "mca", for summary, curves and doubts.

    Returns:
        The page.

    Raises:
        ValueError: For a path that is no run folder, damaged files, an unknown metric and a k that no record has.
    """
    if metric not in ("accuracy", "mca"):
        raise ValueError(f"metric must be 'accuracy' or 'mca', got {metric!r}")
    folders = split_by_branch(open_runs(runs))
    if not folders:
        raise ValueError("no run folders; give at least one")
    page = _render(_contents(folders, title=title, k=k, metric=metric))
    return write_file(path, page)


def _contents(folders: Sequence[RunFolder], *, title: str, k: int | None, metric: str) -> dict[str, Any]:
    """What the template lays out, by name."""
    records = drop_duplicates(record for folder in folders for record in folder.records)
    transfers = drop_duplicates(record for folder in folders if folder.is_transfer for record in folder.records)
    direct = drop_duplicates(record for folder in folders if not folder.is_transfer for record in folder.records)
    if k is not None and records and k not in {record.k for record in records}:
        raise ValueError(f"no record has k={k}; the runs hold k = {sorted({record.k for record in records})}")
    styles = {model: index for index, model in enumerate(dict.fromkeys(record.model for record in direct))}
    sections, summaries, flags = [], [], record_flags(records)
    groups = group_by_setting(direct)
    for number, (setting, group) in enumerate(groups.items()):
        chosen = _chosen_k(group, k)
        heading = describe_setting(setting, groups)
        sections.append(
            numbers_section(
                group,
                [one for folder in folders for one in _artifacts_of(folder, setting)],
                heading=heading,
                anchor=f"numbers-{number + 1}",
                k=chosen,
                styles=styles,
                metric=metric,
            )
        )
        mine = [r for r in group if (r.level, r.metric, r.k) == ("patch", metric, chosen)]
        per_model = [[r for r in mine if r.model == model] for model in dict.fromkeys(r.model for r in mine)]
        models = tuple(map(summarize_model, per_model))
        text = summary_sentence(models, metric=metric)
        if not models:
            text = certificate_sentence([record for record in group if record.k == chosen])
        summaries.append(SettingSummary(heading, chosen, text, models))
        flags += [flag for rows in per_model for flag in cross_attack_flags(rows)]
    return {
        "title": title,
        "summaries": summaries,
        "flags": flags,
        "flag_table": _flag_table(flags),
        "notes": _notes(records),
        "sections": sections,
        "transfers": _transfer_sections(transfers, k),
        "effort": effort_table(records),
        "differences": _differences(folders, metric=metric, k=k),
        "has_noise": any(map(is_noise, records)),
        "training": _training(folders),
        "provenance": [run_provenance(folder) for folder in folders],
        "has_records": bool(records),
        "styles": styles,
        "version": software_versions().get("hsat", "(not installed)"),
    }


def _flag_table(flags: Sequence[Flag]) -> Table:
    rows = [(flag.model or "(unnamed model)", ", ".join(flag.conditions), flag.reason) for flag in flags]
    return Table(("model", "conditions", "reason"), rows, "Reasons for doubt")


def _transfer_sections(records: Iterable[Record], k: int | None) -> list[TransferSection]:
    groups = group_by_setting(records)
    return [
        transfer_section(group, heading=describe_setting(setting, groups), k=_chosen_k(group, k))
        for setting, group in groups.items()
    ]


def _chosen_k(records: Sequence[Record], k: int | None) -> int:
    return k if k is not None and any(record.k == k for record in records) else records[0].k


def _artifacts_of(folder: RunFolder, setting: EvaluationSetting) -> list[Artifacts]:
    """A folder's artifacts of its own records of this setting; another cohort's have the same model and weights."""
    first = next((r.classifier for r in folder.records if not r.k), "")
    if setting.classifier and setting.classifier != first:  # files of artifacts hold one classifier without neighbours
        return []
    measured = {(r.model, r.target, r.checkpoint) for r in folder.records if EvaluationSetting.of(r) == setting}
    return [one for one in folder.artifacts if (one.model, one.target, one.checkpoint) in measured]


def _notes(records: Sequence[Record]) -> list[str]:
    """What a reader must know about the conditions and is no reason for doubt."""
    stated: dict[str, dict[str, None]] = {}  # the conditions of each note
    for record in records:
        if note := record.settings.get("note"):
            stated.setdefault(note, {})[record.attack_name] = None
    notes: dict[str, None] = {f"{', '.join(names)}: {note}.": None for note, names in stated.items()}
    for record in records:
        layer = record.settings.get("layer")
        if record.attack and record.target in LAYERS and not is_noise(record) and "members" not in record.settings:
            notes[
                f"Attacks on the {record.target} do not aim at the decision: what they leave is an upper bound, and"
                " attacks on the decision usually leave far less."
            ] = None
        if record.attack and record.target in LAYERS and layer and layer != record.target:
            notes[
                f"Attacks on the {record.target} are measured by a classifier that reads the {layer}:"
                f" an attack on the {layer} may leave less."
            ] = None
    return list(notes)


def _differences(folders: Sequence[RunFolder], *, metric: str, k: int | None) -> list[tuple[str, Table]]:
    """A table for each run that compared its models, by the run's name."""
    tables = []
    for folder in folders:
        chosen = k if k is not None else next((one.k for one in folder.differences), 0)
        if table := page_differences_table(folder.differences, metric=metric, k=chosen):
            tables.append((folder.path.name, table))
    return tables


def _training(folders: Sequence[RunFolder]) -> list[tuple[str, tuple[PageFigure, ...]]]:
    runs = [(folder.path.name, training_figures(folder.training, name=folder.path.name)) for folder in folders]
    return [(name, figures) for name, figures in runs if figures]


def _render(contents: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((_PAGE / "report.css").read_text(encoding="utf-8"))
    page = environment.get_template("report.html").render(**contents, style=style, raw=Markup)
    return page.lstrip()
