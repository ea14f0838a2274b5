from __future__ import annotations

import hashlib
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from hsat.fingerprints import fingerprint_weights
from hsat.models import build_encoder, checkpoint_hash, load_checkpoint, load_encoder, save_encoder, wrap_encoder

NAME = "test_resnet"


def encoder_of(seed: int, **options):
    return build_encoder(NAME, **{"embedding_dim": 8, "norm": "none", "seed": seed, **options})


@pytest.fixture(scope="module")
def source():
    return encoder_of(1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
@pytest.mark.parametrize("inside", [None, "model", "state_dict"])
def test_own_state_under_every_wrapper(source, tmp_path, prefix, inside):
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if inside is None else {inside: state, "epoch": 2}, tmp_path / "c.pt")
    target = encoder_of(2)
    report = load_checkpoint(target, tmp_path / "c.pt")
    assert fingerprint_weights(target) == fingerprint_weights(source)
    assert report.loaded == len(state)
    assert report.sha256 == hashlib.sha256((tmp_path / "c.pt").read_bytes()).hexdigest()


def test_training_checkpoint_with_everything_in_it(source, tmp_path):
    optimiser = torch.optim.AdamW(source.parameters())
    content = {
        "model": source.state_dict(),
        "optimizer": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": 4,
        "encoder": source.spec,
    }
    torch.save(content, tmp_path / "last.pt")
    target = encoder_of(2)
    assert load_checkpoint(target, tmp_path / "last.pt").metadata["epoch"] == 4
    assert fingerprint_weights(target) == fingerprint_weights(source)
    assert fingerprint_weights(load_encoder(tmp_path / "last.pt")) == fingerprint_weights(source)


def test_equal_encoders_are_equal_files(source, tmp_path):
    files = [save_encoder(source, tmp_path / str(i), metadata={"step": 3, "cohort": "c"}) for i in range(12)]
    assert len({checkpoint_hash(file) for file in files}) == 1


def test_training_checkpoint_with_the_spec_among_its_extras(source, tmp_path):
    content = {"model": source.state_dict(), "epoch": 4, "extra": {"best": 0.5, "encoder": source.spec}}
    torch.save(content, tmp_path / "last.pt")
    assert fingerprint_weights(load_encoder(tmp_path / "last.pt")) == fingerprint_weights(source)


def test_the_spec_is_found_beside_tensors_among_the_extras(source, tmp_path):
    """Warm starts keep the perturbations of images there."""
    extra = {"warm": {"deltas": torch.zeros(2, dtype=torch.int8)}, "encoder": source.spec}
    torch.save({"model": source.state_dict(), "extra": extra}, tmp_path / "last.pt")
    loaded = load_encoder(tmp_path / "last.pt")
    assert fingerprint_weights(loaded) == fingerprint_weights(source)
    assert loaded.weights_report.metadata["extra"] == {"encoder": source.spec}


def test_plain_safetensors_and_plain_backbone(source, tmp_path):
    save_file(dict(source.backbone.state_dict()), tmp_path / "b.safetensors")
    target = encoder_of(2, head=None, embedding_dim=None)
    assert load_checkpoint(target, tmp_path / "b.safetensors").layout == "backbone"
    assert fingerprint_weights(target.backbone) == fingerprint_weights(source.backbone)


@settings(max_examples=8, deadline=None)
@given(
    head=st.sampled_from(["linear", "mlp", "mlp3_bn", None]),
    dual=st.booleans(),
    size=st.sampled_from([None, 32, (32, 48)]),
    mean=st.sampled_from([None, 0.5]),
)
def test_save_and_rebuild(tmp_path_factory, head, dual, size, mean):
    path = tmp_path_factory.mktemp("saved") / "deep" / "encoder.safetensors"
    encoder = build_encoder(NAME, head=head, dual_norm=dual, input_size=size, mean=mean, std=mean, seed=5).eval()
    assert save_encoder(encoder, path, metadata={"epoch": 3}) == path
    random = torch.get_rng_state()
    again = load_encoder(path)
    assert torch.equal(torch.get_rng_state(), random)
    assert not again.training
    assert fingerprint_weights(again) == fingerprint_weights(encoder)
    assert load_checkpoint(encoder, path).metadata["epoch"] == 3
    x = torch.rand(2, 3, 40, 40)
    assert torch.equal(again(x), encoder(x))
    assert os.listdir(path.parent) == ["encoder.safetensors"]


def test_a_failed_save_leaves_the_old_file(source, tmp_path, monkeypatch):
    path = save_encoder(source, tmp_path / "e.safetensors")
    before = checkpoint_hash(path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_encoder(encoder_of(2), path)
    assert checkpoint_hash(path) == before
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_metadata_must_be_json(source, tmp_path):
    with pytest.raises(TypeError, match="plain JSON"):
        save_encoder(source, tmp_path / "e.safetensors", metadata={"x": torch.zeros(1)})


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_encoder_that_is_not_finite_is_not_saved(tmp_path, value):
    encoder = encoder_of(1)
    path = save_encoder(encoder, tmp_path / "e.safetensors")
    before = path.read_bytes()
    name, buffer = next((n, b) for n, b in encoder.named_buffers() if b.is_floating_point())
    buffer.view(-1)[-1] = value
    with pytest.raises(FloatingPointError) as error:
        save_encoder(encoder, path)
    assert f"{name} (1 of {buffer.numel()} values)" in str(error.value) and str(path) in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    with pytest.raises(FloatingPointError):
        save_encoder(encoder, tmp_path / "new" / "e.safetensors")
    assert not (tmp_path / "new").exists()


def test_wrapped_encoders_save_but_are_rebuilt_by_hand(tmp_path):
    encoder = wrap_encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), head=3, input_size=2, norm="none")
    path = save_encoder(encoder, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"does not say how to build its encoder.*wrap_encoder"):
        load_encoder(path)
    target = wrap_encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), head=3, input_size=2, norm="none")
    load_checkpoint(target, path)
    assert fingerprint_weights(target) == fingerprint_weights(encoder)


