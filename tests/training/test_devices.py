"""Two real processes over gloo: what they exchange, and what not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.eval.gathering import gather_table, own_rows
from hsat.losses import HiDiscLoss
from hsat.training import (
    accumulated_step,
    adversarial_step,
    average_statistics,
    image_slots,
    same_everywhere,
    share_of_batch,
    split_batch,
    synchronised_norm,
)
from hsat.types import EmbeddingTable

SHARED = """
import torch
from torch import nn
from hsat.attacks import PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.types import HierarchicalBatch

ATTACK = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)

def network(norm):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else [])]
    return nn.Sequential(*first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).double()

def grid():
    images = torch.rand(4, 2, 1, 2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return HierarchicalBatch.from_grid(images)
"""
RANK = (
    SHARED
    + """
import sys
import numpy as np, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hsat.eval.gathering import gather_table, own_rows
from hsat.training import (accumulated_step, adversarial_step, average_statistics, image_slots, same_everywhere,
                           split_batch)
from hsat.types import EmbeddingTable

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.set_num_threads(1)
counted, inside = {"inside": 0, "outside": 0}, [False]
for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce", "all_to_all", "gather"):
    def spy(*args, honest=getattr(dist, name), **options):
        counted["inside" if inside[0] else "outside"] += 1
        return honest(*args, **options)
    setattr(dist, name, spy)

class Watched:
    run = None
    def __call__(self, *args, **options):
        inside[0] = True
        try:
            return ATTACK(*args, **options)
        finally:
            inside[0] = False

mine = split_batch(grid(), 2)[rank]
ids, loss, answers = image_slots(len(mine), rank=rank), HiDiscLoss(gather=True), {}
for case, norm, attack, parts in (("plain", False, None, 1), ("attacked", True, Watched(), 1),
                                  ("parts", True, Watched(), 2)):
    model = network(norm)
    parallel = DistributedDataParallel(model)
    options = dict(generator=torch.Generator().manual_seed(3), ids=ids)
    if parts == 1:
        result = adversarial_step(parallel, loss, attack, mine, **options)
        result.loss.backward()
    else:
        result = accumulated_step(parallel, loss, attack, mine, split_batch(mine, parts), **options)
    average_statistics(model)
    answers[case] = [result.loss.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]]
answers["counted"] = dict(counted)
share = own_rows(5, batch_size=2)
numbers = np.arange(5)
table = EmbeddingTable(np.eye(5, dtype=np.float32)[share], *[numbers[share] * 0] * 1, *[numbers[share]] * 3,
                       class_names=("a",))
answers["table"] = torch.from_numpy(gather_table(table).patch)
answers["lone"] = torch.from_numpy(gather_table(table if rank else None).patch)
try:
    same_everywhere(rank, "the number")
except ValueError as error:
    answers["differs"] = str(error)
same_everywhere("equal", "the word")
torch.save(answers, f"{out}/rank{rank}.pt")
dist.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
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
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def alone(norm, attack, parts):
    names: dict = {}
    exec(SHARED, names)
    model, batch = names["network"](norm), names["grid"]()
    options = {"generator": torch.Generator().manual_seed(3), "ids": image_slots(len(batch), rank=0)}
    if parts == 1:
        result = adversarial_step(model, HiDiscLoss(), attack, batch, **options)
        result.loss.backward()
    else:
        result = accumulated_step(model, HiDiscLoss(), attack, batch, split_batch(batch, parts), **options)
    return [result.loss.detach(), [p.grad for p in model.parameters()], list(model.buffers())]


@pytest.mark.parametrize(("case", "norm", "parts"), [("plain", False, 1), ("attacked", True, 2), ("parts", True, 4)])
def test_ranks_equal_one_process(ranks, case, norm, parts):
    attack = None if case == "plain" else PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    wanted = alone(norm, attack, parts)
    for answers in ranks:
        torch.testing.assert_close(answers[case], wanted, rtol=1e-6, atol=1e-9)


def test_the_attack_exchanges_nothing(ranks):
    for answers in ranks:
        assert answers["counted"]["inside"] == 0 and answers["counted"]["outside"] > 0


def test_rows_come_back_in_order_on_all_ranks(ranks):
    for answers in ranks:
        assert answers["table"].tolist() == [0, 1, 2, 3, 4]
        assert answers["lone"].tolist() == [2, 3, 4]
        assert "the number (rank 0: 0, rank 1: 1)" in answers["differs"]


def test_without_a_process_group_all_of_it_is_plain():
    assert own_rows(5, batch_size=2) == slice(0, 5)
    table = EmbeddingTable(np.eye(2, dtype=np.float32), *[np.zeros(2, np.int64)] * 4, class_names=("a",))
    assert gather_table(table) is table
    with pytest.raises(ValueError, match="no rank"):
        gather_table(None)
    with pytest.raises(ValueError, match="batch_size"):
        own_rows(3, batch_size=0)
    same_everywhere(1, "a number")
    norm = nn.BatchNorm1d(2)
    before = copy.deepcopy(norm.state_dict())
    average_statistics(norm)
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())


def test_shares_of_a_batch():
    assert share_of_batch(12, ranks=2, parts=3) == 6
    assert image_slots(3, rank=2).tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match=r"batch_patients=10 .* 2 rank\(s\) with 2 part\(s\) each; use 8 or 12"):
        share_of_batch(10, ranks=2, parts=2)
    with pytest.raises(ValueError, match="at least 1"):
        share_of_batch(4, ranks=0)


def test_synchronised_norm_says_where_it_works():
    with pytest.raises(ValueError, match="GPUs"):
        synchronised_norm(nn.Sequential(nn.BatchNorm2d(3)), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="no BatchNorm"):
        synchronised_norm(nn.Linear(2, 2), device=torch.device("cuda"))
    made = synchronised_norm(nn.Sequential(nn.BatchNorm2d(3)), device=torch.device("cuda"))
    assert isinstance(made[0], nn.SyncBatchNorm)
