"""An evaluation shared by two real processes over gloo: the numbers of one, its cache and state, and its errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hsat.eval.doubt.subset import Handful
from hsat.eval.engine.journal import Journal
from hsat.eval.tally import Tally
from torch.utils.data import DataLoader

from hsat.attacks import PGD, Linf
from hsat.data import write_synthetic_cohort
from hsat.distributed import ShardedLoader, World, shared_world
from hsat.eval import KNNClassifier, embed, evaluate_whitebox, fit_shards

SHARED = '''
import dataclasses, hashlib, json
import numpy as np
import torch
from torch import nn
from hsat.attacks import PGD, Linf
from hsat.data import Cohort, PatchDataset, patch_loader
from hsat.eval import Strongest, evaluate_transfer, evaluate_whitebox
from hsat.types import HierarchicalBatch

SMALL = Linf(2 / 255)
PGDS = {"PGD": PGD(SMALL, step_size=1 / 255, steps=2), "other": PGD(Linf(1 / 255), step_size=1 / 255, steps=2)}
ATTACKS = PGDS | {"strongest": Strongest(SMALL, steps=2, vote_steps=2, restarts=1, queries=3)}
OPTIONS = dict(k=5, bootstrap=10, noise=True, diagnose=3, keep_examples=5, target="knn", model="m")

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(16, 6)
        self.images = 0

    def features(self, x):
        self.images += len(x)
        return nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).tanh(), 2).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))

def loaders(root, batch_size=3):
    cohort = Cohort.from_opensrh(root)
    return [patch_loader(PatchDataset(cohort, s, image_size=16), batch_size=batch_size) for s in ("train", "val")]

class Batches(list):
    class dataset:
        class_names, split = ("a", "b"), "val"

def batches(sizes, first=0):
    generator, found = torch.Generator().manual_seed(first), Batches()
    for size in sizes:
        ids = torch.arange(first, first + size)
        images = torch.rand(size, 3, 12, 12, generator=generator)
        found.append(HierarchicalBatch(images, ids, ids // 2, ids // 2, (ids // 2) % 2))
        first += size
    return found

def transfer(**options):
    """In memory, over loaders that every rank reads whole."""
    torch.manual_seed(1)
    encoders = {"a": Network(), "b": nn.Sequential(nn.Flatten(), nn.Linear(432, 5))}
    banks, queries = batches([4, 9], 900), batches([2, 5, 1, 4, 3])
    found = evaluate_transfer(encoders, banks, queries, PGDS, k=5, bootstrap=10, **options)
    tables = (*found.clean.values(), *found.attacked.values())
    scores = [hashlib.sha256(each.tobytes()).hexdigest() for by_k in tables for each in by_k.values()]
    return {"records": [repr(record) for record in found.records], "patch": found.queries.patch.tolist(),
            "scores": scores, "made": [list(each) for each in found.made]}

def bytes_of(result):
    """All that an evaluation says, as texts."""
    found = {"records": [json.dumps(dataclasses.asdict(record), sort_keys=True) for record in result.records]}
    for name, table in result.tables.items():
        columns = [table.z, table.label, table.patch, table.slide, table.patient, result.examples[name].numpy()]
        columns += list(result.scores[name].values())
        found[name] = [hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for each in columns]
    for name, each in result.casualties.items():
        found["casualties " + name] = [each.patch.tolist(), each.felled_by.tolist(), each.margin.tolist(),
                                       repr(each.members)]
    return json.loads(json.dumps(found))
'''
RANK = (
    SHARED
    + """
import os, signal, sys, warnings
import torch.distributed as dist
warnings.simplefilter("error")
rank, store, root, out = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
answers = {}

