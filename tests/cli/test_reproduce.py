"""hsat reproduce: which run fills which row of the paper's tables, and how it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hsat.eval import write_records


@pytest.fixture
def run(made_run, tmp_path):
    return made_run(tmp_path / "run")


def reproduce(argv):
    from hsat.cli.reproduce import main

    main([*argv])


def test_models_fill_the_rows_of_their_names(run, tmp_path, capsys):
    reproduce(["--table", "1", "--runs", str(run), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table1.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| HiDisc | paper | 83.10 / 82.29 | 10.25 / 9.84 |" in text
    assert "| HiDisc | ours | 80.00 [70.0, 90.0] / 78.00 [68.0, 88.0] | 60.00 [50.0, 70.0] / 58.00" in text
    assert "| HSAT-R50-ImageNet | ours | – |" in text
    assert "attacks on the features, k = 20" in text and "The paper's is OpenSRH" in text
    assert "Chance level: patch accuracy 40.0 %, MCA 33.3 %" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table1.md", "table1.tex", "table1.csv"}


def test_a_row_takes_the_model_that_is_named(run, tmp_path):
    words = [f"HSAT-Patch={run}:HiDisc", f"HSAT={run}"]
    reproduce(["--table", "3", "--runs", *words, "--out", str(tmp_path)])
    text = (tmp_path / "table3.md").read_text()
    assert "| HSAT-Patch | ours | 40.00 [30.0, 50.0] / 38.00" in text
    assert "| HSAT-Patient | ours | 35.00 [25.0, 45.0] / 33.00" in text
    assert "| HSAT-Slide | paper | 69.32 / 64.69 |\n| HSAT-Slide | ours | – |" in text


def test_seeds_and_cohorts_are_told(made_records, tmp_path):
    words = []
    for seed, value in enumerate((0.7, 0.9)):
        records = made_records("any", value, seed=seed, cohort=f"{seed}" * 20, flags=("odd",))
        write_records(tmp_path / str(seed) / "records.jsonl", records)
        words.append(f"HSAT={tmp_path / str(seed)}")
    reproduce(["--table", "1", "--runs", *words, "--out", str(tmp_path)])
    text = (tmp_path / "table1.md").read_text()
    assert "80.00 ± 14.14 (2 runs)" in text
    assert "not of one cohort and split" in text and "000000000000 (val), 111111111111 (val)" in text
    assert "Doubt: HSAT, PGD-8: odd." in text


def test_the_papers_target_and_k_are_preferred(made_records, tmp_path, stops):
    records = [
        record
        for target, k, value in (
            ("features", 20, 0.2),
            ("features", 200, 0.4),
            ("embedding", 20, 0.6),
            ("embedding", 200, 0.8),
        )
        for record in made_records("HSAT", value, target=target, k=k)
    ]
    write_records(tmp_path / "run" / "records.jsonl", records)
    words = ["--table", "3", "--runs", str(tmp_path / "run"), "--out", str(tmp_path)]
    for options, value in (([], 40), (["--k", "20"], 30), (["--k", "20", "--target", "features"], 10)):
        reproduce([*words, *options])
        assert f"| HSAT-Patient | ours | {value}.00 [" in (tmp_path / "table3.md").read_text()
    write_records(tmp_path / "run" / "records.jsonl", [r for r in records if r.k == 20] + made_records("HSAT", k=50))
    assert "several of k (20, 50); choose one with --k" in stops(reproduce, words)


def test_drops_fill_table_2(made_records, tmp_path):
    drops = [
        record
        for surrogate, value in (("others", 0.25), ("HiDisc", 0.5))
        for record in made_records("HSAT", value, surrogate=surrogate)
    ]
    drops = [r for r in drops if r.attack_name in ("PGD-8", "PGD-4") and r.metric != "map"]
    renamed = [type(r)(**{**r.__dict__, "metric": f"{r.metric}_drop"}) for r in drops]
    write_records(tmp_path / "run" / "records.jsonl", renamed)
    reproduce(["--table", "2", "--runs", str(tmp_path / "run"), "--attack", "PGD-4", "--out", str(tmp_path)])
    text = (tmp_path / "table2.md").read_text()
    assert "| method | source | PGD-4 |" in text
    assert "| HSAT-R50 | paper | 2.33 / 4.02 |\n| HSAT-R50 | ours | 18.75 [8.8, 28.7] / 16.75" in text


def test_all_tables_at_once(run, tmp_path, capsys):
    reproduce(["--table", "all", "--runs", str(run), "--out", str(tmp_path / "out")])
    assert "table 2 is left out" in capsys.readouterr().err
    assert {path.stem for path in (tmp_path / "out").glob("*.tex")} == {"table1", "table3", "table4"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "give runs"),
        (["--runs", "/no/such"], "/no/such holds no records.jsonl"),
        (["--runs", "HSAT2=RUN"], "table 1 has no row 'HSAT2'"),
        (["--runs", "HSAT-Patch=RUN"], "holds the models ['HiDisc', 'HSAT']; choose one: HSAT-Patch=DIR:HiDisc"),
        (["--runs", "HSAT=RUN:none"], "holds the models ['HiDisc', 'HSAT']"),
        (["--runs", "RUN", "--k", "7"], "--k 7: the runs hold 20"),
        (["--runs", "RUN", "--table", "5"], "table"),
        (["--runs", "RUN", "--table", "2"], "no record of the runs is a drop under PGD-8"),
        (["--runs", "RUN", "--numbers", "BAD"], "table 1: KeyError: 'metrics'"),
    ],
)
def test_mistakes_end_the_tables_with_their_name(argv, named, run, tmp_path, stops):
    (tmp_path / "bad.yaml").write_text("1: {title: x}\n")
    words = [word.replace("RUN", str(run)).replace("BAD", str(tmp_path / "bad.yaml")) for word in argv]
    assert named in stops(reproduce, [*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_rows_says_what_to_type(made_records, tmp_path, stops):
    write_records(tmp_path / "run" / "records.jsonl", made_records("mine"))
    message = stops(reproduce, ["--runs", str(tmp_path / "run"), "--out", str(tmp_path)])
    assert "'mine'" in message and "ROW=DIR:MODEL" in message


def test_runs_of_different_arithmetic_are_refused(made_records, tmp_path, stops):
    ours = made_records("HSAT")
    paper = [type(r)(**{**r.__dict__, "settings": r.settings | {"how": "paper"}}) for r in made_records("HiDisc")]
    write_records(tmp_path / "run" / "records.jsonl", [*ours, *paper])
    message = stops(reproduce, ["--runs", str(tmp_path / "run"), "--out", str(tmp_path)])
    assert "how mean; how paper" in message


def test_other_attacks_and_branches_are_no_runs_of_one_number(made_records, tmp_path, stops):
    ours, path = made_records("HSAT"), tmp_path / "run" / "records.jsonl"
    argv = ["--runs", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    write_records(path, [*ours, *(replace(r, attack=r.attack.replace("10", "50")) for r in ours)])
    assert "HSAT, PGD-4: runs of different attacks (PGD(Linf(eps=4/255), steps=10); PGD(" in stops(reproduce, argv)
    branch = [replace(r, settings=r.settings | {"branch": "normal"}) for r in ours]
    write_records(path, [*ours, *branch])
    assert "HSAT, clean: runs of different branches (none; normal)" in stops(reproduce, argv)


def test_a_clean_number_of_two_evaluations_counts_once(made_records, tmp_path):
    ours = made_records("HSAT")
    write_records(tmp_path / "whitebox" / "records.jsonl", ours)
    drops = [replace(r, surrogate="others", metric=f"{r.metric}_drop") for r in ours if r.attack and r.metric != "map"]
    clean = [replace(r, settings=r.settings | {"bootstrap": 7}) for r in ours if not r.attack]
    write_records(tmp_path / "transfer" / "records.jsonl", [*clean, *drops])
    reproduce(["--runs", str(tmp_path / "whitebox"), str(tmp_path / "transfer"), "--out", str(tmp_path)])
    text = (tmp_path / "table1.md").read_text()
    assert "| HSAT | ours | 80.00 [70.0, 90.0] / 78.00 [68.0, 88.0] |" in text and " runs)" not in text


def test_printed_numbers_are_the_papers():
    from hsat.cli.reproduce import read_tables

    tables = read_tables()
    assert list(tables) == ["1", "2", "3", "4"]
    for table in tables.values():
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.place.startswith(f"Table {table.number}")
            assert all(0 <= value <= 100 for value in row.printed.values())
            assert {level for level, _, _ in row.printed} <= set(table.levels)
            assert {(c, m) for _, c, m in row.printed} <= {(c, m) for c in table.columns for m in table.metrics}
            assert all(table.row(name) is row for name in (row.name, *row.also)), f"two rows answer to {row.name}"

    def number(table, row, *place):
        return tables[table].row(row).printed.get(place)

    assert number("1", "HSAT", "patch", "MIFGSM-8", "mca") == 54.76
    assert number("1", "HSAT", "slide", "clean", "accuracy") == 76.26
    assert number("1", "HSAT", "slide", "clean", "mca") is None
    assert number("1", "HSAT-Patch", "patient", "PGD-8", "mca") == 54.83
    assert number("2", "HiDisc-R101", "patch", "drop", "mca_drop") == 35.36
    assert number("3", "HSAT-Slide", "slide", "PGD-8", "accuracy") == 69.32
    assert number("4", "s_pt", "patient", "PGD-8", "mca") == 66.67
