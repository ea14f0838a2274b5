"""Tables of a paper with printed numbers and our own side by side, as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hsat.eval import Record, Table
from hsat.eval.tables import ABSENT, escape_latex, latex_tabular
from hsat.report.aggregation import TITLES, Estimate, aggregate_runs, format_estimate
from hsat.report.tables import join_estimates

Place = tuple[str, str, str]  # level, column, metric


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper.

    Attributes:
        name: What it is called there.
        group: In which group of rows it stands.
        printed: Percent by (level, column, metric); what is not known is absent.
        also: Other names for it.
        place: Where in the paper it stands.
    """

    name: str
    group: str
    printed: Mapping[Place, float]
    also: tuple[str, ...] = ()
    place: str = ""

    def is_called(self, name: str) -> bool:
        """Whether a name means this row; case does not matter, and spaces, _ and - are one.

        Args:
            name: What a user calls the row.

        Returns:
            True if it is this row's name, or one of its other names.
        """
        return _plain(name) in {_plain(own) for own in (self.name, *self.also)}


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number, title: As printed.
        levels: Its parts.
        columns: Conditions, as records name them.
        metrics: Those of a cell, in order.
        rows: Its rows.
        surrogate: Of the records that fill it: "" for attacks on the model itself, "others" for the mean over
            surrogates.
        notes: What stands below.
    """

    number: int
    title: str
    levels: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    surrogate: str = ""
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> PaperRow | None:
        """The row of that name, if there is one.

        Args:
            name: As `PaperRow.is_called` takes it.

        Returns:
            The row, or None.
        """
        return next((row for row in self.rows if row.is_called(name)), None)


@dataclass(frozen=True)
class PaperLine:
    """One row at one level: the printed numbers and ours, by (column, metric)."""

    level: str
    row: PaperRow
    printed: Mapping[tuple[str, str], float]
    ours: Mapping[tuple[str, str], Estimate]


def paper_lines(table: PaperTable, runs: Mapping[str, Sequence[Record]]) -> tuple[PaperLine, ...]:
    """Every row at every level of a table.

    Args:
        table: The table.
        runs: Records by the name of the row that they stand for, of one target, k and arithmetic; several records for
            one number are runs of it and give mean and standard deviation.

    Returns:
        The lines, level by level.

    Raises:
        ValueError: For a row that the table lacks.
    """
    for name in runs:
        if table.row(name) is None:
            known = ", ".join(row.name for row in table.rows)
            raise ValueError(f"table {table.number} has no row {name!r}; its rows are {known}")
    lines = []
    for level in table.levels:
        for row in table.rows:
            records = [record for name, runs_of_row in runs.items() if row.is_called(name) for record in runs_of_row]
            ours = {}
            for column, metric in _places(table):
                fitting = [
                    record
                    for record in records
                    if (record.level, record.attack_name, record.metric, record.surrogate)
                    == (level, column, metric, table.surrogate)
                ]
                if (estimate := aggregate_runs(fitting)) is not None:
                    ours[column, metric] = estimate
            printed = {(c, m): row.printed[level, c, m] for c, m in _places(table) if (level, c, m) in row.printed}
            lines.append(PaperLine(level, row, printed, ours))
    return tuple(lines)


def paper_markdown(table: PaperTable, lines: Sequence[PaperLine], remarks: Sequence[str] = ()) -> str:
    """The table for people: two rows each, the paper's and ours, one table per level and group.

    Args:
        table: The table.
        lines: What `paper_lines` gave.
        remarks: Further notes.

    Returns:
        Markdown text.
    """
    parts = [
        f"# Table {table.number}: {table.title}",
        f"{_metrics(table)}, %. {ABSENT} is a number that is not known, or was not measured.",
        *(section.to_markdown().rstrip("\n") for section in _sections(table, lines, ("method", "source"))),
    ]
    notes = (*table.notes, *remarks)
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def paper_latex(table: PaperTable, lines: Sequence[PaperLine], remarks: Sequence[str] = ()) -> str:
    """The table as one `tabular` with the rules of booktabs; notes stand below.

    Args:
        table: The table.
        lines: What `paper_lines` gave.
        remarks: Further notes.

    Returns:
        LaTeX text.
    """
    sections = [
        replace(section, details=f"{section.details} ({_metrics(table)}, %)")
        for section in _sections(table, lines, ("Method", "Source"))
    ]
    text = f"% Table {table.number}: {' '.join(table.title.split())}; needs \\usepackage{{booktabs}}\n"
    text += latex_tabular(sections, align="ll" + "c" * len(table.columns))
    return text + "".join(f"\n\\noindent\\footnotesize {escape_latex(note)}\n" for note in (*table.notes, *remarks))


def paper_csv(table: PaperTable, lines: Sequence[PaperLine]) -> str:
    """The table as CSV, one line per number: shares in percent, empty where there is none.

    Args:
        table: The table.
        lines: What `paper_lines` gave.

    Returns:
        CSV text.
    """
    rows = []
    for line in lines:
        for column, metric in _places(table):
            printed, estimate = line.printed.get((column, metric)), line.ours.get((column, metric))
            ours = [""] * 6
            if estimate is not None:
                numbers = [estimate.value, estimate.low, estimate.high, estimate.sd]
                ours = ["" if value is None else f"{100 * value:.4f}" for value in numbers]
                ours += [str(estimate.runs), " ".join(map(str, estimate.n))]
            place = line.row.place if printed is not None else ""
            shown = "" if printed is None else f"{printed:.2f}"
            head = [str(table.number), line.row.group, line.row.name, line.level, column, metric]
            rows.append([*head, shown, *ours, place])
    return Table(
        "table,group,method,level,condition,metric,printed,ours,low,high,sd,runs,n,place".split(","), rows
    ).to_csv()


def _sections(table: PaperTable, lines: Sequence[PaperLine], names: tuple[str, str]) -> list[Table]:
    """A table per level and group of rows; names: heads of the first two columns."""
    head = [*names, *(_column_title(column) for column in table.columns)]
    sections = []
    for level, group in dict.fromkeys((line.level, line.row.group) for line in lines):
        rows = []
        for line in lines:
            if (line.level, line.row.group) == (level, group):
                rows.append([line.row.name, "paper", *_printed(table, line)])
                rows.append([line.row.name, "ours", *_ours(table, line)])
        sections.append(Table(head, rows, f"{level.capitalize()} level", f", {group}" if group else ""))
    return sections


def _metrics(table: PaperTable) -> str:
    return " / ".join(TITLES.get(name, name) for name in table.metrics)


def _places(table: PaperTable) -> Iterator[tuple[str, str]]:
    return ((column, metric) for column in table.columns for metric in table.metrics)


def _printed(table: PaperTable, line: PaperLine) -> list[str]:
    return [_joined([line.printed.get((column, name)) for name in table.metrics]) for column in table.columns]


def _joined(values: Sequence[float | None]) -> str:
    texts = [ABSENT if value is None else f"{value:.2f}" for value in values]
    return ABSENT if all(text == ABSENT for text in texts) else " / ".join(texts)


def _ours(table: PaperTable, line: PaperLine) -> list[str]:
    estimates = ([line.ours.get((column, name)) for name in table.metrics] for column in table.columns)
    return [join_estimates(cell, lambda estimate: format_estimate(estimate, digits=2)) for cell in estimates]


def _column_title(column: str) -> str:
    return column[:1].upper() + column[1:] if column == "clean" else column


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace("_", "-")
