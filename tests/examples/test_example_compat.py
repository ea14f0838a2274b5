"""--compat paper in training: which options it sets, that single options win, and that a run with it trains."""

from __future__ import annotations

import json

import pytest

from hsat.data import read_opensrh
from hsat.fingerprints import fingerprint_weights


def trainer(root, *argv):
    from train_hsat import TrainHSAT
    from trainer import Trainer

    small = (
        "--data.image_size 32 --model.backbone test_byobnet --model.embedding_dim 16 --train.batch_patients 2".split()
    )
    settings = TrainHSAT.load(["--data.root", str(root), *small, "--train.epochs", "1600", *argv])
    return Trainer(settings, read_opensrh(root))


def choices(made):
    views = made.loader.dataset
    slots = type(made.loader.collate_fn).__name__ == "_SlotIds"
    return slots, made.sampler.order, views.transform.uncropped, views.transform.static_epochs


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (False, "spread", "resize", 0)),
        (["--compat", "paper"], (True, "plain", "keep", 2)),  # 1600 epochs have plateaus of two
        (["--compat", "paper", "--train.plateau", "50"], (True, "plain", "keep", 50)),
        (["--compat", "paper", "--data.dynamic", "false"], (True, "plain", "keep", 0)),
        (["--compat", "paper", "--data.augmentation", "static"], (True, "plain", "keep", 0)),
        (["--compat", "paper", "--data.ids", "true", "--data.static_epochs", "7"], (False, "plain", "keep", 7)),
        (["--data.order", "plain", "--data.uncropped", "keep"], (False, "plain", "keep", 0)),
        (["--data.ids", "slots"], (True, "spread", "resize", 0)),
    ],
)
def test_what_compat_sets_and_what_wins(argv, expected, root):
    assert choices(trainer(root, *argv)) == expected


def test_a_run_with_compat_trains_and_says_so(options, root, trained, tmp_path):
    from hsat.models import load_encoder
    from train_hsat import main

    main([*options, "--compat", "paper", "--train.steps", "4", "--out", str(tmp_path / "run")])
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["settings"]["compat"] == "paper"
    published, usual = (load_encoder(folder / "final.safetensors") for folder in (tmp_path / "run", trained))
    assert fingerprint_weights(published) != fingerprint_weights(usual)


def test_patches_of_another_size_are_refused_with_the_way_out(options, tmp_path, stops):
    from train_hsat import main

    argv = [*options, "--compat", "paper", "--data.image_size", "40", "--out", str(tmp_path / "run")]
    message = stops(main, argv)
    assert "a patch of 32 x 32 pixels that is not cropped" in message and "image_size=32" in message


def test_another_compat_is_refused(stops):
    from train_hsat import TrainHSAT

    message = stops(TrainHSAT.load, ["--compat", "published"])
    assert "compat" in message and "paper" in message
