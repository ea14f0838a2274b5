"""--run: encoder and data of an evaluation from the folder of a training; the synthetic cohort is for its own."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from safetensors import safe_open

from hsat.cli.evaluate import Evaluate
from hsat.data import read_opensrh
from hsat.eval import read_records
from hsat.fingerprints import digest_patient
from hsat.models import build_encoder, save_encoder

FEW = "--k 5 --bootstrap 0 --quiet --query_patches 4 --bank_patches 12 --device cpu".split()
COMMANDS = {
    "evaluate": "--steps 1 --attacks pgd --eps 8/255 --gallery 0 --diagnose 0 --noise false --natural_shift false",
    "transfer": "--steps 1 --attacks pgd --eps 8/255",
    "certify": "--sigma 0.02 --samples 4 --selection 2",
    "budget": "--steps 1",
    "universal": "--epochs 1",
    "compare": "--steps 1 --attacks pgd",
}


def training_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hsat"])["training"]


def settings_of(folder):
    return json.loads((folder / "run.json").read_text())["settings"]


def test_files_state_what_they_were_trained_on(trained, root):
    cohort = read_opensrh(root)
    names = {cohort.records[row].patient for row in cohort.rows("train")}
    stated = training_of(trained / "final.safetensors")
    assert stated["patients"] == sorted(map(digest_patient, names)) and stated["kind"] == "srh"
    assert stated["image_size"] == settings_of(trained)["data"]["image_size"]
    from hsat.models.checkpoints import read_weights

    assert read_weights(trained / "last.pt").metadata["training"] == stated


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_says_encoder_and_data(command, trained, root, tmp_path, capsys):
    main = importlib.import_module(f"hsat.cli.{command}").main
    main(["--run", str(trained), "--out", str(tmp_path / "out"), *FEW, *COMMANDS[command].split()])
    settings = settings_of(tmp_path / "out")
    assert settings["data"]["root"] == str(root) and settings["run"] == [str(trained)]
    assert settings["data"]["image_size"] == settings_of(trained)["data"]["image_size"]
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert not any("trained on" in flag for record in records for flag in record.flags)
    assert f"from --run: {trained}" in capsys.readouterr().err


def test_options_that_are_given_win(trained):
    own = Evaluate.load(["--run", str(trained), "--data.image_size", "24", "--checkpoint", "a=other.pt"])
    assert own.data.image_size == 24 and own.checkpoint == ["a=other.pt"]
    assert str(own.data.root) == settings_of(trained)["data"]["root"] and own.data.workers == 0


def test_another_size_is_flagged(trained, tmp_path):
    from hsat.cli.evaluate import main

    words = COMMANDS["evaluate"].split()
    main(["--run", str(trained), "--data.image_size", "24", "--out", str(tmp_path), *FEW, *words])
    size = settings_of(trained)["data"]["image_size"]
    expected = f"the encoder was trained on images of {size} pixels a side, and these have 24"
    assert all(expected in record.flags for record in read_records(tmp_path / "records.jsonl"))
    assert all(record.settings["image_size"] == 24 for record in read_records(tmp_path / "records.jsonl"))


def test_what_is_no_training_is_refused(trained, tmp_path, stops):
    from hsat.cli.evaluate import main

    assert "run.json" in stops(main, ["--run", str(tmp_path)])
    shutil.copy(trained / "run.json", tmp_path)
    message = stops(main, ["--run", str(tmp_path)])
    assert "has not come to an encoder yet" in message and f"--resume --out {tmp_path}" in message


def stated_encoder(path, patients):
    training = {"kind": "rgb", "image_size": 96, "patients": [digest_patient(name) for name in patients]}
    encoder = build_encoder("test_byobnet", embedding_dim=16, seed=0)
    return save_encoder(encoder, path, metadata={"training": training} if patients else {})


@pytest.mark.parametrize("command", COMMANDS)
def test_an_encoder_of_other_data_is_not_sent_to_the_synthetic_cohort(command, stops, tmp_path, monkeypatch):
    main = importlib.import_module(f"hsat.cli.{command}").main
    monkeypatch.chdir(tmp_path)
    stated_encoder(tmp_path / "mine.safetensors", ["P1", "P2"])
    message = stops(main, ["--checkpoint", "mine.safetensors", *FEW, *COMMANDS[command].split()])
    assert "mine.safetensors was trained on 2 patients of data of your own" in message
    assert "--data.root FOLDER" in message and "--run" in message and "--data.image_size 96" in message
    assert not list(tmp_path.glob("runs/*")), "nothing was written"


@pytest.mark.parametrize("patients", [[], ["SYN_001", "SYN_045"]])
def test_who_states_nothing_or_the_synthetic_patients_goes_on(patients, tmp_path):
    from hsat.cli.training_runs import check_synthetic

    check_synthetic([stated_encoder(tmp_path / "e.safetensors", patients), tmp_path / "nowhere.pt"])


@pytest.fixture
def run_of(tmp_path):
    """run_of(settings): the folder of somebody's training with these settings in its run.json."""
    folder = tmp_path / "strangers"
    folder.mkdir()
    (folder / "best.safetensors").touch()

    def run_of(**settings):
        (folder / "run.json").write_text(json.dumps({"schema": 1, "settings": settings}))
        return folder

    return run_of


