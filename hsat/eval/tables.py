"""One table of text, and its five forms: Markdown, LaTeX, CSV, HTML and a DataFrame of pandas."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from hsat.untrusted import as_cell

if TYPE_CHECKING:
    from pandas import DataFrame

ABSENT = "–"
"""What stands in a cell for a number that is not known or was not measured."""

_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


@dataclass(frozen=True)
class TableCell:
    """A cell with more than a text.

    Attributes:
        text: What it says.
        small: What qualifies that, in small type where there is such a thing.
        shade: Share of colour behind it, in [0, 1], on a page.
    """

    text: str
    small: str = ""
    shade: float = 0.0

    def __str__(self) -> str:
        return f"{self.text} ({self.small})" if self.small else self.text


Row = Sequence[str | TableCell]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Attributes:
        head: One label per column; the first column names the rows.
        rows: One text or `TableCell` per column.
        caption: What the table is, in bold where there is such a thing.
        details: What follows the caption.
        groups: (label, number of columns below it) of the columns after the first, in order; empty for none.
        notes: What stands below the table, a sentence each.

    Raises:
        ValueError: For a row or groups of another number of columns than the head.
    """

    head: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    details: str = ""
    groups: Sequence[tuple[str, int]] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells under a head of {len(self.head)}: {list(map(str, row))}")
        if self.groups and sum(span for _, span in self.groups) != len(self.head) - 1:
            raise ValueError(f"groups {list(self.groups)} do not span the {len(self.head) - 1} columns after the first")

    def __str__(self) -> str:
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The table as Markdown; a bar or a line break inside a cell does not end it."""
        lines = [f"**{self.caption}**{self.details}", ""] if self.caption else []
        lines += [_markdown_row(self._flat_head()), "|" + " --- |" * len(self.head)]
        lines += [_markdown_row([str(cell) for cell in row]) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def to_latex(self) -> str:
        """The table as a `tabular` with the rules of booktabs, a package that the document must use."""
        return latex_tabular([self])

    def to_csv(self) -> str:
        """Head and rows as CSV; a text that a spreadsheet would run begins with an apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(map(as_cell, self._flat_head()))
        writer.writerows([as_cell(str(cell)) for cell in row] for row in self.rows)
        return out.getvalue()

    def to_frame(self) -> DataFrame:
        """Head and rows as a DataFrame of pandas, which the extra `frames` brings.

        The columns are those of `to_csv`.  A column whose cells are numbers, or absent, holds numbers, and NaN where
        one is absent; the first column, which names the rows, and all others hold the text of the cells.

        Returns:
            The DataFrame.

        Raises:
            ImportError: If pandas is not installed; the message names the command that installs it.

        Example:
            >>> Table(("model", "k", "clean"), [("a", "20", "93.8"), ("b", "20", "–")]).to_frame()["clean"].max()
            np.float64(93.8)
        """
        pandas = import_pandas("to_frame")
        columns = [[str(row[place]) for row in self.rows] for place in range(len(self.head))]
        frame = pandas.DataFrame({place: _numbers(cells) if place else cells for place, cells in enumerate(columns)})
        frame.columns = self._flat_head()  # two columns may have one name
        return frame

    def to_html(self, *, kind: str = "") -> str:
        """The table as HTML, in a box of its own that scrolls; all text is escaped.

        Args:
            kind: A class of the style sheet.

        Returns:
            HTML text.
        """
        caption = escape(self.caption + self.details)
        parts = [f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">']
        parts += [f'<table class="{escape(kind)}">', f"<caption><span>{caption}</span></caption>", "<thead>"]
        if self.groups:
            spans = "".join(
                f'<th scope="colgroup" colspan="{span}">{escape(label)}</th>' for label, span in self.groups
            )
            parts.append(f"<tr><td></td>{spans}</tr>")
        corner, *labels = self.head
        columns = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in labels)
        parts += [f'<tr><th scope="col">{escape(corner)}</th>{columns}</tr>', "</thead>", "<tbody>"]
        for label, *cells in self.rows:
            parts.append(f'<tr><th scope="row">{escape(str(label))}</th>{"".join(map(_html_cell, cells))}</tr>')
        parts += ["</tbody>", "</table>", "</div>", *(f'<p class="note">{escape(note)}</p>' for note in self.notes)]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return self.to_html()

    def _flat_head(self) -> list[str]:
        """The head in one line: the group before the label."""
        if not self.groups:
            return list(self.head)
        groups = [label for label, span in self.groups for _ in range(span)]
        return [self.head[0], *(f"{group} {label}" for group, label in zip(groups, self.head[1:], strict=True))]


def import_pandas(what: str) -> Any:
    """The module pandas.

    Args:
        what: The function that needs it.

    Raises:
        ImportError: If it is not installed; the message names the command that installs it.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f'{what} needs pandas: pip install "hsat[frames]"') from error
    return pandas


def _numbers(cells: Sequence[str]) -> list[str] | list[int] | list[float]:
    """The cells of a column as numbers, with NaN for absent ones; unchanged if one is a text or none is a number."""
    texts = [cell.replace("−", "-") for cell in cells]
    known = [text for text in texts if text not in ("", ABSENT)]
    if not known or not all(map(_NUMBER.fullmatch, known)):
        return list(cells)
    if len(known) == len(texts) and all(text.lstrip("+-").isdigit() for text in known):
        return [int(text) for text in texts]
    return [float("nan") if text in ("", ABSENT) else float(text) for text in texts]


def latex_tabular(tables: Sequence[Table], *, align: str = "") -> str:
    """Tables of one head as sections of one `tabular` with the rules of booktabs.

    Args:
        tables: At least one; captions become lines across all columns.
        align: Letters of the columns; by default the first is "l" and the others are "r".
    """
    first = tables[0]
    width = len(first.head)
    lines = [f"\\begin{{tabular}}{{{align or 'l' + 'r' * (width - 1)}}}", "\\toprule"]
    if first.groups:
        spans = [f"\\multicolumn{{{span}}}{{c}}{{{escape_latex(label)}}}" for label, span in first.groups]
        lines.append(" & ".join(["", *spans]) + r" \\")
    lines.append(" & ".join(map(escape_latex, first.head)) + r" \\")
    for table in tables:
        lines.append("\\midrule")
        if title := table.caption + table.details:
            lines.append(f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{escape_latex(title)}}}}} \\\\")
        lines += [" & ".join(escape_latex(str(cell)) for cell in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"±": r"$\pm$", "–": "--", "−": "$-$", "→": r"$\to$", "↓": r"$\downarrow$", "[": "{[}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def escape_latex(text: str) -> str:
    """A text on one line as LaTeX source; a bracket is no option of the line before it."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _html_cell(cell: str | TableCell) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    style = f' style="--shade:{cell.shade:.3f}"' if cell.shade else ""
    small = f" <small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<td{style}>{escape(cell.text)}{small}</td>"
