"""Two real processes over gloo: what they exchange, and what not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.distributed import (
    average_statistics,
    gather_objects,
    global_indices,
    row_share,
)
from hsat.embedding import gather_table
from hsat.losses import HiDiscLoss
from hsat.models import convert_to_dual
from hsat.training import LossGap, accumulated_step, adversarial_step, split_batch
from hsat.types import EmbeddingTable

SHARED = """
import torch
from torch import nn
from hsat.attacks import NFGSM, PGD, Linf
from hsat.losses import HiDiscLoss
from hsat.models import convert_to_dual
from hsat.distributed import average_statistics, global_indices
from hsat.training import OverfittingGuard, adversarial_step, free_replays
from hsat.types import HierarchicalBatch

ATTACK = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)

def network(norm):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else [])]
    return nn.Sequential(*first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).double()

def grid():
    images = torch.rand(4, 2, 1, 2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return HierarchicalBatch.from_grid(images)

def outcome(model, result):
    return [result.loss.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]]

def local_negatives(batch, rank, wrap=lambda model: model):
    model = network(True)
    parallel = wrap(model)  # has to live until the backward pass
    options = dict(generator=torch.Generator().manual_seed(3), ids=global_indices(len(batch), rank=rank))
    result = adversarial_step(parallel, HiDiscLoss(), ATTACK, batch, **options)
    result.loss.backward()
    average_statistics(model)
    return outcome(model, result)

def freely(batch, ids, loss, wrap=lambda model: model):
    model = network(False)
    descent, seen, parallel = torch.optim.SGD(model.parameters(), lr=0.1), [], wrap(model)
    options = dict(threat=ATTACK.threat, replays=3, generator=torch.Generator().manual_seed(3), ids=ids)
    for result in free_replays(parallel, loss, batch, **options):
        descent.zero_grad()
        result.loss.backward()
        descent.step()
        seen.append(result.x_adv)
    return [list(model.parameters()), seen]

def measured(batch, ids):
    guard = OverfittingGuard(NFGSM(ATTACK.threat), ATTACK)
    return list(guard.measure(network(True), HiDiscLoss(), batch, generator=torch.Generator().manual_seed(3), ids=ids))
"""
RANK = (
    SHARED
    + """
import sys
import numpy as np, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hsat.distributed import row_share
from hsat.embedding import gather_table
from hsat.distributed import gather_objects
from hsat.training import accumulated_step, assert_same, split_batch
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

mine = split_batch(grid(), 2).parts[rank]
ids, loss, answers = global_indices(len(mine), rank=rank), HiDiscLoss(gather=True), {}
for case, norm, attack, parts in (("plain", False, None, 1), ("attacked", True, Watched(), 1),
                                  ("parts", True, Watched(), 2)):
    model = network(norm)
    parallel = DistributedDataParallel(model)
    options = dict(generator=torch.Generator().manual_seed(3), ids=ids)
    if parts == 1:
        result = adversarial_step(parallel, loss, attack, mine, **options)
        result.loss.backward()
    else:
        result = accumulated_step(parallel, loss, attack, split_batch(mine, parts), **options)
    average_statistics(model)
    answers[case] = [result.loss.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]]

def wrap(model):
    return DistributedDataParallel(model, broadcast_buffers=False)

answers["local"] = local_negatives(mine, rank, wrap)
dual = convert_to_dual(network(True))
parallel = wrap(dual)
result = adversarial_step(parallel, loss, Watched(), mine, clean_weight=0.3, **options)
result.loss.backward()
average_statistics(dual)
answers["dual"] = outcome(dual, result)
answers["free"] = freely(mine, ids, loss, wrap)
inside[0] = True
gap = measured(mine, ids)
inside[0] = False
answers["gaps"] = gather_objects(gap)
answers["counted"] = dict(counted)
share = row_share(5, batch_size=2)
numbers = np.arange(5)
table = EmbeddingTable(np.eye(5, dtype=np.float32)[share], *[numbers[share] * 0] * 1, *[numbers[share]] * 3,
                       class_names=("a",))
