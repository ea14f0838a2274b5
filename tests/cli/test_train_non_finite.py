"""hsat train where a number is not finite: nothing is spoiled, the step is named, and the run can go on."""

from __future__ import annotations

import json
import logging
import math
import shlex

import pytest
import torch
from safetensors.torch import load_file

PLANTED = """
import sys
import hsat.cli.train as command
from hsat.training.trainer import Trainer

class Planted(Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        rank, step, value = sys.argv[1:4]
        if int(rank) == self.rank:
            weight = self.encoder.head.layers[0].weight
            weight.register_hook(lambda grad: grad * float(value) if self.done == int(step) else grad)

command.Trainer = Planted
command.main(sys.argv[4:])
"""


def assert_kept(out, step):
    """last.pt is that of this step and finite; there is no final encoder, and none half written."""
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["step"] == step
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    moments = [value for state in state["optimizer"]["state"].values() for value in state.values()]
    assert all(bool(value.isfinite().all()) for value in moments)
    assert not (out / "final.safetensors").exists() and not list(out.glob(".*"))


@pytest.fixture
def plant(monkeypatch):
    """plant(change): `change(trainer)` is called with every trainer that a run makes."""
    import hsat.cli.train as command
    from hsat.training.trainer import Trainer

    def use(change):
        class Planted(Trainer):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                change(self)

        monkeypatch.setattr(command, "Trainer", Planted)

    return use


def spoil_gradient(value, steps):
    """In these steps one parameter's gradient holds this value, and the loss is finite."""

    def change(trainer):
        weight = trainer.encoder.backbone.stem.conv.weight

        def spoiled(grad):
            if trainer.done in steps:
                grad = grad.clone()
                grad.view(-1)[-1] = value
            return grad

        weight.register_hook(spoiled)

    return change


def test_a_nan_gradient_ends_the_process_and_its_command_goes_on(
    options, launch, finish, train, rows_of, tmp_path, caplog
):
    (tmp_path / "script.py").write_text(PLANTED)
    argv = [*options, "--out", str(tmp_path / "run")]
    process = launch("script.py", "0", "5", "nan", *argv, cwd=tmp_path)
    shown = finish(process)
    assert process.returncode == 1 and "Traceback" not in shown, shown
    for part in ("error: step 5:", "head.layers.0.weight", "after 3 steps", str(tmp_path / "run" / "last.pt")):
        assert part in shown
    assert_kept(tmp_path / "run", 3)
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == list(range(5))

    program, command, *words = shlex.split(shown.strip().splitlines()[-1])
    assert (program, command) == ("hsat", "train") and "--resume" in words
    assert words[words.index("--train.lr") + 1] == "0.0001"
    caplog.set_level(logging.INFO, logger="hsat")
    train(words)
    assert "from step 3 on train.lr is 0.0001; it was 0.001" in caplog.text
    rows = rows_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert [float(row["lr"]) for row in rows] == pytest.approx(
        [0.5 * (0.001 if step < 3 else 0.0001) * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    )
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["changes"] == [{"step": 3, "settings": {"train.lr": [0.001, 0.0001]}}]
    assert about["settings"]["train"]["lr"] == 0.001
    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "run" / "final.safetensors").values())


@pytest.mark.parametrize(
    "chosen",
    [
        ("--train.accumulate", "2"),
        ("--attack.name", "free", "--attack.replays", "2"),
        ("--attack.name", "none", "--model.dual_norm"),
        ("--train.precision", "bf16", "--train.clean"),
    ],
    ids=["parts", "free", "baseline with two BatchNorms", "bfloat16, clean images"],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_bad_gradient_is_not_stepped_on(value, chosen, options, train, tmp_path, plant, stops):
    plant(spoil_gradient(value, {4}))
    argv = [*options, *chosen, "--data.tune_fraction", "0", "--train.eval_every", "8"]
    message = stops(train, [*argv, "--out", str(tmp_path / "run")])
    assert "step 4:" in message and "in 1 of " in message and "backbone.stem.conv.weight (1 of " in message
    assert_kept(tmp_path / "run", 3)


@pytest.mark.slow
def test_before_the_first_checkpoint_the_command_starts_over(
    options, train, rows_of, tmp_path, plant, stops, monkeypatch
):
    plant(spoil_gradient(math.nan, {1}))
    argv = [*options, "--train.lr=0.01", "--data.tune_fraction", "0", "--out", str(tmp_path / "run")]
    message = stops(train, argv)
    assert "step 1:" in message and "nothing was saved" in message and "--train.save_every 3" in message
    monkeypatch.undo()
    words = shlex.split(message.splitlines()[-1])[2:]
    assert "--train.lr=0.01" not in words
    train(words)
    assert float(rows_of(tmp_path / "run")[0]["lr"]) == 0.001
    changes = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    assert changes == [{"step": 0, "settings": {"train.lr": [0.01, 0.001]}}]


@pytest.mark.slow
def test_two_ranks_end_with_one_message(options, torchrun, finish, tmp_path):
    (tmp_path / "script.py").write_text(PLANTED)
    argv = [*options, "--data.tune_fraction", "0", "--out", str(tmp_path / "run")]
    process = torchrun("script.py", "1", "4", "inf", *argv, cwd=tmp_path)
    shown = finish(process)
    assert process.returncode == 1, shown
    assert shown.count("error: step 4:") == 1 and "head.layers.0.weight" in shown and "after 3 steps" in shown
    assert "torchrun --nproc_per_node=2 -m hsat train " in shown
    assert_kept(tmp_path / "run", 3)


def test_spoiled_statistics_are_not_saved(options, train, tmp_path, plant, stops):
    """BatchNorm's running mean is NaN after the last step, whose loss and gradients are finite."""

    def change(trainer):
        honest = trainer.step
        names[:] = [n for n, m in trainer.encoder.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]

        def step(batch):
            row = honest(batch)
            if row["step"] == 7:
                trainer.encoder.get_submodule(names[0]).running_mean[0] = math.nan
            return row

        trainer.step = step

    names: list[str] = []
    plant(change)
    for tuned in ([], ["--data.tune_fraction", "0"]):
        out = tmp_path / f"run{len(tuned)}"
        message = stops(train, [*options, *tuned, "--attack.name", "none", "--out", str(out)])
        assert f"{names[0]}.running_mean (1 of " in message and "after 6 steps" in message
        assert_kept(out, 6)


def test_weights_that_a_step_made_infinite_are_not_saved(options, train, tmp_path, plant, stops):
    """The learning rate overflows in the last step: there is no loss after it that would show it."""
    argv = ["--train.lr", "1e39", "--train.warmup", "0", "--train.steps", "1", "--data.tune_fraction", "0"]
    message = stops(train, [*options, *argv, "--attack.name", "none", "--out", str(tmp_path / "run")])
    assert "not finite in" in message and "weight" in message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "train.csv"}


