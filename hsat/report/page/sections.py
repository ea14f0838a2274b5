"""The parts of the report's page, as plain values that the template lays out."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsat.eval import Record, Table
from hsat.eval.doubts import is_attack, is_noise, is_shift, norm_of
from hsat.report.aggregation import CLEAN, mean_chance
from hsat.report.artifacts import Artifacts, picture_number
from hsat.report.natural_shift import shift_table
from hsat.report.page.figures import (
    PageFigure,
    accuracy_figure,
    accuracy_legend,
    class_legend,
    map_figures,
    shift_figures,
)
from hsat.report.page.tables import confusion_table
from hsat.report.run_folders import RunFolder
from hsat.report.summary import summarize_model, transfer_sentence
from hsat.report.tables import drop_table, level_table, prefix_caption
from hsat.types import LEVELS
from hsat.untrusted import open_regular

_MOST_PICTURE = 32 << 20  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_MAIN_METRICS = ("accuracy", "mca", "certified_accuracy")


@dataclass(frozen=True)
class CurvePanels:
    """The panels of one norm, with one legend where names have no room; chance: whether its level is drawn."""

    norm: str
    figures: tuple[PageFigure, ...]
    legend: tuple[tuple[str, str], ...]
    chance: bool


@dataclass(frozen=True)
class EmbeddingMap:
    """The maps of one model; text says how much they show."""

    model: str
    text: str
    figures: tuple[PageFigure, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PatchPictures:
    """One patch in three pictures (data URIs), with what it is and what it was taken for."""

    clean: str
    perturbation: str
    adversarial: str
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Gallery:
    """A patch of each class under one attack on one model; scale: what perturbations are multiplied with."""

    model: str
    attack: str
    scale: float
    patches: tuple[PatchPictures, ...]


@dataclass(frozen=True)
class NumbersSection:
    """Everything about the records of one setting."""

    heading: str
    anchor: str
    k: int
    tables: tuple[Table, ...]
    more_tables: tuple[Table, ...]
    shift_tables: tuple[Table, ...]
    shift_figures: tuple[PageFigure, ...]
    curves: tuple[CurvePanels, ...]
    confusions: tuple[tuple[Table, Table], ...]
    maps: tuple[EmbeddingMap, ...]
    galleries: tuple[Gallery, ...]


@dataclass(frozen=True)
class TransferSection:
    """Attacks made on one encoder and shown to another."""

    heading: str
    k: int
    text: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class RunProvenance:
    """Where one run's numbers come from: facts, all its settings, its attacks, and what its folder lacks."""

    name: str
    facts: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    attacks: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]


def numbers_section(
    records: Sequence[Record],
    artifacts: Sequence[Artifacts],
    *,
    heading: str,
    anchor: str,
    k: int,
    styles: Mapping[str, int],
    metric: str,
) -> NumbersSection:
    """The block of one setting's records and of the artifacts that belong to them."""
    shifts = [record for record in records if record.k == k and (is_shift(record) or not record.attack)]
    records = [record for record in records if not is_shift(record)]
    main = [record for record in records if record.k == k]
    levels = [level for level in LEVELS if any(record.level == level for record in main)]
    others = [name for name in dict.fromkeys(r.metric for r in main) if name not in _MAIN_METRICS]
    more = [level_table(main, level=level, metrics=others) for level in levels]
    for other in dict.fromkeys(record.k for record in records if record.k != k):
        rows = [record for record in records if record.k == other]
        tables = [level_table(rows, level=level, metrics=_MAIN_METRICS) for level in levels]
        more += [prefix_caption(table, f"k = {other}: ") for table in tables if table]
    tables = [level_table(main, level=level, metrics=_MAIN_METRICS) for level in levels]
    artifacts = sorted(artifacts, key=lambda one: styles[one.model])
    confusions, galleries, maps = [], [], []
    for one in artifacts:
        attack = _strongest(main, one, metric)
        before, after = confusion_table(one, CLEAN, k), confusion_table(one, attack, k) if attack else None
        if before and after:
            confusions.append((before, after))
        if attack and (figures := map_figures(one, attack)):
            maps.append(EmbeddingMap(one.model, _map_text(one, attack), figures, class_legend(one.class_names)))
        if attack and (patches := _patches(one, attack, k)):
            galleries.append(Gallery(one.model, attack, one.conditions[attack].scale, patches))
    return NumbersSection(
        heading=heading,
        anchor=anchor,
        k=k,
        tables=tuple(table for table in tables if table),
        more_tables=tuple(table for table in more if table),
        shift_tables=tuple(
            t
            for level in levels
            if (t := shift_table(shifts, level=level, metric=metric, with_amounts=level == levels[-1]))
        ),
        shift_figures=shift_figures(shifts, metric=metric),
        curves=_curves(main, levels, styles, metric),
        confusions=tuple(confusions),
        maps=tuple(maps),
        galleries=tuple(galleries),
    )