EVIL = """
from pathlib import Path
Path("RAN").touch()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_does_not_say_which_code_is_run(command, run_of, tmp_path, monkeypatch, stops):
    main = importlib.import_module(f"hsat.cli.{command}").main
    monkeypatch.chdir(tmp_path)
    folder = run_of(data={"image_size": 32}, model={"factory": "strangers.evil:make", "features": "save"})
    (folder / "evil.py").write_text(EVIL)
    message = stops(main, ["--run", str(folder), "--out", "out"])
    assert "'strangers.evil:make'" in message and "run.json" in message
    assert message.endswith("give --model.factory strangers.evil:make --model.features save yourself")
    assert not (tmp_path / "RAN").exists() and not (tmp_path / "out").exists()


def test_a_factory_that_the_user_gives_is_taken(run_of, tmp_path):
    folder = str(run_of(model={"factory": "m:f", "norm": "none", "input_size": 64}))
    assert Evaluate.load(["--run", folder, "--model.factory", "m:f"]).model.norm == "none"
    (tmp_path / "own.yaml").write_text("model: {factory: m:f}")
    model = Evaluate.load(["--run", folder, "--config", str(tmp_path / "own.yaml")]).model
    assert (model.factory, model.norm, model.input_size) == ("m:f", "none", 64)


@pytest.mark.parametrize(
    ("data", "words", "said"),
    [
        ({"allow_links": True}, "--data.allow_links false", "give --data.allow_links true if the links are your own"),
        ({"exclude": "/etc/shadow"}, "--data.exclude mine.csv", "give --data.exclude FILE yourself"),
        ({"exclude": "strangers/../x.csv"}, "--data.exclude mine.csv", "give --data.exclude FILE yourself"),
        ({"manifest": "/etc/passwd"}, "--data.manifest m.csv", "no plain path below the root"),
        ({"manifest": "../m.csv"}, "--data.manifest ../m.csv", "no plain path below the root"),
        ({"manifest": "~/m.csv"}, "--data.manifest m.csv", "no plain path below the root"),
        ({"image_size": 12000}, "--data.image_size 24", "settings.data.image_size must be a whole number from 0 to"),
        ({"patient": "a" * 2000}, "--data.patient a", "settings.data.patient has more than 1000 characters"),
    ],
)
def test_what_drops_a_guard_or_opens_a_file_is_given_by_the_user(data, words, said, run_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(run_of(data=data))
    with pytest.raises(SystemExit) as stop:
        Evaluate.load(["--run", folder])
    assert folder in str(stop.value) and said in str(stop.value)
    assert Evaluate.load(["--run", folder, *words.split()]).run == [folder]


def test_a_list_in_the_folder_of_the_run_is_taken_and_said(run_of, tmp_path, capsys):
    folder = run_of(data={"exclude": str(tmp_path / "strangers" / "files.csv"), "patient": "(.)", "workers": 9})
    data = Evaluate.load(["--run", str(folder)]).data
    assert data.exclude == folder / "files.csv" and data.workers == 0
    assert "also patient '(.)', exclude " in capsys.readouterr().err
    (folder / "files.csv").symlink_to("/etc/hostname")
    with pytest.raises(SystemExit, match=r"give --data\.exclude FILE yourself"):
        Evaluate.load(["--run", str(folder)])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "settings must be an object, got a list of 0"),
        ({"train": 5}, "settings.train must be an object, got 5"),
        ({"train": {"views": "x"}}, "settings.train.views must be an object, got 'x'"),
        ({"data": [1]}, "settings.data must be an object, got a list of 1"),
        ({"model": 7}, "settings.model must be an object, got 7"),
        ({"data": {"layout": "x"}}, "settings.data.layout: Input should be"),
        ({"data": {"mixed": "keep"}, "seed": -1}, "seed must be a whole number from 0 to"),
        ({"data": {"root": "a" * 400}, "model": {"factory": "m:f", "norm": 3}}, "settings.model.norm must be a text"),
    ],
)
def test_damaged_settings_are_named(settings, said, run_of):
    folder = run_of()
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(SystemExit) as stop:
        Evaluate.load(["--run", str(folder), "--model.factory", "m:f"])
    assert f"{folder / 'run.json'}: {said}" in str(stop.value)


@pytest.mark.parametrize("named", ["[1, [2]]", "5", "{a: b}", "['']"])
def test_run_in_a_configuration_names_folders(named, tmp_path):
    (tmp_path / "own.yaml").write_text(f"run: {named}\n")
    with pytest.raises(SystemExit, match=r"^error: --run must name folders of trainings"):
        Evaluate.load(["--config", str(tmp_path / "own.yaml")])
