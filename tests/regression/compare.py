"""Compare, bit for bit, what the commands of two checkouts write at seed 0 on the synthetic cohort.

    tests/regression/compare.sh OLD NEW
    tests/regression/compare.sh OLD NEW --python-old A/bin/python --python-new B/bin/python --only whitebox train-hsat

OLD and NEW are folders of two checkouts; each command runs in both, with the checkout's own .venv/bin/python where no
other is given.  Exit status 0: all results are equal; 1: there are differences, which are listed as
"command: file: record: field: old -> new"; 2: the comparison could not be made.  README.md says more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from checkouts import Checkout, CommandFailedError, Workshop
from commands import COMMANDS, Command, selected
from differences import Difference, compare_results, count_values
from editions import TABLE, Ignored, ignored_of, read_table
from results import read_results

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """What came of one command: seconds on both sides, differences, failures of the command itself, OLD's values."""

    seconds: tuple[float, float]
    differences: list[Difference]
    failures: list[str]
    values: int = 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="compare.sh", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?", help="folder of the checkout that is right")
    parser.add_argument("new", type=Path, nargs="?", help="folder of the checkout that is tried")
    parser.add_argument("--python-old", type=Path, help="its Python; OLD/.venv/bin/python if not given")
    parser.add_argument("--python-new", type=Path, help="its Python; NEW/.venv/bin/python if not given")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="commands, or how their names begin")
    parser.add_argument("--list", action="store_true", help="show the names of the commands and end")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "regression", help="folder for the results")
    parser.add_argument("--fresh", action="store_true", help="run everything again, also what has not changed")
    parser.add_argument("--jobs", type=int, default=2, help="commands at the same time, of one thread each")
    parser.add_argument("--lines", type=int, default=8, help="differences shown per file; the others are counted")
    parser.add_argument("--renames", type=Path, default=TABLE, help="the table of renamed things")
    options = parser.parse_args(argv)
    if not options.list and options.new is None:
        parser.error("give two folders: compare.sh OLD NEW")
    return options


def compare(
    old: Checkout, new: Checkout, commands: Sequence[Command], *, workshop: Workshop, ignored: Ignored, jobs: int
) -> dict[str, Outcome]:
    """Run the commands on both sides, and compare; what is done is said as it comes."""
    by_name = {command.name: command for command in COMMANDS}
    futures: dict[tuple[str, str], Future[Path]] = {}

    def submit(pool: ThreadPoolExecutor, command: Command, checkout: Checkout) -> None:
        """Queue a command behind those whose results it reads, which are OLD's for both sides."""
        if (checkout.side, command.name) in futures:
            return
        for name in command.inputs:
            submit(pool, by_name[name], old)
        needed = {name: futures["old", name] for name in command.inputs}
        futures[checkout.side, command.name] = pool.submit(_run, workshop, command, checkout, needed)

    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for command in commands:
            for checkout in (old, new):
                submit(pool, command, checkout)
        for command in commands:
            sides = {checkout: futures[checkout.side, command.name] for checkout in (old, new)}
            outcomes[command.name] = outcome = _outcome(command, sides, workshop, ignored)
            verdict = f"{len(outcome.differences) or 'no'} differences in {outcome.values} values"
            verdict = "failed" if outcome.failures else verdict
            print(
                f"{command.name}: {verdict} (old {outcome.seconds[0]:.1f} s, new {outcome.seconds[1]:.1f} s)",
                flush=True,
            )
    return outcomes


def _run(workshop: Workshop, command: Command, checkout: Checkout, needed: Mapping[str, Future[Path]]) -> Path:
    inputs: dict[str, Path] = {}
    for name, future in needed.items():
        try:
            inputs[name] = future.result()
        except CommandFailedError:
            raise CommandFailedError(f"not run, because {name} failed on the old side") from None
    return workshop.run(command, checkout, inputs)


def _outcome(command: Command, sides: Mapping[Checkout, Future[Path]], workshop: Workshop, ignored: Ignored) -> Outcome:
    seconds, results, failures = [], [], []
    for checkout, future in sides.items():
        try:
            folder = future.result()
            results.append(read_results(folder, checkout.edition, ignored))
            seconds.append(workshop.seconds(folder))
        except (CommandFailedError, ValueError) as error:
            failures.append(f"{command.name} ({checkout.side}): {error}")
            seconds.append(0.0)
    if failures:
        return Outcome((seconds[0], seconds[1]), [], failures)
    if not any(results):
        return Outcome((seconds[0], seconds[1]), [], [f"{command.name}: neither side wrote a file that is compared"])
    edition = [*sides][1].edition
    differences = compare_results(command.name, results[0], results[1], ignored=ignored, edition=edition)
    return Outcome((seconds[0], seconds[1]), differences, [], values=count_values(results[0], ignored))


def listed(outcomes: Mapping[str, Outcome], *, lines: int, files: int) -> str:
    """Failures and differences for people, those of records and columns first; what is left out is counted."""
    parts: list[str] = []
    for name, outcome in outcomes.items():
        parts += outcome.failures
        by_file: dict[str, list[Difference]] = {}
        for difference in outcome.differences:
            by_file.setdefault(difference.file, []).append(difference)
        ordered = sorted(by_file, key=lambda file: (not file.endswith((".jsonl", ".csv")), file.count("/")))
        for file in ordered[:files]:
            parts += [str(difference) for difference in by_file[file][:lines]]
            if left := len(by_file[file]) - lines:
                parts += [f"{name}: {file}: and {left} more"] if left > 0 else []
        if left := sum(len(by_file[file]) for file in ordered[files:]):
            parts.append(f"{name}: and {left} more in {len(ordered) - files} other files, from {ordered[files]} on")
    return "\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Compare two checkouts; the exit status."""
    options = arguments(argv)
    if options.list:
        for command in COMMANDS:
            names = ", ".join(name for name, _ in command.encoders)
            print(f"{command.name}: {command.program}" + (f" of {names}" if names else ""))
        return 0
    began = time.monotonic()
    try:
        table, commands = read_table(options.renames), selected(options.only)
        old = Checkout.open("old", options.old, options.python_old, table)
        new = Checkout.open("new", options.new, options.python_new, table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(old.describe(), new.describe(), sep="\n", flush=True)
    workshop = Workshop(options.work.resolve(), fresh=options.fresh)
    outcomes = compare(old, new, commands, workshop=workshop, ignored=ignored_of(table), jobs=options.jobs)
    whole = workshop.folder / "differences.txt"
    whole.write_text(listed(outcomes, lines=sys.maxsize, files=sys.maxsize) + "\n")
    if text := listed(outcomes, lines=options.lines, files=6):
        print(f"\n{text}\n\nall of them: {whole}")
    failed = sum(bool(outcome.failures) for outcome in outcomes.values())
    differing = sum(bool(outcome.differences) for outcome in outcomes.values())
    old_time, new_time = (sum(outcome.seconds[side] for outcome in outcomes.values()) for side in (0, 1))
    print(
        f"{len(outcomes) - failed - differing} commands equal, {differing} differ, {failed} failed"
        f" ({time.monotonic() - began:.0f} s; the commands took {old_time:.0f} s old, {new_time:.0f} s new)"
    )
    return 1 if failed or differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