answers["table"] = torch.from_numpy(gather_table(table).patch)
answers["lone"] = torch.from_numpy(gather_table(table if rank else None).patch)
try:
    assert_same("the number", rank)
except ValueError as error:
    answers["differs"] = str(error)
assert_same("the word", "equal")
torch.save(answers, f"{out}/rank{rank}.pt")
del parallel  # held, the group would keep gloo's threads, which may abort the interpreter's end
dist.destroy_process_group()
"""
)


SYNCHRONISED = (
    SHARED
    + """
import sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hsat.distributed import synchronize_batchnorm
from hsat.training import split_batch

rank, store, out, device = int(sys.argv[1]), sys.argv[2], sys.argv[3], torch.device(sys.argv[4])
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)  # NCCL wants a GPU for each rank
mine = split_batch(grid(), 2).parts[rank].to(device)
answers = {}
for case, attack in (("plain", None), ("attacked", ATTACK)):
    model = synchronize_batchnorm(network(True), device=device).to(device)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    options = dict(generator=torch.Generator().manual_seed(3), ids=global_indices(len(mine), rank=rank))
    result = adversarial_step(parallel, HiDiscLoss(gather=True), attack, mine, **options)
    result.loss.backward()
    answers[case] = [[value.cpu() for value in values] for values in outcome(model, result)[1:]]
torch.save(answers, f"{out}/rank{rank}.pt")
del parallel  # held, the group would keep gloo's threads, which may abort the interpreter's end
dist.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return answers_of(RANK, tmp_path_factory.mktemp("ranks"))


def answers_of(script, folder, *more):
    """What two processes that run the script write."""
    (folder / "rank.py").write_text(script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "rank.py"), str(rank), f"file://{folder}/store", str(folder), *more],
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


@pytest.fixture(scope="module")
def shared():
    names: dict = {}
    exec(SHARED, names)
    return SimpleNamespace(**names)


def alone(shared, norm, attack, parts, *, dual=False, clean_weight=0.0):
    model, batch = shared.network(norm), shared.grid()
    model = convert_to_dual(model) if dual else model
    options = {"generator": torch.Generator().manual_seed(3), "ids": global_indices(len(batch), rank=0)}
    options["clean_weight"] = clean_weight
    if parts == 1:
        result = adversarial_step(model, HiDiscLoss(), attack, batch, **options)
        result.loss.backward()
    else:
        result = accumulated_step(model, HiDiscLoss(), attack, split_batch(batch, parts), **options)
    return [result.loss.detach(), [p.grad for p in model.parameters()], list(model.buffers())]


