"""Files that other people's tools wrote: under wrappers' names, beside a normaliser, or no weights at all."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
from torch import nn

from hsat.fingerprints import fingerprint_weights
from hsat.models import build_encoder, load_checkpoint

NAME = "test_resnet"


class Command:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.fixture(scope="module")
def source():
    return build_encoder(NAME, norm="none", embedding_dim=8, seed=1)


@pytest.mark.parametrize("prefix", ["net.", "student.", "backbone.", "model.encoder.", "lit.wrapped.module."])
def test_whatever_a_lightning_module_calls_its_encoder(source, tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in source.state_dict().items()}}, tmp_path / "l.ckpt")
    target = build_encoder(NAME, norm="none", embedding_dim=8, seed=2)
    assert load_checkpoint(target, tmp_path / "l.ckpt").layout == f"hsat, prefix {prefix}"
    assert fingerprint_weights(target) == fingerprint_weights(source)


def test_a_second_network_in_the_file_is_not_passed_over(source, tmp_path):
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in source.state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "two.ckpt")
    target = build_encoder(NAME, norm="none", embedding_dim=8, seed=2)
    before = fingerprint_weights(target)
    with pytest.raises(ValueError, match=r"in the file without a place: teacher\.backbone"):
        load_checkpoint(target, tmp_path / "two.ckpt")
    assert fingerprint_weights(target) == before


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [("module.model.", "module."), ("model.", "normalize."), ("1.", "0."), ("module.", "module."), ("model.1.", "")],
)
def test_normalisers_and_classifiers_beside_a_backbone_are_left_out(source, tmp_path, prefix, beside):
    extra = {beside + "mean": torch.zeros(3), beside + "std": torch.ones(3), prefix + "fc.weight": torch.zeros(9, 512)}
    state = {prefix + key: value for key, value in source.backbone.state_dict().items()}
    torch.save({"state_dict": state | extra}, tmp_path / "at.pth")
    encoder = build_encoder(NAME, norm="none", weights=tmp_path / "at.pth", seed=2)
    assert set(encoder.weights_report.dropped) == set(extra)
    assert torch.equal(encoder.backbone.conv1[0].weight, source.backbone.conv1[0].weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Not found", "neither a torch nor a safetensors file; it is some text; open it"),
        (b'{"message": "Bad credentials"}', "neither a torch nor a safetensors file; it is a JSON text"),
        (b"<!-- saved from -->\n<html></html>", "is an HTML page, not a file of weights"),
        (pickle.dumps(Command(), protocol=4), "holds Python objects .* a pickle that torch.save did not write"),
    ],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, content, message, capsys):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_the_object_that_is_refused_is_named(source, tmp_path, capsys):
    for value, name in (
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Command(), r"[_builtins.]*print"),
    ):
        torch.save({"model": source.state_dict(), "args": value}, tmp_path / "w.pth")
        with pytest.raises(
            ValueError, match=f"can run code or take memory without bound: {name}\\. Where you trust it"
        ):
            load_checkpoint(source, tmp_path / "w.pth")
    assert capsys.readouterr().out == ""
