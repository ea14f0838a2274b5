"""The pass, shared by two real processes over gloo: the numbers of one, its cache and store, and its errors."""

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

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier, fit_shards
from hsat.data import write_synthetic_cohort
from hsat.embedding import embed
from hsat.eval import RunOptions, Scoring, evaluate_whitebox

SHARED = '''
import dataclasses, hashlib, json
import numpy as np
import torch
from torch import nn
from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.data import PatchDataset, patch_loader, read_opensrh
from hsat.classifiers import KNNClassifier
from hsat.eval import Provenance, RunOptions, Scoring, evaluate_transfer, evaluate_whitebox
from hsat.types import HierarchicalBatch

SMALL = Linf(2 / 255)
PGDS = {"PGD": PGD(SMALL, step_size=1 / 255, steps=2), "other": PGD(Linf(1 / 255), step_size=1 / 255, steps=2)}
ATTACKS = PGDS | {"ensemble": AttackEnsemble(SMALL, steps=2, decision_steps=2, restarts=1, queries=3)}
OPTIONS = dict(classifier=KNNClassifier(k=5), scoring=Scoring(bootstrap=10), provenance=Provenance(model="m"))
PLAIN = dict(classifier=KNNClassifier(k=3), scoring=Scoring(bootstrap=0))

def run(**options):
    return RunOptions(diagnose=3, keep_examples=5, **options)

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
    cohort = read_opensrh(root)
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
    settings = dict(classifier=KNNClassifier(k=5), scoring=Scoring(bootstrap=10))
    found = evaluate_transfer(encoders, banks, queries, PGDS, run=RunOptions(**options), **settings)
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
    for name, each in result.outcomes.items():
        found["outcome " + name] = [each.patch.tolist(), each.broken_by.tolist(), each.margin.tolist(),
                                    repr(each.members)]
    return json.loads(json.dumps(found))
'''
RANK = (
    SHARED
    + """
import os, signal, sys, warnings
import torch.distributed as dist
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "builtin type [sS]w")  # as in pyproject.toml; FAISS before 1.14 falls over the error
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
keep = dict(OPTIONS, run=run(cache_dir=f"{out}/cache", resume_dir=f"{out}/state"))
for name in ("first", "again"):
    network = Network()
    answers[name] = bytes_of(evaluate_whitebox(network, bank, queries, ATTACKS, **keep))
    answers[name + " images"] = network.images
answers["lone"] = bytes_of(
    evaluate_whitebox(Network(), batches([7, 6, 7], 900), batches([4]), ATTACKS, run=run(), **OPTIONS))
answers["uneven"] = bytes_of(
    evaluate_whitebox(Network(), batches([7], 900), batches([2, 5, 1, 4, 3]), ATTACKS,
                      run=run(resume_dir=f"{out}/begun"), **OPTIONS))

answers["transfer"] = transfer()
answers["kept"] = [transfer(resume_dir=f"{out}/transfer") for _ in range(2)]

bank, queries = batches([9], 900), batches([2, 2, 2])
plain = dict(run=RunOptions(noise=False), target="features", **PLAIN)
def broken(x):
    if rank and x.requires_grad:
        raise ValueError("no memory left on this rank")
    return x.flatten(1)[:, :9]
answers["seed"] = said(Network(), bank, queries, PGDS, **plain | dict(run=RunOptions(noise=False, seed=rank)))
answers["order"] = said(Network(), bank, Batches(queries[:: 1 - 2 * rank]), PGDS, **plain)
answers["bank"] = said(Network(), Batches(bank * (1 + rank)), queries, PGDS, **plain)
answers["one"] = said(broken, bank, queries, PGDS, **plain)
answers["thesis"] = said(Network(), bank, queries, PGDS, **plain | dict(run=RunOptions(resume_dir=f"{out}/thesis")))
say("answers")
dying = Dying(batches([2, 3, 2, 3, 2, 3]))
answers = {"killed": said(Network(), bank, dying, ATTACKS, run=run(resume_dir=f"{out}/dying"), **OPTIONS)}
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
        call(names, names["batches"]([7], 900), begun, resume_dir=out / "begun")
    (out / "thesis").mkdir()
    (out / "thesis" / "thesis.tex").write_text("years of work")
    *answers, last = two_ranks(out, root)
    return out, root, answers, last


def call(names, bank, queries, network=None, **options):
    network = network or names["Network"]()
    run = names["run"](**options)
    return evaluate_whitebox(network, bank, queries, names["ATTACKS"], run=run, **names["OPTIONS"])


@pytest.mark.slow
def test_two_ranks_say_what_one_process_says(names, shared):
    """Records, embeddings, scores, pictures, outcomes, diagnoses; also where one rank has no batch at all."""
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


@pytest.mark.slow
def test_transfer_of_two_ranks_is_that_of_one_process(names, shared):
    out, _, answers, _ = shared
    wanted = names["transfer"]()
    again = wanted | {"made": []}
    for answer in answers:
        assert answer["transfer"] == wanted
        assert answer["kept"] == [wanted, again]
    assert names["transfer"](resume_dir=out / "transfer") == again
    assert not list((out / "transfer").rglob("*.safetensors"))


@pytest.mark.slow
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
    alone = call(names, *names["loaders"](root), network, cache_dir=out / "cache", resume_dir=shutil.copytree(
        out / "state", out / "copied"))  # fmt: skip
    assert names["bytes_of"](alone) == answers[0]["first"] and network.images == 0


@pytest.mark.slow
def test_a_killed_rank_and_one_process_that_goes_on(names, shared):
    out, _, _, last = shared
    assert last["killed"].startswith("RankFailedError: another process of this evaluation has stopped")
    done = sorted(int(path.name[6:12]) for path in (out / "dying").glob("batch-*"))
    assert done == [0, 1, 2, 4]
    queries, went_on, whole = names["batches"]([2, 3, 2, 3, 2, 3]), names["Network"](), names["Network"]()
    again = call(names, names["batches"]([9], 900), queries, went_on, resume_dir=out / "dying")
    assert names["bytes_of"](again) == names["bytes_of"](call(names, names["batches"]([9], 900), queries, whole))
    assert went_on.images < whole.images


@pytest.mark.slow
def test_errors_reach_every_rank(shared):
    _, _, answers, _ = shared
    for answer in answers:
        assert "seed is 0 on rank 0, 1 on rank 1" in answer["seed"]
        assert "were given different batches (3, 3 of them)" in answer["order"]
        assert "were given different batches (1, 2 of them)" in answer["bank"]
    stopped = "RankFailedError: another process of this evaluation has stopped"
    assert answers[0]["one"].startswith(stopped)
    assert answers[1]["one"] == "ValueError: no memory left on this rank"
    assert "holds something else" in answers[0]["thesis"] and answers[1]["thesis"].startswith(stopped)


def test_a_bank_in_several_tables(toy_encoder, toy_batches):
    parts = [embed(toy_encoder, toy_batches(seed=1, sizes=(20,), first_id=first)) for first in (1000, 2000)]
    queries, attacks = toy_batches(seed=2, sizes=(9,)), {"PGD": PGD(Linf(1 / 255), step_size=1 / 255, steps=2)}
    options = dict(classifier=KNNClassifier(k=7), scoring=Scoring(bootstrap=0), run=RunOptions(noise=False))
    found = evaluate_whitebox(toy_encoder, parts, queries, attacks, **options)
    sharded = fit_shards(KNNClassifier(k=7), parts)
    for name, table in found.tables.items():
        np.testing.assert_array_equal(found.scores[name][7], sharded.predict_proba(table))
    assert found.records[0].settings["bank_rows"] == 40
    other = parts[1].__class__(**{**vars(parts[1]), "cohort": "elsewhere"})
    with pytest.raises(ValueError, match="table 1 is of cohort 'elsewhere', and table 0 is of cohort 'toy'"):
        evaluate_whitebox(toy_encoder, [parts[0], other], queries, attacks, **options)
    with pytest.raises(TypeError, match="the bank must be an EmbeddingTable"):
        evaluate_whitebox(toy_encoder, [parts[0], toy_batches(seed=1, sizes=(3,))[0]], queries, attacks, **options)
