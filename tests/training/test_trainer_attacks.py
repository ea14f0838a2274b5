"""Trainings with the cheaper inner maximisations: they run, log, and resume bit for bit."""

from __future__ import annotations

import pytest

from hsat.training.config import TrainConfig

FAST = {"steps": 3, "batch_patients": 2, "save_every": 2, "views": {"image_size": 32, "augmentation": "none"}}
ATTACKS = {
    "fgsm_rs": {"check_every": 2},
    "nfgsm": {"check_every": 0},
    "free": {"replays": 2},
    "warm": {"steps": 1},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_resumed_run_ends_with_the_same_bytes(name, make_trainer, root, rows_of, tmp_path):
    from hsat.data import read_opensrh

    config = TrainConfig(**FAST, attack={"name": name, **ATTACKS[name]})
    options = {"cohort": read_opensrh(root)}
    make_trainer("whole", config, **options).fit()
    part = make_trainer("parts", config, **options)
    honest = part.step

    def step(batch):
        if part.done == 2:
            raise KeyboardInterrupt
        return honest(batch)

    part.step = step
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    make_trainer("parts", config, **options, resume=True).fit()
    for file in ("final.safetensors", "train.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    rows = rows_of(tmp_path / "whole")
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert all(float(row["eps"]) == 8 / 255 for row in rows)
    assert ("single_step_share" in rows[0]) == (name == "fgsm_rs")
    if name == "fgsm_rs":
        shares = [float(row["single_step_share"]) for row in rows]
        assert shares[0] == shares[1] != shares[2], "a check at steps 0 and 2"
