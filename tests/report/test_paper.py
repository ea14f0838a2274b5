"""The paper's tables: ours beside the printed numbers, in three forms."""

from __future__ import annotations

import csv
import io
import re

import pytest

from hsat.report import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown

TABLE = PaperTable(
    number=9,
    title="50% of A_B",
    levels=("patch", "slide"),
    columns=("clean", "PGD-8"),
    metrics=("accuracy", "mca"),
    rows=(
        PaperRow("A_B", "R50 & co", {("patch", "PGD-8", "accuracy"): 5.5}, also=("other name",), place="Table 9"),
        PaperRow("C", "R50 & co", {("slide", "clean", "mca"): 77.125}),
    ),
    notes=("a note with 100 %",),
)


def test_rows_are_found_by_any_of_their_names():
    assert TABLE.row("a-b") is TABLE.row("Other_Name") is not None is not TABLE.rows[1]
    assert TABLE.row("a-b").name == "A_B"
    assert TABLE.row("AB") is None


def test_markdown(made_records):
    lines = paper_lines(TABLE, {"A_B": made_records("whatever", 0.8)})
    text = paper_markdown(TABLE, lines, ["a remark"])
    wanted = """**Patch level**, R50 & co

| method | source | Clean | PGD-8 |
| --- | --- | --- | --- |
| A_B | paper | – | 5.50 / – |
| A_B | ours | 80.00 [70.0, 90.0] / 78.00 [68.0, 88.0] | 40.00 [30.0, 50.0] / 38.00 [28.0, 48.0] |
| C | paper | – | – |
| C | ours | – | – |

**Slide level**, R50 & co
"""
    assert wanted in text
    assert "| C | paper | – / 77.12 | – |" in text
    assert text.endswith("- a note with 100 %\n- a remark\n")


def test_several_seeds(made_records):
    runs = [r for seed, value in enumerate((0.6, 0.8, 0.7)) for r in made_records("m", value, seed=seed)]
    text = paper_markdown(TABLE, paper_lines(TABLE, {"C": runs}))
    assert "| C | ours | 70.00 ± 10.00 (3 runs) / 68.00 ± 10.00 (3 runs) |" in text


def test_other_surrogates_do_not_fill_a_white_box_table(made_records):
    lines = paper_lines(TABLE, {"C": made_records(surrogate="x")})
    assert not any(line.ours for line in lines)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match="table 9 has no row 'x'; its rows are A_B, C"):
        paper_lines(TABLE, {"x": []})


def test_latex_is_a_plain_table_of_equal_rows(made_records):
    lines = paper_lines(TABLE, {"A_B": made_records(value=0.8)})
    text = paper_latex(TABLE, lines, ["x^2 ~ {y} \\z # $"])
    begin, rows, after = re.fullmatch(
        r"% [^\n]*\n\\begin\{tabular\}\{(l+c+)\}\n(.*)\n\\end\{tabular\}\n(.*)", text, re.DOTALL
    ).groups()
    assert begin == "llcc"
    for row in rows.splitlines():
        rule = row in ("\\toprule", "\\midrule", "\\bottomrule")
        assert rule or row.startswith("\\multicolumn{4}{l}{") or len(re.findall(r"(?<!\\)&", row)) == 3
        assert rule or row.endswith(r"\\")
    assert r"A\_B & ours & 80.00 {[}70.0, 90.0] / 78.00" in rows
    assert r"A\_B & paper & -- & 5.50 / -- \\" in rows
    assert r"R50 \& co (Acc / MCA, \%)" in rows
    assert r"x\textasciicircum{}2 \textasciitilde{} \{y\} \textbackslash{}z \# \$" in after
    for sign in "%$#_":
        assert not re.search(rf"(?<!\\){re.escape(sign)}", rows.replace(r"$\pm$", "")), sign
    assert rows.count("{") - rows.count(r"\{") == rows.count("}") - rows.count(r"\}")
    assert rows.isascii()


def test_latex_has_no_other_letters_for_several_runs(made_records):
    runs = [r for seed in (0, 1) for r in made_records(seed=seed, value=0.5 + seed / 10)]
    assert r"$\pm$ 7.07 (2 runs)" in paper_latex(TABLE, paper_lines(TABLE, {"C": runs}))


def test_csv_has_a_line_per_number(made_records):
    lines = paper_lines(TABLE, {"A_B": made_records(value=0.8)})
    rows = list(csv.DictReader(io.StringIO(paper_csv(TABLE, lines))))
    assert len(rows) == 2 * 2 * 2 * 2
    found = {(r["method"], r["level"], r["condition"], r["metric"]): r for r in rows}
    both = found["A_B", "patch", "PGD-8", "accuracy"]
    assert (both["printed"], both["ours"], both["low"], both["high"]) == ("5.50", "40.0000", "30.0000", "50.0000")
    assert (both["sd"], both["runs"], both["n"], both["place"]) == ("", "1", "36", "Table 9")
    none = found["C", "patch", "clean", "accuracy"]
    assert (none["printed"], none["ours"], none["runs"], none["place"]) == ("", "", "", "")
