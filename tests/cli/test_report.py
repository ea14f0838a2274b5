"""hsat report as people call it, and docs/report.md."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch

from hsat.classifiers import KNNClassifier
from hsat.eval import Provenance, evaluate_whitebox, read_records
from hsat.report import open_runs, records_csv, records_latex
from hsat.types import HierarchicalBatch

ROOT = Path(__file__).parents[2]
PROVENANCE = Provenance(model="an encoder", class_names=("a", "b"))


def report(argv):
    from hsat.cli.report import main

    main([*argv])


@pytest.fixture
def run(made_run, tmp_path):
    return made_run(tmp_path / "run")


@pytest.mark.slow
def test_a_real_evaluation_and_training_on_one_page(trained, root, tmp_path, capsys):
    from hsat.cli.evaluate import main as evaluate

    options = (
        "--data.image_size 32 --steps 2 --bootstrap 10 --gallery 2 --quiet --k 5 --eps 8/255 --attacks pgd".split()
    )
    argv = ["--checkpoint", f"HSAT={trained / 'final.safetensors'}", "--data.root", str(root), *options]
    evaluate([*argv, "--out", str(tmp_path / "whitebox")])
    (found,) = open_runs([tmp_path / "whitebox"])
    (artifacts,) = found.artifacts
    label, taken = (artifacts.conditions["PGD-8"].label, artifacts.conditions["PGD-8"].prediction)
    accuracy = {r.level: r.value for r in found.records if (r.attack_name, r.metric) == ("PGD-8", "accuracy")}
    for level, value in accuracy.items():
        assert (label[level] == taken[level, 5]).mean() == pytest.approx(value), "artifacts and records disagree"
    assert found.absent == ()
    report([str(tmp_path / "whitebox"), str(trained), "--out", str(tmp_path / "page.html"), "--title", "Two runs"])
    page = (tmp_path / "page.html").read_text()
    assert "Two runs</h1>" in page and "HSAT keeps" in page and "Training loss of run." in page
    assert page.count("data:image/png") == 6
    assert str(tmp_path / "page.html") in capsys.readouterr().out


def test_the_page_lies_in_the_first_run_by_default(run, capsys):
    report(["--k", "20", "--runs", str(run)])
    assert (run / "report.html").is_file()


def test_tables_for_a_paper_and_for_other_programs(run, tmp_path, capsys):
    files = [tmp_path / "new" / "table.tex", tmp_path / "numbers.csv"]
    report([str(run), "--latex", str(files[0]), "--csv", str(files[1])])
    records = read_records(run / "records.jsonl")
    assert files[0].read_text() == records_latex(records) and files[1].read_text() == records_csv(records)
    shown = capsys.readouterr().out
    report([str(run), "--latex", str(files[0]), "--intervals", "false"])
    assert files[0].read_text() == records_latex(records, intervals=False)
    assert (run / "report.html").is_file() and all(str(file) in shown for file in files)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "give run folders"),
        (["/no/such/folder"], "/no/such/folder is not a folder"),
        (["RUN", "--k", "7"], "no record has k=7"),
        (["RUN", "--metric", "map"], "option metric"),
    ],
)
def test_mistakes_end_the_report_with_their_name(argv, named, run, stops):
    assert named in stops(report, [str(run) if word == "RUN" else word for word in argv])


def test_folders_on_the_command_line():
    from hsat.cli.options import collect_words

    assert collect_words(["a", "b", "--k", "3", "--runs", "c", "d", "--out", "e"], "runs") == [
        *("--k", "3", "--out", "e"),
        *("--runs", "a,b,c,d"),
    ]
    assert collect_words(["--runs=a", "b"], "runs") == ["--runs", "a,b"]
    assert collect_words(["--k", "3"], "runs") == ["--k", "3"]


def test_a_folder_with_a_comma_is_refused(tmp_path, stops):
    (tmp_path / "a,b").mkdir()
    assert "rename it" in stops(report, [str(tmp_path / "a,b")])


def test_the_page_about_the_report_runs(tmp_path, capsys):
    text = (ROOT / "docs" / "report.md").read_text()
    ids = torch.arange(8)
    batch = HierarchicalBatch(torch.rand(8, 3, 8, 8), ids, ids, ids // 2, ids // 2 % 2)
    knn = KNNClassifier(k=2)
    result = evaluate_whitebox(lambda x: x.flatten(1), [batch], [batch], {}, classifier=knn, provenance=PROVENANCE)
    names = {"result": result}
    with contextlib.chdir(tmp_path):
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(compile(code, "report.md", "exec", dont_inherit=True), names)
    assert "an encoder" in (tmp_path / "report.html").read_text()
    assert names["artifacts"].model == "mine"
    assert read_records(tmp_path / "runs" / "other" / "records.jsonl") == names["mine"].records


def test_the_commands_of_the_page_parse():
    from hsat.cli import report, reproduce
    from hsat.cli.options import collect_words

    text = (ROOT / "docs" / "report.md").read_text() + (report.__doc__ or "") + (reproduce.__doc__ or "")
    found = re.findall(r"^ *hsat (report|reproduce) (.*)$", text, re.MULTILINE)
    assert len(found) >= 8
    for name, words in found:
        settings = {"report": report.Report, "reproduce": reproduce.Reproduce}[name]
        assert settings.load(collect_words(words.split(), "runs")).runs
