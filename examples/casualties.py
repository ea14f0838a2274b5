"""Who felled which patch: the outcome of --attacks strongest as a file and as tables."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from pathlib import Path

from hsat.eval import Casualties, casualties_table


def write_casualties(out: Path, results: dict[str, dict[str, Casualties]]) -> str:
    """Write strongest.csv, a line per encoder, ensemble and patch; returns the tables in Markdown, "" without any."""
    text, file = "", io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["model", "attack", "patch", "felled_by", "margin"])
    for title, ensembles in results.items():
        for name, found in ensembles.items():
            text += f"\n**{name}** on {title}: who felled how many patches\n\n{casualties_table(found)}"
            rows = zip(found.patch, found.felled_by, found.margin, strict=True)
            lines.writerows([title, name, int(patch), by, f"{margin:.6f}"] for patch, by, margin in rows)
    if text:
        working = out / ".strongest.csv.partial"
        working.write_text(file.getvalue())
        os.replace(working, out / "strongest.csv")
    return text


def folder_name(title: str) -> str:
    """A name for a folder, another one for every title."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:40]
    return f"{readable}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
