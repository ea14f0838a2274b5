"""One table in five forms."""

from __future__ import annotations

import csv
import io
import math
import sys

import pytest

from hsat.eval import Table, TableCell

TABLE = Table(
    head=("name", "Acc", "Acc"),
    rows=[("a|b\nc", "1 & 2", TableCell("50.0", "40.0 to 60.0")), ("<b>", "±", TableCell("9", shade=0.25))],
    caption="A 50 % <table>",
    details=" (n = 3)",
    groups=[("x_1", 1), ("y", 1)],
    notes=["a & b"],
)


def test_markdown_has_a_line_per_row():
    assert TABLE.to_markdown().splitlines() == [
        "**A 50 % <table>** (n = 3)",
        "",
        "| name | x_1 Acc | y Acc |",
        "| --- | --- | --- |",
        "| a\\|b c | 1 & 2 | 50.0 (40.0 to 60.0) |",
        "| <b> | ± | 9 |",
        "",
        "- a & b",
    ]
    assert str(TABLE) == TABLE.to_markdown()


def test_latex_uses_booktabs_and_escapes():
    lines = TABLE.to_latex().splitlines()
    assert lines[:3] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & \multicolumn{1}{c}{x\_1} & \multicolumn{1}{c}{y} \\",
    ]
    assert lines[4:6] == [r"\midrule", r"\multicolumn{3}{l}{\textit{A 50 \% <table> (n = 3)}} \\"]
    assert lines[6:8] == [r"a|b c & 1 \& 2 & 50.0 (40.0 to 60.0) \\", r"<b> & $\pm$ & 9 \\"]
    assert lines[8:] == [r"\bottomrule", r"\end{tabular}"]


def test_csv_comes_back():
    head, first, _ = csv.reader(io.StringIO(TABLE.to_csv()))
    assert head == ["name", "x_1 Acc", "y Acc"] and first == ["a|b\nc", "1 & 2", "50.0 (40.0 to 60.0)"]


def test_csv_holds_no_formulas():
    head, row = csv.reader(io.StringIO(Table(("", "@x"), [("=1+1", "-1.5")]).to_csv()))
    assert head == ["", "'@x"] and row == ["'=1+1", "-1.5"]


def test_a_frame_has_numbers_where_cells_are_numbers():
    rows = [("1", "20", "−3.5", "a", "–", TableCell("9", "8 to 10")), ("2", "200", "–", "", "–", "7")]
    frame = Table(("name", "k", "Acc", "text", "absent", "Acc"), rows, groups=[("x", 4), ("y", 1)]).to_frame()
    assert list(frame.columns) == ["name", "x k", "x Acc", "x text", "x absent", "y Acc"]
    assert frame["name"].tolist() == ["1", "2"], "the first column names the rows"
    assert frame["x k"].dtype == "int64" and frame["x k"].tolist() == [20, 200]
    assert frame["x Acc"][0] == -3.5 and math.isnan(frame["x Acc"][1])
    assert frame["x text"].tolist() == ["a", ""] and frame["x absent"].tolist() == ["–", "–"]
    assert frame["y Acc"].tolist() == ["9 (8 to 10)", "7"]


def test_a_frame_of_columns_of_one_name_or_of_no_rows():
    assert Table(("a", "b", "b"), [("x", "1", "2.5")]).to_frame().to_numpy().tolist() == [["x", 1, 2.5]]
    empty = Table(("a", "b"), []).to_frame()
    assert list(empty.columns) == ["a", "b"] and len(empty) == 0


def test_a_frame_without_pandas_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'^to_frame needs pandas: pip install "hsat\[frames\]"$'):
        TABLE.to_frame()


def test_html_is_escaped_and_says_what_cells_are():
    html = TABLE.to_html(kind="text")
    assert "<caption><span>A 50 % &lt;table&gt; (n = 3)</span></caption>" in html and '<table class="text">' in html
    assert '<th scope="row">&lt;b&gt;</th><td>±</td><td style="--shade:0.250">9</td>' in html
    assert "<td>50.0 <small>40.0 to 60.0</small></td>" in html and '<p class="note">a &amp; b</p>' in html
    assert '<th scope="colgroup" colspan="1">x_1</th>' in html


def test_rows_and_groups_fit_the_head():
    with pytest.raises(ValueError, match=r"a row of 1 cells under a head of 2: \['a'\]"):
        Table(("x", "y"), [("a",)])
    with pytest.raises(ValueError, match="do not span the 1 columns after the first"):
        Table(("x", "y"), [], groups=[("g", 2)])
