"""The parts of the report's page, as plain values that the template lays out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsat.eval.records import Record
from hsat.eval.reporting.charts import Figure, accuracy_figure, accuracy_legend, class_legend, map_figures
from hsat.eval.reporting.evidence import CLEAN, Evidence
from hsat.eval.reporting.findings import is_noise, norm_of, outcome_of, transfer_sentence
from hsat.eval.reporting.page_tables import Table, confusion_table, flat, level_table, transfer_table
from hsat.eval.reporting.run_folders import RunFolder
from hsat.types import LEVELS

_PNG = b"\x89PNG\r\n\x1a\n"
_MAIN_METRICS = ("accuracy", "mca", "certified_accuracy")


@dataclass(frozen=True)
class Curves:
    """The panels of one norm, with one legend."""

    norm: str
    figures: tuple[Figure, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Map:
    """The maps of one model; text says how much they show."""

    model: str
    text: str
    figures: tuple[Figure, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Patch:
    """One patch in three pictures (data URIs), with what it is and what it was taken for."""

    clean: str
    perturbation: str
    adversarial: str
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Gallery:
    """The first patches of one model under one attack; scale: what perturbations are multiplied with."""

    model: str
    attack: str
    scale: float
    patches: tuple[Patch, ...]


@dataclass(frozen=True)
class Block:
    """Everything about the records of one setting."""

    heading: str
    anchor: str
    k: int
    tables: tuple[Table, ...]
    more_tables: tuple[Table, ...]
    curves: tuple[Curves, ...]
    confusions: tuple[tuple[Table, Table], ...]
    maps: tuple[Map, ...]
    galleries: tuple[Gallery, ...]


@dataclass(frozen=True)
class TransferBlock:
    """Attacks made on one encoder and shown to another."""

    heading: str
    k: int
    text: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Provenance:
    """Where one run's numbers come from: facts, all its settings, its attacks, and what its folder lacks."""

    name: str
    facts: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    attacks: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]


def block_of(
    records: Sequence[Record],
    evidence: Sequence[Evidence],
    *,
    heading: str,
    anchor: str,
    k: int,
    styles: Mapping[str, int],
    metric: str,
) -> Block:
    """The block of one setting's records and of the evidence that belongs to them."""
    main = [record for record in records if record.k == k]
    levels = [level for level in LEVELS if any(record.level == level for record in main)]
    others = [name for name in dict.fromkeys(r.metric for r in main) if name not in _MAIN_METRICS]
    more = [level_table(main, level=level, metrics=others) for level in levels]
    for other in dict.fromkeys(record.k for record in records if record.k != k):
        rows = [record for record in records if record.k == other]
        tables = [level_table(rows, level=level, metrics=_MAIN_METRICS) for level in levels]
        more += [_named(table, f"k = {other}: ") for table in tables if table]
    tables = [level_table(main, level=level, metrics=_MAIN_METRICS) for level in levels]
    evidence = sorted(evidence, key=lambda each: styles[each.model])
    attacked = {each.model: _strongest(main, each, metric) for each in evidence}
    confusions, galleries, maps = [], [], []
    for each in evidence:
        attack = attacked[each.model]
        before, after = confusion_table(each, CLEAN, k), confusion_table(each, attack, k) if attack else None
        if before and after:
            confusions.append((before, after))
        if attack and (figures := map_figures(each, attack)):
            maps.append(Map(each.model, _map_text(each, attack), figures, class_legend(each.class_names)))
        if attack and (patches := _patches(each, attack, k)):
            galleries.append(Gallery(each.model, attack, each.conditions[attack].scale, patches))
    return Block(
        heading=heading,
        anchor=anchor,
        k=k,
        tables=tuple(table for table in tables if table),
        more_tables=tuple(table for table in more if table),
        curves=_curves(main, levels, styles, metric),
        confusions=tuple(confusions),
        maps=tuple(maps),
        galleries=tuple(galleries),
    )


def _named(table: Table, prefix: str) -> Table:
    return Table(prefix + table.caption, table.corner, table.head, table.rows, table.groups, table.notes)


def _strongest(records: Sequence[Record], evidence: Evidence, metric: str) -> str:
    """The attack that left this model least at the largest eps, if there is evidence of it; else the last attack."""
    mine = [r for r in records if (r.model, r.level, r.metric) == (evidence.model, "patch", metric)]
    worst = outcome_of(mine).worst if mine else None
    if worst is not None and worst.name in evidence.conditions:
        return worst.name
    attacks = [r.attack_name for r in mine if r.attack and not is_noise(r) and r.attack_name in evidence.conditions]
    return attacks[-1] if attacks else ""


def _curves(
    records: Sequence[Record], levels: Sequence[str], styles: Mapping[str, int], metric: str
) -> tuple[Curves, ...]:
    attacks = [record for record in records if record.attack and not is_noise(record)]
    found = []
    for norm in dict.fromkeys(norm_of(record) for record in attacks):
        drawn = [accuracy_figure(records, styles, level=level, norm=norm, metric=metric) for level in levels]
        models = {record.model: styles[record.model] for record in attacks if norm_of(record) == norm}
        noise = any(is_noise(record) and norm_of(record) == norm for record in records)
        legend = accuracy_legend(dict(sorted(models.items(), key=lambda item: item[1])), noise=noise)
        if any(drawn):
            found.append(Curves(norm, tuple(figure for figure in drawn if figure), legend))
    return tuple(found)


def _map_text(evidence: Evidence, attack: str) -> str:
    shown = 100 * sum(evidence.variance)
    moved = evidence.conditions[attack].movement
    text = f"These two axes show {shown:.0f} % of the variance of the clean queries"
    if moved is not None:
        text += f", and {100 * moved:.0f} % of the squared movement under {attack}"
    return text + "."


def _patches(evidence: Evidence, attack: str, k: int) -> tuple[Patch, ...]:
    clean, attacked = evidence.conditions.get(CLEAN), evidence.conditions[attack]
    if clean is None or "patch" not in clean.label or "patch" not in attacked.label:
        return ()
    found = []
    rows = min(len(clean.label["patch"]), len(attacked.label["patch"]))
    triples = zip(clean.patches[:rows], attacked.perturbations, attacked.patches, strict=False)
    for index, (before, added, after) in enumerate(triples):
        names = evidence.class_names
        taken = [
            names[condition.prediction["patch", k][index]] if ("patch", k) in condition.prediction else "not recorded"
            for condition in (clean, attacked)
        ]
        found.append(
            Patch(
                clean=_data_uri(before),
                perturbation=_data_uri(added),
                adversarial=_data_uri(after),
                truth=names[clean.label["patch"][index]],
                before=taken[0],
                after=taken[1],
            )
        )
    return tuple(found)


def _data_uri(path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"{path} is no PNG file; evaluate again")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def transfer_block_of(records: Sequence[Record], *, heading: str, k: int) -> TransferBlock:
    """The matrices of one setting's transfers: every level and attack that was measured."""
    main = [record for record in records if record.k == k]
    attacks = dict.fromkeys(record.attack_name for record in main if record.attack)
    tables = [transfer_table(main, level=level, attack=attack) for level in LEVELS for attack in attacks]
    return TransferBlock(heading, k, transfer_sentence(main), tuple(table for table in tables if table))


def provenance_of(folder: RunFolder) -> Provenance:
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
    return Provenance(
        name=str(folder.path),
        facts=tuple(facts),
        settings=tuple(flat(settings).items()) if isinstance(settings, dict) else (),
        attacks=tuple(attacks),
        absent=folder.absent,
    )
