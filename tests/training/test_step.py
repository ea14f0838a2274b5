from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.models import convert_to_dual
from hsat.training import adversarial_step, paper_clean_weight
from hsat.types import HierarchicalBatch, Objective

EPS, STEP = 8 / 255, 2 / 255
PREFIXES = {"model.bb.": "", "model.proj.layers.0.": "fc."}


class SmallEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        return nn.functional.normalize(self.fc(x.mean((2, 3))), dim=1)


class StartsOutsideTheBox:
    """The published training attack: the network sees the unclipped start, every later point lies in ball and box."""

    def __call__(self, x: Tensor, objective: Objective, *, start: Tensor | None = None, **_: Any) -> Tensor:
        ball, point = Linf(EPS), start
        for _ in range(5):
            point = point.detach().requires_grad_()
            (grad,) = torch.autograd.grad(objective(point), point)
            point = ball.project(point.detach() + STEP * grad.sign(), x)
        return point

    run = None


class Spy:
    """An attack that adds a constant and remembers how it was called and what the model was like."""

    def __init__(self, model: nn.Module, error: Exception | None = None) -> None:
        self.model, self.error, self.seen = model, error, {}

    def __call__(self, x: Tensor, objective: Objective, **options: Any) -> Tensor:
        value = objective(x)
        self.seen = options | {
            "value": value,
            "training": [part.training for part in self.model.modules()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "autocast": torch.is_autocast_enabled("cpu"),
            "active": [part.active for part in self.model.modules() if hasattr(part, "active")],
        }
        if self.error:
            raise self.error
        return (x + 0.01).clamp(0, 1)

    run = None


def renamed(name: str) -> str:
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    raise KeyError(name)


def states(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(value) for name, value in golden.items() if name.startswith(prefix)}
    return {renamed(name.removeprefix(prefix)): value for name, value in found.items()}


def small_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> HierarchicalBatch:
    generator = torch.Generator().manual_seed(seed)
    return HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 6, 6, generator=generator, dtype=dtype))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallEncoder().train()


def pgd(steps: int = 2) -> PGD:
    return PGD(Linf(EPS), step_size=STEP, steps=steps)


CASES: dict[str, dict[str, Any]] = {
    "clean": {"attack": None},
    "only_adv": {},
    "mixed": {"clean_weight": paper_clean_weight(1.0)},
    "mixed_dynamic_strength0.4": {"clean_weight": paper_clean_weight(0.4)},
    "only_adv_attack_loss_pt": {"inner_loss": HiDiscLoss.from_code("pt")},
}


@pytest.mark.parametrize("case", CASES)
def test_two_published_training_steps(golden: dict[str, np.ndarray], golden_numbers: dict, case: str) -> None:
    """Weights and BatchNorm statistics after two steps of SGD, and the losses on the way."""
    model = SmallEncoder().double().train()
    model.load_state_dict(states(golden, "init/"))
    batch = HierarchicalBatch.from_grid(torch.from_numpy(golden["images"]))
    start = batch.images + (2 * torch.from_numpy(golden["U"]) - 1) * EPS
    options = {"attack": StartsOutsideTheBox(), **CASES[case]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    logged: dict[str, list[float]] = {}
    for _ in range(2):
        result = adversarial_step(model, HiDiscLoss(), batch=batch, start=start, **options)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        logged.setdefault("total_loss", []).append(result.loss.item())
        for prefix, terms in (("clean", result.clean), ("adv", result.adversarial)):
            for level in ("total", "patch", "slide", "patient"):
                name = f"{prefix}_loss" if level == "total" else f"{prefix}_{level}_loss"
                logged.setdefault(name, []).append(0.0 if terms is None else getattr(terms, level).item())
    wanted = golden_numbers["train_one_epoch_2_identical_batches"][case]
    for name, values in wanted.items():
        assert np.mean(logged[name]) == pytest.approx(values, abs=1e-9), name
    after, ours = states(golden, f"{case}/after2/"), model.state_dict()
    assert after.keys() in (ours.keys(), set())
    for name, value in after.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-9, msg=name)


