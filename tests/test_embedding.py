from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hsat.attacks import PGD, Linf, feature_drift
from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, read_opensrh, write_synthetic_cohort
from hsat.embedding import embed, to_device
from hsat.eval import evaluate_whitebox
from hsat.types import HierarchicalBatch

ATTACK = PGD(Linf(8 / 255), step_size=2 / 255, steps=3)


@pytest.mark.parametrize("layer", ["features", "embedding"])
def test_rows_are_the_unit_outputs_in_order(toy_encoder, toy_batches, layer):
    loader = toy_batches(seed=0, sizes=(5, 4, 1))
    found = embed(toy_encoder, loader, layer=layer, encoder_name="toy")
    images = torch.cat([batch.images for batch in loader])
    toy_encoder.eval()
    expected = toy_encoder.features(images) if layer == "features" else toy_encoder(images)
    np.testing.assert_allclose(found.z, nn.functional.normalize(expected.detach(), dim=1), atol=1e-6)
    assert found.z.dtype == np.float32
    for name in ("label", "patch", "slide", "patient"):
        np.testing.assert_array_equal(getattr(found, name), torch.cat([getattr(batch, name) for batch in loader]))
    assert found.class_names == ("cyan", "green", "red")
    assert (found.cohort, found.split, found.encoder) == ("toy", "val", "toy")


def test_what_is_given_wins_over_the_dataset(toy_encoder, toy_batches):
    found = embed(toy_encoder, toy_batches(seed=0, sizes=(3,)), class_names="xyz", cohort="c", split="s")
    assert (found.class_names, found.cohort, found.split) == (("x", "y", "z"), "c", "s")


def test_a_plain_function_is_an_encoder(toy_batches):
    loader = list(toy_batches(seed=0, sizes=(4, 2)))
    found = embed(lambda images: images.mean((2, 3)).half(), loader, class_names=("a", "b", "c"))
    assert found.z.shape == (6, 3)
    np.testing.assert_allclose(np.linalg.norm(found.z, axis=1), 1, atol=1e-6)


def test_the_encoder_comes_back_as_it_was(toy_encoder, toy_batches):
    toy_encoder.train()
    toy_encoder.head.eval()
    toy_encoder.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in toy_encoder.state_dict().items()}
    global_state = torch.get_rng_state()
    embed(toy_encoder, toy_batches(seed=0, sizes=(5,)), attack=ATTACK)
    assert toy_encoder.training and toy_encoder.norm.training and not toy_encoder.head.training
    assert not toy_encoder.head.weight.requires_grad and toy_encoder.norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in toy_encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in toy_encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("target", ["features", "embedding"])
def test_attacked_rows_are_those_of_the_attack_by_hand(toy_encoder, toy_batches, target):
    (batch,) = toy_batches(seed=0, sizes=(6,))
    toy_encoder.eval()
    encode = toy_encoder.features if target == "features" else toy_encoder
    generator = torch.Generator().manual_seed(5)
    x_adv = ATTACK(batch.images, feature_drift(encode, batch.images), generator=generator, ids=batch.patch)
    found = embed(
        toy_encoder,
        toy_batches(seed=0, sizes=(6,)),
        attack=ATTACK,
        target=target,
        generator=torch.Generator().manual_seed(5),
    )
    expected = nn.functional.normalize(toy_encoder.features(x_adv).detach(), dim=1)
    np.testing.assert_allclose(found.z, expected, atol=1e-6)


def test_batches_and_order_do_not_matter_to_the_attack(toy_encoder, toy_batches):
    (batch,) = toy_batches(seed=0, sizes=(7,))
    whole = embed(toy_encoder, [batch], attack=ATTACK, class_names="abc")
    rows = [[4, 2], [6], [0, 1, 5, 3]]
    parts = [
        HierarchicalBatch(*(getattr(batch, name)[row] for name in ("images", "patch", "slide", "patient", "label")))
        for row in rows
    ]
    split = embed(toy_encoder, parts, attack=ATTACK, class_names="abc")
    np.testing.assert_allclose(split.z, whole.z[[4, 2, 6, 0, 1, 5, 3]], atol=1e-5)


def test_the_clean_reference_is_embedded_once_per_batch(toy_encoder, toy_batches):
    embed(toy_encoder, toy_batches(seed=0, sizes=(4, 4)), attack=ATTACK)
    assert toy_encoder.forwards <= 2 * (1 + ATTACK.steps + 2)


