"""hsat evaluate: what it writes, which checkpoints and cohorts it takes, and how it refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest
import timm
import torch
from PIL import Image

from hsat.attacks import NaturalShift
from hsat.data import read_opensrh
from hsat.eval import Scoring, compare_models, load_scores, read_records
from hsat.models import load_encoder

QUICK = "--data.image_size 32 --steps 2 --bootstrap 10 --gallery 2 --diagnose 0 --quiet".split()
ONE = [*QUICK, "--k", "5", "--eps", "8/255", "--attacks", "pgd"]
BUILT = ["--model.backbone", "test_byobnet", "--model.embedding_dim", "16"]


def evaluate(argv):
    from hsat.cli.evaluate import main

    main([*argv])


def values(out, model):
    """Numbers of one encoder by condition, level and metric."""
    found = [record for record in read_records(out / "records.jsonl") if record.model == model]
    return {(record.attack_name, record.level, record.metric): record.value for record in found}


@pytest.fixture
def published(trained, tmp_path):
    """The trained weights as the published code writes them."""
    state = load_encoder(trained / "final.safetensors").state_dict()
    new = {"backbone.": "module.model.bb.", "head.": "module.model.proj."}
    renamed = {new[f"{key.partition('.')[0]}."] + key.partition(".")[2]: value for key, value in state.items()}
    assert any(key.startswith("module.model.proj.layers.") for key in renamed)
    torch.save({"model": renamed, "epoch": 3, "loss": 0.5}, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def test_writes_records_table_plot_and_gallery(trained, root, tmp_path, capsys):
    out, file = tmp_path / "out", trained / "best.safetensors"
    evaluate(
        [
            "--checkpoint",
            str(file),
            "--data.root",
            str(root),
            *QUICK,
            "--k",
            "5",
            "--attacks",
            "pgd,mifgsm",
            "--target",
            "embedding",
            "--out",
            str(out),
        ]
    )
    records = read_records(out / "records.jsonl")
    conditions = {
        "clean",
        "noise-4",
        "noise-8",
        *(f"{kind}-{eps}" for kind in ("PGD", "MIFGSM") for eps in (4, 8)),
    }
    shifts = set(NaturalShift.standard(stained=False))
    assert {record.attack_name for record in records} == conditions | shifts
    assert {record.level for record in records} == {"patch", "slide", "patient"}
    assert {(record.model, record.target, record.k, record.seed) for record in records} == {("run", "embedding", 5, 0)}
    assert {record.checkpoint for record in records} == {hashlib.sha256(file.read_bytes()).hexdigest()}
    assert {record.cohort for record in records} == {read_opensrh(root).fingerprint()}
    attacked = next(record for record in records if record.attack_name == "MIFGSM-8")
    assert attacked.eps == "8/255" and "MIFGSM" in attacked.attack and "steps=2" in attacked.attack
    table = (out / "table.md").read_text()
    assert all(f" {name} |" in table for name in conditions) and "BIM" not in table
    assert "**Natural shift, patch level, Acc in %" in table and "| blur |" in table and "stain" not in table
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) <= 10 and "natural shift without stain: SRH patches are not stained" in shown.err
    assert not list((out / "evidence").rglob("blur*"))
    for name in ("accuracy_vs_eps.png", "patches_run_PGD-8.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    about = json.loads((out / "run.json").read_text())
    assert about["settings"]["target"] == "embedding" and about["settings"]["k"] == [5]


@pytest.mark.slow
def test_published_last_and_own_files_of_the_same_weights_measure_alike(trained, published, root, tmp_path):
    own = f"final={trained / 'final.safetensors'},last={trained / 'last.pt'}"
    rest = ["--data.root", str(root), *ONE, "--gallery", "0"]
    evaluate(["--checkpoint", own, *rest, "--untrained", "--out", str(tmp_path / "own")])
    evaluate(["--checkpoint", str(published), *BUILT, *rest, "--out", str(tmp_path / "theirs")])
    wanted = values(tmp_path / "own", "final")
    assert wanted and values(tmp_path / "own", "last") == wanted
    assert values(tmp_path / "theirs", "published") == wanted
    assert len(values(tmp_path / "own", "untrained")) == len(wanted)
    assert not list((tmp_path / "own").glob("patches_*"))


@pytest.mark.parametrize("layout", ["folders", "csv"])
def test_folders_and_tables_of_colour_patches(layout, trained, colour_root, tmp_path, capsys):
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(colour_root), *ONE]
    evaluate([*argv, "--data.layout", layout, "--out", str(tmp_path / "out")])
    assert "adenoma" in capsys.readouterr().err
    assert values(tmp_path / "out", "run")["clean", "patch", "accuracy"] == 1.0  # one class is dark, one bright


def test_stained_patches_have_other_stains_and_diagnosis_is_sized_by_the_work(trained, colour_root, tmp_path):
    argv = [
        "--checkpoint",
        str(trained / "final.safetensors"),
        "--data.root",
        str(colour_root),
        "--data.layout",
        "folders",
    ]
    argv += [word for word in ONE if word not in ("--diagnose", "0")]
    evaluate([*argv, "--out", str(tmp_path / "out")])
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert set(NaturalShift.standard()) <= {record.attack_name for record in records}
    looked_at = {record.settings["diagnosis"]["images"] for record in records if "diagnosis" in record.settings}
    assert looked_at == {min(8, next(r.n for r in records if r.level == "patch"))}


def test_the_published_evaluation_has_no_shifts_unless_asked_for():
    from hsat.cli.evaluate import Evaluate

    assert Evaluate.load([]).natural_shift and not Evaluate.load(["--preset", "paper"]).natural_shift
    assert Evaluate.load(["--preset", "paper", "--natural_shift"]).natural_shift
    assert Evaluate.load([]).diagnose is None


def test_k_above_the_bank_is_said_once_in_a_plain_line(trained, root, tmp_path, capsys):
    given = ",".join(f"{name}={trained / 'final.safetensors'}" for name in "ab")
    argv = ["--checkpoint", given, "--data.root", str(root), *QUICK, "--attacks", "pgd"]
    argv += ["--k", "200"]
    evaluate([*argv, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.count("k=200 is more than") == 1 and ".py:" not in said and "UserWarning" not in said
    assert "note: k=200 is more than the 36 rows of the bank; using k=36\n" in said
    assert {record.k for record in read_records(tmp_path / "out" / "records.jsonl")} == {36}


def test_bank_and_queries_are_thinned_on_request(trained, root, tmp_path):
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *ONE]
    evaluate([*argv, "--bank_patches", "12", "--query_patches", "6", "--out", str(tmp_path / "out")])
    assert {r.n for r in read_records(tmp_path / "out" / "records.jsonl") if r.level == "patch"} == {6}


@pytest.mark.slow
def test_checkpoints_whose_path_holds_an_equals_sign(trained, root, tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "best.safetensors").write_bytes((trained / "best.safetensors").read_bytes())
    both = f"{folder / 'best.safetensors'},b={folder / 'best.safetensors'}"
    evaluate(["--checkpoint", both, "--data.root", str(root), *ONE, "--gallery", "0", "--out", str(tmp_path / "out")])
    assert {record.model for record in read_records(tmp_path / "out" / "records.jsonl")} == {"lr=0.1", "b"}


def test_two_checkpoints_are_compared_on_the_same_patients(trained, root, tmp_path, capsys):
    both = f"first={trained / 'best.safetensors'},second={trained / 'final.safetensors'}"
    argv = ["--checkpoint", both, "--data.root", str(root), *ONE, "--gallery", "0", "--untrained"]
    evaluate([*argv, "--out", str(tmp_path / "out")])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "**Differences** from first" in table and len(capsys.readouterr().out.splitlines()) <= 10
    found = json.loads((tmp_path / "out" / "differences.json").read_text())
    assert {(each["model"], each["against"]) for each in found} == {("second", "first"), ("untrained", "first")}
    measured = {model: values(tmp_path / "out", model) for model in ("first", "second", "untrained")}
    for each in found:
        key = (each["condition"], each["level"], each["metric"])
        expected = measured[each["model"]][key] - measured["first"][key]
        assert each["difference"] == pytest.approx(expected)
        assert each["low"] is not None or each["reason"]
    again = compare_models(load_scores(tmp_path / "out" / "scores.npz"), scoring=Scoring(bootstrap=10))
    assert [asdict(each) for each in again] == found


@pytest.mark.parametrize(("more", "target"), [([], "embedding"), (["--target", "features"], "features")])
def test_the_preset_switches_to_the_published_evaluation(more, target, trained, root, tmp_path):
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *ONE, "--gallery", "0"]
    evaluate([*argv, "--preset", "paper", *more, "--out", str(tmp_path / "out")])
    for record in read_records(tmp_path / "out" / "records.jsonl"):
        chosen = [record.settings[name] for name in ("compat", "how", "absent", "keys")]
        assert (record.target, *chosen) == (target, "paper", "paper", "zero", "id_and_label")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["target"] == target


def html(path, state):
    path.write_text("<!DOCTYPE html><html><title>Sign in</title></html>")


def without_a_key(path, state):
    torch.save({key: value for key, value in state.items() if key != "head.layers.0.weight"}, path)


def without_names(path, state):
    torch.save({"epoch": 3}, path)


def half(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])


def absent(path, state):
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (html, "HTML page"),
        (without_a_key, "1 missing in the file: head.layers.0.weight"),
        (without_names, "no named tensors"),
        (half, "truncated or damaged"),
        (absent, "no file of weights"),
    ],
)
@pytest.mark.parametrize("built", [BUILT, []])
def test_files_that_hold_no_fitting_weights(spoil, named, built, trained, root, tmp_path, stops):
    path = tmp_path / "weights.pt"
    spoil(path, load_encoder(trained / "final.safetensors").state_dict())
    message = stops(
        evaluate, ["--checkpoint", str(path), *built, "--data.root", str(root), *ONE, "--out", str(tmp_path)]
    )
    expected = named if built or spoil is not without_a_key else "does not say how to build"
    assert str(path) in message and expected in message
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--data.root", "/no/such/folder"], ["/no/such/folder"]),
        (["--data.layout", "csv"], ["manifest.csv"]),
        (["--attacks", "pgd,autoattack"], ["'autoattack'", "pgd"]),
        (["--model.backbone", "resnet5O"], ["'resnet5O'", "resnet50"]),
        (["--model.backbone", "test_resnet"], ["does not fit", "missing in the file"]),
        (["--k", "0"], ["k must be"]),
        (["--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_mistakes_end_the_program_with_their_name(argv, named, trained, root, tmp_path, stops):
    start = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(root), *ONE]
    message = stops(evaluate, [*start, "--out", str(tmp_path / "out"), *argv])
    assert all(part in message for part in named), message


def test_without_a_checkpoint_it_says_what_to_give(root, stops):
    assert "--checkpoint FILE" in stops(evaluate, ["--data.root", str(root)])


def test_two_encoders_of_one_name_are_refused(trained, root, tmp_path, stops):
    both = f"{trained / 'final.safetensors'},{trained / 'best.safetensors'}"
    message = stops(evaluate, ["--checkpoint", both, "--data.root", str(root), *ONE, "--out", str(tmp_path)])
    assert "'run'" in message and "a=FILE,b=FILE" in message


def test_unreadable_patch_is_named(trained, own_root, tmp_path, stops):
    victim = sorted(own_root.glob("studies/*/1/patches/*"))[-1]
    victim.write_bytes(victim.read_bytes()[:100])
    argv = ["--checkpoint", str(trained / "final.safetensors"), "--data.root", str(own_root), *ONE]
    message = stops(evaluate, [*argv, "--out", str(tmp_path / "out")])
    assert "cannot read patch" in message and victim.name in message


def test_a_real_process_refuses_a_web_page_without_a_traceback(launch, root, tmp_path):
    html(tmp_path / "weights.pt", {})
    argv = ["--checkpoint", "weights.pt", "--data.root", str(root), "--out", "out"]
    process = launch("evaluate", *argv, cwd=tmp_path)
    shown = process.communicate()[0]
    assert process.returncode == 1
    assert "HTML page" in shown and "Traceback" not in shown


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_loaders_lock_pages_for_a_gpu_alone(root, monkeypatch, kind):
    from hsat.cli import evaluation
    from hsat.cli.evaluate import Evaluate

    monkeypatch.setattr(evaluation, "device_of", lambda _name: kind)
    settings = Evaluate.load(["--data.root", str(root), "--checkpoint", "x"])
    for loader in evaluation.open_loaders(settings, read_opensrh(root)):
        assert loader.pin_memory == (kind == "cuda")


def test_a_whole_classifier_from_a_factory_is_said(root, tmp_path, monkeypatch, capsys):
    text = "import timm\n\n\ndef whole():\n    return timm.create_model('test_resnet', num_classes=7)\n"
    (tmp_path / "my_classifiers.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = timm.create_model("test_resnet", num_classes=7)
    torch.save(module.state_dict(), tmp_path / "whole.pth")
    argv = ["--checkpoint", str(tmp_path / "whole.pth"), "--data.root", str(root), *ONE, "--model.norm", "none"]
    evaluate([*argv, "--model.factory", "my_classifiers:whole", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.count("whole: its output are the 7 logits of a classifier: for its features build it with timm") == 1


def test_the_checkpoint_of_a_classifier_names_the_option_that_leaves_its_head_out(root, tmp_path, stops):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "whole.pth")
    argv = ["--checkpoint", str(tmp_path / "whole.pth"), "--data.root", str(root), *ONE, "--model.norm", "none"]
    argv += ["--model.backbone", "test_resnet", "--out", str(tmp_path / "out")]
    message = stops(evaluate, argv)
    assert "fc.weight" in message and "leaves out for head=None (--model.head none)" in message
    evaluate([*argv, "--model.head", "none"])
    assert (tmp_path / "out" / "records.jsonl").exists()
