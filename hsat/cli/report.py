"""One HTML page about one or several runs: summary, tables, curves, confusion, embedding map, patches, doubts, origin.

    hsat report runs/demo
    hsat report runs/whitebox runs/hsat runs/transfer --out report.html
    hsat report runs/whitebox --latex table.tex --csv numbers.csv

RUN is the folder that hsat evaluate, transfer, certify, budget or train wrote, or a folder of those.  The page needs no
network and no other file.  --latex writes the tables of the records for a paper (booktabs), --csv every number on a
line of its own.  docs/report.md says what the page shows, docs/files.md what a run folder holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hsat.cli.options import Names, Settings, collect_words
from hsat.files import write_file
from hsat.report import open_runs, records_csv, records_latex, write_report
from hsat.report.run_folders import split_by_branch


class Report(Settings):
    """Write one HTML page about one or several runs."""

    runs: Names = Field([], description="run folders; the words before the first option are run folders, too")
    out: Path | None = Field(None, description="the page; report.html in the first run folder if not given")
    latex: Path | None = Field(
        None, description="also write the tables of the records as LaTeX (booktabs) to this file"
    )
    csv: Path | None = Field(None, description="also write the numbers of the records as CSV to this file")
    intervals: bool = Field(True, description="whether the LaTeX tables show the intervals")
    title: str = Field("Robustness report", description="its heading")
    k: int | None = Field(None, gt=0, description="neighbours of the summary and the figures; the first in the records")
    metric: Literal["accuracy", "mca"] = Field("accuracy", description="of the summary and the curves")


def main(argv: list[str]) -> None:
    """Read the options, write the page, say where it is."""
    settings = Report.load(collect_words(argv, "runs"))
    if not settings.runs:
        raise SystemExit("error: give run folders: hsat report runs/whitebox runs/hsat")
    out = settings.out or Path(settings.runs[0]) / "report.html"
    try:
        path = write_report(settings.runs, out, title=settings.title, k=settings.k, metric=settings.metric)
        files = write_tables(settings)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"report: {path}")
    for file in files:
        print(f"tables: {file}")


def write_tables(settings: Report) -> list[Path]:
    """Write the tables that were asked for beside the page; returns their paths."""
    records = [record for folder in split_by_branch(open_runs(settings.runs)) for record in folder.records]
    files = []
    if settings.latex is not None:
        files.append(write_file(settings.latex, records_latex(records, intervals=settings.intervals)))
    if settings.csv is not None:
        files.append(write_file(settings.csv, records_csv(records)))
    return files
