"""The trainer's ways to compute: several ranks and parts, float16, compiled code, shortage of memory."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

STEPS = "--train.steps 4 --train.eval_every 2 --train.save_every 2".split()


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """pretended(rank, *argv): the trainer of one of two ranks, in a process group that is really of one."""
    import torch.distributed as dist

    import hsat.training.optimization as optimization
    import hsat.training.trainer as trainer
    from hsat.cli.encoders import new_encoder
    from hsat.cli.train import hold_out, load_settings
    from hsat.data import read_opensrh

    def build(rank, *argv):
        settings = load_settings([*map(str, argv), "--out", str(tmp_path / f"{rank}{len(list(tmp_path.iterdir()))}")])
        cohort = hold_out(read_opensrh(settings.data.root), settings)
        for module in (trainer, optimization):
            monkeypatch.setattr(module, "world_rank", lambda: rank)
            monkeypatch.setattr(module, "world_size", lambda: 2)
        encoder = new_encoder(settings.model, seed=settings.seed)
        return trainer.Trainer(encoder, cohort, settings.train_config(), out=settings.out)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build
    dist.destroy_process_group()


def test_options_for_several_ranks_reach_the_trainer(options, pretended):
    assert pretended(0, *options).optimization.loss.gather
    assert not pretended(0, *options, "--train.global_negatives", "false").optimization.loss.gather
    with pytest.raises(ValueError, match="synchronised BatchNorm needs GPUs: torch has none for the CPU"):
        pretended(0, *options, "--train.sync_norm", "true")
    with pytest.raises(ValueError, match=r"--attack.name warm .* \(got 2 rank\(s\), --train.accumulate 1\)"):
        pretended(0, *options, "--attack.name", "warm", "--data.augmentation", "none")


def test_ranks_train_on_other_patients_and_other_views(options, pretended):
    """Each draws its own share of the batch; where augmentation is off, what they see is the patch itself."""
    mine, other = (next(iter(pretended(rank, *options).loader)) for rank in range(2))
    again = next(iter(pretended(1, *options).loader))
    assert torch.equal(other.images, again.images), "draws depend on names and seeds"
    assert not {*mine.patient.tolist()} & {*other.patient.tolist()}
    assert not torch.equal(mine.images, other.images)
    views = {image.numpy().tobytes() for batch in (mine, other) for image in batch.images}
    assert len(views) == len(mine) + len(other), "every view is augmented by draws of its own"


def test_what_ranks_and_parts_cannot_share_is_refused(options, train, tmp_path, stops):
    message = stops(train, [*options, "--train.accumulate", "3", "--out", tmp_path / "run"])
    assert "--train.batch_patients=2" in message and "use 3" in message
    for name in ("warm", "free"):
        argv = [*options, "--attack.name", name, "--data.augmentation", "none", "--train.accumulate", "2"]
        message = stops(train, [*argv, "--out", tmp_path / "run"])
        assert f"--attack.name {name}" in message and "without --train.accumulate" in message and "fgsm_rs" in message
    with pytest.raises(SystemExit) as stop:
        train([*options, "--train.max_memory", "much", "--out", tmp_path / "run"])
    assert "8GB" in str(stop.value.code)
    assert not (tmp_path / "run").exists()


def test_parts_resume_bit_for_bit(options, train, tmp_path, monkeypatch):
    import hsat.training.trainer as trainer

    argv = [*options, *STEPS, "--train.accumulate", "2", "--data.tune_fraction", "0", "--attack.steps", "1", "--out"]
    train([*argv, tmp_path / "whole"])
    honest = trainer.Trainer.step

    def stopped(self, batch):
        if self.done == 3:
            raise KeyboardInterrupt
        return honest(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "step", stopped)
        train([*argv, tmp_path / "run"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 2 and not (tmp_path / "run" / "final.safetensors").exists()
    train([*argv, tmp_path / "run", "--resume"])
    for name in ("final.safetensors", "train.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_float16_trains_and_keeps_the_scale(options, train, rows_of, tmp_path):
    """The first steps are skipped until the scale fits: after two of them nothing would have been trained."""
    argv = [*options, "--train.steps", "6", "--train.precision", "16", "--data.tune_fraction", "0", "--out", tmp_path]
    train([*argv, "--resume"])
    assert "0.0" in {row["skipped"] for row in rows_of(tmp_path)}
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["extra"]["scaler"]["scale"] > 0
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    assert all(value.dtype != torch.float16 for value in state["model"].values())


def test_length_and_memory_are_said(options, train, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hsat")
    loud = [word for word in options if word != "--quiet"]
    argv = [*loud, "--train.steps", "4", "--data.tune_fraction", "0", "--attack.steps", "1"]
    train([*argv, "--train.max_memory", "1MB", "--out", tmp_path / "run"])
    shown = caplog.text
    assert "s per step (over 2 steps)" in shown and "for 1 more steps" in shown
    assert "of --train.max_memory 1 MB; " in shown and "were in use before it" in shown and "lower" not in shown


def test_shortage_of_memory_names_what_to_lower(options, train, tmp_path, stops, monkeypatch):
    import hsat.training.optimization as optimization

    def full(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(optimization, "adversarial_step", full)
    message = stops(train, [*options, "--out", tmp_path / "run"])
    for words in (
        "out of memory",
        "--train.accumulate (now 1",
        "--train.batch_patients (now 2",
        "--data.image_size (32)",
    ):
        assert words in message


@pytest.mark.slow
def test_compiled_training_is_close_to_eager(options, trained, train, rows_of, tmp_path, capfd):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler for C++")
    argv = [*options, "--train.steps", "1", "--data.tune_fraction", "0", "--train.warmup", "0"]
    train([*argv, "--out", tmp_path / "eager"])
    train([*argv, "--train.compile", "--out", tmp_path / "compiled"])
    assert "compile, outer pass: 1 graph(s), no graph break" in capfd.readouterr().err
    eager, compiled = (float(rows_of(tmp_path / name)[0]["loss"]) for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)
