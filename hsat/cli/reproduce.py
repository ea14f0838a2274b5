"""The paper's tables with our numbers beside the printed ones: Markdown, LaTeX and CSV from the records of runs.

    hsat reproduce --table 1 --runs runs/demo/embedding
    hsat reproduce --table 1 --runs HiDisc=runs/a HSAT=runs/b HSAT=runs/c --k 20
    hsat reproduce --table 3 --runs HSAT-Patch=runs/p HSAT-Patient=runs/x:HSAT

Which run fills which row: a plain DIR gives every model in its records to the row of that name; ROW=DIR gives the one
model of DIR (or the one that is called ROW) to ROW; ROW=DIR:MODEL gives that one.  A row named several times has
several seeds: mean, standard deviation and n.  Rows without a run show a dash.
hsat/recipes/paper_numbers.yaml lists the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hsat.cli.classifiers import ClassifierName
from hsat.cli.folders import choose_folder
from hsat.cli.options import Names, Settings, collect_words, say
from hsat.cli.yaml_files import read_yaml
from hsat.eval import Record, read_records
from hsat.recipes import read_paper_numbers
from hsat.report import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown
from hsat.report.aggregation import EvaluationSetting, drop_duplicates, label_branch
from hsat.report.summary import chance_line
from hsat.training.config import written


class Reproduce(Settings):
    """Build the paper's tables from records."""

    table: Annotated[Literal["1", "2", "3", "4", "all"], BeforeValidator(str)] = Field("1", description="which one")
    runs: Names = Field([], description="DIR, ROW=DIR or ROW=DIR:MODEL, with spaces or commas between")
    target: Literal["features", "embedding", "decision"] | None = Field(
        None, description="what the attacks moved; embedding, as in the paper, where the records have it"
    )
    k: int | None = Field(None, gt=0, description="neighbours; 200, as in the paper, where the records have it")
    classifier: ClassifierName | None = Field(
        None, description="what decided; knn, as in the paper, where the records have it"
    )
    attack: str = Field("PGD-8", description="of the drops in table 2")
    numbers: Path | None = Field(None, description="YAML file of the printed numbers; the package's if not given")
    out: Path = Field(written("runs/paper-TIME"), description="folder for the tables; TIME stands for the time of now")


def read_tables(path: Path | None = None) -> dict[str, PaperTable]:
    """The paper's tables by number, of a YAML file or the package's; SystemExit names what is wrong in the file."""
    tables = {}
    for number, text in (read_paper_numbers() if path is None else read_yaml(path, numbered=True)).items():
        try:
            tables[str(number)] = as_table(int(number), text)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"error: {path}, table {number}: {type(error).__name__}: {error}") from None
    return tables


def as_table(number: int, text: dict[str, Any]) -> PaperTable:
    """One table of the YAML file."""
    metrics = tuple(text["metrics"])
    rows = []
    for row in text["rows"]:
        printed = {
            (level, column, metric): float(value)
            for level, columns in row["printed"].items()
            for column, values in columns.items()
            for metric, value in zip(metrics, values, strict=True)
            if value is not None
        }
        rows.append(PaperRow(row["name"], row["group"], printed, tuple(row.get("also", ())), row["place"]))
    return PaperTable(
        number=number,
        title=text["title"],
        levels=tuple(text["levels"]),
        columns=tuple(text["columns"]),
        metrics=metrics,
        rows=tuple(rows),
        surrogate=text.get("surrogate", ""),
        notes=tuple(text.get("notes", ())),
    )


def of_attack(table: PaperTable, attack: str) -> PaperTable:
    """Table 2 with its one column named after the attack that fills it."""
    if table.columns != ("drop",):
        return table
    rows = [
        dataclasses.replace(row, printed={(level, attack, metric): v for (level, _, metric), v in row.printed.items()})
        for row in table.rows
    ]
    return dataclasses.replace(table, columns=(attack,), rows=tuple(rows))