def test_baseline_is_the_plain_loss(model: nn.Module) -> None:
    batch = small_batch()
    result = adversarial_step(model, HiDiscLoss(), None, batch, clean_weight=0.3)
    assert result.adversarial is None and result.x_adv is None
    with torch.no_grad():
        torch.testing.assert_close(result.clean, HiDiscLoss()(model(batch.images), batch))
    assert result.loss is result.clean.total


def test_only_adversarial_images_by_default(model: nn.Module) -> None:
    batch = small_batch()
    result = adversarial_step(model, HiDiscLoss(), pgd(), batch, generator=torch.Generator().manual_seed(1))
    assert result.clean is None
    assert not result.x_adv.requires_grad
    gap = (result.x_adv.double() - batch.images.double()).abs()
    assert 0 < gap.max() <= EPS
    assert result.loss is result.adversarial.total
    torch.testing.assert_close(result.adversarial, HiDiscLoss()(model(result.x_adv), batch))


def test_attack_alone_with_the_same_generator_gives_the_same_images(model: nn.Module) -> None:
    from hsat.attacks import hierarchical
    from hsat.models import frozen

    batch = small_batch()
    result = adversarial_step(model, HiDiscLoss(), pgd(), batch, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    fresh = SmallEncoder().train()
    with frozen(fresh):
        objective = hierarchical(fresh, HiDiscLoss(), batch)
        alone = pgd()(batch.images, objective, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result.x_adv, alone)


@pytest.mark.parametrize("clean_weight", [0.0, 0.25, 1.0])
def test_weighted_sum_of_separate_passes_adversarial_first(model: nn.Module, clean_weight: float) -> None:
    batch, passes = small_batch(), []
    hook = model.register_forward_pre_hook(lambda part, args: passes.append(args[0]) if part.training else None)
    result = adversarial_step(model, HiDiscLoss(), Spy(model), batch, clean_weight=clean_weight)
    hook.remove()
    shifted = (batch.images + 0.01).clamp(0, 1)
    expected = [shifted] if clean_weight == 0 else [batch.images] if clean_weight == 1 else [shifted, batch.images]
    assert len(passes) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(passes, expected, strict=True))
    total = sum(
        weight * terms.total
        for weight, terms in ((clean_weight, result.clean), (1 - clean_weight, result.adversarial))
        if terms is not None
    )
    torch.testing.assert_close(result.loss, total)
    assert (result.x_adv is None) == (clean_weight == 1)


def test_batch_statistics_move_in_the_outer_passes_only(model: nn.Module) -> None:
    batch = small_batch()
    adversarial_step(model, HiDiscLoss(), pgd(5), batch, clean_weight=0.5)
    assert model.bn1.num_batches_tracked.item() == 2
    adversarial_step(model, HiDiscLoss(), pgd(5), batch)
    assert model.bn1.num_batches_tracked.item() == 3


