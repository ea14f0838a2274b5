from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
import torch
from torch import nn

from hsat.models import PAPER_NAMES, HeadSpec, branch, build_encoder, convert_to_dual, is_dual, projection_head
from hsat.models.dual_norm import DualBatchNorm
from hsat.models.zoo import create_backbone, feature_width, find_architecture, fixed_size, import_timm


def layer_text(head: nn.Module) -> list[str]:
    return [repr(layer) for layer in head.layers]


def test_the_papers_heads():
    assert layer_text(projection_head("linear", in_features=2048)) == [
        "Linear(in_features=2048, out_features=128, bias=True)"
    ]
    mlp = projection_head("mlp", in_features=6, hidden=(7, 8), embedding_dim=9)
    assert [type(layer).__name__ for layer in mlp.layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in mlp.layers[::2]] == [(7, 6), (8, 7), (9, 8)]
    deep = projection_head("mlp3_bn", in_features=6)
    kinds = ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in deep.layers] == kinds
    assert [key for key in deep.state_dict() if "bias" in key] == [f"layers.{i}.bias" for i in (0, 1, 4, 7)]
    assert deep.out_features == deep.in_features == 6
    assert projection_head("mlp", in_features=6).layers[0].out_features == 6


def test_heads_sit_on_the_true_width():
    for head, width in (("linear", 128), ("mlp", 128), ("mlp3_bn", 96), (None, 96), (17, 17)):
        encoder = build_encoder("test_resnet", head=head, seed=0)
        assert encoder.feature_dim == 96 and encoder.embedding_dim == width
        assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_every_paper_name_builds(name):
    architecture = find_architecture(name, pretrained=False)
    with torch.device("meta"):
        backbone = create_backbone(architecture, pretrained=False)
    assert feature_width(backbone) in {384, 768, 1024, 1536, 2048}
    straight = {"resnet50", "resnet50_multi_bn", "wide_resnet50_2", "wide_resnet50_2_pretrained"}
    straight |= {n for n in PAPER_NAMES if n.startswith(("resnet50_timm", "resnetv2"))}
    assert (architecture.normalisation is None) == (name in straight)
    gelu = any("gelu" in type(m).__name__.lower() for m in backbone.modules())
    assert gelu == (name in {"wresnet50_at", "resnet152_at"} or name.startswith(("conv", "swin", "vit")))