def test_backbone_weights_with_classifier_and_normalisation(source, tmp_path):
    state = {f"module.{key}": value for key, value in source.backbone.state_dict().items()}
    state |= {"module.fc.weight": torch.zeros(10, 96), "module.normalize.mean": torch.zeros(3)}
    torch.save({"state_dict": state, "arch": "resnet"}, tmp_path / "w.pth")
    encoder = encoder_of(2, weights=tmp_path / "w.pth")
    assert fingerprint_weights(encoder.backbone) == fingerprint_weights(source.backbone)
    assert encoder.weights_report.dropped == ("module.fc.weight", "module.normalize.mean")
    assert encoder.weights_report.metadata == {"arch": "resnet"}
    with pytest.raises(ValueError, match=r"2 in the file without a place: module\.fc\.weight"):
        load_checkpoint(encoder_of(2, head=None, embedding_dim=None), tmp_path / "w.pth")


def test_backbone_weights_fill_both_branches(source, tmp_path):
    torch.save(source.backbone.state_dict(), tmp_path / "w.pth")
    state = encoder_of(2, weights=tmp_path / "w.pth", dual_norm=True).backbone.state_dict()
    pairs = [(key, key.replace("bn_list.0", "bn_list.1")) for key in state if "bn_list.0" in key]
    assert pairs and all(torch.equal(state[a], state[b]) for a, b in pairs)


def test_backbone_weights_of_a_whole_checkpoint_leave_its_head(source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    report = encoder_of(2, embedding_dim=16, weights=tmp_path / "w.pth").weights_report
    assert report.dropped == ("head.layers.0.weight", "head.layers.0.bias")


def test_fingerprint_sees_one_bit_and_the_normalisation(source):
    other = encoder_of(1)
    assert fingerprint_weights(other) == fingerprint_weights(source)
    weight = (
        other.backbone.conv1[0].weight
        if isinstance(other.backbone.conv1, nn.Sequential)
        else other.backbone.conv1.weight
    )
    with torch.no_grad():
        flat = weight.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
    assert fingerprint_weights(other) != fingerprint_weights(source)
    assert fingerprint_weights(encoder_of(1, norm="0.5/0.5")) != fingerprint_weights(source)
    assert fingerprint_weights(source.to(torch.bfloat16)) != fingerprint_weights(source.float())


def damaged(state, how):
    key = "head.layers.0.weight"
    if how == "missing":
        del state[key]
    elif how == "extra":
        state["surplus"] = torch.zeros(1)
    elif how == "shape":
        state[key] = torch.zeros(9, 96)
    elif how == "finite":
        state[key] = torch.full((8, 96), torch.nan)
    elif how == "kind":
        state[key] = torch.zeros(8, 96, dtype=torch.int64)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing in the file: head\.layers\.0\.weight; for a backbone without its head write"),
        ("extra", "1 in the file without a place: surplus"),
        ("shape", r"weight is \(9, 96\) in the file, \(8, 96\) in the encoder"),
        ("finite", r"1 not finite: head\.layers\.0\.weight"),
        ("kind", "1 integers where floats belong"),
    ],
)
def test_misfits_are_named_and_nothing_is_loaded(source, tmp_path, how, message):
    torch.save(damaged({k: v.clone() for k, v in source.state_dict().items()}, how), tmp_path / "c.pt")
    target = encoder_of(2)
    before = fingerprint_weights(target)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(target, tmp_path / "c.pt")
    assert fingerprint_weights(target) == before


def test_long_lists_are_cut(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        load_checkpoint(encoder_of(2), tmp_path / "c.pt")
    assert len(str(caught.value)) < 1200 and ", ..." in str(caught.value)


def whole_file(source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


BAD = {
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML page, not a file of weights"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "noise": (bytes(range(256)) * 4, "is neither a torch nor a safetensors file; it is some other binary"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_weights(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "w.pth")


@pytest.mark.parametrize("keep", [20, 0.3, 0.99])
def test_truncated_torch_file(source, tmp_path, keep):
    content = whole_file(source, tmp_path)
    (tmp_path / "w.pth").write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_checkpoint(encoder_of(2), tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_safetensors(source, tmp_path, suffix):
    content = save_encoder(source, tmp_path / "e.safetensors").read_bytes()
    (tmp_path / f"w{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_checkpoint(encoder_of(2), tmp_path / f"w{suffix}")


class Runs:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "callback": Runs()}, "w.pth")
    with pytest.raises(ValueError, match=r"holds Python objects.*state dict alone"):
        load_checkpoint(nn.Linear(1, 1), "w.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_file_folder_and_files_without_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of weights at"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_checkpoint(nn.Linear(1, 1), tmp_path)
    torch.save({"epoch": 1, "note": "x"}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"holds no named tensors.*it holds epoch, note"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "w.pth")
    torch.save(torch.zeros(3), tmp_path / "t.pth")
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "t.pth")


def test_the_spec_is_json(source):
    assert json.loads(json.dumps(source.spec))["name"] == NAME
