"""With a seed and ids, the noise of an image is its own: batch size, order, restarts and rank do not matter.

Bit for bit needs a network that rounds alike in every batch.  Matrix products and convolutions do not promise that
(kernels are chosen by size), so the encoder here multiplies element by element and sums one number after the other.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hsat.attacks import (
    BIM,
    L2,
    MIFGSM,
    PGD,
    Linf,
    RandomNoise,
    classification,
    feature_drift,
    margin,
    match_features,
    worst_case,
)
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.types import EmbeddingTable, HierarchicalBatch

N, ROOT = 11, Path(__file__).parents[2]
THREAT, BALL = Linf(8 / 255), L2(0.4)
IDS = torch.arange(N) * 7 + 3
SHUFFLE = torch.tensor([2, 7, 0, 10, 1, 6, 3, 4, 9, 5, 8])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


WEIGHT = torch.randn(3, 48, generator=seeded(2), dtype=torch.float64)


def encoder(v):
    """(n, 3, 4, 4) -> (n, 3), whose row i is computed alike in every batch."""
    pixels = (v.double().flatten(1)[:, None] - 0.5) * WEIGHT
    return (pixels.cumsum(2)[:, :, -1] * 0.7).sin()


X = torch.rand(N, 3, 4, 4, generator=seeded(9))
LABEL = torch.arange(N) % 3
TARGET = torch.randn(N, 3, generator=seeded(5), dtype=torch.float64)
INDEX = np.arange(50)
BANK = EmbeddingTable(torch.randn(50, 3, generator=seeded(6)).numpy(), INDEX % 3, INDEX, INDEX, INDEX, ("a", "b", "c"))
KNN = KNNClassifier(k=9)
VOTE = margin(DecisionModel(encoder, KNN.fit(BANK)), LABEL)
ATTACKS = {
    "pgd": PGD(THREAT, step_size=2 / 255, steps=3),
    "restarts": PGD(THREAT, step_size=2 / 255, steps=2, restarts=3),
    "bim": BIM(BALL, step_size=0.1, steps=3, restarts=2),
    "mifgsm": MIFGSM(THREAT, step_size=2 / 255, steps=3, random_start=True),
    "noise": RandomNoise(BALL),
    "worst": worst_case(
        PGD(THREAT, step_size=2 / 255, steps=2),
        (MIFGSM(THREAT, step_size=2 / 255, steps=2, restarts=2), lambda x: feature_drift(encoder, x)),
    ),
}
OBJECTIVES = {
    "drift": lambda index: feature_drift(encoder, X).select(index),
    "classes": lambda index: classification(encoder, LABEL).select(index),
    "guide": lambda index: match_features(encoder, TARGET).select(index),
    "vote": VOTE.select,
}


def attacked(attack, objective, parts, *, stop=False):
    """The batch in its own order, attacked in these parts."""
    result = torch.empty_like(X)
    for index in parts:
        own = objective(index)
        success = VOTE.select(index).success if stop else None
        result[index] = attack(X[index], own, generator=seeded(4), ids=IDS[index], success=success)
    return result


@pytest.mark.parametrize(
    ("attack", "objective", "stop"),
    [
        *((attack, "vote", stop) for attack in ATTACKS for stop in (False, True)),
        *(("restarts", objective, stop) for objective in ("drift", "classes", "guide") for stop in (False, True)),
        ("worst", "drift", True),
    ],
)
def test_batch_size_and_order(attack, objective, stop):
    attack, objective = ATTACKS[attack], OBJECTIVES[objective]
    whole = attacked(attack, objective, [torch.arange(N)], stop=stop)
    assert not torch.equal(whole, X)
    for size in (1, 3, 8):
        again = attacked(attack, objective, SHUFFLE.split(size), stop=stop)
        assert torch.equal(again, whole), f"batches of {size} differ"


def test_the_noise_depends_on_seed_id_and_restart():
    attack, ids = ATTACKS["noise"], IDS[:4]
    draw = lambda seed, ids: attack(X[:4], encoder, generator=seeded(seed), ids=ids) - X[:4]
    assert not torch.equal(draw(1, ids), draw(2, ids))
    assert not torch.equal(draw(1, ids), draw(1, ids + 1))
    two = dataclasses.replace(ATTACKS["restarts"], restarts=2)
    seen = []
    two(X[:4], lambda v: seen.append(v.detach()) or v.sum((1, 2, 3)), generator=seeded(1), ids=ids)
    assert not torch.equal(seen[0], seen[3]), "the second restart begins elsewhere"


class Loader(list):
    """Batches that know their classes."""

    class dataset:
        class_names = ("a", "b", "c")


def loader(parts):
    return Loader(HierarchicalBatch(X[i], IDS[i], IDS[i], IDS[i], LABEL[i]) for i in parts)


@pytest.mark.parametrize("target", ["features", "decision"])
def test_evaluation(target):
    from hsat.eval import RunOptions, Scoring, evaluate_whitebox

    attacks = {"PGD-8": ATTACKS["restarts"], "worst": ATTACKS["worst"]}

    def run(parts):
        return evaluate_whitebox(
            encoder,
            BANK,
            loader(parts),
            attacks,
            classifier=KNN,
            target=target,
            scoring=Scoring(bootstrap=0),
            run=RunOptions(noise=False),
        )

    whole = run([torch.arange(N)])
    for size in (1, 3, 8):
        again = run(SHUFFLE.split(size))
        for name, table in again.tables.items():
            back = np.argsort(table.patch)
            np.testing.assert_array_equal(table.z[back], whole.tables[name].z)
        for one, other in zip(again.records, whole.records, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-12)


def test_embed_attacks_each_image_alike():
    from hsat.embedding import embed

    whole = embed(encoder, loader([torch.arange(N)]), attack=ATTACKS["pgd"], generator=seeded(4))
    parts = embed(encoder, loader(SHUFFLE.split(3)), attack=ATTACKS["pgd"], generator=seeded(4))
    np.testing.assert_array_equal(parts.z[np.argsort(parts.patch)], whole.z)


RANK = """
import sys
import torch, torch.distributed as dist
import importlib.util

torch.set_num_threads(1)
rank, store, here, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
spec = importlib.util.spec_from_file_location("order", here)
order = importlib.util.module_from_spec(spec)
spec.loader.exec_module(order)
mine = order.SHUFFLE[rank::2]
found = {}
for name, attack in order.ATTACKS.items():
    part = attack(order.X[mine], order.OBJECTIVES["vote"](mine), generator=order.seeded(4), ids=order.IDS[mine])
    gathered = [torch.empty_like(order.X[order.SHUFFLE[each::2]]) for each in range(2)]
    for each in range(2):
        if each == rank:
            gathered[each] = part
        dist.broadcast(gathered[each], src=each)
    whole = torch.empty_like(order.X)
    for each, rows in enumerate(gathered):
        whole[order.SHUFFLE[each::2]] = rows
    found[name] = whole
torch.save(found, f"{out}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path):
    expected = {name: attacked(attack, OBJECTIVES["vote"], [torch.arange(N)]) for name, attack in ATTACKS.items()}
    store = f"file://{tmp_path}/store"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), store, __file__, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, whole in expected.items():
            assert torch.equal(found[name], whole), f"{name} differs on rank {rank}"