def test_seed_fixes_the_weights_and_spares_the_global_generator():
    before = torch.get_rng_state()
    first, second, other = (build_encoder("test_resnet", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.layers.0.weight"], other["head.layers.0.weight"])


def test_normalisation_of_a_name_and_its_replacement():
    assert build_encoder("test_resnet", seed=0).mean is None
    changed = build_encoder("test_resnet", mean=0, std=1, seed=0)
    assert (changed.mean, changed.std) == ((0.0,), (1.0,))
    assert PAPER_NAMES["vits_normal"].normalisation == ((0.5,) * 3, (0.5,) * 3)


def test_pretrained_brings_its_normalisation(monkeypatch):
    timm = import_timm()
    create, asked = timm.create_model, []

    def offline(name, *, pretrained, **options):
        asked.append((name, pretrained))
        return create("test_resnet.r160_in1k", pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    wanted = create("test_resnet.r160_in1k").pretrained_cfg
    encoder = build_encoder("test_resnet", pretrained=True, seed=0)
    assert (encoder.mean, encoder.std) == (tuple(wanted["mean"]), tuple(wanted["std"]))
    assert build_encoder("resnet50", pretrained=True, seed=0).mean == tuple(wanted["mean"])
    assert build_encoder("resnet50_timm_pretrained", pretrained=True, seed=0).mean is None  # as published
    assert build_encoder("resnet50_normal", pretrained=True, seed=0).mean == (0.485, 0.456, 0.406)
    assert asked == [
        ("test_resnet", True),
        ("resnet50", True),
        ("resnet50", True),
        ("resnet50.tv_in1k", True),
    ]


def test_one_size_backbones_say_so():
    encoder = build_encoder("vit_tiny_patch16_224", seed=0)
    with pytest.raises(ValueError, match="takes 224x224 images, got 32x32; pass input_size=224"):
        encoder(torch.rand(1, 3, 32, 32))
    resizing = build_encoder("vit_tiny_patch16_224", input_size=224, seed=0)
    with torch.no_grad():
        assert resizing(torch.rand(1, 3, 32, 32)).shape == (1, 128)
    with torch.device("meta"):
        flexible = create_backbone(find_architecture("vits_at", pretrained=False), pretrained=False)
    assert fixed_size(flexible) is None


ERRORS = {
    "typo": (r"'resnet5O' is neither.*did you mean .*resnet50", {"name": "resnet5O"}),
    "both": ("give one of them", {"weights": "x.pth", "pretrained": True}),
    "adversarial": (r"fetch https://.*ARES_ResNet50_AT\.pth yourself", {"name": "resnet50_at", "pretrained": True}),
    "hub": ("pass pretrained=True to allow the download", {"name": "hf-hub:someone/model"}),
    "head": ("head must be one of linear, mlp, mlp3_bn", {"head": "cubic"}),
    "hidden": ("no hidden layers", {"head": HeadSpec("linear", hidden=(4,))}),
    "hidden3": ("has two hidden layers", {"head": HeadSpec("mlp3_bn", hidden=(4,))}),
    "width": ("positive widths", {"embedding_dim": 0}),
    "none": ("head=None gives features of width 96", {"head": None, "embedding_dim": 128}),
    "int": ("head=4 and embedding_dim=5", {"head": 4, "embedding_dim": 5}),
    "two widths": (r"head=HeadSpec\(.* and embedding_dim=5 disagree", {"head": HeadSpec("mlp", 4), "embedding_dim": 5}),
    "norm": ("no BatchNorm layer", {"name": "test_vit", "dual_norm": True}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    message, options = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        build_encoder(**{"name": "test_resnet", "seed": 0, **options})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "different builds.*nms.*--force-reinstall"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "pip install timm"),
    ],
)
def test_a_broken_torchvision_is_explained(monkeypatch, error, message):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "timm":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=message):
        build_encoder("resnet50")


def test_import_is_light():
    code = "import sys, hsat.models; print([m for m in ('timm', 'torchvision', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dual_branches_start_equal_and_move_apart():
    encoder = build_encoder("test_resnet", dual_norm=True, seed=0)
    single = build_encoder("test_resnet", seed=0)
    x = torch.rand(4, 3, 32, 32)
    for name in ("normal", "pgd"):
        with branch(encoder.eval(), name):
            assert torch.equal(encoder(x), single.eval()(x))
    encoder.train()
    with branch(encoder, "pgd"):
        encoder(x).sum().backward()
    layers = [m for m in encoder.modules() if isinstance(m, DualBatchNorm)]
    assert layers and all(int(m.bn_list[0].num_batches_tracked) == 0 for m in layers)
    assert all(int(m.bn_list[1].num_batches_tracked) == 1 for m in layers)
    assert all(m.bn_list[0].weight.grad is None and m.bn_list[1].weight.grad is not None for m in layers)
    assert all(m.active == "normal" for m in layers)


def test_branch_nests_and_comes_back_after_an_exception():
    model = convert_to_dual(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)))
    layers = [m for m in model.modules() if isinstance(m, DualBatchNorm)]
    layers[0].active = "pgd"
    with pytest.raises(KeyError), branch(model, "normal"):
        with branch(model, "pgd"):
            assert [m.active for m in layers] == ["pgd", "pgd"]
        assert [m.active for m in layers] == ["normal", "normal"]
        raise KeyError
    assert [m.active for m in layers] == ["pgd", "normal"]


def test_convert_twice_changes_nothing_and_a_lone_norm_is_returned_new():
    model = convert_to_dual(nn.Sequential(nn.BatchNorm2d(4)))
    names = list(model.state_dict())
    assert isinstance(convert_to_dual(nn.BatchNorm1d(3)), DualBatchNorm)
    assert is_dual(model) and not is_dual(nn.Linear(2, 2))
    model.append(nn.BatchNorm2d(4))
    assert [n for n in convert_to_dual(model).state_dict() if n.startswith("0.")] == names


def test_branch_errors():
    with pytest.raises(ValueError, match="must be 'normal' or 'pgd', got 'clean'"), branch(nn.Linear(2, 2), "clean"):
        pass
    with pytest.raises(ValueError, match="Linear has no dual BatchNorm"), branch(nn.Linear(2, 2), "pgd"):
        pass
