"""load_encoder with a backbone's name: the head comes from the file, and a wrong name is told from a right one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.fingerprints import fingerprint_weights
from hsat.models import (
    HeadSpec,
    build_encoder,
    has_encoder_spec,
    load_checkpoint,
    load_encoder,
    projection_head,
    save_encoder,
)
from hsat.models.state_dicts import StoredHead, find_equivalent_backbones, find_head, find_matching_backbones
from hsat.models.zoo import PAPER_NAMES

NAME = "test_resnet"
HEADS = {"linear": HeadSpec("linear", 24), "mlp": HeadSpec("mlp", 16, (20, 12)), "mlp3_bn": HeadSpec("mlp3_bn", 96)}


def published(encoder, *, zoo=False):
    """The encoder's state under the names of the published code."""
    new = {"backbone": "model.bb.model" if zoo else "model.bb", "head": "model.proj"}
    parts = (key.partition(".") for key in encoder.state_dict())
    return {f"{new[first]}.{rest}": encoder.state_dict()[f"{first}.{rest}"] for first, _, rest in parts}


def in_format(kind, state):
    """What the three kinds of published files hold."""
    if kind == "ddp":
        return {"epoch": 3, "loss": 1.5, "optimizer": {}, "model": {f"module.{k}": v for k, v in state.items()}}
    return {"state_dict": state, "global_step": 7} if kind == "lightning" else state


@pytest.fixture(scope="module")
def at_encoder():
    return build_encoder("resnet50_at", embedding_dim=32, seed=1)


@pytest.mark.parametrize("kind", ["ddp", "lightning", "plain"])
@pytest.mark.parametrize("head", HEADS)
def test_the_name_of_the_backbone_is_enough(head, kind, tmp_path):
    source = build_encoder(NAME, head=HEADS[head], seed=1)
    torch.save(in_format(kind, published(source)), tmp_path / "p.pth")
    encoder = load_encoder(tmp_path / "p.pth", NAME)
    assert not encoder.training and encoder.spec["head"] == head
    assert encoder.spec["embedding_dim"] == HEADS[head].embedding_dim
    assert tuple(encoder.spec["head_hidden"]) == (HEADS[head].hidden or (() if head == "linear" else (96, 96)))
    assert fingerprint_weights(encoder) == fingerprint_weights(source)
    assert encoder.weights_report.loaded == len(source.state_dict())
    again = load_encoder(save_encoder(encoder, tmp_path / "own.safetensors"))
    assert fingerprint_weights(again) == fingerprint_weights(source)
    assert has_encoder_spec(tmp_path / "own.safetensors") and not has_encoder_spec(tmp_path / "p.pth")


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["linear", "mlp", "mlp3_bn"]),
    widths=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    where=st.sampled_from(["head.", "module.model.proj.", "proj."]),
)
def test_a_head_is_read_back_from_its_shapes(kind, widths, where):
    hidden = () if kind == "linear" else tuple(widths[2:])
    head = projection_head(kind, in_features=widths[0], embedding_dim=widths[1], hidden=hidden)
    state = {where + key: value for key, value in head.state_dict().items()}
    state["model.bb.blocks.0.attn.proj.weight"] = torch.zeros(2, 2)  # a name that only looks like a projector
    assert find_head(state) == StoredHead(HeadSpec(kind, widths[1], hidden), widths[0])


