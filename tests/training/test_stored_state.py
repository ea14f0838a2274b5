"""States of a checkpoint that was tampered with are refused by file and field before anything is changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hsat.training import load_training_state, save_checkpoint

Content = dict[str, Any]


def parts(*, channels_last: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "generators": {"noise": torch.Generator().manual_seed(1)},
    }


def take_step(run: dict[str, Any]) -> torch.Tensor:
    run["optimizer"].zero_grad()
    x = torch.rand(2, 3, 4, 4, generator=run["generators"]["noise"])
    run["model"](x).square().sum().backward()
    run["optimizer"].step()
    run["scheduler"].step()
    return run["model"][0].weight.detach().clone()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    run = parts()
    take_step(run)
    path = save_checkpoint(tmp_path_factory.mktemp("run") / "last.pt", **run, epoch=0, step=1, config={})
    return torch.load(path, weights_only=True)


def every(**entries: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for state in content["optimizer"]["state"].values():
            state.update({name: value(state["exp_avg"]) for name, value in entries.items()})

    return change


def group(**entries: Any) -> Callable[[Content], None]:
    return lambda content: content["optimizer"]["param_groups"][0].update(entries)


def model(name: str, value: float) -> Callable[[Content], None]:
    return lambda content: content["model"][name].fill_(value)


def chance(**entries: Any) -> Callable[[Content], None]:
    return lambda content: content["random"][0].update(entries)


def schedule(**entries: Any) -> Callable[[Content], None]:
    return lambda content: content["scheduler"].update(entries)


def numpy_at(place: int) -> Callable[[Content], None]:
    return lambda content: content["random"][0]["numpy"].__setitem__(2, place)


CHANGES: list[tuple[Callable[[Content], Any], str]] = [
    (
        every(exp_avg=lambda _: torch.zeros(1)),
        r"the optimizer of .*state\[0\]\.exp_avg is torch.float32 \(1,\), and its",
    ),
    (every(exp_avg=lambda z: z.double()), r"state\[0\]\.exp_avg is torch.float64 \(4, 3, 2, 2\)"),
    (every(exp_avg=lambda z: z.to("meta")), r"state\[0\]\.exp_avg is no plain tensor"),
    (every(exp_avg=lambda _: "x"), r"state\[0\]\.exp_avg is 'x'"),
    (every(exp_avg=lambda z: z * torch.nan), r"not finite in state\[0\]\.exp_avg \(48 of 48"),
    (every(exp_avg_sq=lambda z: z * 0 - 1), r"state\[0\]\.exp_avg_sq holds a negative square"),
    (every(exp_avg_sq=lambda z: z * 0 + torch.inf), r"not finite in state\[0\]\.exp_avg_sq"),
    (every(step=lambda _: torch.zeros(9)), r"state\[0\]\.step is Tensor"),
    (every(step=lambda _: -1.0), r"state\[0\]\.step is -1.0"),
    (lambda content: content["optimizer"]["state"][0].pop("exp_avg_sq"), r"state\[0\] lacks exp_avg_sq"),
    (lambda content: content["optimizer"]["state"].update({9: {}}), r"state\[9\] belongs to none of the 4"),
    (lambda content: content["optimizer"].update(state=[]), "state must hold the moments"),
    (lambda content: content["optimizer"].pop("param_groups"), "must hold state and param_groups"),
    (lambda content: content["optimizer"]["param_groups"].append({}), "must be a list of 1 groups"),
    (lambda content: content["optimizer"]["param_groups"][0].pop("lr"), r"param_groups\[0\] lacks 'lr'"),
    (group(params=[0]), r"param_groups\[0\]\.params are not the 4 parameters"),
    (group(lr="x"), r"param_groups\[0\]\.lr is 'x'; finite"),
    (group(lr=float("nan")), r"param_groups\[0\]\.lr is nan"),
    (group(weight_decay=-1), r"weight_decay is -1"),
    (group(betas=[5.0, 0.9]), r"betas are \[5.0, 0.9\]; 2 numbers below 1"),
    (group(maximize=True), r"maximize is True, and False is due"),
    (group(evil=3), "unknown option 'evil'"),
    (schedule(get_lr=7), "the scheduler of .*unknown name 'get_lr'"),
    (schedule(step=None), "unknown name 'step'"),
    (schedule(last_epoch="x"), "last_epoch is 'x'"),
    (schedule(base_lrs=[0.1, 0.1]), "base_lrs is a list of 2"),
    (schedule(base_lrs=[float("nan")]), r"base_lrs\[0\] is nan"),
    (lambda content: content["scheduler"].pop("last_epoch"), "lacks 'last_epoch'"),
    (model("0.weight", float("nan")), r"last.pt is a damaged .* not finite in 0\.weight"),
    (model("1.running_var", -5.0), r"1\.running_var of its model holds a negative variance"),
    (chance(numpy=[]), "last.pt .*random state numpy cannot be used"),
    (numpy_at(10**6), "random state numpy cannot be used: its place is 1000000"),
    (chance(python=5), "random state python cannot be used"),
    (chance(torch=torch.zeros(3, dtype=torch.uint8)), "random state torch cannot be used"),
    (chance(cuda=3), "random state cuda cannot be used"),
    (chance(generators=5), "generators cannot be used"),
    (chance(generators={"noise": "x"}), r"random state generators\.noise cannot be used"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    tmp_path: Path, content: Content, change: Callable[[Content], Any], named: str
) -> None:
    crafted, run = copy.deepcopy(content), parts()
    change(crafted)
    torch.save(crafted, tmp_path / "last.pt")
    before = copy.deepcopy([run[name].state_dict() for name in ("model", "optimizer", "scheduler")])
    states = random.getstate(), torch.get_rng_state(), run["generators"]["noise"].get_state()
    numpy = np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match=named):
        load_training_state(tmp_path / "last.pt", **run)
    assert str(before) == str([run[name].state_dict() for name in ("model", "optimizer", "scheduler")])
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(run["generators"]["noise"].get_state(), states[2])
    assert np.random.get_state()[1].tolist() == numpy


def test_moments_whose_values_share_memory_are_laid_out_anew(tmp_path: Path, content: Content) -> None:
    crafted, run = copy.deepcopy(content), parts(channels_last=True)
    every(exp_avg=lambda z: torch.full((1,), 0.5).expand(z.shape))(crafted)
    torch.save(crafted, tmp_path / "last.pt")
    load_training_state(tmp_path / "last.pt", **run, restore_random=False)
    weight = run["model"][0].weight
    moment = run["optimizer"].state[weight]["exp_avg"]
    assert moment.stride() == weight.stride() and moment.eq(0.5).all()


def test_another_version_of_torch_may_know_other_switches(tmp_path: Path, content: Content) -> None:
    crafted, run = copy.deepcopy(content), parts()
    crafted["scheduler"]["verbose"] = False
    del crafted["scheduler"]["_get_lr_called_within_step"]
    crafted["optimizer"]["param_groups"][0]["future"] = None
    del crafted["optimizer"]["param_groups"][0]["differentiable"]
    torch.save(crafted, tmp_path / "last.pt")
    assert load_training_state(tmp_path / "last.pt", **run).step == 1
    assert run["scheduler"].last_epoch == 1