@pytest.mark.parametrize(("case", "norm", "parts"), [("plain", False, 1), ("attacked", True, 2), ("parts", True, 4)])
def test_ranks_equal_one_process(ranks, shared, case, norm, parts):
    attack = None if case == "plain" else PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    wanted = alone(shared, norm, attack, parts)
    for answers in ranks:
        torch.testing.assert_close(answers[case], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_dual_norm_with_clean_images_on_ranks_equals_parts(ranks, shared):
    """Both branches get gradients and statistics, each of its own images."""
    wanted = alone(shared, True, shared.ATTACK, 2, dual=True, clean_weight=0.3)
    for answers in ranks:
        torch.testing.assert_close(answers["dual"], wanted, rtol=1e-6, atol=1e-9)
    _, grads, buffers = ranks[0]["dual"]
    assert all(bool(grad.abs().sum() > 0) for grad in grads[2:6]), "weight and bias of both branches"
    assert not torch.equal(buffers[0], buffers[3]), "clean and adversarial means"
    assert not torch.allclose(wanted[0], alone(shared, True, shared.ATTACK, 2, dual=True)[0])


def test_local_negatives_give_each_rank_its_own_loss(ranks, shared):
    """Gradients and statistics are the means of those that each rank would have alone; other ones than with all."""
    halves = split_batch(shared.grid(), 2).parts
    lone = [shared.local_negatives(half, rank) for rank, half in enumerate(halves)]
    mean = [[(one + two) / 2 for one, two in zip(lone[0][i], lone[1][i], strict=True)] for i in (1, 2)]
    for rank, answers in enumerate(ranks):
        loss, grads, buffers = answers["local"]
        torch.testing.assert_close(loss, lone[rank][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(grads, mean[0], rtol=1e-6, atol=1e-9)
        for name, found, wanted in zip(("mean", "variance"), buffers, mean[1], strict=False):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9, msg=name)
        assert not torch.allclose(grads[0], answers["attacked"][1][0])
        assert not torch.allclose(loss, answers["attacked"][0])


def test_free_replays_on_ranks_equal_one_process(ranks, shared):
    """Images move along the gradient of the loss of all ranks: no parts are needed for it to be the same."""
    batch = shared.grid()
    weights, images = shared.freely(batch, global_indices(len(batch), rank=0), HiDiscLoss())
    for answers in ranks:
        torch.testing.assert_close(answers["free"][0], weights, rtol=1e-6, atol=1e-9)
    both = [torch.cat(pair) for pair in zip(ranks[0]["free"][1], ranks[1]["free"][1], strict=True)]
    torch.testing.assert_close(both, images, rtol=0, atol=1e-12)
    assert not torch.equal(images[0], images[1])


def test_ranks_decide_by_one_gap(ranks, shared):
    """Each measures its own images without a word; what they hear of one another is the same everywhere."""
    batch = shared.grid()
    ids = global_indices(len(batch), rank=0).split(len(batch) // 2)
    halves = split_batch(batch, 2).parts
    wanted = [shared.measured(half, own) for half, own in zip(halves, ids, strict=True)]
    assert ranks[0]["gaps"] == ranks[1]["gaps"] == [pytest.approx(gap, rel=1e-9) for gap in wanted]
    assert wanted[0] != wanted[1] != shared.measured(halves[1], ids[0]), "noise goes by an image's place"
    found = LossGap.mean([LossGap(*gap) for gap in wanted])
    assert found == pytest.approx([sum(pair) / 2 for pair in zip(*wanted, strict=True)])
    with pytest.raises(ValueError, match="no gap to take the mean of"):
        LossGap.mean([])


def test_the_attack_exchanges_nothing(ranks):
    for answers in ranks:
        assert answers["counted"]["inside"] == 0 and answers["counted"]["outside"] > 0


def test_rows_come_back_in_order_on_all_ranks(ranks):
    for answers in ranks:
        assert answers["table"].tolist() == [0, 1, 2, 3, 4]
        assert answers["lone"].tolist() == [2, 3, 4]
        assert "rank 1 disagrees with rank 0 about the number: 1, not 0" in answers["differs"]


def test_without_a_process_group_all_of_it_is_plain():
    assert row_share(5, batch_size=2) == slice(0, 5)
    table = EmbeddingTable(np.eye(2, dtype=np.float32), *[np.zeros(2, np.int64)] * 4, class_names=("a",))
    assert gather_table(table) is table
    with pytest.raises(ValueError, match="no rank"):
        gather_table(None)
    with pytest.raises(ValueError, match="batch_size"):
        row_share(3, batch_size=0)
    assert gather_objects([1, 2]) == [[1, 2]]
    norm = nn.BatchNorm1d(2)
    before = copy.deepcopy(norm.state_dict())
    average_statistics(norm)
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm has no CPU form")
def test_synchronised_norm_of_two_ranks_is_that_of_the_whole_batch(shared, tmp_path):
    """One step, both ranks on one GPU: gradients and running statistics are those of one process without ranks."""
    found = answers_of(SYNCHRONISED, tmp_path, "cuda:0")
    batch, model = shared.grid(), shared.network(True)
    result = adversarial_step(model, HiDiscLoss(), None, batch)
    result.loss.backward()
    for answers in found:
        torch.testing.assert_close(answers["plain"], shared.outcome(model, result)[1:], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(answers["attacked"], found[0]["attacked"], rtol=0, atol=0)
        assert not torch.allclose(answers["attacked"][0][0], answers["plain"][0][0])
