"""The commands on a GPU, as a user would run them: `python -m pytest -m gpu`."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import pytest

from hsat.eval import read_records
from hsat.models import load_encoder

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHORT = "--train.steps 4 --train.eval_every 2 --train.save_every 2 --attack.steps 2".split()
STEPS = [*SHORT, "--device", DEVICE]


def train(argv):
    from hsat.cli.train import main

    main([*map(str, argv)])


def rows_of(folder):
    with (folder / "train.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "chosen",
    [
        (),
        ("--train.precision", "bf16", "--train.channels_last", "true"),
        ("--train.precision", "16"),
        ("--data.packed", "auto", "--data.augment", "items", "--data.workers", "2"),
        ("--train.accumulate", "2"),
        ("--attack.name", "free", "--attack.replays", "2"),
        ("--attack.name", "nfgsm", "--attack.check_every", "2"),
        ("--model.dual_norm", "true", "--train.clean", "true"),
    ],
    ids=lambda chosen: " ".join(chosen) or "float32",
)
def test_trainings_run_and_are_written(chosen, options, tmp_path):
    train([*options, *STEPS, *chosen, "--out", tmp_path / "run"])
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    encoder = load_encoder(tmp_path / "run" / "final.safetensors")
    assert all(bool(p.isfinite().all()) for p in encoder.parameters())


@pytest.mark.slow
def test_compiled_training_runs(options, tmp_path):
    train([*options, *STEPS, "--train.compile", "true", "--train.precision", "bf16", "--out", tmp_path / "run"])
    assert len(rows_of(tmp_path / "run")) == 4


def test_the_first_step_is_that_of_the_cpu(options, tmp_path):
    """Same draws, same batch, same noise: the losses differ by rounding alone (and convolutions by ten bits)."""
    train([*options, *STEPS, "--out", tmp_path / "gpu"])
    train([*options, *SHORT, "--device", "cpu", "--out", tmp_path / "cpu"])
    here, there = rows_of(tmp_path / "cpu")[0], rows_of(tmp_path / "gpu")[0]
    assert there["loss"] == pytest.approx(here["loss"], rel=0.05)


class PowerCut(BaseException):
    """Nothing catches it."""


def test_a_run_goes_on_from_its_checkpoint(options, tmp_path, monkeypatch):
    import hsat.training.trainer as trainer

    step = trainer.Trainer.step

    def until_the_third(self, batch):
        if self.done == 3:
            raise PowerCut
        return step(self, batch)

    train([*options, *STEPS, "--out", tmp_path / "whole"])
    part = [*options, *STEPS, "--out", tmp_path / "part"]
    monkeypatch.setattr(trainer.Trainer, "step", until_the_third)
    with pytest.raises(PowerCut):
        train(part)
    monkeypatch.setattr(trainer.Trainer, "step", step)
    train([*part, "--resume"])
    assert [row["step"] for row in rows_of(tmp_path / "part")] == [0, 1, 2, 3]
    for here, there in zip(rows_of(tmp_path / "part"), rows_of(tmp_path / "whole"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=0.05)


def test_torchrun_with_one_rank_over_nccl(options, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "hsat", "train"]
    done = subprocess.run(
        [sys.executable, *words, *options, *STEPS, "--out", str(tmp_path / "run")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_evaluation_on_the_gpu_is_that_of_the_cpu(trained, root, tmp_path):
    from hsat.cli.evaluate import main

    quick = "--data.image_size 32 --steps 2 --bootstrap 0 --gallery 0 --diagnose 0 --quiet --k 5 --eps 8/255".split()
    found = []
    for device in ("cpu", DEVICE):
        out = tmp_path / f"{len(found)}"
        argv = ["--checkpoint", trained / "final.safetensors", "--data.root", root, *quick, "--device", device]
        main([*map(str, [*argv, "--attacks", "pgd", "--out", out])])
        records = read_records(out / "records.jsonl")
        found.append({(r.attack_name, r.level, r.metric): r.value for r in records})
        assert json.loads((out / "run.json").read_text())["settings"]["device"] == device
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, abs=0.35), key  # a few patches: one more or less is much