def said(*args, **options):
    try:
        evaluate_whitebox(*args, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"

class Dying(Batches):
    def __iter__(self):
        yield from self[:3]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from self[3:]

def say(case):
    with open(f"{out}/{case}{rank}.json", "w") as file:
        json.dump(answers, file)

bank, queries = loaders(root)
keep = dict(OPTIONS, cache=f"{out}/cache", state=f"{out}/state")
for name in ("first", "again"):
    network = Network()
    answers[name] = bytes_of(evaluate_whitebox(network, bank, queries, ATTACKS, **keep))
    answers[name + " images"] = network.images
answers["lone"] = bytes_of(
    evaluate_whitebox(Network(), batches([7, 6, 7], 900), batches([4]), ATTACKS, **OPTIONS))
answers["uneven"] = bytes_of(
    evaluate_whitebox(Network(), batches([7], 900), batches([2, 5, 1, 4, 3]), ATTACKS, state=f"{out}/begun", **OPTIONS))

answers["transfer"] = transfer()
answers["kept"] = [transfer(state=f"{out}/transfer", hold="one") for _ in range(2)]

bank, queries, plain = batches([9], 900), batches([2, 2, 2]), dict(k=3, bootstrap=0)
def broken(x):
    if rank and x.requires_grad:
        raise ValueError("no memory left on this rank")
    return x.flatten(1)[:, :9]
answers["seed"] = said(Network(), bank, queries, PGDS, seed=rank, **plain)
answers["order"] = said(Network(), bank, Batches(queries[:: 1 - 2 * rank]), PGDS, **plain)
answers["bank"] = said(Network(), Batches(bank * (1 + rank)), queries, PGDS, **plain)
answers["one"] = said(broken, bank, queries, PGDS, **plain)
answers["thesis"] = said(Network(), bank, queries, PGDS, state=f"{out}/thesis", **plain)
say("answers")
dying = Dying(batches([2, 3, 2, 3, 2, 3]))
answers = {"killed": said(Network(), bank, dying, ATTACKS, state=f"{out}/dying", **OPTIONS)}
say("last")
dist.destroy_process_group()
"""
)


def two_ranks(out, root):
    """Run all that; returns the exit codes, the answers of both ranks, and the last words of the one that is left."""
    (out / "rank.py").write_text(RANK)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, out / "rank.py", str(rank), f"file://{out}/store", str(root), str(out)],
            stderr=subprocess.PIPE,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    assert codes == [0, -signal.SIGKILL], errors
    return [json.loads((out / f"{name}.json").read_text()) for name in ("answers0", "answers1", "last0")]


@pytest.fixture(scope="module")
def names():
    found: dict = {}
    exec(SHARED, found)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def shared(names, tmp_path_factory):
    out = tmp_path_factory.mktemp("shared")
    root = write_synthetic_cohort(out / "srh", classes=("hgg", "lgg"), patients_per_class=5, patches=2, size=16)

    class Breaking(names["Batches"]):
        def __iter__(self):
            yield from self[:3]
            raise Interrupted

    begun = Breaking(names["batches"]([2, 5, 1, 4, 3]))
    with pytest.raises(Interrupted):
        call(names, names["batches"]([7], 900), begun, state=out / "begun")
    (out / "thesis").mkdir()
    (out / "thesis" / "thesis.tex").write_text("years of work")
    *answers, last = two_ranks(out, root)
    return out, root, answers, last


def call(names, bank, queries, network=None, **options):
    network = network or names["Network"]()
    return evaluate_whitebox(network, bank, queries, names["ATTACKS"], **names["OPTIONS"], **options)


def test_two_ranks_say_what_one_process_says(names, shared):
    """Records, embeddings, scores, pictures, casualties, diagnoses; also where one rank has no batch at all."""
    _, root, answers, _ = shared
    network = names["Network"]()
    cases = {
        "first": call(names, *names["loaders"](root), network),
        "lone": call(names, names["batches"]([7, 6, 7], 900), names["batches"]([4])),
        "uneven": call(names, names["batches"]([7], 900), names["batches"]([2, 5, 1, 4, 3])),
    }
    for case, result in cases.items():
        wanted = names["bytes_of"](result)
        for answer in answers:
            assert answer[case] == wanted, case
    assert any("diagnosis" in record.settings for record in cases["first"].records)
    assert len(cases["first"].examples["clean"]) == 5
    seen = [answer["first images"] for answer in answers]
    assert max(seen) < 0.75 * network.images < sum(seen)  # each did its share, and together they did all


def test_transfer_of_two_ranks_is_that_of_one_process(names, shared):
    out, _, answers, _ = shared
    wanted = names["transfer"]()
    again = wanted | {"made": []}
    for answer in answers:
        assert answer["transfer"] == wanted
        assert answer["kept"] == [wanted, again]
    assert names["transfer"](state=out / "transfer") == again
    assert not list((out / "transfer").rglob("*.safetensors"))


def test_cache_and_state_are_shared(names, shared):
    """Two files in the cache, one per batch in the state; the second call computes nothing."""
    out, root, answers, _ = shared
    _, queries = names["loaders"](root)
    assert len(list((out / "cache").iterdir())) == 2
    assert len(list((out / "state").glob("batch-*"))) == len(queries)
    assert not list(out.glob("*/.*"))
    for answer in answers:
        assert answer["again"] == answer["first"] and answer["again images"] == 0
    network = names["Network"]()
    alone = call(names, *names["loaders"](root), network, cache=out / "cache", state=shutil.copytree(
        out / "state", out / "copied"))  # fmt: skip
    assert names["bytes_of"](alone) == answers[0]["first"] and network.images == 0


def test_a_killed_rank_and_one_process_that_goes_on(names, shared):
    out, _, _, last = shared
    assert last["killed"].startswith("RankFailedError: another process of this evaluation has stopped")
    done = sorted(path.name for path in (out / "dying").glob("batch-*"))
    assert done == [f"batch-00000{number}.arrays" for number in (0, 1, 2, 4)]
    queries, went_on, whole = names["batches"]([2, 3, 2, 3, 2, 3]), names["Network"](), names["Network"]()
    again = call(names, names["batches"]([9], 900), queries, went_on, state=out / "dying")
    assert names["bytes_of"](again) == names["bytes_of"](call(names, names["batches"]([9], 900), queries, whole))
    assert went_on.images < whole.images


def test_errors_reach_every_rank(shared):
    _, _, answers, _ = shared
    for answer in answers:
        assert "must be called alike: seed is 0 on rank 0, 1 on rank 1" in answer["seed"]
        assert "were given different batches (3, 3 of them)" in answer["order"]
        assert "were given different batches (1, 2 of them)" in answer["bank"]
    stopped = "RankFailedError: another process of this evaluation has stopped"
    assert answers[0]["one"].startswith(stopped)
    assert answers[1]["one"] == "ValueError: no memory left on this rank"
    assert "holds something else" in answers[0]["thesis"] and answers[1]["thesis"].startswith(stopped)


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


def test_handfuls_of_several_are_one(toy_batches):
    batches = toy_batches(seed=0, sizes=(5, 9, 4, 6))
    whole, parts = Handful(7, seed=3), [Handful(7, seed=3) for _ in range(2)]
    for number, batch in enumerate(batches):
        for each in (whole, parts[number % 2]):
            each.see(batch, batch.label)
    parts[1].join(parts)
    for one, other in zip(whole.batches(), parts[1].batches(), strict=True):
        assert torch.equal(one.patch, other.patch) and torch.equal(one.images, other.images)


def test_alone_is_as_before():
    with shared_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather("x") == ["x"] and world.gather_by_index({2: "b", 0: "a"}) == ["a", "b"]
        world.assert_same({"k": object()})


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    Journal(tmp_path, {"k": 1})
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"k": 1}))
    with pytest.raises(ValueError, match="format was null, now 2"):
        Journal(tmp_path, {"k": 1})


def test_a_bank_in_several_tables(toy_encoder, toy_batches):
    parts = [embed(toy_encoder, toy_batches(seed=1, sizes=(20,), first_id=first)) for first in (1000, 2000)]
    queries, attacks = toy_batches(seed=2, sizes=(9,)), {"PGD": PGD(Linf(1 / 255), step_size=1 / 255, steps=2)}
    found = evaluate_whitebox(toy_encoder, parts, queries, attacks, k=7, bootstrap=0, target="knn")
    sharded = fit_shards(KNNClassifier(k=7), parts)
    for name, table in found.tables.items():
        np.testing.assert_array_equal(found.scores[name][7], sharded.predict_proba(table))
    assert found.records[0].settings["bank_rows"] == 40
    other = parts[1].__class__(**{**vars(parts[1]), "cohort": "elsewhere"})
    with pytest.raises(ValueError, match="shard 1 is of cohort 'elsewhere', shard 0 of 'toy'"):
        evaluate_whitebox(toy_encoder, [parts[0], other], queries, attacks, k=7)
    with pytest.raises(TypeError, match="the bank must be an EmbeddingTable"):
        evaluate_whitebox(toy_encoder, [parts[0], toy_batches(seed=1, sizes=(3,))[0]], queries, attacks, k=7)


def test_counts_of_all_ranks_are_added():
    ours, theirs = Tally(images=3, forwards=30, never_moved=1), Tally(images=2, forwards=20, zero_gradient=2)
    total = ours.over(lambda counts: [counts, theirs.counts()])
    assert total == Tally(images=5, forwards=50, never_moved=1, zero_gradient=2, rows=total.rows)
    assert ours.images == 3
