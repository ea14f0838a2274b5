"""The held-out evaluation of a training: what it measures, and by which branch of dual BatchNorm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hsat.data import read_csv
from hsat.models import build_encoder
from hsat.training.validation import held_out_validation, score_predictions


@pytest.fixture(scope="module")
def encoder():
    return build_encoder("test_byobnet", embedding_dim=16, dual_norm=True, seed=0).eval()


@pytest.mark.parametrize("robust", [True, False])
def test_the_score_is_the_mean_of_two_accuracies(robust, encoder, cohort):
    validate = held_out_validation(cohort, image_size=32, patches=6, k=3, robust=robust)
    values = validate(encoder)
    assert values == validate(encoder), "the same patches every time"
    kind = "robust" if robust else "clean"
    assert values["score"] == (values[f"tune_{kind}_accuracy"] + values[f"tune_{kind}_mca"]) / 2
    assert values.keys() == {f"tune_{k}_{m}" for k in ("clean", "robust") for m in ("accuracy", "mca")} | {"score"}


def test_the_trained_branch_is_measured(encoder, cohort):
    """BatchNorm of the other branch is spoiled: nobody notices."""
    validate = held_out_validation(cohort, image_size=32, patches=6, k=3)
    for part in encoder.modules():
        if hasattr(part, "bn_list"):
            part.bn_list[1].num_batches_tracked += 3  # (normal, pgd)
    before = validate(encoder)
    for part in encoder.modules():
        if hasattr(part, "bn_list"):
            torch.nn.init.normal_(part.bn_list[0].bias, std=100)
    assert validate(encoder) == before
    assert all(part.active == "normal" for part in encoder.modules() if hasattr(part, "bn_list")), "as it was"


def test_mean_class_accuracy_counts_classes_alike():
    label = torch.tensor([0, 0, 0, 1]).numpy()
    assert score_predictions(torch.zeros(4, dtype=int).numpy(), label) == (0.75, 0.5)


def test_bad_files_are_found_before_anything_is_trained(tmp_path):
    """Held-out patches are never replaced; those of the bank are left out where training replaces them."""
    rows = ["path,class,patient,slide,split"]
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number % 2]},p{number},s,{'tune' if number > 4 else 'train'}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    cohort = read_csv(tmp_path)
    for name in ("0.png", "6.png", "7.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(ValueError, match=r"1 of the 5 patches of split 'train' .* cannot be read: .*0\.png"):
        held_out_validation(cohort, image_size=8)
    with (
        pytest.warns(UserWarning, match="1 of the 5 patches of split 'train'.*the bank is without them"),
        pytest.raises(ValueError, match=r"2 of the 3 .* 'tune'.*6\.png.*7\.png.*hsat check .* --data\.exclude"),
    ):
        held_out_validation(cohort, image_size=8, on_bad="replace")
    held_out_validation(cohort.without(cohort.check_files().paths()), image_size=8)