def test_progress_goes_to_standard_error_only_when_asked(toy_encoder, toy_batches, capfd, monkeypatch):
    monkeypatch.setattr("hsat.progress.EVERY", 0.0)  # seconds between two lines
    embed(toy_encoder, toy_batches(seed=0, sizes=(4,)))
    assert capfd.readouterr() == ("", "")
    embed(toy_encoder, toy_batches(seed=0, sizes=(4,)), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "embedding" in err


def test_embeddings_that_are_not_finite_name_their_patches(toy_batches):
    def encode(images):
        z = images.mean((2, 3))
        z[[1, 3]] = torch.nan
        return z

    with pytest.raises(ValueError, match="embeddings of 2 of 4 images are not finite: patch ids 11, 13"):
        embed(encode, toy_batches(seed=0, sizes=(4,), first_id=10))


@pytest.mark.parametrize("option", ["layer", "target"])
def test_an_unknown_layer(toy_encoder, toy_batches, option):
    with pytest.raises(ValueError, match=r"unknown layer 'pixels'; choose one of \['features', 'embedding'\]"):
        embed(toy_encoder, toy_batches(seed=0, sizes=(2,)), **{option: "pixels"})


def test_missing_class_names(toy_encoder, toy_batches):
    with pytest.raises(
        ValueError, match=r"class names are missing and list has no dataset.class_names; pass class_names"
    ):
        embed(toy_encoder, list(toy_batches(seed=0, sizes=(2,))))


def test_no_batches(toy_encoder, toy_batches):
    with pytest.raises(ValueError, match=r"the loader gave no batches \(split 'val'\)"):
        embed(toy_encoder, toy_batches(seed=0, sizes=()))


def test_batches_without_labels(toy_encoder):
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="a batch without labels cannot fill an embedding table"):
        embed(toy_encoder, [HierarchicalBatch(torch.rand(2, 3, 4, 4), ids, ids, ids)], class_names="a")


def test_maps_instead_of_embeddings(toy_batches):
    with pytest.raises(ValueError, match=r"gave shape \(2, 3, 6, 6\) for 2 images; expected \(2, d\).*wrap_encoder"):
        embed(lambda images: images, toy_batches(seed=0, sizes=(2,)))


def test_importing_the_room_loads_nothing_heavy():
    code = (
        "import sys, hsat.eval, hsat.report; heavy = ('torchvision', 'timm', 'faiss', 'hsat.data',"
        " 'matplotlib', 'scipy', 'sklearn', 'jinja2', 'pandas'); print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_only_the_way_to_a_gpu_does_not_wait(monkeypatch):
    """Back from a GPU the host would read what has not arrived yet."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place, **how: asked.append((place.type, how)) or self)
    for name in ("cpu", "cuda:1", "mps"):
        to_device(torch.zeros(1), torch.device(name))
    assert asked == [(kind, {"non_blocking": kind == "cuda"}) for kind in ("cpu", "cuda", "mps")]


def test_pairs_of_images_and_labels_are_taken_and_each_image_is_a_patient():
    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)
    table = embed(lambda x: x.flatten(1), loader, class_names=("a", "b"))
    assert table.label.tolist() == labels.tolist()
    assert table.patch.tolist() == table.slide.tolist() == table.patient.tolist() == list(range(8))
    with pytest.raises(ValueError, match="class names are missing"):
        embed(lambda x: x.flatten(1), loader)
    with pytest.raises(TypeError, match=r"pairs of tensors \(images, labels\); got Tensor"):
        embed(lambda x: x.flatten(1), [images], class_names=("a", "b"))
    bank = embed(lambda x: x.flatten(1), loader, class_names=("a", "b"))
    with pytest.raises(
        TypeError, match=r"needs to know patients and slides, and the loader gives list.*evaluate_classifier"
    ):
        evaluate_whitebox(lambda x: x.flatten(1), bank, loader, {"PGD": ATTACK}, classifier=KNNClassifier(k=3))


def test_a_loader_without_collate_says_what_to_pass(tmp_path):
    root = write_synthetic_cohort(tmp_path / "c", classes=("hgg", "normal"), patients_per_class=2, patches=2, size=16)
    loader = DataLoader(PatchDataset(read_opensrh(root)), batch_size=4)
    with pytest.raises(TypeError, match=r"got Sample: pass collate_fn=hsat\.collate to the DataLoader"):
        embed(lambda x: x.flatten(1), loader)
