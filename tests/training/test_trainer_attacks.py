"""train_hsat.py with the cheaper inner maximisations: they run, log, resume bit for bit, and refuse what cannot be."""

from __future__ import annotations

import csv

import pytest


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train(argv):
    from hsat.cli.train import main

    main([*argv])


QUICK = ["--data.tune_fraction", "0", "--train.steps", "3", "--train.save_every", "2"]
STILL = ["--data.augmentation", "none"]
WAYS = {
    "fgsm_rs": ["--attack.check_every", "2"],
    "nfgsm": ["--attack.check_every", "0"],
    "free": ["--attack.replays", "2"],
    "warm": ["--attack.steps", "1", *STILL],
}


@pytest.mark.parametrize("name", WAYS)
def test_a_resumed_run_ends_with_the_same_bytes(name, options, tmp_path, monkeypatch):
    import hsat.training.trainer as trainer

    argv = [*options, *QUICK, "--attack.name", name, *WAYS[name]]
    train([*argv, "--out", str(tmp_path / "whole")])
    honest, seen = trainer.Trainer.train_step, []

    def stopping(self, *args):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return honest(self, *args)

    monkeypatch.setattr(trainer.Trainer, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train([*argv, "--out", str(tmp_path / "parts")])
    monkeypatch.undo()
    train([*argv, "--out", str(tmp_path / "parts"), "--resume"])
    for file in ("final.safetensors", "train.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    rows = rows_of(tmp_path / "whole" / "train.csv")
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert all(float(row["eps"]) == 8 / 255 for row in rows)
    assert ("single_step_share" in rows[0]) == (name == "fgsm_rs")
    if name == "fgsm_rs":
        shares = [float(row["single_step_share"]) for row in rows]
        assert shares[0] == shares[1] != shares[2], "a check at steps 0 and 2"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--attack.name", "warm", "--data.augmentation", "v0"], "--data.augmentation none"),
        (["--attack.name", "warm", *STILL, "--data.ids", "slots"], "true ids"),
        (["--attack.name", "free", "--train.clean"], "leave out --train.clean"),
        (["--attack.name", "free", "--train.precision", "16"], "--train.precision bf16"),
        (["--attack.name", "free", "--attack.levels", "pt"], "--attack.levels p_s_pt"),
        (["--attack.name", "free", "--train.accumulate", "2"], "without --train.accumulate"),
    ],
)
def test_what_cannot_go_together_is_named(argv, named, options, tmp_path, stops):
    assert named in stops(train, [*options, *QUICK, *argv, "--out", str(tmp_path / "run")])