HALF = ("--train.precision", "16", "--attack.name", "none")


def test_skipped_float16_steps_are_counted_and_said(options, train, rows_of, tmp_path, plant, caplog):
    """Some overflow by themselves, until the scale of the loss fits this encoder."""
    caplog.set_level(logging.INFO, logger="hsat")
    plant(spoil_gradient(math.inf, {6}))
    train([*options, *HALF, "--out", tmp_path / "run"])
    skipped = [int(float(row["skipped"])) for row in rows_of(tmp_path / "run")]
    assert skipped[6] == 1 and 0 < sum(skipped) < 8
    assert f"note: {sum(skipped)} of 8 steps were skipped" in caplog.text
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["extra"]["skipped"] == sum(skipped)
    assert state["extra"]["scaler"]["scale"] == 2.0 ** (16 - sum(skipped))


def test_a_float16_run_whose_every_step_was_skipped_says_so(options, train, tmp_path, plant, stops):
    plant(spoil_gradient(math.inf, range(8)))
    argv = [*options, *HALF, "--train.steps", "3", "--out", str(tmp_path / "run")]
    message = stops(train, argv)
    assert "every one of the 3 steps was skipped" in message and "--train.precision bf16" in message
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert stops(train, [*argv, "--resume"]) == message


def test_float16_gradients_that_no_scale_helps_end_the_run(options, train, tmp_path, plant, stops, monkeypatch):
    def change(trainer):
        trainer.optimization.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        spoil_gradient(math.nan, range(9))(trainer)

    plant(change)
    argv = [*options, *HALF, "--train.steps", "5", "--train.save_every", "1", "--data.tune_fraction", "0"]
    message = stops(train, [*argv, "--out", str(tmp_path / "run")])
    assert "step 2:" in message and "scale 0.5" in message and "3 of 3 steps" in message
    assert "backbone.stem.conv.weight" in message
    assert_kept(tmp_path / "run", 2)
    monkeypatch.undo()
    words = shlex.split(message.splitlines()[-1])[2:]
    assert words[-4:] == ["--train.precision", "bf16", "--change", "train.precision"]
    train(words)
    assert (tmp_path / "run" / "final.safetensors").exists()


@pytest.mark.parametrize("parts", ["1", "2"])
def test_an_encoder_whose_output_is_detached_is_refused(parts, options, train, tmp_path, plant, stops):
    plant(lambda trainer: trainer.encoder.register_forward_hook(lambda module, inputs, output: output.detach()))
    argv = ["--attack.name", "none", "--train.accumulate", parts, "--out", str(tmp_path / "run")]
    message = stops(train, [*options, *argv])
    assert "gradient" in message and "detached" in message
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "last.pt").exists()


def test_a_frozen_encoder_is_refused_before_anything_is_written(options, train, tmp_path, stops, monkeypatch):
    import hsat.cli.train as command

    honest = command.new_encoder
    monkeypatch.setattr(command, "new_encoder", lambda *args, **how: honest(*args, **how).requires_grad_(False))
    message = stops(train, [*options, "--out", str(tmp_path / "run")])
    assert "requires_grad" in message and "backbone.stem.conv.weight" in message
    assert not (tmp_path / "run").exists()


def test_another_learning_rate_needs_consent(options, train, tmp_path, stops):
    argv = [*options, "--train.steps", "2", "--attack.name", "none", "--out", str(tmp_path / "run")]
    train(argv)
    other = [*argv, "--resume", "--train.lr", "0.0005"]
    message = stops(train, other)
    assert "train.lr was 0.001, now 0.0005" in message and "--change train.lr" in message
    message = stops(train, [*other, "--seed", "3", "--change", "train.lr"])
    assert "seed was 0, now 3" in message and "train.lr was" not in message
    train([*other, "--change", "train.lr"])