def _strongest(records: Sequence[Record], artifacts: Artifacts, metric: str) -> str:
    """The attack that left this model least at the largest eps, if there are artifacts of it; else the last attack."""
    mine = [r for r in records if (r.model, r.level, r.metric) == (artifacts.model, "patch", metric)]
    worst = summarize_model(mine).worst if mine else None
    if worst is not None and worst.name in artifacts.conditions:
        return worst.name
    attacks = [r.attack_name for r in mine if is_attack(r) and r.attack_name in artifacts.conditions]
    return attacks[-1] if attacks else ""


def _curves(
    records: Sequence[Record], levels: Sequence[str], styles: Mapping[str, int], metric: str
) -> tuple[CurvePanels, ...]:
    attacks = [record for record in records if is_attack(record)]
    panels = []
    for norm in dict.fromkeys(norm_of(record) for record in attacks):
        drawn = [accuracy_figure(records, styles, level=level, norm=norm, metric=metric) for level in levels]
        models = {record.model: styles[record.model] for record in attacks if norm_of(record) == norm}
        noise = any(is_noise(record) and norm_of(record) == norm for record in records)
        ordered = dict(sorted(models.items(), key=lambda item: item[1]))
        chance = mean_chance(record for record in records if record.metric == metric) is not None
        figures = tuple(figure for figure in drawn if figure)
        named = all(figure.named for figure in figures)
        legend = () if named else accuracy_legend(ordered, noise=noise, chance=chance)
        if figures:
            panels.append(CurvePanels(norm, figures, legend, chance))
    return tuple(panels)


def _map_text(artifacts: Artifacts, attack: str) -> str:
    shown = 100 * sum(artifacts.variance)
    moved = artifacts.conditions[attack].movement
    text = f"These two axes show {shown:.0f} % of the variance of the clean queries"
    if moved is not None:
        text += f", and {100 * moved:.0f} % of the squared movement under {attack}"
    return text + "."


def _patches(artifacts: Artifacts, attack: str, k: int) -> tuple[PatchPictures, ...]:
    """One patch of each class, the first that there is a picture of, in the order of the classes."""
    clean, attacked = artifacts.conditions.get(CLEAN), artifacts.conditions[attack]
    if clean is None or "patch" not in clean.label or "patch" not in attacked.label:
        return ()
    names, labels = artifacts.class_names, clean.label["patch"]
    pictures: dict[int, PatchPictures] = {}
    before, added, after = (
        {picture_number(path): path for path in paths}
        for paths in (clean.patches, attacked.perturbations, attacked.patches)
    )
    for number in sorted(before.keys() & added.keys() & after.keys()):
        row = clean.patch_rows[number] if number < len(clean.patch_rows) else len(labels)
        if not row < min(len(labels), len(attacked.label["patch"])) or int(labels[row]) in pictures:
            continue
        taken = [
            names[condition.prediction["patch", k][row]] if ("patch", k) in condition.prediction else "not recorded"
            for condition in (clean, attacked)
        ]
        pictures[int(labels[row])] = PatchPictures(
            clean=_data_uri(before[number]),
            perturbation=_data_uri(added[number]),
            adversarial=_data_uri(after[number]),
            truth=names[labels[row]],
            before=taken[0],
            after=taken[1],
        )
    return tuple(pictures[label] for label in sorted(pictures))


