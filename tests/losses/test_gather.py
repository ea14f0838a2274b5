"""Two real processes over gloo against one, with equal and with unequal numbers of images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hsat.losses import HiDiscLoss, gather_with_grad
from hsat.types import Levels

RANK = """
import sys
import torch, torch.distributed as dist, torch.distributed.nn.functional  # before there is a group: hsat.distributed
from hsat.losses import HiDiscLoss, gather_with_grad
from hsat.types import Levels

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.set_num_threads(1)
case = torch.load(out + "/case.pt")
answers = {}
for name, (z, ids, cut) in case.items():
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    model = torch.nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.arange(24.0).sin().reshape(4, 6)); model.bias.fill_(0.1)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    levels = Levels(*(column[part] for column in ids))
    try:
        terms = HiDiscLoss(slide=2.0, gather=True)(parallel(z[part]), levels)
    except ValueError as error:
        answers[name] = str(error)
        continue
    terms.total.backward()
    answers[name] = [torch.stack(list(terms)).detach(), model.weight.grad, model.bias.grad]
rows = torch.full((1 + rank, 2), float(rank), requires_grad=True)
everything = gather_with_grad(rows)
(everything * torch.arange(6.0).reshape(3, 2) * (rank + 1)).sum().backward()
answers["gathered"] = [everything.detach(), rows.grad]
torch.save(answers, f"{out}/rank{rank}.pt")
del parallel, model, terms  # held, the group would keep gloo's threads, which may abort the interpreter's end
dist.destroy_process_group()
"""


def cases() -> dict[str, tuple[torch.Tensor, list[torch.Tensor], int]]:
    z = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patch = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    slide, patient = patch // 2, patch // 4
    across = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])  # no rank has a pair of its own
    return {
        "equal": (z, [patch, slide, patient], 4),
        "unequal": (z, [patch, slide, patient], 3),
        "pairs lie across ranks": (z, [across, across, across], 4),
        "no pair": (z, [torch.arange(8), torch.arange(8), torch.arange(8)], 4),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases(), folder / "case.pt")
    (folder / "rank.py").write_text(RANK)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "rank.py"), str(rank), f"file://{folder}/store", str(folder)],
            stderr=subprocess.PIPE,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in running:
            process.kill()
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ["equal", "unequal", "pairs lie across ranks"])
def test_two_ranks_equal_one_process(ranks: list[dict], name: str) -> None:
    z, ids, _ = cases()[name]
    model = torch.nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.arange(24.0).sin().reshape(4, 6))
        model.bias.fill_(0.1)
    terms = HiDiscLoss(slide=2.0)(model(z), Levels(*ids))
    terms.total.backward()
    wanted = [torch.stack(list(terms)).detach(), model.weight.grad, model.bias.grad]
    for answers in ranks:
        torch.testing.assert_close(answers[name], wanted, rtol=1e-10, atol=1e-10)


def test_no_pair_on_any_rank_is_said_by_every_rank(ranks: list[dict]) -> None:
    for answers in ranks:
        assert "the patch term (weight 1.0) has no positive pair: the 8 images lie in 8 groups" in answers["no pair"]


def test_rows_come_in_order_of_rank_and_gradients_are_summed_over_ranks(ranks: list[dict]) -> None:
    rows, weights = torch.tensor([[0.0, 0], [1, 1], [1, 1]]), 3 * torch.arange(6.0).reshape(3, 2)
    torch.testing.assert_close(ranks[0]["gathered"], [rows, weights[:1]])
    torch.testing.assert_close(ranks[1]["gathered"], [rows, weights[1:]])


def test_without_a_process_group_rows_come_back_untouched() -> None:
    z = torch.randn(2, 3, requires_grad=True)
    assert gather_with_grad(z) is z