def by_row(table: PaperTable, words: Sequence[str]) -> dict[str, list[Record]]:
    """Records by the name of the row that they fill.

    Args:
        table: The paper's table.
        words: DIR, ROW=DIR or ROW=DIR:MODEL each.

    Returns:
        Records by row.

    Raises:
        ValueError: For a word that fills no row, or no single one.
    """
    records_of_row: dict[str, list[Record]] = {}
    for word in words:
        name, records = _records_of(table, word)
        models = dict.fromkeys(record.model for record in records)
        if name is None:
            fitting = {model: row.name for model in models if (row := table.row(model))}
            if not fitting:
                rows = ", ".join(row.name for row in table.rows)
                raise ValueError(
                    f"{word}: its models {', '.join(map(repr, models))} are no rows of table {table.number} ({rows});"
                    " say which row is meant: ROW=DIR or ROW=DIR:MODEL"
                )
            for record in records:
                if record.model in fitting:
                    records_of_row.setdefault(fitting[record.model], []).append(record)
        else:
            records_of_row.setdefault(name, []).extend(records)
    return {name: list(drop_duplicates(records)) for name, records in records_of_row.items()}


def _records_of(table: PaperTable, word: str) -> tuple[str | None, tuple[Record, ...]]:
    """(name of the row or None, records) of DIR, ROW=DIR or ROW=DIR:MODEL."""
    if Path(word).exists() or "=" not in word:
        return None, _read(Path(word))
    name, _, place = word.partition("=")
    row = table.row(name)
    if row is None:
        known = ", ".join(row.name for row in table.rows)
        raise ValueError(f"{word}: table {table.number} has no row {name!r}; its rows are {known}")
    folder, colon, model = (place, "", "") if Path(place).exists() else place.rpartition(":")
    records = _read(Path(folder if colon else place))
    models = list(dict.fromkeys(record.model for record in records))
    if not colon:
        called = [model for model in models if row.is_called(model)]
        model = called[0] if called else models[0]
    if model not in models or (not colon and len(models) > 1 and not called):
        raise ValueError(f"{word}: {folder or place} holds the models {models}; choose one: {name}=DIR:{models[0]}")
    return row.name, tuple(record for record in records if record.model == model)


def _read(folder: Path) -> tuple[Record, ...]:
    path = folder / "records.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} holds no records.jsonl; hsat evaluate and hsat transfer write it")
    records = read_records(path)
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def check_alike(row: str, records: Sequence[Record], table: PaperTable) -> None:
    """Check that records which would become runs of one number are of one kind.

    Args:
        row: Name of the row.
        records: That fill it.
        table: The paper's table.

    Raises:
        ValueError: For records of different attacks, encoders or banks.
    """
    shown = [r for r in records if r.surrogate == table.surrogate and r.attack_name in table.columns]
    for column in table.columns:
        here = [record for record in shown if record.attack_name == column]
        kinds: dict[str, dict[Any, None]] = {
            "attacks": dict.fromkeys(record.attack for record in here),
            "branches": dict.fromkeys(label_branch(record) or "none" for record in here),
            "temperatures": dict.fromkeys(record.temperature for record in here),
            "classifiers": dict.fromkeys("" if record.k else record.classifier for record in here),
            "indexes": dict.fromkeys(EvaluationSetting.of(record).index or "exact" for record in here),
        }
        for what, found in kinds.items():
            if len(found) > 1:
                listed = "; ".join(map(str, found))
                raise ValueError(f"{row}, {column}: runs of different {what} ({listed}); give those of one kind only")


