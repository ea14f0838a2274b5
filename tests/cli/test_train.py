"""hsat train: what a run leaves behind, and how it ends when something is wrong."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch

from hsat.data import read_opensrh
from hsat.fingerprints import fingerprint_weights
from hsat.models import load_encoder
from hsat.training import StepResult


def test_run_folder_says_what_was_run_on_what(trained, root):
    about = json.loads((trained / "run.json").read_text())
    assert about["settings"]["seed"] == 0
    assert about["settings"]["attack"]["eps"] == 8 / 255
    assert about["settings"]["model"]["backbone"] == "test_byobnet"
    assert {"python", "torch", "hsat", "timm", "numpy"} <= about["versions"].keys()
    split = read_opensrh(root).with_split(val_fraction=0.15, names=("train", "tune"), of="train")
    assert about["cohort"] == split.fingerprint()
    left = {path.name for path in trained.iterdir()}
    assert left == {"run.json", "train.csv", "last.pt", "final.safetensors", "best.safetensors", "best.json"}


def test_log_has_every_step_once_with_its_numbers(trained, rows_of):
    rows = rows_of(trained)
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [int(row["epoch"]) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    for row in rows:
        parts = [float(row[f"adversarial_{level}"]) for level in ("patch", "slide", "patient")]
        assert math.isclose(float(row["loss"]), sum(parts), rel_tol=1e-5)
        assert float(row["eps"]) == 8 / 255 and 0 <= float(row["lr"]) <= 1e-3
    assert [float(row["strength"]) for row in rows[::2]] == [1.0, 0.75, 0.5, 0.25]
    looked = [int(row["step"]) for row in rows if row["tune_robust_accuracy"]]
    assert looked == [3, 7]
    assert all(0 <= float(rows[step]["tune_clean_mca"]) <= 1 for step in looked)


def test_best_encoder_loads_and_is_the_one_that_scored_highest(trained, rows_of):
    best, final = load_encoder(trained / "best.safetensors"), load_encoder(trained / "final.safetensors")
    assert best(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    about = json.loads((trained / "best.json").read_text())
    rows = [row for row in rows_of(trained) if row["tune_robust_accuracy"]]
    scores = [(float(row["tune_robust_accuracy"]) + float(row["tune_robust_mca"])) / 2 for row in rows]
    assert about["score"] == max(scores)
    assert about["step"] == int(rows[scores.index(max(scores))]["step"]) + 1
    assert (fingerprint_weights(best) == fingerprint_weights(final)) == (about["step"] == 8)


def test_same_seed_same_bytes_other_seed_other_numbers(trained, options, train, rows_of, tmp_path):
    train([*options, "--out", str(tmp_path / "again"), "--resume"])  # nothing to resume: it starts
    for name in ("final.safetensors", "best.safetensors", "train.csv", "best.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name
    train([*options, "--out", str(tmp_path / "other"), "--seed", "1", "--train.steps", "1"])
    assert rows_of(tmp_path / "other")[0]["loss"] != rows_of(trained)[0]["loss"]


def test_baseline_is_trained_without_attack_and_chosen_on_clean_patches(options, train, rows_of, tmp_path, capsys):
    train([*options, "--train.steps", "2", "--attack.name", "none", "--out", str(tmp_path / "run")])
    rows = rows_of(tmp_path / "run")
    assert {row["eps"] for row in rows} == {"0.0"}
    assert "clean_patch" in rows[0] and "adversarial_patch" not in rows[0]
    about = json.loads((tmp_path / "run" / "best.json").read_text())
    assert about["score"] == (about["tune_clean_accuracy"] + about["tune_clean_mca"]) / 2
    assert capsys.readouterr().out == f"encoder: {tmp_path / 'run' / 'best.safetensors'}\n"


@pytest.mark.parametrize("layout", ["folders", "csv"])
def test_folders_and_tables_of_colour_patches(layout, options, colour_root, train, tmp_path):
    argv = [*options, "--data.root", str(colour_root), "--data.layout", layout, "--data.patches", "1"]
    train([*argv, "--train.steps", "1", "--out", str(tmp_path / "run")])
    assert load_encoder(tmp_path / "run" / "best.safetensors").spec["name"] == "test_byobnet"


def test_without_a_root_it_writes_and_uses_the_synthetic_cohort(root, train, monkeypatch, tmp_path, capsys):
    import hsat.cli.cohort as cohorts

    asked = []
    monkeypatch.setattr(cohorts, "write_synthetic_cohort", lambda path, seed: asked.append((str(path), seed)) or root)
    monkeypatch.chdir(tmp_path)
    small = ["--model.backbone", "test_byobnet", "--train.steps", "1", "--train.batch_patients", "2", "--quiet"]
    train([*small, "--seed", "4", "--attack.steps", "1", "--data.image_size", "32"])
    assert asked == [("runs/synthetic-4", 4)]
    assert "synthetic cohort" in capsys.readouterr().err
    (out,) = (tmp_path / "runs").glob("hsat-*")
    assert (out / "final.safetensors").exists()


def test_one_patient_of_each_class_is_enough_to_train_when_nobody_is_held_out(options, root, train, tmp_path, stops):
    lines = ["path,class,patient,slide,split"]
    for row in read_opensrh(root).records:
        number = int(row.patient.removeprefix("SYN_"))
        if number % 4 in (1, 2):
            split = ("val", "train")[number % 4 - 1]
            lines.append(f"{root / row.path},{row.class_name},{row.patient},{row.slide},{split}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines).replace(f"{root}/", "") + "\n")
    argv = [*options, "--data.layout", "csv", "--data.manifest", str(table), "--train.steps", "1"]
    assert "--data.tune_fraction 0" in stops(train, [*argv, "--out", str(tmp_path / "run")])
    train([*argv, "--data.tune_fraction", "0", "--out", str(tmp_path / "run")])
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {"final.safetensors"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--data.root", "/no/such/folder"], ["/no/such/folder"]),
        (["--data.layout", "folders"], ["wanted class/patient/slide/patch"]),
        (["--data.layout", "csv", "--data.manifest", "none.csv"], ["none.csv", "path, class, patient, slide"]),
        (["--model.backbone", "resnet5O"], ["'resnet5O'", "resnet50"]),
        (["--model.weights", "/no/such/weights.pt"], ["/no/such/weights.pt"]),
        (["--model.backbone", "resnet50_at", "--model.pretrained"], ["resnet50_at", "weights"]),
        (["--train.batch_patients", "50"], ["batch_patients=50", "4"]),
        (["--data.views", "1"], ["patch", "positive"]),
        (["--device", "abacus"], ["abacus"]),
        (["--device", "cuda:99"], ["cuda:99"]),
    ],
)
def test_mistakes_end_the_program_with_their_name(argv, named, options, train, tmp_path, stops):
    message = stops(train, [*options, "--out", str(tmp_path / "run"), *argv])
    assert all(part in message for part in named), message


def test_out_that_is_a_file_is_named(options, train, tmp_path, stops):
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in stops(train, [*options, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_patch_is_named_or_replaced(workers, options, own_root, train, tmp_path, stops):
    for path in sorted(own_root.glob("studies/*/1/patches/*"))[::3]:  # the first patch of each patient's first slide
        path.write_bytes(path.read_bytes()[:100])
    argv = [*options, "--data.root", str(own_root), "--data.workers", workers, "--data.tune_fraction", "0"]
    argv += ["--data.patches", "3", "--train.steps", "1", "--attack.name", "none"]
    message = stops(train, [*argv, "--out", str(tmp_path / "run")])
    assert "cannot read patch" in message and str(own_root) in message and message.count("\n") == 0
    if workers == "0":
        with pytest.warns(UserWarning, match="of the same slide instead"):
            train([*argv, "--data.on_bad", "replace", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("content", [b"", None])
def test_missing_and_empty_patches_are_found_before_training(content, options, own_root, train, tmp_path, stops):
    victim = sorted(own_root.glob("studies/*/1/patches/*"))[0]
    victim.unlink() if content is None else victim.write_bytes(content)
    message = stops(train, [*options, "--data.root", str(own_root), "--out", str(tmp_path / "run")])
    assert victim.name in message
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_by_step_and_leaves_the_checkpoint_whole(
    trained, options, train, rows_of, tmp_path, monkeypatch, stops
):
    import hsat.training.optimization as optimization

    honest, seen = optimization.adversarial_step, []

    def spoiled(*args, **kwargs) -> StepResult:
        result = honest(*args, **kwargs)
        seen.append(1)
        return result._replace(loss=result.loss * math.nan) if len(seen) == 6 else result

    monkeypatch.setattr(optimization, "adversarial_step", spoiled)
    out = tmp_path / "run"
    message = stops(train, [*options, "--out", str(out)])
    assert "step 5" in message and "nan" in message and "--train.lr" in message
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == 3
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert [int(row["step"]) for row in rows_of(out)] == list(range(5))
    assert not (out / "final.safetensors").exists()
    monkeypatch.undo()
    train([*options, "--out", str(out), "--resume"])
    for name in ("final.safetensors", "best.safetensors", "train.csv"):  # of the rows after step 3, each one once
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize("attack", ["pgd", "none"])
def test_diverging_training_is_stopped_by_step(attack, options, train, tmp_path, stops):
    argv = [*options, "--train.lr", "1e30", "--train.warmup", "0", "--attack.name", attack]
    message = stops(train, [*argv, "--data.tune_fraction", "0", "--out", str(tmp_path / "run")])
    assert "step 1:" in message and "--train.lr" in message


def test_tensorboard_gets_every_row(options, train, rows_of, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train([*options, "--train.steps", "2", "--log.tensorboard", "--out", str(out)])
    found = EventAccumulator(str(out)).Reload()
    rows = rows_of(out)
    seen = {event.step: event.value for event in found.Scalars("loss")}
    assert seen == pytest.approx({int(row["step"]): float(row["loss"]) for row in rows})
    assert "tune_robust_mca" in found.Tags()["scalars"]


@pytest.mark.parametrize(
    ("module", "words"), [("wandb", ["--log.wandb", "mine"]), ("torch.utils.tensorboard", ["--log.tensorboard"])]
)
def test_missing_logger_is_one_line_and_leaves_no_run(module, words, options, train, tmp_path, monkeypatch, stops):
    monkeypatch.setitem(sys.modules, module, None)
    message = stops(train, [*options, *words, "--out", str(tmp_path / "run")])
    assert 'pip install "hsat[train]"' in message and words[0] in message and "\n" not in message
    assert not (tmp_path / "run" / "run.json").exists()


def test_wandb_gets_settings_and_rows(options, train, tmp_path, monkeypatch):
    asked, rows = [], []
    session = types.SimpleNamespace(log=lambda numbers, step: rows.append((step, numbers)))
    fake = types.SimpleNamespace(init=lambda **options: asked.append(options) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train([*options, "--train.steps", "2", "--log.wandb", "mine", "--out", str(tmp_path / "run")])
    assert asked[0]["project"] == "mine" and asked[0]["config"]["attack"]["eps"] == 8 / 255
    assert [step for step, _ in rows] == [0, 1] and {"loss", "lr", "eps"} <= rows[0][1].keys()


def test_a_run_with_the_preset_trains_and_says_so(options, train, trained, tmp_path):
    train([*options, "--preset", "paper", "--train.steps", "4", "--out", tmp_path / "run"])
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["preset"] == "paper"
    published, usual = (load_encoder(folder / "final.safetensors") for folder in (tmp_path / "run", trained))
    assert fingerprint_weights(published) != fingerprint_weights(usual)


def test_patches_of_another_size_are_refused_with_the_way_out(options, train, tmp_path, stops):
    message = stops(train, [*options, "--preset", "paper", "--data.image_size", "40", "--out", tmp_path / "run"])
    assert "a patch of 32 x 32 pixels that is not cropped" in message and "image_size=32" in message


def test_another_preset_is_refused(train, stops):
    message = stops(train, ["--preset", "published"])
    assert "preset" in message and "paper" in message


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--attack.name", "warm", "--data.augmentation", "v0"], ["--data.augmentation none"]),
        (["--attack.name", "warm", "--data.augmentation", "none", "--data.ids", "slots"], ["true ids"]),
        (["--attack.name", "free", "--train.clean"], ["leave out --train.clean"]),
        (["--attack.name", "free", "--train.precision", "16"], ["--train.precision bf16"]),
        (["--attack.name", "free", "--attack.levels", "pt"], ["--attack.levels p_s_pt"]),
        (["--attack.name", "free", "--train.accumulate", "2"], ["without --train.accumulate"]),
    ],
)
def test_what_cannot_go_together_is_named(argv, named, options, train, tmp_path, stops):
    message = stops(train, [*options, *argv, "--out", tmp_path / "run"])
    assert all(part in message for part in named), message


def test_a_paper_scale_run_asks_for_its_data(train, stops, tmp_path):
    argv = ["--recipe", "experiment-2", "--data.root", "/data/opensrh", "--out", tmp_path / "run"]
    assert "/data/opensrh" in stops(train, argv) and not (tmp_path / "run").exists()
