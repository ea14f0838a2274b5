"""Encoders of --checkpoint: branches of dual BatchNorm, published files, and files that do not say what they hold."""

from __future__ import annotations

import json

import pytest
import torch

from hsat.eval import read_records
from hsat.models import build_encoder, save_encoder

QUICK = "--data.image_size 32 --steps 1 --bootstrap 0 --gallery 0 --diagnose 0 --attacks pgd --eps 8/255 --k 5"
QUICK += " --noise false --quiet"


def evaluate(argv):
    from hsat.cli.evaluate import main

    main([str(word) for word in argv])


def measured(out):
    records = read_records(out / "records.jsonl")
    (name,) = {record.settings.get("branch") for record in records}
    return name, {(r.attack_name, r.level, r.metric): r.value for r in records}


@pytest.mark.slow
def test_evaluation_picks_the_branch_and_says_so(root, tmp_path, capsys):
    few = ["--bank_patches", "40", "--query_patches", "20"]
    encoder = build_encoder("test_byobnet", embedding_dim=16, dual_norm=True, seed=0)
    for part in encoder.modules():
        if hasattr(part, "bn_list"):  # both were trained, and they differ
            for norm in part.bn_list:
                norm.num_batches_tracked += 3
            torch.nn.init.normal_(part.bn_list[0].bias, std=20, generator=torch.Generator().manual_seed(0))
    path = save_encoder(encoder, tmp_path / "apart.safetensors")
    argv = ["--checkpoint", path, "--data.root", root, *QUICK.split(), *few]
    found = {}
    for wanted in ("normal", "pgd", None):
        out = tmp_path / str(wanted)
        evaluate([*argv, "--out", out, *(["--model.branch", wanted] if wanted else [])])
        said = "using branch pgd; --model.branch chooses" in capsys.readouterr().err
        assert said == (wanted is None)
        found[wanted] = measured(out)
        assert json.loads((out / "run.json").read_text())["settings"]["model"]["branch"] == wanted
    assert [found[wanted][0] for wanted in found] == ["normal", "pgd", "pgd"]
    assert found["pgd"][1] == found[None][1]
    scores = {wanted: (tmp_path / str(wanted) / "scores.npz").read_bytes() for wanted in found}
    assert scores["pgd"] == scores[None] != scores["normal"]