def of_one_setting(
    rows: dict[str, list[Record]], settings: Reproduce, table: PaperTable
) -> tuple[dict[str, list[Record]], list[str]]:
    """The records of one target and k.

    Args:
        rows: Records by row.
        settings: The options.
        table: The paper's table.

    Returns:
        The records that are shown, and remarks on what they are.

    Raises:
        ValueError: Where a choice is needed, naming the option.
    """
    records = [record for found in rows.values() for record in found]
    kind = _chosen("classifier", settings.classifier, "knn", [kind_of_classifier(record) for record in records])
    rows = {name: [record for record in found if kind_of_classifier(record) == kind] for name, found in rows.items()}
    records = [record for found in rows.values() for record in found]
    target = _chosen("target", settings.target, "embedding", [record.target for record in records])
    k = _chosen("k", settings.k, 200, [record.k for record in records])
    kept = {
        name: [record for record in found if (record.target, record.k) == (target, k)] for name, found in rows.items()
    }
    chosen = [record for found in kept.values() for record in found]
    arithmetic = sorted({EvaluationSetting.of(record).arithmetic for record in chosen})
    if len(arithmetic) > 1:
        raise ValueError(f"the runs differ in their arithmetic ({'; '.join(arithmetic)}); give those of one kind only")
    for name, found in kept.items():
        check_alike(name, found, table)
    voters = f"k = {k}" if k else ", ".join(dict.fromkeys(record.classifier for record in chosen))
    remarks = [f"Ours: attacks on the {target}, {voters}; brackets are 95 % intervals from resampled patients."]
    data = {name: sorted({f"{r.cohort[:12]} ({r.split})" for r in found}) for name, found in kept.items() if found}
    places = sorted({place for found in data.values() for place in found})
    if len(places) > 1:
        listed = "; ".join(f"{name}: {', '.join(found)}" for name, found in data.items())
        remarks.append(f"The runs are not of one cohort and split, so that rows may not be comparable: {listed}.")
    else:
        remarks.append(f"Cohort and split of ours: {', '.join(places)}. The paper's is OpenSRH.")
    remarks += [line] if (line := chance_line(chosen)) else []
    remarks += [f"No record of {name} has target {target} and {voters}." for name, found in kept.items() if not found]
    flags = dict.fromkeys(f"{name}, {r.attack_name}: {flag}" for name, f in kept.items() for r in f for flag in r.flags)
    return kept, [*remarks, *(f"Doubt: {flag}." for flag in flags)]


def kind_of_classifier(record: Record) -> str:
    """The name of a record's classifier on the command line; of another classifier the name of its settings."""
    name = record.classifier.partition("(")[0]
    return "knn" if record.k else {"LinearProbe": "linear", "NearestCentroid": "centroid"}.get(name, name)


def _chosen(what: str, asked: Any, paper: Any, there: Sequence[Any]) -> Any:
    known = list(dict.fromkeys(there))
    if asked is not None:
        if asked not in known:
            raise ValueError(f"--{what} {asked}: the runs hold {', '.join(map(str, known))}")
        return asked
    if paper in known or len(known) == 1:
        return paper if paper in known else known[0]
    raise ValueError(f"the runs hold several of {what} ({', '.join(map(str, known))}); choose one with --{what}")


def write_table(table: PaperTable, settings: Reproduce) -> str:
    """Write a table as Markdown, LaTeX and CSV.

    Args:
        table: The paper's table.
        settings: The options.

    Returns:
        The Markdown.

    Raises:
        ValueError: Where no record of the runs fits the table.
    """
    kept, remarks = of_one_setting(by_row(table, settings.runs), settings, table)
    lines = paper_lines(table, kept)
    if not any(line.ours for line in lines):
        kind = f"a drop under {settings.attack}, averaged over surrogates" if table.surrogate else "a condition of it"
        raise ValueError(f"table {table.number}: no record of the runs is {kind}; the rows would all be dashes")
    texts = {"md": paper_markdown(table, lines, remarks), "tex": paper_latex(table, lines, remarks)}
    texts["csv"] = paper_csv(table, lines)
    settings.out.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        path = settings.out / f"table{table.number}.{ending}"
        working = path.with_name(f".{path.name}.partial")
        working.write_text(text, encoding="utf-8")
        working.replace(path)
    return texts["md"]


def main(argv: list[str]) -> None:
    """Read the options, write the tables, print them."""
    settings = Reproduce.load(collect_words(argv, "runs"))
    if not settings.runs:
        raise SystemExit("error: give runs: --runs DIR, or --runs HiDisc=DIR HSAT=DIR")
    tables = read_tables(settings.numbers)
    numbers = list(tables) if settings.table == "all" else [settings.table]
    for number in numbers:
        if number not in tables:
            raise SystemExit(
                f"error: {settings.numbers or 'the paper'} has no table {number}; it has {', '.join(tables)}"
            )
        try:
            settings = settings.model_copy(update={"out": choose_folder(settings.out)})
            print(write_table(of_attack(tables[number], settings.attack), settings))
        except (OSError, ValueError) as error:
            if settings.table != "all":
                raise SystemExit(f"error: {error}") from None
            say(f"table {number} is left out: {error}")
    say(f"tables are in {settings.out}")
