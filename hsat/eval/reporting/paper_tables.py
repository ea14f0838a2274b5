"""Tables of a paper with printed numbers and our own side by side, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hsat.eval.records import Record
from hsat.eval.reporting.grouping import Cell, cell_of

TITLES = {"accuracy": "Acc", "mca": "MCA", "accuracy_drop": "Acc-D", "mca_drop": "MCA-D"}
DASH = "–"
Place = tuple[str, str, str]  # level, column, metric


@dataclass(frozen=True)
class PaperRow:
    """One row: what it is called in the paper, and in which group of rows; `also`: other names for it.

    printed: percent by (level, column, metric); what is not known is absent.  place: where in the paper it stands.
    """

    name: str
    group: str
    printed: Mapping[Place, float]
    also: tuple[str, ...] = ()
    place: str = ""

    def is_called(self, name: str) -> bool:
        """Whether a name means this row; case does not matter, and spaces, _ and - are one."""
        return _plain(name) in {_plain(each) for each in (self.name, *self.also)}


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper: columns are conditions as records name them, metrics those of a cell, in order.

    surrogate: of the records that fill it, "" for attacks on the model itself, "others" for the mean over surrogates.
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
        """The row of that name, if there is one."""
        return next((row for row in self.rows if row.is_called(name)), None)


@dataclass(frozen=True)
class Line:
    """One row at one level: the printed numbers and ours, by (column, metric)."""

    level: str
    row: PaperRow
    printed: Mapping[tuple[str, str], float]
    ours: Mapping[tuple[str, str], Cell]


def paper_lines(table: PaperTable, runs: Mapping[str, Sequence[Record]]) -> tuple[Line, ...]:
    """Every row at every level of a table.

    runs: records by the name of the row that they stand for, of one target, k and arithmetic; several records for one
    number are runs of it and give mean and standard deviation.  Raises ValueError for a row that the table lacks.
    """
    for name in runs:
        if table.row(name) is None:
            known = ", ".join(row.name for row in table.rows)
            raise ValueError(f"table {table.number} has no row {name!r}; its rows are {known}")
    lines = []
    for level in table.levels:
        for row in table.rows:
            records = [record for name, found in runs.items() if row.is_called(name) for record in found]
            ours = {}
            for column, metric in _places(table):
                fitting = [
                    record
                    for record in records
                    if (record.level, record.attack_name, record.metric, record.surrogate)
                    == (level, column, metric, table.surrogate)
                ]
                if (cell := cell_of(fitting)) is not None:
                    ours[column, metric] = cell
            printed = {(c, m): row.printed[level, c, m] for c, m in _places(table) if (level, c, m) in row.printed}
            lines.append(Line(level, row, printed, ours))
    return tuple(lines)


def paper_markdown(table: PaperTable, lines: Sequence[Line], remarks: Sequence[str] = ()) -> str:
    """The table for people: two rows each, the paper's and ours, one table per level and group."""
    metric = " / ".join(TITLES.get(name, name) for name in table.metrics)
    parts = [
        f"# Table {table.number}: {table.title}",
        f"{metric}, %. {DASH} is a number that is not known, or was not measured.",
    ]
    for level, group, found in _grouped(lines):
        head = ["method", "source", *(_column_title(column) for column in table.columns)]
        text = [f"**{level.capitalize()} level**" + (f", {group}" if group else ""), ""]
        text += [_pipes(head), _pipes(["---"] * len(head))]
        for line in found:
            text.append(_pipes([_cell_markdown(line.row.name), "paper", *_printed(table, line)]))
            text.append(_pipes([_cell_markdown(line.row.name), "ours", *_ours(table, line)]))
        parts.append("\n".join(text))
    parts += ["\n".join(f"- {note}" for note in (*table.notes, *remarks))] if (*table.notes, *remarks) else []
    return "\n\n".join(parts) + "\n"


def paper_latex(table: PaperTable, lines: Sequence[Line], remarks: Sequence[str] = ()) -> str:
    """The same as a plain `tabular` that needs no package; rules are hlines, notes stand below."""
    metric = " / ".join(TITLES.get(name, name) for name in table.metrics)
    head = ["Method", "Source", *(_column_title(column) for column in table.columns)]
    text = [f"% Table {table.number}: {_one_line(table.title)}", f"\\begin{{tabular}}{{ll{'c' * len(table.columns)}}}"]
    text += ["\\hline", " & ".join(_tex(word) for word in head) + r" \\", "\\hline"]
    for level, group, found in _grouped(lines):
        title = f"{level.capitalize()} level" + (f", {group}" if group else "") + f" ({metric}, %)"
        text.append(f"\\multicolumn{{{len(head)}}}{{l}}{{\\textit{{{_tex(title)}}}}} \\\\")
        for line in found:
            for source, cells in (("paper", _printed(table, line)), ("ours", _ours(table, line))):
                text.append(" & ".join(_tex(word) for word in (line.row.name, source, *cells)) + r" \\")
        text.append("\\hline")
    text.append("\\end{tabular}")
    for note in (*table.notes, *remarks):
        text.append(f"\n\\noindent\\footnotesize {_tex(_one_line(note))}")
    return "\n".join(text) + "\n"


def paper_csv(table: PaperTable, lines: Sequence[Line]) -> str:
    """The same with one line per number: shares in percent, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow("table,group,method,level,condition,metric,printed,ours,low,high,sd,runs,n,place".split(","))
    for line in lines:
        for column, metric in _places(table):
            printed, cell = line.printed.get((column, metric)), line.ours.get((column, metric))
            ours: list[str] = [""] * 6
            if cell is not None:
                numbers = [cell.value, cell.low, cell.high, cell.sd]
                ours = ["" if value is None else f"{100 * value:.4f}" for value in numbers]
                ours += [str(cell.runs), " ".join(map(str, cell.n))]
            place = line.row.place if printed is not None else ""
            shown = "" if printed is None else f"{printed:.2f}"
            head = [table.number, line.row.group, line.row.name, line.level, column, metric]
            writer.writerow([*head, shown, *ours, place])
    return out.getvalue()


def _places(table: PaperTable) -> Iterator[tuple[str, str]]:
    return ((column, metric) for column in table.columns for metric in table.metrics)


def _grouped(lines: Sequence[Line]) -> list[tuple[str, str, list[Line]]]:
    keys = dict.fromkeys((line.level, line.row.group) for line in lines)
    return [
        (level, group, [line for line in lines if (line.level, line.row.group) == (level, group)])
        for level, group in keys
    ]


def _printed(table: PaperTable, line: Line) -> list[str]:
    return [_joined([line.printed.get((column, name)) for name in table.metrics]) for column in table.columns]


def _joined(values: Sequence[float | None]) -> str:
    known = [DASH if value is None else f"{value:.2f}" for value in values]
    return DASH if all(text == DASH for text in known) else " / ".join(known)


def _ours(table: PaperTable, line: Line) -> list[str]:
    found = []
    for column in table.columns:
        cells = [line.ours.get((column, name)) for name in table.metrics]
        found.append(DASH if not any(cells) else " / ".join(_number(cell) for cell in cells))
    return found


def _number(cell: Cell | None) -> str:
    if cell is None:
        return DASH
    value = f"{100 * cell.value:.2f}"
    if cell.sd is not None:
        return f"{value} ± {100 * cell.sd:.2f} (n={cell.runs})"
    if cell.low is None or cell.high is None:
        return value
    return f"{value} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def _column_title(column: str) -> str:
    return column[:1].upper() + column[1:] if column == "clean" else column


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell_markdown(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--"}
_TEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text).replace("[", "{[}")


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace("_", "-")