def test_attack_sees_a_frozen_model_which_is_restored_also_after_an_error(model: nn.Module) -> None:
    model.bn2.eval()
    model.fc.bias.requires_grad_(False)
    modes = [part.training for part in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    for error in (None, RuntimeError("attack failed")):
        spy = Spy(model, error)
        if error:
            with pytest.raises(RuntimeError, match="attack failed"):
                adversarial_step(model, HiDiscLoss(), spy, small_batch())
        else:
            adversarial_step(model, HiDiscLoss(), spy, small_batch())
        assert not any(spy.seen["training"])
        assert not any(spy.seen["requires_grad"])
        assert [part.training for part in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert all(p.grad is None for p in model.parameters())


def test_start_and_generator_reach_the_attack_and_ids_do_not(model: nn.Module) -> None:
    spy, batch, generator = Spy(model), small_batch(), torch.Generator()
    start = torch.rand_like(batch.images)
    adversarial_step(model, HiDiscLoss(), spy, batch, generator=generator, start=start)
    assert spy.seen["start"] is start
    assert spy.seen["generator"] is generator
    assert spy.seen.get("ids") is None


def test_inner_loss_drives_the_attack_only(model: nn.Module) -> None:
    spy, batch = Spy(model), small_batch()
    inner = HiDiscLoss.from_code("pt")
    result = adversarial_step(model, HiDiscLoss(), spy, batch, inner_loss=inner)
    torch.manual_seed(0)
    fresh = SmallEncoder().eval()
    with torch.no_grad():
        torch.testing.assert_close(spy.seen["value"].detach(), inner(fresh(batch.images), batch).total)
    assert result.loss > spy.seen["value"]


def test_autocast_covers_attack_and_passes(model: nn.Module) -> None:
    spy, dtypes = Spy(model), []
    model.fc.register_forward_hook(lambda part, args, out: dtypes.append(out.dtype))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    result = adversarial_step(model, HiDiscLoss(), spy, small_batch(), clean_weight=0.5, autocast=autocast)
    assert spy.seen["autocast"]
    assert dtypes == [torch.bfloat16] * 3
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert not torch.is_autocast_enabled("cpu")


def test_dual_batch_norm_takes_the_branch_of_its_images(model: nn.Module) -> None:
    dual = convert_to_dual(model)
    spy = Spy(dual)
    adversarial_step(dual, HiDiscLoss(), spy, small_batch(), clean_weight=0.5)
    assert set(spy.seen["active"]) == {"pgd"}
    normal, pgd_branch = dual.bn1.bn_list
    assert normal.num_batches_tracked.item() == pgd_branch.num_batches_tracked.item() == 1
    adversarial_step(dual, HiDiscLoss(), None, small_batch())
    assert (normal.num_batches_tracked.item(), pgd_branch.num_batches_tracked.item()) == (2, 1)
    assert dual.bn1.active == "normal"


def test_ten_steps_lower_the_loss_under_attack(model: nn.Module) -> None:
    batch, optimizer = small_batch(), torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(10):
        result = adversarial_step(model, HiDiscLoss(), pgd(), batch, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < losses[0] - 1


def test_model_in_eval_mode(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"SmallEncoder is in eval mode; call \.train\(\)"):
        adversarial_step(model.eval(), HiDiscLoss(), None, small_batch())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_clean_weight_out_of_range(model: nn.Module, share: float) -> None:
    with pytest.raises(ValueError, match=r"clean_weight is the share of the clean loss and must lie in \[0, 1\], got"):
        adversarial_step(model, HiDiscLoss(), None, small_batch(), clean_weight=share)


RANK = """
import sys
import torch, torch.distributed as dist
from torch import nn
from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.training import adversarial_step
from hsat.types import HierarchicalBatch

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
answers = {}
for gather in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8)).double()
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=sys.argv[3] == "True")
    images = torch.rand(2, 2, 2, 2, 3, 6, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    grid = HierarchicalBatch.from_grid(images)
    batch = HierarchicalBatch(grid.images, grid.patch + 8 * rank, grid.slide + 4 * rank, grid.patient + 2 * rank)
    # Ranks that climb different numbers of steps would wait for each other for ever if a step were collective.
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=1 + 3 * rank)
    for share in (0.0, 0.4):
        parallel.zero_grad()
        result = adversarial_step(parallel, HiDiscLoss(gather=gather), attack, batch, clean_weight=share,
                                  generator=torch.Generator().manual_seed(1))
        result.loss.backward()
        answers[gather, share] = [result.loss.detach(), model[0].weight.grad.clone(), result.x_adv]
torch.save(answers, f"{folder}/rank{rank}.pt")
del parallel  # held, the group would keep gloo's threads, which may abort the interpreter's end
dist.destroy_process_group()
"""


OLDER_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


@pytest.mark.parametrize(
    "broadcast_buffers",
    [
        pytest.param(False, marks=pytest.mark.slow),
        pytest.param(
            True,
            marks=(
                pytest.mark.slow,
                pytest.mark.xfail(
                    OLDER_TORCH,
                    reason="buffers broadcast in the second forward break the backward of the first in torch 2.8",
                    strict=False,
                ),
            ),
        ),
    ],
)
def test_two_ranks_attack_apart_and_average_their_gradients(tmp_path: Path, broadcast_buffers: bool) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(tmp_path / "rank.py")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), str(broadcast_buffers)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for key, (loss, grad, _) in first.items():
        torch.testing.assert_close(grad, second[key][1])
        gathered, _ = key
        assert torch.isclose(loss, second[key][0]) == gathered
    # The attack's negatives are local, with and without gathering.
    assert torch.equal(first[False, 0.0][2], first[True, 0.0][2])
