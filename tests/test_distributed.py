"""Processes that share work: what each of them does, and what one process alone says.

Real processes are in tests/eval/test_runner.py, tests/eval/test_evaluations.py and tests/training.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hsat.distributed import (
    ShardedLoader,
    World,
    batch_share,
    gather_objects,
    global_indices,
    row_share,
    shared_world,
    synchronize_batchnorm,
    world_rank,
    world_size,
)


class Third(World):
    """One rank of three, without the others."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.size = rank, 3


def test_batches_are_dealt_in_turn_and_finished_ones_apart():
    finished = (1, 2, 5)
    shares = [ShardedLoader(range(9), Third(rank), finished=finished) for rank in range(3)]
    owned = [[number for number in range(9) if share.is_mine(number)] for share in shares]
    assert owned == [[0, 1, 6], [2, 3, 7], [4, 5, 8]]
    assert [len(share) for share in shares] == [3, 3, 3]
    with pytest.raises(TypeError):
        len(ShardedLoader(iter(range(9)), Third(0)))


def test_only_own_images_are_read_of_a_loader_in_order():
    read = []

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, at):
            read.append(at)
            return at

    loader = DataLoader(Numbers(), batch_size=2)
    got = {number: batch.tolist() for number, batch in ShardedLoader(loader, Third(1))}
    assert got == {1: [2, 3], 4: [8, 9]} and read == [2, 3, 8, 9]
    assert len(ShardedLoader(DataLoader(Numbers(), batch_size=2, drop_last=True), Third(2))) == 1
    before = torch.get_rng_state()
    list(ShardedLoader(loader, Third(0)))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="cannot share a DataLoader that shuffles"):
        ShardedLoader(DataLoader(Numbers(), shuffle=True), Third(0))
    read.clear()
    own_order = DataLoader(Numbers(), sampler=[3, 1, 2])
    assert isinstance(ShardedLoader(own_order, Third(0)), ShardedLoader) and not read  # read whole, so not refused


def test_alone_is_as_before():
    with shared_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather("x") == ["x"] and world.gather_by_index({2: "b", 0: "a"}) == ["a", "b"]
        world.assert_same({"k": object()})


def test_one_process_shares_with_nobody():
    assert (world_rank(), world_size()) == (0, 1) and gather_objects([1]) == [[1]]
    assert row_share(7, batch_size=2) == slice(0, 7)
    with pytest.raises(ValueError, match="batch_size at least 1, got 3 and 0"):
        row_share(3, batch_size=0)


def test_shares_of_a_batch():
    assert batch_share(12, ranks=2, parts=3) == 6
    assert global_indices(3, rank=2).tolist() == [6, 7, 8]
    with pytest.raises(ValueError, match=r"images=10 .*2 rank\(s\) with 2 part\(s\).*use 8 or 12"):
        batch_share(10, ranks=2, parts=2, name="images")
    with pytest.raises(ValueError, match=r"batch_patients=10 .* use 8 or 12"):
        batch_share(10, ranks=2, parts=2)
    with pytest.raises(ValueError, match="at least 1"):
        batch_share(4, ranks=0)


def test_synchronize_batchnorm_says_where_it_works():
    with pytest.raises(ValueError, match="GPUs"):
        synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="no BatchNorm"):
        synchronize_batchnorm(nn.Linear(2, 2), device=torch.device("cuda"))
    made = synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), device=torch.device("cuda"))
    assert isinstance(made[0], nn.SyncBatchNorm)


def test_a_loader_knows_how_many_batches_it_gave():
    loader = ShardedLoader([_Batch([0, 1]), _Batch([2])], World())
    assert [number for number, _ in loader] == [0, 1] and loader.batches == 2
    loader.check()


class _Batch:
    def __init__(self, patch):
        self.patch = torch.tensor(patch)