@pytest.mark.slow
def test_branches_that_nobody_trained_are_pointed_at(tmp_path, root, capsys, stops, trained):
    encoder = build_encoder("test_byobnet", embedding_dim=8, dual_norm=True, seed=0)
    for part in encoder.modules():
        if hasattr(part, "bn_list"):
            part.bn_list[0].num_batches_tracked += 5  # as a baseline without an attack leaves it
    path = save_encoder(encoder, tmp_path / "baseline.safetensors")
    argv = ["--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    evaluate(["--checkpoint", path, *argv])
    shown = capsys.readouterr().err
    assert "using branch normal" in shown and "never trained" not in shown
    evaluate(["--checkpoint", path, *argv, "--model.branch", "pgd", "--overwrite"])
    assert f"note: branch pgd of {path} was never trained" in capsys.readouterr().err
    single = ["--checkpoint", trained / "final.safetensors", *argv, "--overwrite", "--model.branch", "pgd"]
    message = stops(evaluate, single)
    assert "holds no dual BatchNorm" in message and "--model.branch pgd" in message


def published(encoder, inner):
    parts = [(key.partition("."), value) for key, value in encoder.state_dict().items()]
    new = {"backbone": f"module.model.{inner}", "head": "module.model.proj"}
    return {"epoch": 1, "loss": 0.5, "model": {f"{new[first]}.{rest}": value for (first, _, rest), value in parts}}


def test_a_published_checkpoint_needs_its_backbones_name_only(root, tmp_path, capsys):
    encoder = build_encoder("test_byobnet", head="mlp3_bn", seed=3)
    torch.save(published(encoder, "bb"), tmp_path / "official.pth")
    argv = ["--data.root", root, *QUICK.split(), "--target", "embedding"]
    named = ["--checkpoint", tmp_path / "official.pth", "--model.backbone", "test_byobnet"]
    evaluate([*named, *argv, "--out", tmp_path / "theirs"])
    said = "head mlp3_bn, embedding_dim 256, hidden [256, 256] (inferred from the file)"
    assert said in capsys.readouterr().err
    path = save_encoder(encoder, tmp_path / "own.safetensors")
    evaluate(["--checkpoint", path, *argv, "--out", tmp_path / "own"])
    assert measured(tmp_path / "theirs") == measured(tmp_path / "own")


@pytest.mark.slow
def test_a_backbone_of_the_paper(root, tmp_path, capsys):
    torch.save(published(build_encoder("resnet50_at", embedding_dim=64, seed=3), "bb.model"), tmp_path / "official.pth")
    argv = ["--checkpoint", tmp_path / "official.pth", "--model.backbone", "resnet50_at", "--data.root", root]
    evaluate([*argv, *QUICK.split(), "--bank_patches", "10", "--query_patches", "4", "--out", tmp_path / "out"])
    shown = capsys.readouterr().err
    assert "320 tensors (published zoo, prefix module.model.); head linear, embedding_dim 64 (inferred" in shown
    assert {record.model for record in read_records(tmp_path / "out" / "records.jsonl")} == {"official"}


def test_own_and_published_files_in_one_table(trained, root, tmp_path, capsys):
    torch.save(published(build_encoder("test_resnet", embedding_dim=6, seed=3), "bb"), tmp_path / "official.pth")
    both = f"own={trained / 'final.safetensors'},official={tmp_path / 'official.pth'}"
    argv = ["--checkpoint", both, "--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    evaluate([*argv, "--model.backbone", "test_resnet"])
    assert {record.model for record in read_records(tmp_path / "out" / "records.jsonl")} == {"own", "official"}


def test_a_head_that_cannot_be_told_names_the_option(root, tmp_path, stops):
    state = published(build_encoder("test_byobnet", embedding_dim=6, seed=3), "bb")
    state["model"]["module.model.proj.layers.1.weight"] = torch.zeros(6, 6)
    torch.save(state, tmp_path / "official.pth")
    argv = ["--checkpoint", tmp_path / "official.pth", "--data.root", root, *QUICK.split(), "--out", tmp_path / "out"]
    message = stops(evaluate, [*argv, "--model.backbone", "test_byobnet"])
    assert "no known projection head" in message and "--model.head none" in message
    assert "--model.backbone NAME" in stops(evaluate, argv)
    evaluate([*argv, "--model.backbone", "test_byobnet", "--model.head", "none"])
    assert (tmp_path / "out" / "records.jsonl").exists()


NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x):
        return {"logits": x.mean((2, 3)), "pooled": self.convolution(x).relu().mean((2, 3))}


def small():
    return Network()
"""


def test_a_network_of_the_users_own_is_trained_and_evaluated_by_command(
    options, root, train, rows_of, tmp_path, monkeypatch, capsys, stops
):
    (tmp_path / "my_networks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # so that another test's module of this name is forgotten afterwards
    own = ["--model.factory", "my_networks:small", "--model.features", "pooled"]
    trained_so = [*options, "--train.steps", "2", "--out", tmp_path / "run", *own]
    message = stops(train, trained_so)
    assert "say how the pixels were normalised" in message and "--model.norm none" in message
    train([*trained_so, "--model.norm", "0.5/0.25"])
    assert len(rows_of(tmp_path / "run")) == 2
    capsys.readouterr()
    argv = ["--checkpoint", tmp_path / "run" / "final.safetensors", "--data.root", root, *QUICK.split()]
    evaluate([*argv, *own, "--model.norm", "0.5/0.25", "--out", tmp_path / "out"])
    assert "pixels minus mean (0.5) over std (0.25) (stated by the caller)" in capsys.readouterr().err
    (pixels,) = {
        json.dumps(r.settings["pixel_normalisation"]) for r in read_records(tmp_path / "out" / "records.jsonl")
    }
    assert json.loads(pixels) == {"mean": [0.5], "std": [0.25], "stated_by": "the caller"}
    message = stops(train, [*trained_so, "--model.norm", "none", "--model.dual_norm", "true"])
    assert "--model.dual_norm would change nothing" in message
    assert "my_networks:large" in stops(train, [*trained_so, "--model.factory", "my_networks:large"])
    assert "package.module:function" in stops(train, [*trained_so, "--model.factory", "my_networks"])


def test_an_encoder_that_standardises_images_is_trained_and_evaluated_by_command(
    options, root, train, tmp_path, capsys
):
    train([*options, "--train.steps", "2", "--out", tmp_path / "run", "--model.norm", "image"])
    capsys.readouterr()
    evaluate(["--run", tmp_path / "run", "--untrained", "true", *QUICK.split(), "--out", tmp_path / "out"])
    assert "each channel of each image minus its own mean" in capsys.readouterr().err
    stated = [r.settings["pixel_normalisation"] for r in read_records(tmp_path / "out" / "records.jsonl")]
    assert {(one["mean"], one["std"], one["per_image"]) for one in stated} == {(None, None, True)}  # untrained, too
