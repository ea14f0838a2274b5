"""One HTML page about one or several runs: summary, tables, curves, confusion, embedding map, patches, doubts, origin.

    hsat report runs/demo
    hsat report runs/whitebox runs/hsat runs/transfer --out report.html

RUN is the folder that hsat evaluate, hsat transfer or hsat train wrote, or a folder of those.  The
page needs no network and no other file.  docs/report.md says what it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from hsat.cli.options import Names, Settings, collect_words
from hsat.report import write_report


class Report(Settings):
    """Write one HTML page about one or several runs."""

    runs: Names = Field([], description="run folders; the words before the first option are run folders, too")
    out: Path | None = Field(None, description="the page; report.html in the first run folder if not given")
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
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"report: {path}")