def test_no_head_two_heads_and_unknown_heads():
    assert find_head({"layers.0.weight": torch.zeros(2, 2), "fc.weight": torch.zeros(2, 2)}) is None
    linear = {"layers.0.weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"several projection heads: a\.head\.layers\., b\.head\.layers\."):
        find_head({f"{who}.head.{key}": value for who in "ab" for key, value in linear.items()})
    with pytest.raises(ValueError, match=r"no known projection head \(weights 0: \(2, 3\), 1: \(2, 3\)\)"):
        find_head({f"proj.layers.{i}.weight": torch.zeros(2, 3) for i in (0, 1)})
    with pytest.raises(ValueError, match="no known projection head"):  # widths that do not follow on each other
        find_head({f"proj.layers.{i}.weight": torch.zeros(2, 3) for i in (0, 2)})


def test_a_backbone_alone_has_no_head_and_a_head_can_be_left_out(tmp_path):
    source = build_encoder(NAME, embedding_dim=8, seed=1)
    torch.save(source.backbone.state_dict(), tmp_path / "b.pth")
    assert load_encoder(tmp_path / "b.pth", NAME, norm="none").spec["head"] is None
    torch.save(published(source), tmp_path / "p.pth")
    alone = load_encoder(tmp_path / "p.pth", NAME, head=None)
    assert alone.head is None
    assert set(alone.weights_report.dropped) == {"model.proj.layers.0.weight", "model.proj.layers.0.bias"}
    assert fingerprint_weights(alone.backbone) == fingerprint_weights(source.backbone)


def test_a_classifier_is_left_out_on_request_only(tmp_path):
    source = build_encoder(NAME, head=None, seed=1)
    torch.save({**source.backbone.state_dict(), "fc.weight": torch.zeros(9, 96)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"without a place: fc\.weight; these are a classifier.*head=None"):
        load_encoder(tmp_path / "c.pth", NAME)
    assert load_encoder(tmp_path / "c.pth", NAME, head=None, norm="none").weights_report.dropped == ("fc.weight",)


def test_what_is_said_about_the_head_must_be_so(tmp_path):
    source = build_encoder(NAME, embedding_dim=8, seed=1)
    torch.save(published(source), tmp_path / "p.pth")
    assert load_encoder(tmp_path / "p.pth", NAME, head="linear", embedding_dim=8).embedding_dim == 8
    for wrong in ({"embedding_dim": 9}, {"head": "mlp"}, {"head": "mlp3_bn"}):
        with pytest.raises(ValueError, match="file's head is head='linear', embedding_dim=8, on features of width 96"):
            load_encoder(tmp_path / "p.pth", NAME, norm="none", **wrong)


def test_a_head_for_other_features_is_refused_and_the_backbone_can_be_had(tmp_path):
    """Published encoders of narrow backbones have a head for 2048 features, and so never ran."""
    state = published(build_encoder(NAME, embedding_dim=8, seed=1))
    state["model.proj.layers.0.weight"] = torch.zeros(8, 2048)
    torch.save(state, tmp_path / "p.pth")
    with pytest.raises(ValueError, match=r"on features of width 2048.*head=None it takes the backbone alone"):
        load_encoder(tmp_path / "p.pth", NAME)
    assert load_encoder(tmp_path / "p.pth", NAME, head=None).feature_dim == 96


def test_another_name_than_the_file_says(tmp_path):
    encoder = build_encoder(NAME, embedding_dim=8, mean=0.4, std=0.2, input_size=24, seed=1)
    path = save_encoder(encoder, tmp_path / "own.safetensors")
    assert fingerprint_weights(load_encoder(path, NAME)) == fingerprint_weights(encoder)  # pixels and all
    assert load_encoder(path, NAME, input_size=20).input_size == (20, 20)
    with pytest.raises(ValueError, match=r"does not fit.*the file says that it holds 'test_resnet'"):
        load_encoder(path, "test_byobnet")


def test_dual_norm_comes_from_the_file(tmp_path):
    source = build_encoder(NAME, embedding_dim=8, dual_norm=True, seed=1)
    torch.save(published(source), tmp_path / "p.pth")
    encoder = load_encoder(tmp_path / "p.pth", NAME)
    assert encoder.spec["dual_norm"] and fingerprint_weights(encoder) == fingerprint_weights(source)


def test_same_shapes_other_pixels_are_refused(at_encoder, tmp_path):
    torch.save(in_format("ddp", published(at_encoder, zoo=True)), tmp_path / "at.pth")
    torch.save(in_format("lightning", published(at_encoder)), tmp_path / "scratch.pth")
    plain, right = build_encoder("resnet50", embedding_dim=32, seed=2), load_encoder(tmp_path / "at.pth", "resnet50_at")
    assert fingerprint_weights(right) == fingerprint_weights(at_encoder)
    before = fingerprint_weights(plain)
    with pytest.raises(ValueError, match=r"that normalises pixels.*Use resnet50_normal or resnet50_at, or give mean="):
        load_checkpoint(plain, tmp_path / "at.pth")
    assert fingerprint_weights(plain) == before
    with pytest.raises(ValueError, match=r"does not normalise pixels.*Use resnet50 or resnet50_timm"):
        load_encoder(tmp_path / "scratch.pth", "resnet50_at")
    plain.mean = plain.std = (0.5,)  # as build_encoder(..., mean=0.5, std=0.5) has them: said by hand, so it is meant
    assert load_checkpoint(plain, tmp_path / "at.pth").loaded == len(plain.state_dict())


def test_a_wrong_name_is_answered_with_the_right_ones(at_encoder, tmp_path):
    state = published(at_encoder, zoo=True)
    torch.save(state, tmp_path / "at.pth")
    with pytest.raises(ValueError, match=r"its backbone is that of resnet50_normal, resnet50_at$"):
        load_encoder(tmp_path / "at.pth", "wresnet50_at")
    half = dict(list(state.items())[: len(state) // 2])
    assert find_matching_backbones(half) == []
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"nothing was loaded\. 1\d\d missing in the file: backbone\."):
        load_encoder(tmp_path / "half.pth", "resnet50_at", embedding_dim=32)
    state["model.bb.model.bn1.running_var"] = torch.full((64,), torch.nan)
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"1 not finite: backbone\.bn1\.running_var$"):
        load_encoder(tmp_path / "nan.pth", "resnet50_at")


@pytest.mark.parametrize("name", ["resnet50_multi_bn", "resnetv2_50_gn", "wresnet50_at", "vits_at", "swins_normal"])
def test_every_backbone_is_told_from_its_names_and_shapes(name):
    with torch.device("meta"):
        encoder = build_encoder(name, head=None)
    state = {f"bb.model.{key}": value for key, value in encoder.backbone.state_dict().items()}
    if PAPER_NAMES[name].normalisation is None:
        state = {key.replace("bb.model.", "bb."): value for key, value in state.items()}
    found = find_matching_backbones(state)
    assert name in found and set(found) <= {name, *find_equivalent_backbones(name)}
    assert find_matching_backbones({key: value for key, value in list(state.items())[1:]}) == []


def test_a_vit_of_another_size_is_read_with_its_size(tmp_path):
    source = build_encoder("test_vit", image_size=64, head=None, norm="none", seed=1)
    torch.save(source.backbone.state_dict(), tmp_path / "vit.pth")
    encoder = load_encoder(tmp_path / "vit.pth", "test_vit", image_size=64, norm="none")
    assert fingerprint_weights(encoder.backbone) == fingerprint_weights(source.backbone)
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 64)
    with pytest.raises(ValueError, match="pos_embed"):
        load_encoder(tmp_path / "vit.pth", "test_vit", norm="none")
