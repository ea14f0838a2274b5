"""--classifier, --k and --C: which classifier commands attack, and how many neighbours vote where nobody says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hsat.classifiers import KNNClassifier, LinearProbe, NearestCentroid
from hsat.cli import budget, certify, evaluate, export, reproduce, transfer, universal
from hsat.cli.classifiers import ClassifierOptions, choose_classifiers
from hsat.cli.evaluation import upper_bound_note
from hsat.data import PatchDataset, patch_loader, read_folders, read_opensrh
from hsat.eval import load_scores, read_records
from hsat.eval.default_neighbours import default_k, is_opensrh
from hsat.report import write_report

FEW = "--data.image_size 32 --batch_size 4 --quiet --bootstrap 10".split()
QUICK = [*FEW, *"--steps 2 --eps 8/255 --attacks pgd".split()]


@pytest.fixture
def argv(trained, root):
    return ["--checkpoint", f"a={trained / 'final.safetensors'}", "--data.root", str(root)]


def records_in(out):
    return read_records(out / "records.jsonl")


def test_options_become_classifiers(root, capsys):
    bank = patch_loader(PatchDataset(read_opensrh(root), "train"), batch_size=8)

    def chosen(**options):
        return choose_classifiers(ClassifierOptions(**options), bank)

    assert chosen(classifier="linear", C="0.5") == [LinearProbe(C=0.5)]
    assert chosen(classifier="centroid", temperature=0.2) == [NearestCentroid(temperature=0.2)]
    assert chosen(classifier="linear,knn", k="3,5") == [LinearProbe(), KNNClassifier(k=3), KNNClassifier(k=5)]
    assert chosen(classifier="knn,knn,linear", k=3) == [KNNClassifier(k=3), LinearProbe()]
    assert capsys.readouterr().err == ""
    assert chosen() == [KNNClassifier(k=1)]  # one in 20 of 36
    assert "kNN with k = 1: one in 20 of 36 bank patches" in capsys.readouterr().err
    for wrong in ({"classifier": "svm"}, {"k": "0"}, {"C": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ClassifierOptions(**wrong)


def test_how_many_neighbours_vote(root, own_root, colour_root):
    bank = PatchDataset(read_opensrh(root), "train")
    assert len(bank) == 36 and not is_opensrh(bank.cohort) and default_k(bank) == 1
    many = bank.subset([index % 36 for index in range(7200)])
    assert default_k(many) == 200
    labels = bank.cohort.label[bank.rows]
    first = [index for index, label in enumerate(labels) if label == labels[0]]
    other = next(index for index, label in enumerate(labels) if label != labels[0])
    assert default_k(bank.subset(first * 100 + [other] * 7)) == 7  # the smallest class
    assert default_k(bank.subset(first * 100)) == 90  # a class without rows does not count
    assert default_k(bank.subset([0])) == 1
    (own_root / "meta" / "synthetic.json").unlink()  # what tells a painted cohort from OpenSRH
    published = PatchDataset(read_opensrh(own_root), "train")
    assert is_opensrh(published.cohort) and default_k(published) == 200
    colour = read_folders(colour_root).with_split(val_fraction=0.5, seed=0)
    assert not is_opensrh(colour) and default_k(PatchDataset(colour, "train")) == 1


def test_a_probe_is_attacked_and_a_vote_is_beside_it(argv, tmp_path, capsys):
    out = tmp_path / "mixed"
    evaluate.main([*argv, *QUICK, "--classifier", "linear,centroid,knn", "--C", "0.5", "--k", "3", "--out", str(out)])
    records = records_in(out)
    names = list(dict.fromkeys(record.classifier for record in records))
    assert names == [repr(LinearProbe(C=0.5)), repr(NearestCentroid()), repr(KNNClassifier(k=3))]
    assert {(r.k, r.classifier) for r in records} == {(0, names[0]), (0, names[1]), (3, names[2])}
    attacked = [record for record in records if record.attack_name == "PGD-8"]
    for record in attacked:
        assert record.settings["attacked_classifier"] == names[0]
        flagged = any(f"optimised for {names[0]}" in flag for flag in record.flags)
        assert flagged == (record.classifier != names[0])
    about = json.loads((out / "run.json").read_text())
    assert about["classifiers"] == names and about["settings"]["classifier"] == ["linear", "centroid", "knn"]
    table = (out / "table.md").read_text()
    assert f"| a, {names[0]} | decision | - |" in table.replace("–", "-").replace("—", "-")
    assert f"| a, {names[1]} |" in table and "| a | decision | 3 |" in table
    scores = load_scores(out / "scores.npz")
    assert {(one.k, one.classifier) for one in scores} == {(0, names[0]), (0, names[1]), (3, "")}
    page = write_report([out], tmp_path / "page.html").read_text()
    assert names[0] in page and names[1] in page and "k&nbsp;=&nbsp;3" in page and "k&nbsp;=&nbsp;0" not in page
    assert "upper bound" not in capsys.readouterr().err


@pytest.mark.slow
def test_two_encoders_are_compared_by_each_classifier(argv, trained, tmp_path):
    both = [f"a={trained / 'final.safetensors'},b={trained / 'best.safetensors'}" if "=" in w else w for w in argv]
    out = tmp_path / "both"
    evaluate.main([*both, *QUICK, "--classifier", "linear,centroid", "--gallery", "0", "--out", str(out)])
    differences = json.loads((out / "differences.json").read_text())
    assert {one["classifier"] for one in differences} == {repr(LinearProbe()), repr(NearestCentroid())}
    assert repr(LinearProbe()) in (out / "table.md").read_text().split("**Differences**")[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_probe_only(argv, tmp_path, monkeypatch):
    out, words = tmp_path / "run", [*argv, *QUICK, "--classifier", "linear", "--gallery", "0", "--cache", "cache"]
    monkeypatch.chdir(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_results", stop)
        evaluate.main([*words, "--out", str(out)])
    with pytest.raises(SystemExit, match="classifier"):
        evaluate.main([*words, "--C", "0.1", "--out", str(out), "--resume"])
    evaluate.main([*words, "--out", str(out), "--resume"])
    evaluate.main([*words, "--out", str(tmp_path / "whole")])
    plain = [replace(record, versions={}) for record in records_in(out)]
    assert plain == [replace(record, versions={}) for record in records_in(tmp_path / "whole")]
    assert {record.classifier for record in plain} == {repr(LinearProbe())}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "centroid"])
def test_other_commands_take_one(argv, trained, name, tmp_path):
    words = [*argv, "--classifier", name]
    text = repr(LinearProbe() if name == "linear" else NearestCentroid())
    few = ["--query_patches", "6"]
    budget.main([*words, *QUICK, *few, "--fractions", "1", "--out", str(tmp_path / "budget")])
    sizes = "--sigma 0.02 --samples 20 --selection 4".split()
    certify.main([*words, *FEW, *few, *sizes, "--out", str(tmp_path / "certify")])
    export.main([*words, *QUICK, "--threat", "raw_srh", "--out", str(tmp_path / "export")])
    both = [f"a={trained / 'final.safetensors'},b={trained / 'best.safetensors'}" if "a=" in w else w for w in words]
    transfer.main([*both, *QUICK, *few, "--out", str(tmp_path / "transfer")])
    for command in ("budget", "certify", "export", "transfer"):
        assert {(r.k, r.classifier) for r in records_in(tmp_path / command)} == {(0, text)}, command
        assert json.loads((tmp_path / command / "run.json").read_text())["classifiers"] == [text]
    assert {record.target for record in records_in(tmp_path / "transfer")} == {"decision"}
    assert text in (tmp_path / "transfer" / "table.md").read_text()


def test_a_universal_perturbation_is_measured_by_several(argv, tmp_path, capsys):
    words = "--eps 8/255 --epochs 1 --classifier centroid,linear".split()
    universal.main([*argv, *FEW, *words, "--out", str(tmp_path / "out")])
    assert {r.classifier for r in records_in(tmp_path / "out")} == {repr(NearestCentroid()), repr(LinearProbe())}
    assert "upper bound" in capsys.readouterr().err


@pytest.mark.parametrize("command", [budget, certify, export])
def test_commands_of_one_classifier_refuse_several(argv, command, tmp_path):
    with pytest.raises(SystemExit, match="takes one classifier; --classifier has linear,knn"):
        command.main([*argv, "--classifier", "linear,knn", "--quiet", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="takes one classifier; --k has 3,5"):
        command.main([*argv, "--k", "3,5", "--quiet", "--out", str(tmp_path / "out")])


def test_the_default_number_is_printed_and_recorded(argv, tmp_path, capsys):
    evaluate.main([*argv, *QUICK, "--target", "features", "--gallery", "0", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.count("kNN with k = 1: one in 20 of 36 bank patches") == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("note: the attacks moved the features and not the decision") and "upper bound" in last
    assert {record.k for record in records_in(tmp_path / "out")} == {1}
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["classifiers"] == [repr(KNNClassifier(k=1))] and about["settings"]["k"] == []


def test_when_a_run_is_an_upper_bound():
    assert "moved the embedding" in upper_bound_note("embedding", ["pgd"])
    for target, attacks in (("decision", ["pgd"]), ("any", []), ("features", ["pgd", "Ensemble"])):
        assert upper_bound_note(target, attacks) == ""


@pytest.mark.slow
def test_reproduce_chooses_a_classifier(argv, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mixed"
    words = [*argv, *QUICK, "--target", "embedding", "--gallery", "0", "--noise", "false"]
    evaluate.main([*words, "--classifier", "knn,linear,centroid", "--k", "3", "--out", str(out)])
    monkeypatch.chdir(tmp_path)
    printed = {}
    for name in ("knn", "linear"):
        capsys.readouterr()
        reproduce.main(["--table", "1", "--runs", f"HSAT={out}", "--classifier", name])
        printed[name] = capsys.readouterr().out
    assert "k = 3" in printed["knn"] and repr(LinearProbe()) in printed["linear"]
    reproduce.main(["--table", "1", "--runs", f"HSAT={out}"])
    assert capsys.readouterr().out == printed["knn"]