def _data_uri(path: Path) -> str:
    with open_regular(path, kind="PNG file") as file:
        content = file.read(_MOST_PICTURE + 1)
    if len(content) > _MOST_PICTURE:
        raise ValueError(f"{path} has more than {_MOST_PICTURE} bytes, which is no picture of a patch; evaluate again")
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG file; evaluate again")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def transfer_section(records: Sequence[Record], *, heading: str, k: int) -> TransferSection:
    """The matrices of one setting's transfers: every level and attack that was measured."""
    main = [record for record in records if record.k == k]
    attacks = dict.fromkeys(record.attack_name for record in main if record.attack)
    tables = [drop_table(main, level=level, attack=attack) for level in LEVELS for attack in attacks]
    return TransferSection(heading, k, transfer_sentence(main), tuple(table for table in tables if table))


def run_provenance(folder: RunFolder) -> RunProvenance:
    """How a run was made, from its run.json and its records."""
    about, records = folder.about, folder.records
    command = about.get("command")
    facts = [("folder", str(folder.path))]
    if command:
        facts.append(("command", " ".join(map(str, command)) if isinstance(command, list) else str(command)))
    cohorts = [str(about["cohort"])] if about.get("cohort") else []
    cohorts += [record.cohort for record in records if record.cohort]
    facts += [("cohort", text) for text in dict.fromkeys(cohorts)]
    facts += [("split", text) for text in dict.fromkeys(r.split for r in records if r.split)]
    weights = dict.fromkeys((record.model, record.checkpoint) for record in records)
    facts += [(f"weights of {model}", digest or "no file (not trained, or not recorded)") for model, digest in weights]
    facts += [("image size", size)] if (size := _image_size(about)) else []
    facts += [(f"pixel normalisation of {model}", text) for model, text in pixel_normalisations(records).items()]
    seeds = list(dict.fromkeys(str(record.seed) for record in records))
    seed = about.get("settings", {}).get("seed") if isinstance(about.get("settings"), dict) else None
    if seeds or seed is not None:
        facts.append(("seed", ", ".join(seeds) or str(seed)))
    versions = dict(about["versions"]) if isinstance(about.get("versions"), dict) else {}
    for record in records:
        versions |= {name: text for name, text in record.versions.items() if name not in versions}
    if versions:
        facts.append(("versions", ", ".join(f"{name} {text}" for name, text in sorted(versions.items()))))
    settings = about.get("settings")
    attacks = dict.fromkeys((record.attack_name, record.attack) for record in records if record.attack)
    return RunProvenance(
        name=str(folder.path),
        facts=tuple(facts),
        settings=tuple(flatten_settings(settings).items()) if isinstance(settings, dict) else (),
        attacks=tuple(attacks),
        absent=folder.absent,
    )


def _image_size(about: Mapping[str, Any]) -> str:
    """The side of the patches that the network saw, from run.json; "" where it does not say."""
    settings = about.get("settings")
    data = settings.get("data") if isinstance(settings, Mapping) else None
    side = data.get("image_size") if isinstance(data, Mapping) else None
    return f"{side} × {side} pixels" if isinstance(side, int) else ""


def pixel_normalisations(records: Sequence[Record]) -> dict[str, str]:
    """What is subtracted from pixels and divided by, for each model whose records state it."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if stated := record.settings.get("pixel_normalisation"):
            found.setdefault(record.model, {})[_normalisation_text(stated)] = None
    return {model: "; ".join(texts) for model, texts in found.items()}


def _normalisation_text(stated: object) -> str:
    """One normalisation of records: mean, standard deviation, and who says so."""
    if not isinstance(stated, Mapping):
        return str(stated)
    if stated.get("note"):
        return str(stated["note"])
    ends = (stated.get("mean"), stated.get("std"))
    numbers = [", ".join(f"{value:g}" for value in end) for end in ends if isinstance(end, list | tuple)]
    text = "each image's own" if stated.get("per_image") else "none"
    text = f"mean {numbers[0]}; standard deviation {numbers[1]}" if len(numbers) == 2 else text
    return f"{text} (stated by {stated['stated_by']})" if stated.get("stated_by") else text


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text."""
    names: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            names |= flatten_settings(value, f"{prefix}{key}.")
        else:
            names[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return names
