"""NaN and infinity in gradients and states, found before they spoil weights or files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hsat.training import (
    accumulated_step,
    check_gradients,
    check_state,
    check_trainable,
    largest_gradient,
    save_checkpoint,
    split_batch,
)
from hsat.types import HierarchicalBatch


class Counted(TorchFunctionMode):
    """Counts what makes a host wait for the device."""

    READS = frozenset({"__float__", "__bool__", "__int__", "item", "tolist", "cpu", "numpy", "nonzero", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.READS:
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def trained(steps: int = 1) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_the_largest_gradient_is_a_maximum_over_all_parameters():
    model, _ = trained()
    wanted = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    assert float(largest_gradient(model)) == check_gradients(model) == wanted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_anywhere_is_found_and_its_parameter_named(value):
    model, _ = trained()
    for name, parameter in model.named_parameters():
        flat = parameter.grad.view(-1)
        for place in (0, len(flat) - 1):
            before = flat[place].item()
            flat[place] = value
            assert not math.isfinite(float(largest_gradient(model)))
            with pytest.raises(FloatingPointError) as error:
                check_gradients(model)
            assert f"in 1 of 6 parameters: {name} (1 of {len(flat)} values)" in str(error.value)
            flat[place] = before
    assert check_gradients(model) > 0


def test_many_bad_parameters_are_counted_and_the_first_ones_named():
    model, _ = trained()
    for parameter in model.parameters():
        parameter.grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"6 of 6 parameters: 0\.weight .*, 1\.weight .* and 3 more$"):
        check_gradients(model)


def test_finite_gradients_whose_norm_overflows_are_finite():
    model, _ = trained()
    for parameter in model.parameters():
        parameter.grad.fill_(1e30)
    assert not math.isfinite(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    assert check_gradients(model) == pytest.approx(1e30)


def test_the_device_is_read_once_whatever_the_number_of_parameters():
    model, optimizer = trained()
    with Counted() as counted:
        largest_gradient(model)
    assert counted.reads == []
    with Counted() as counted:
        check_gradients(model)
    assert len(counted.reads) == 1
    with Counted() as counted:
        check_state(model, optimizer)
    assert len(counted.reads) == 1


def test_parameters_without_a_gradient_are_left_out():
    model, _ = trained()
    model[0].weight.grad = None
    assert check_gradients(model) > 0


@pytest.mark.parametrize("kind", ["frozen", "detached", "no backward", "empty"])
def test_a_model_without_any_gradient_is_named_with_the_reason(kind):
    model, x = network(), torch.randn(6, 5)
    if kind == "frozen":
        model.requires_grad_(False)
        named = r"none of the 6 parameters of Sequential has requires_grad \(0\.weight, .*requires_grad_\(True\)"
        with pytest.raises(ValueError, match=named):
            check_trainable(model)
    elif kind == "detached":
        (model(x).detach() * torch.ones(3, requires_grad=True)).sum().backward()
        named = r"none of the 6 .* got a gradient \(0\.weight, .*detached"
    elif kind == "empty":
        model, named = nn.Sequential(nn.Tanh()), "no parameters"
    else:
        named = r"was backward\(\) called"
    with pytest.raises(ValueError, match=named):
        check_gradients(model)


@pytest.mark.parametrize("frozen", [True, False])
def test_accumulation_says_that_an_encoder_has_no_gradient(frozen):
    class Detached(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).detach()

    batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 4, 4), torch.arange(2))
    layers = nn.Flatten(), nn.Linear(48, 4)
    model = nn.Sequential(*layers).requires_grad_(False) if frozen else Detached(*layers)
    with pytest.raises(ValueError, match="requires_grad" if frozen else "Detached have no gradient"):
        accumulated_step(model, lambda z, _: z.square().mean(), None, split_batch(batch, 2))


def test_state_names_statistics_weights_and_moments():
    model, optimizer = trained()
    check_state(model, optimizer)
    model[1].running_var[2] = math.nan
    with pytest.raises(FloatingPointError, match=r"1\.running_var \(1 of 8 values\)"):
        check_state(model)
    model[1].running_var[2] = 1.0
    optimizer.state[model[3].bias]["exp_avg_sq"][0] = math.inf
    check_state(model)
    with pytest.raises(FloatingPointError, match=r"optimizer\.state\.3\.bias\.exp_avg_sq \(1 of 3 values\)"):
        check_state(model, optimizer)


@pytest.mark.parametrize("where", ["weight", "statistics", "moment"])
def test_a_state_that_is_not_finite_leaves_the_previous_checkpoint(where, tmp_path):
    model, optimizer = trained()
    parts = {"model": model, "optimizer": optimizer, "epoch": 0, "config": {}}
    path = save_checkpoint(tmp_path / "last.pt", step=1, **parts)
    before = path.read_bytes()
    tensor, named = {
        "weight": (model[0].weight.data, "0.weight"),
        "statistics": (model[1].running_mean, "1.running_mean"),
        "moment": (optimizer.state[model[0].weight]["exp_avg"], "optimizer.state.0.weight.exp_avg"),
    }[where]
    tensor.view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError) as error:
        save_checkpoint(path, step=2, **parts)
    assert named in str(error.value) and str(path) in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


RANKS = """
import math, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from hsat.training import check_gradients, save_checkpoint

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
if rank == 1:
    model.module[2].weight.register_hook(lambda grad: grad * math.nan)
model(torch.randn(6, 4)).square().mean().backward()
try:
    check_gradients(model.module)
except FloatingPointError as error:
    print("gradient:", error)
if rank == 1:
    model.module[1].running_mean[0] = math.nan
try:
    save_checkpoint(folder / "last.pt", model=model, epoch=0, step=1, config={})
except FloatingPointError as error:
    print("state:", error)
del model  # held, the group would keep gloo's threads, which may abort the interpreter's end
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_decide_alike_where_one_has_a_bad_gradient_or_state(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        shown = process.communicate(timeout=120)[0]
        assert process.returncode == 0, shown
        assert "gradient: the gradient is not finite in 1 of 6 parameters: 2.weight (8 of 8 values)" in shown
        assert "state of rank 1 is not finite in 1.running_mean (1 of 4 values)" in shown
    assert not (tmp_path / "last.pt").exists()
