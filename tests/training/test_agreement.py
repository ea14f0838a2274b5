"""Three real processes over gloo that agree, or say who differs in what."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch

from hsat.data import read_opensrh, write_synthetic_cohort
from hsat.training import assert_ranks_agree, assert_same
from hsat.training.agreement import patient_digests, tensor_digests

RANK = """
import copy, glob, json, sys
from importlib import metadata
import torch, torch.distributed as dist
from torch import nn
from hsat.data import Cohort, read_opensrh, write_patch_store
from hsat.training import assert_ranks_agree, assert_same

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
torch.set_num_threads(1)
last = rank == 2
whole, other = (read_opensrh(f"{folder}/{name}") for name in ("one", "two"))
mine = read_opensrh(f"{folder}/copy") if last else whole
patients = whole.patient_names

def of(records):
    return Cohort(root=whole.root, records=records, class_names=whole.class_names, kind=whole.kind)

def model(change=False):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    network[1].running_mean[2] += change * 2.0**-20
    return network

def descent(change=False):
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    optimizer.state[network[0].bias]["momentum_buffer"] += change
    return optimizer

def differently_installed():
    honest = metadata.version
    metadata.version = lambda name: "0.0.1" if name == "timm" and rank == 1 else honest(name)
    try:
        assert_ranks_agree()
    finally:
        metadata.version = honest

def packed(cohort, name):
    return write_patch_store(cohort, f"{folder}/packed-{name}-{rank}")

seen = of([r for r in whole.records if r.patient != patients[1]]) if last else whole
cases = {
    "all the same": lambda: assert_ranks_agree(
        settings={"lr": 0.1, "nan": float("nan"), "list": [1, None]}, cohort=mine, model=model(), optimizer=descent(),
        store=packed(whole, "same"), seed=3),
    "other keys' order": lambda: assert_same("x", {"a": 1, "b": 2} if last else {"b": 2, "a": 1}),
    "settings": lambda: assert_ranks_agree(settings={"train.lr": 0.1 + 0.1 * (rank == 1), "seed": 0}),
    "ranks 1 and 2": lambda: assert_same("the step", 7 + rank),
    "rank 0": lambda: assert_same("the step", 7 + (rank > 0)),
    "a key": lambda: assert_same("the table", {"a": 1} if last else {"a": 1, "b": 2}),
    "patient": lambda: assert_ranks_agree(cohort=seen),
    "order": lambda: assert_ranks_agree(cohort=of(whole.records[::-1] if last else whole.records)),
    "split": lambda: assert_ranks_agree(cohort=whole.with_split(seed=0, val_fraction=0.5 if last else 0.3)),
    "pixels": lambda: assert_ranks_agree(cohort=other if last else whole, seed=5),
    "no pixels": lambda: assert_ranks_agree(cohort=other if last else whole, patches=0),
    "packed": lambda: assert_ranks_agree(
        cohort=other if last else whole, store=packed(other if last else whole, "own"), patches=0),
    "not packed": lambda: assert_ranks_agree(cohort=whole, store=None if last else packed(whole, "own")),
    "weights": lambda: assert_ranks_agree(model=model(last)),
    "optimiser": lambda: assert_ranks_agree(optimizer=descent(last)),
    "versions": differently_installed,
}
found = {}
for name, case in cases.items():
    found[name] = None
    try:
        case()
    except ValueError as error:
        found[name] = str(error)
