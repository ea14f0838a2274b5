"""The trainer as a library: fit, a loop of one's own, a validation of one's own, and a run that goes on."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from hsat.data import read_opensrh
from hsat.fingerprints import fingerprint_weights
from hsat.models import load_encoder
from hsat.training.config import InnerAttackConfig, TrainConfig, ViewConfig
from hsat.training.folder import OccupiedRunError, SettingsChangedError

FAST = {"steps": 5, "batch_patients": 2, "eval_every": 2, "save_every": 3, "views": {"image_size": 32}}
TINY = TrainConfig(**FAST, attack={"steps": 2})
BASELINE = TrainConfig(**FAST, attack={"name": "none"})


def test_fit_trains_and_returns_the_best_encoder(make_trainer, tmp_path, rows_of):
    trainer = make_trainer("run", TINY)
    assert (trainer.done, trainer.total, trainer.epochs) == (0, 5, 3)
    path = trainer.fit()
    assert path == tmp_path / "run" / "best.safetensors" and trainer.done == 5
    assert [int(row["step"]) for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3, 4]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["train"]["attack"]["steps"] == 2 and about["settings"]["encoder"]["name"] == "test_byobnet"
    final = load_encoder(tmp_path / "run" / "final.safetensors")
    assert fingerprint_weights(final) == fingerprint_weights(trainer.encoder.eval())


def test_a_warm_up_longer_than_the_run_is_refused(make_trainer, tmp_path):
    attack = {"steps": 2, "warmup_epochs": 50}
    with pytest.raises(ValueError, match=r"warmup_epochs 50 is longer than the run of 3 epochs .* give at most 3"):
        make_trainer("run", TrainConfig(**FAST, attack=attack))
    assert not (tmp_path / "run").exists()
    trainer = make_trainer("run", TrainConfig(**FAST, attack=attack | {"warmup_epochs": 3}))
    assert trainer.attack(2).threat.eps == 8 / 255
    make_trainer("baseline", TrainConfig(**FAST, attack=attack | {"name": "none"}))


def test_a_loop_of_ones_own_is_fit_bit_for_bit(make_trainer):
    fitted, looped = make_trainer("fit", TINY), make_trainer("loop", TINY)
    fitted.fit()
    rows = [looped.step(batch) for batch in looped.batches()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and looped.done == looped.total
    assert {"loss", "lr", "eps", "strength", "epoch", "adversarial_patch"} <= rows[0].keys()
    for name, value in fitted.encoder.state_dict().items():
        assert torch.equal(value, looped.encoder.state_dict()[name]), name


def test_a_loop_of_ones_own_may_stop_save_and_go_on(make_trainer):
    whole, begun = make_trainer("whole", BASELINE), make_trainer("parts", BASELINE)
    whole.fit()
    for batch in begun.batches():
        begun.step(batch)
        if begun.done == 3:
            break
    begun.save()
    resumed = make_trainer("parts", BASELINE, resume=True)
    assert resumed.done == 3
    for batch in resumed.batches():
        resumed.step(batch)
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[name]), name


def test_ones_own_validation_chooses_the_best_encoder(make_trainer, tmp_path, rows_of):
    scores = iter((0.2, 0.9, 0.5))
    seen = []

    def validate(encoder):
        seen.append(fingerprint_weights(encoder))
        return {"score": next(scores), "mine": float(len(seen))}

    path = make_trainer("run", BASELINE, validate=validate).fit()
    assert path.name == "best.safetensors" and fingerprint_weights(load_encoder(path)) == seen[1] != seen[2]
    assert [row["mine"] for row in rows_of(tmp_path / "run")] == ["", "1.0", "", "2.0", "3.0"]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["score"], best["mine"]) == (4, 0.9, 2.0)


def test_without_held_out_patients_the_final_encoder_is_returned(make_trainer, root, tmp_path):
    path = make_trainer("run", BASELINE, cohort=read_opensrh(root)).fit()
    assert path == tmp_path / "run" / "final.safetensors" and not (tmp_path / "run" / "best.safetensors").exists()


def test_a_folder_with_a_run_is_refused_and_other_settings_are_named(make_trainer):
    make_trainer("run", BASELINE).fit()
    with pytest.raises(OccupiedRunError, match="holds a run already"):
        make_trainer("run", BASELINE)
    other = BASELINE.model_copy(update={"lr": 0.5})
    with pytest.raises(SettingsChangedError, match=r"train\.lr was 0\.001, now 0\.5") as error:
        make_trainer("run", other, resume=True)
    assert error.value.names == ("train.lr",)
    assert make_trainer("run", BASELINE, resume=True).done == 5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attack": {"name": "warm"}}, "augmentation none and true ids"),
        ({"attack": {"name": "warm"}, "views": {"augmentation": "none", "ids": "slots"}}, "true ids"),
        ({"attack": {"name": "free"}, "clean": True}, "leave out clean"),
        ({"attack": {"name": "free"}, "precision": "16"}, "precision bf16"),
        ({"attack": {"name": "free", "levels": "pt"}}, "levels p_s_pt"),
        ({"steps": 3, "epochs": 3}, "epochs or steps, not both"),
        ({"attack": {"eps": 8}}, "8/255"),
        ({"lrr": 1}, "lrr"),
        ({"max_memory": "much"}, "8GB"),
    ],
)
def test_configurations_that_cannot_be_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**config)


def test_named_configurations():
    assert TrainConfig.hsat() == TrainConfig() and TrainConfig.hidisc(steps=3).attack.name == "none"
    assert TrainConfig(attack={"eps": "4/255"}).attack == InnerAttackConfig(eps=4 / 255)
    assert TrainConfig().views == ViewConfig() and TrainConfig().attack.eps == 8 / 255


def test_two_batchnorm_branches_resume_bit_for_bit(make_trainer, tmp_path):
    config = TrainConfig(**FAST | {"steps": 3, "save_every": 1}, clean=True, attack={"steps": 2})
    make_trainer("whole", config, dual_norm=True).fit()
    part = make_trainer("parts", config, dual_norm=True)
    honest = part.step

    def step(batch):
        if part.done == 2:
            raise KeyboardInterrupt
        return honest(batch)

    part.step = step
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    make_trainer("parts", config, dual_norm=True, resume=True).fit()
    for name in ("final.safetensors", "best.safetensors", "train.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    normal, pgd = load_encoder(tmp_path / "parts" / "last.pt").backbone.stem.bn.bn_list
    assert int(normal.num_batches_tracked) == int(pgd.num_batches_tracked) == 3
    assert not torch.equal(normal.running_mean, pgd.running_mean)


def test_the_library_prints_nothing(make_trainer, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="hsat"):
        make_trainer("run", BASELINE, progress=False).fit()
    assert capsys.readouterr() == ("", "") and caplog.text == ""


def test_options_that_change_no_number_may_differ_in_a_resumed_run(make_trainer):
    make_trainer("run", BASELINE).fit()
    views = BASELINE.views.model_copy(update={"workers": 1})
    other = BASELINE.model_copy(update={"views": views, "save_every": 1, "max_memory": "8GB"})
    assert make_trainer("run", other, resume=True).done == 5


@pytest.mark.parametrize("target", ["gone", "last.pt"])
def test_a_state_behind_a_link_that_leads_nowhere_is_no_new_beginning(make_trainer, tmp_path, target):
    make_trainer("run", BASELINE)
    (tmp_path / "run" / "last.pt").symlink_to(target)
    with pytest.raises((ValueError, FileNotFoundError), match=r"last\.pt.* link"):
        make_trainer("run", BASELINE, resume=True)


def test_the_options_of_the_run_stand_above_those_of_its_file(make_trainer, tmp_path):
    trainer, path = make_trainer("run", BASELINE), tmp_path / "run" / "last.pt"
    trainer.step(next(iter(trainer.batches())))
    trainer.save()
    content, groups = torch.load(path, weights_only=True), trainer.optimization.optimizer.state_dict()["param_groups"]
    content["optimizer"]["param_groups"][0].update(lr=1e9, weight_decay=1e30, betas=[0.0, 0.0])
    torch.save(content, path)
    resumed = make_trainer("run", BASELINE, resume=True)
    assert resumed.optimization.optimizer.state_dict()["param_groups"] == groups
    content["scheduler"]["last_epoch"] = 10**6
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.pt is damaged: its scheduler stands at step 1000000, it at 1"):
        make_trainer("run", BASELINE, resume=True)
    torch.save(content | {"scheduler": content["scheduler"] | {"last_epoch": 1}, "extra": {"best": torch.nan}}, path)
    with pytest.raises(ValueError, match=r"last\.pt is damaged.*best is nan"):
        make_trainer("run", BASELINE, resume=True)
