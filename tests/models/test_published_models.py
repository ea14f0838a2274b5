"""A published checkpoint, loaded by name, gives the published features and embeddings."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from hsat.models import branch, build_encoder, frozen, load_checkpoint


def load_published(name, state, tmp_path, prefix="module."):
    path = tmp_path / "checkpoint.pth"
    content = {"epoch": 3, "loss": 1.25, "optimizer": {"state": {0: torch.zeros(1)}}, "model": {}}
    content["model"] = {prefix + key: value for key, value in state.items()}
    torch.save(content, path)
    encoder = build_encoder(name, seed=0)
    return encoder, load_checkpoint(encoder, path)


def check(encoder, golden, key, x, dtype, inside=None):
    with frozen(encoder), torch.no_grad(), inside or nullcontext():
        features = encoder.to(dtype).features(x.to(dtype))
        embeddings = encoder.project(features)
        assert torch.equal(encoder(x.to(dtype)), embeddings)
    wanted = golden[f"{key}/float64/features"]
    exact = dtype == torch.float64
    error = np.abs(features[:, :64].numpy() - wanted).max() / np.abs(wanted).max()
    assert error < (1e-12 if exact else 4e-6)
    wanted = golden[f"{key}/float{64 if exact else 32}/embeddings"][:, 0]
    np.testing.assert_allclose(embeddings.numpy(), wanted, atol=1e-12 if exact else 2e-6, rtol=0)


@pytest.mark.parametrize("name", ["resnet50", "resnet50_at"])
def test_published_checkpoint(name, golden, filled_state, golden_input, tmp_path):
    state = filled_state(name)
    encoder, report = load_published(name, state, tmp_path)
    assert report.loaded == len(state) == len(encoder.state_dict())
    assert report.metadata == {"epoch": 3, "loss": 1.25}
    assert report.layout.startswith("published zoo" if name == "resnet50_at" else "published,")
    check(encoder, golden, name, golden_input, torch.float32)
    check(encoder, golden, name, golden_input, torch.float64)


def test_published_dual_norm_checkpoint_and_both_branches(golden, filled_state, golden_input, tmp_path):
    state = filled_state("resnet50_multi_bn")
    encoder, report = load_published("resnet50_multi_bn", state, tmp_path)
    assert report.loaded == len(state) == 585
    check(encoder, golden, "resnet50_multi_bn/normal", golden_input, torch.float64)  # the default branch
    inside = branch(encoder, "pgd")
    check(encoder, golden, "resnet50_multi_bn/pgd", golden_input, torch.float64, inside)


def test_lightning_prefix(filled_state, tmp_path):
    state = filled_state("resnet50")
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "global_step": 7}, path)
    encoder = build_encoder("resnet50", seed=0)
    report = load_checkpoint(encoder, path)
    assert report.metadata == {"global_step": 7}
    assert torch.equal(encoder.backbone.conv1.weight, state["model.bb.conv1.weight"])
    assert torch.equal(encoder.head.layers[0].bias, state["model.proj.layers.0.bias"])


def test_one_missing_entry_loads_nothing(filled_state, tmp_path):
    state = filled_state("resnet50")
    del state["model.bb.layer4.2.bn3.running_var"]
    encoder = build_encoder("resnet50", seed=0)
    before = encoder.backbone.conv1.weight.clone()
    path = tmp_path / "partial.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=r"1 missing in the file: backbone\.layer4\.2\.bn3\.running_var"):
        load_checkpoint(encoder, path)
    assert torch.equal(encoder.backbone.conv1.weight, before)
