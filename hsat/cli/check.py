r"""All that is wrong with a cohort's files, before hours are spent on them: files.csv, which --data.exclude reads.

    hsat check /data/patches
    hsat train --data.root /data/patches --data.exclude runs/check/files.csv

Reads every file once, in parallel, and lists files that cannot be read, equal files (by content; "contradicting" where
their classes differ), files that look like one of another split, files of an odd size, and blank ones.  files.csv has a
row for each; those that say exclude = yes are left out by --data.exclude of every command, and --exclude chooses which
problems say so.  The status is 1 if there is anything to exclude.  A list that is there already, and may have been
edited, is replaced with --overwrite true only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from hsat.cli.cohort import describe, read_settings_cohort, split_settings_cohort
from hsat.cli.failures import as_typed
from hsat.cli.options import Settings, SourceSettings, collect_words, say, split_commas
from hsat.data import FileCheck
from hsat.data.file_check import PROBLEMS
from hsat.training.config import written

_SHOWN = 3

Problems = Annotated[
    list[Literal["unreadable", "contradicting", "duplicate", "near duplicate", "size", "blank"]],
    BeforeValidator(split_commas),
]
assert get_args(get_args(get_args(Problems)[0])[0]) == PROBLEMS


class Check(Settings):
    """List everything that is wrong with the files of a cohort."""

    data: SourceSettings = SourceSettings()
    exclude: Problems = Field(
        written("unreadable,contradicting,duplicate"), description="problems whose files should be left out"
    )
    workers: int | None = Field(None, gt=0, description="threads that read; one per processor if not given")
    out: Path = Field(written("runs/check"), description="folder for files.csv")
    overwrite: bool = Field(False, description="replace the files.csv of an earlier check in --out")


def main(argv: list[str]) -> None:
    """Read the options, read the files, write the list, say what is in it."""
    settings = Check.load(collect_words(argv, "data.root"))
    if settings.data.root is None:
        raise SystemExit("error: give the folder of the cohort: hsat check /data/patches")
    listed = settings.out / "files.csv"
    if settings.data.exclude is not None and settings.data.exclude.resolve() == listed.resolve():
        raise SystemExit(f"error: {listed} is the list that --data.exclude reads; choose another --out for the new one")
    if listed.exists() and not settings.overwrite:
        raise SystemExit(
            f"error: {listed} is the list of an earlier check, which may have been edited; choose another --out, or"
            " replace it: --overwrite true"
        )
    try:
        cohort = split_settings_cohort(read_settings_cohort(settings.data), settings.data)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {as_typed(str(error))}") from None
    for note in cohort.notes:
        say(f"note: {as_typed(note)}")
    say(describe(cohort))
    from tqdm import tqdm

    with tqdm(total=len(cohort), desc="reading", unit="file", mininterval=0.5, disable=None) as bar:
        check = cohort.check_files(workers=settings.workers, progress=bar.update)
    path = check.write(listed, exclude=settings.exclude)
    print(report(check))
    excluded = check.paths(settings.exclude)
    print(f"list: {path}")
    if len({one.path for one in check.problems if one.problem == "unreadable"}) == len(cohort):
        print(
            "no file can be read: the paths or the options are wrong, or the files; a list of all of them helps nobody"
        )
        raise SystemExit(1)
    if excluded:
        print(f"{len(excluded)} files to leave out: add --data.exclude {path} to hsat train, evaluate and the others")
        raise SystemExit(1)


def report(check: FileCheck) -> str:
    """A line for the whole, and one for each kind of problem, with the first files.

    Args:
        check: What was found.

    Returns:
        At most eight lines.
    """
    lines = [str(check)]
    counts = Counter(one.problem for one in check.problems)
    for name in PROBLEMS:
        first = [f"{one.path} ({as_typed(one.detail)})" for one in check.problems if one.problem == name][:_SHOWN]
        if first:
            lines.append(f"  {name}: {'; '.join(first)}{'; ...' if counts[name] > _SHOWN else ''}")
    if len(check.sizes) > 1:
        lines.append("  sizes: " + ", ".join(f"{n} of {h} x {w}" for (h, w), n in list(check.sizes.items())[:5]))
    return "\n".join(lines)