dist.destroy_process_group()
threads = [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]
found["threads"] = " ".join(name for name in threads if "gloo" in name)
json.dump(found, open(f"{folder}/rank{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two cohorts of the same files and sizes, of which one patch has other pixels, and a copy of the first."""
    folder = tmp_path_factory.mktemp("ranks")
    root = write_synthetic_cohort(folder / "one", classes=("hgg", "lgg"), patients_per_class=3, patches=2, size=16)
    shutil.copytree(root, folder / "copy")
    shutil.copytree(root, folder / "two")
    path = sorted((folder / "two").rglob("*.tif"))[3]
    before = path.stat().st_size
    counts = tifffile.imread(path)
    tifffile.imwrite(path, (counts + 1).astype(np.uint16), metadata=None)
    if path.stat().st_size != before:  # a header of another length: change the pixels in place
        shutil.copy(folder / "one" / path.relative_to(folder / "two"), path)
        tifffile.memmap(path, mode="r+")[...] += 1
    assert path.stat().st_size == before
    return folder


@pytest.fixture(scope="module")
def messages(folder):
    """{case: the message that all ranks agree on}."""
    (folder / "rank.py").write_text(RANK)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "rank.py"), str(rank), str(folder)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(3)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in running:
            process.kill()
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert found[0] == found[1] == found[2], "every rank says the same"
    assert found[0].pop("threads") == "", "a thread of gloo that outlives its group may abort the interpreter's end"
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all the same", "other keys' order", "no pixels"])
def test_what_is_the_same_passes(messages, case):
    """Copies elsewhere, NaN, another order of keys; and what nobody compared."""
    assert messages[case] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("settings", ["rank 1 disagrees", "the settings", "train.lr is 0.2, not 0.1."]),
        ("ranks 1 and 2", ["ranks 1, 2 disagree", "the step", "on rank 1 8, not 7"]),
        ("rank 0", ["ranks 1, 2 disagree", "8, not 7"]),
        ("a key", ["rank 2 disagrees", "b is absent, not 2"]),
        ("patient", ["rank 2 disagrees", "the cohort", "patients is 5, not 6", "is absent, not"]),
        ("order", ["rank 2 disagrees", "the cohort", "first difference: the order of the patches is"]),
        ("split", ["rank 2 disagrees", "the cohort", "patches by split is", "first difference: patient"]),
        ("pixels", ["rank 2 disagrees", "the pixels of patches", ".tif is "]),
        ("packed", ["rank 2 disagrees", "the packed patches"]),
        ("not packed", ["rank 2 disagrees", "the packed patches: not packed, not "]),
        ("weights", ["rank 2 disagrees", "the weights: 1.running_mean is "]),
        ("optimiser", ["rank 2 disagrees", "the state of the optimiser: state.1.momentum_buffer is "]),
        ("versions", ["rank 1 disagrees", "the versions of packages", "timm is 0.0.1, not "]),
    ],
)
def test_what_differs_is_named_with_both_values(messages, case, words):
    for word in words:
        assert word in messages[case]


@pytest.mark.slow
def test_the_culprits_themselves_are_named(messages, folder):
    """The patient who is missing and the file that has other pixels, and no other."""
    cohort = read_opensrh(folder / "one")
    named = [name for name in cohort.patient_names if repr(name) in messages["patient"]]
    assert named == [cohort.patient_names[1]]
    (path,) = [record.path for record in cohort.records if record.path in messages["pixels"]]
    assert (folder / "one" / path).read_bytes() != (folder / "two" / path).read_bytes()


def test_digests_of_patients_cover_names_sizes_and_splits(folder):
    cohort = read_opensrh(folder / "one")
    whole = patient_digests(cohort)
    assert len(whole) == len(cohort.patient_names) + 1
    assert whole == patient_digests(read_opensrh(folder / "copy"))
    moved = patient_digests(cohort.with_split(val_fraction=0.5))
    assert [name for name in whole if whole[name] != moved[name]] and [*whole] == [*moved]


def test_digests_of_tensors_know_bits_shapes_and_dtypes():
    values = [
        torch.zeros(2, 3),
        -torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3).double(),
        torch.zeros(6),
        torch.zeros(0),
        torch.zeros(0, 2),
        torch.tensor(0.0),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(2, 3, dtype=torch.bool),
        0.0,
        None,
    ]
    digests = tensor_digests({"deep": [values]})
    assert list(digests) == [f"deep.0.{number}" for number in range(len(values))]
    assert len(set(digests.values())) == len(values)
    image = torch.arange(24.0).view(1, 2, 3, 4)
    laid_out = image.to(memory_format=torch.channels_last)
    assert tensor_digests(image) == tensor_digests(laid_out), "the values, not how they lie in memory"


def test_what_cannot_be_compared_is_refused_also_by_one_process():
    assert_ranks_agree(settings={"a": 1})
    with pytest.raises(TypeError, match=r"the weights cannot be compared .*Tensor"):
        assert_same("the weights", {"w": torch.zeros(1)})
