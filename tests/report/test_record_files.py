"""Any records as tables, as LaTeX, as CSV and as a DataFrame."""

from __future__ import annotations

import csv
import io
import re
import sys
from dataclasses import replace

import pytest

from hsat.report import record_tables, records_csv, records_frame, records_latex


def tabulars(text: str) -> list[list[str]]:
    """The lines inside each tabular; every row has as many cells as the tabular has columns."""
    found = []
    for align, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = body.splitlines()
        assert lines[0] == "\\toprule" and lines[-1] == "\\bottomrule"
        rows = [line for line in lines if line.endswith(r"\\") and not line.startswith("\\multicolumn")]
        assert rows and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(align)}
        found.append(lines)
    assert len(found) == text.count("\\begin{tabular}") == text.count("\\end{tabular}")
    return found


def test_an_evaluation_is_one_table_with_a_section_per_level(made_records):
    records = [r for r in made_records("HSAT_1", 0.8) if r.metric != "map"]
    text = records_latex(records)
    (lines,) = tabulars(text)
    assert text.startswith("% needs \\usepackage{booktabs}\n% Attacks on the features, cohort c0ffeec0ffee (val)\n")
    assert lines.count("\\midrule") == 3
    assert [line for line in lines if "level" in line] == [
        rf"\multicolumn{{{lines[1].count('&') + 1}}}{{l}}{{\textit{{{level} level (Acc / MCA, \%; n = {n})}}}} \\"
        for level, n in (("Patch", 36), ("Slide", 12), ("Patient", 6))
    ]
    row = next(line for line in lines if line.startswith("HSAT"))
    assert row.startswith(r"HSAT\_1 & features & 20 & 80.0 {[}70.0, 90.0] / 78.0 {[}68.0, 88.0]")
    assert "70.0, 90.0" not in records_latex(records, intervals=False)


def test_other_metrics_and_settings_have_tables_of_their_own(made_records):
    records = made_records("HSAT", 0.8)
    certified = [replace(r, metric="certified_accuracy", target="any") for r in records if r.metric == "accuracy"]
    texts = records_latex([*records, *records, *certified])
    tables = tabulars(texts)
    assert ["Acc / MCA" in "".join(lines) for lines in tables] == [True, False, False]
    assert "mAP" in "".join(tables[1]) and "certified Acc" in "".join(tables[2])
    assert "% Certificates, which hold for any attack" in texts


def test_a_transfer_is_a_matrix(made_records):
    attacked = [r for r in made_records("a", 0.8) if r.attack_name in ("clean", "PGD-8") and r.metric == "accuracy"]
    drops = [
        replace(r, model=target, metric="accuracy_drop", surrogate=surrogate)
        for r in attacked
        if r.attack
        for target in "ab"
        for surrogate in "ab"
    ]
    clean = [record for record in attacked if not record.attack]
    (lines,) = tabulars(records_latex([*clean, *drops], intervals=False))
    assert lines[1].startswith(r"surrogate $\downarrow$ target $\to$ & a & b")
    assert r"clean Acc & 80.0 & -- \\" in lines
    assert r"a & \textit{40.0} & 40.0 \\" in lines and r"b & 40.0 & \textit{40.0} \\" in lines


def test_csv_has_a_line_per_number(made_records):
    records = [r for r in made_records("HSAT", 0.8) if r.attack_name in ("clean", "PGD-8")]
    rows = list(csv.DictReader(io.StringIO(records_csv(records))))
    assert len(rows) == len(records)
    chosen = {"level": "patch", "metric": "accuracy", "attack": "PGD-8"}
    (row,) = [row for row in rows if chosen.items() <= row.items()]
    assert row == chosen | {
        "setting": "Attacks on the features, cohort c0ffeec0ffee (val)",
        "model": "HSAT",
        "surrogate": "",
        "target": "features",
        "classifier": "",
        "k": "20",
        "eps": "8/255",
        "value": "0.4",
        "low": "0.30000000000000004",
        "high": "0.5",
        "sd": "",
        "runs": "1",
        "n": "36",
        "chance": "0.4",
    }


def test_csv_holds_no_formulas(made_records):
    records = made_records("=1+1", 0.8)
    assert {row["model"] for row in csv.DictReader(io.StringIO(records_csv(records)))} == {"'=1+1"}


def test_several_runs_are_one_line_of_csv(made_records):
    records = [r for seed, value in enumerate((0.6, 0.8)) for r in made_records("HSAT", value, seed=seed)]
    rows = [r for r in csv.DictReader(io.StringIO(records_csv(records))) if r["metric"] == "accuracy"]
    assert {row["runs"] for row in rows} == {"2"} and {row["low"] for row in rows} == {""}
    assert float(rows[0]["value"]) == pytest.approx(0.7) and float(rows[0]["sd"]) == pytest.approx(0.02**0.5)


@pytest.mark.parametrize("form", [records_latex, records_csv])
def test_nothing_to_tabulate(form):
    with pytest.raises(ValueError, match="no records, so there is no table"):
        form([])


def test_a_frame_has_the_rows_of_the_csv_as_numbers(made_records):
    import pandas

    records = [*made_records("HSAT", 0.8, seed=1), *made_records("HSAT", 0.6, seed=2, checkpoint="other", chance=None)]
    records += made_records("one run", 0.7, low=None, high=None)
    frame = records_frame(records)
    pandas.testing.assert_frame_equal(frame, pandas.read_csv(io.StringIO(records_csv(records)), keep_default_na=False,
        na_values={name: [""] for name in ("value", "low", "high", "sd", "chance")}), check_dtype=False)  # fmt: skip
    assert frame[["k", "runs", "n"]].dtypes.eq("int64").all() and frame["value"].dtype == "float64"
    clean = frame.query("attack == 'clean' and level == 'patch' and metric == 'accuracy'").set_index("model")
    assert clean.loc["HSAT", "value"] == pytest.approx(0.7) and clean.loc["HSAT", "runs"] == 2
    assert clean.loc["HSAT", "chance"] == pytest.approx(0.4) and clean["low"].isna().all()
    with pytest.raises(ValueError, match="no records"):
        records_frame([])


def test_a_frame_without_pandas_names_the_extra(made_records, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'^records_frame needs pandas: pip install "hsat\[frames\]"$'):
        records_frame(made_records())


def test_any_records_are_tables(made_records):
    """The tables of LaTeX, one by one; several settings stand in the captions."""
    records = made_records("HSAT", 0.8)
    tables = record_tables(records, intervals=False)
    assert [table.caption for table in tables] == [f"{level} level" for level in ("Patch", "Slide", "Patient")] * 2
    assert tables[0].head[-1] == "chance" and tables[0].rows[0][-1] == "40.0 / 33.3"
    frame = tables[3].to_frame()  # of mAP alone, so that cells are numbers
    assert (frame.loc[0, "PGD-8"], frame.loc[0, "chance"]) == (39.0, 33.3)
    drops = [replace(r, metric="accuracy_drop", surrogate="b") for r in records if r.attack and r.metric == "accuracy"]
    assert {table.head[0] for table in record_tables([*records, *drops])} == {"surrogate ↓ target →"}
    several = record_tables([*records, *made_records("HSAT", 0.5, target="decision")])
    assert several[-1].caption.startswith("Attacks on the decision of the classifier, cohort c0ffee")
