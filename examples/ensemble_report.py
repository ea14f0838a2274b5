"""Which member of an ensemble broke which patch: the outcome of --attacks ensemble as a file and as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from hsat.eval import EnsembleOutcome
from hsat.files import write_file


def write_ensembles(out: Path, outcomes: Mapping[str, Mapping[str, EnsembleOutcome]]) -> str:
    """Write ensemble.csv, a line per encoder, ensemble and patch; returns the tables in Markdown, "" without any."""
    text, file = "", io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["model", "attack", "patch", "broken_by", "margin"])
    for title, ensembles in outcomes.items():
        for name, outcome in ensembles.items():
            text += f"\n**{name}** on {title}: how many patches each attack broke\n\n{outcome.to_markdown()}"
            rows = zip(outcome.patch, outcome.broken_by, outcome.margin, strict=True)
            lines.writerows([title, name, int(patch), by, f"{margin:.6f}"] for patch, by, margin in rows)
    if text:
        write_file(out / "ensemble.csv", file.getvalue())
    return text
