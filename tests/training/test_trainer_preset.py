"""The preset "paper" in training: which options it sets, and that single options win."""

from __future__ import annotations

import pytest

from hsat.data import read_opensrh
from hsat.training.config import TrainConfig

SMALL = {"batch_patients": 2, "epochs": 1600}


def choices(trainer):
    views = trainer.loader.dataset
    batch = next(iter(trainer.batches()))
    slots = batch.patient.unique().tolist() == list(range(2)) and batch.slide.unique().tolist() == list(range(4))
    return slots, trainer.sampler.order, views.transform.uncropped, views.transform.static_epochs


@pytest.mark.parametrize(
    ("preset", "views", "plateau", "expected"),
    [
        (None, {}, None, (False, "spread", "resize", 0)),
        ("paper", {}, None, (True, "plain", "keep", 2)),  # 1600 epochs have plateaus of two
        ("paper", {}, 50, (True, "plain", "keep", 50)),
        ("paper", {"dynamic": False}, None, (True, "plain", "keep", 0)),
        ("paper", {"augmentation": "static"}, None, (True, "plain", "keep", 0)),
        ("paper", {"ids": "true", "static_epochs": 7}, None, (False, "plain", "keep", 7)),
        (None, {"order": "plain", "uncropped": "keep"}, None, (False, "plain", "keep", 0)),
        (None, {"ids": "slots"}, None, (True, "spread", "resize", 0)),
    ],
)
def test_what_the_preset_sets_and_what_wins(preset, views, plateau, expected, make_trainer, root):
    config = TrainConfig(**SMALL, views={"image_size": 32, **views}, plateau=plateau, preset=preset)
    assert choices(make_trainer("run", config, cohort=read_opensrh(root))) == expected
