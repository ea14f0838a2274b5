"""Packed cohorts: the files' values, resumption after a kill, changes and damage by name, and the same batches."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hsat.data.packing as room
from hsat.data import (
    BadPatch,
    Cohort,
    HierarchicalDataset,
    PackedPatches,
    PatchDataset,
    PatientBatchSampler,
    hierarchical_loader,
    pack_cohort,
    read_patch,
)
from hsat.data.readers import read_stored


@pytest.fixture(params=["srh", "rgb"])
def cohort(request, opensrh_root, folders_root, write_png) -> Cohort:
    """SRH patches of one size, or colour patches of two sizes."""
    if request.param == "srh":
        return Cohort.from_opensrh(opensrh_root)
    write_png(folders_root / "polyp/p2/s1/2.png", size=11)
    return Cohort.from_folders(folders_root).with_split()


@pytest.fixture
def srh(opensrh_root) -> Cohort:
    return Cohort.from_opensrh(opensrh_root)


def rewrite(path: Path, *, later: bool = True) -> None:
    """Another patch of the same size on the disk: uncompressed, so only content and time differ."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before + 10**9 if later else before))


def test_values_equal_those_of_the_files(cohort, tmp_path):
    packed = pack_cohort(cohort, tmp_path / "packed", chunk=2, threads=2)
    assert len(packed) == len(cohort)
    for row in range(len(cohort)):
        stored = packed.stored(row)
        assert stored.dtype == (np.uint16 if cohort.kind == "srh" else np.uint8)
        assert np.array_equal(stored, read_stored(cohort.path(row), kind=cohort.kind))
        assert torch.equal(packed.read(row), read_patch(cohort.path(row), kind=cohort.kind))
    names = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert names == ["checksums.npy", "images.npy", "index.npy", "packed.json", "sources.npy"]
    assert np.load(tmp_path / "packed/images.npy", allow_pickle=False).size == sum(
        packed.stored(row).size for row in range(len(packed))
    )


def test_another_split_and_fewer_patches_find_their_rows(cohort, tmp_path):
    pack_cohort(cohort, tmp_path / "packed")
    rows = list(range(len(cohort)))[::-1][:4]
    fewer = Cohort(
        root=cohort.root,
        records=[cohort.records[row]._replace(split="test") for row in rows],
        class_names=cohort.class_names,
        kind=cohort.kind,
    )
    packed = PackedPatches.open(tmp_path / "packed", fewer, verify=True)
    for here, there in enumerate(rows):
        assert torch.equal(packed.read(here), read_patch(cohort.path(there), kind=cohort.kind))
    with pytest.raises(ValueError, match="opened for another cohort"):
        PatchDataset(cohort, packed=packed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["images", "items", "device"])
def test_training_batches_are_the_same_as_from_files(srh, tmp_path, augment, workers):
    packed = pack_cohort(srh, tmp_path / "packed")
    batches = []
    for source in (None, packed):
        dataset = HierarchicalDataset(srh, image_size=12, seed=3, packed=source, augment=augment)
        sampler = PatientBatchSampler(srh, "train", batch_patients=2, seed=3)
        device = "cpu" if augment == "device" else None
        batches.append(list(hierarchical_loader(dataset, sampler, workers=workers, device=device)))
    assert len(batches[0]) == len(batches[1]) > 0
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.patch, theirs.patch)


@pytest.mark.parametrize("ids", ["true", "slots"])
def test_the_three_places_of_augmentation_agree(cohort, ids):
    """Items equal the device's images to the bit, and the per-image ones to rounding; ids and labels are the same."""
    batches = {}
    for augment in ("images", "items", "device"):
        dataset = HierarchicalDataset(cohort, image_size=12, seed=1, augment=augment, static_epochs=1)
        sampler = PatientBatchSampler(cohort, "train", batch_patients=2, seed=1)
        sampler.set_epoch(1, strength=0.7)
        loader = hierarchical_loader(dataset, sampler, ids=ids, device="cpu" if augment == "device" else None)
        assert len(loader) == len(sampler)
        batches[augment] = list(loader)
    for each, items, device in zip(*batches.values(), strict=True):
        assert torch.equal(items.images, device.images)
        assert ((each.images - items.images).abs() > 2e-5).float().mean() < 1e-3
        for name in ("patch", "slide", "patient", "label"):
            assert torch.equal(getattr(each, name), getattr(items, name))
            assert torch.equal(getattr(each, name), getattr(device, name))


def test_strengths_may_differ_within_a_batch(cohort):
    from hsat.data import Draw
    from hsat.data.batching import collate
    from hsat.data.on_device import CollateDrawn

    first, last = (int(cohort.patient[cohort.rows("train")[row]]) for row in (0, -1))
    draws = [Draw(first, strength=1.0), Draw(last, strength=0.2), Draw(first, strength=1.0, occurrence=1)]
    later = HierarchicalDataset(cohort, image_size=12, augment="device")
    now = HierarchicalDataset(cohort, image_size=12, augment="items")
    batch = CollateDrawn(collate)([later[draw] for draw in draws])
    assert len(batch.pipelines) == 2
    assert torch.equal(batch.augmented("cpu").images, collate([now[draw] for draw in draws]).images)


def test_device_and_dataset_have_to_agree(srh):
    sampler = PatientBatchSampler(srh, "train", batch_patients=1)
    with pytest.raises(ValueError, match="go together"):
        hierarchical_loader(HierarchicalDataset(srh, image_size=12), sampler, device="cpu")
    with pytest.raises(ValueError, match="go together"):
        hierarchical_loader(HierarchicalDataset(srh, image_size=12, augment="device"), sampler)
    with pytest.raises(ValueError, match="'images', 'items' or 'device', got 'gpu'"):
        HierarchicalDataset(srh, image_size=12, augment="gpu")


def test_evaluation_reads_the_same_patches(cohort, tmp_path):
    packed = pack_cohort(cohort, tmp_path / "packed")
    for ours, theirs in zip(PatchDataset(cohort, packed=packed), PatchDataset(cohort), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.paths == theirs.paths


def test_a_copy_for_a_worker_holds_no_pixels(srh, tmp_path):
    packed = pack_cohort(srh, tmp_path / "packed")
    first = packed.read(0)
    copy = pickle.dumps(packed)
    assert len(copy) < packed.stored(0).nbytes * len(packed)
    assert "_values" in packed.__dict__
    assert "_values" not in pickle.loads(copy).__dict__
    assert torch.equal(pickle.loads(copy).read(0), first)


# --- changes, damage, unreadable files --------------------------------------------------------------------------------


def test_a_changed_file_is_named_and_rebuilt_on_request(srh, tmp_path):
    pack_cohort(srh, tmp_path / "packed")
    path = srh.path(3)
    rewrite(path)
    with pytest.raises(ValueError, match=f"changed since.*{path.name}.*rebuild=True"):
        PackedPatches.open(tmp_path / "packed", srh)
    with pytest.raises(ValueError, match="changed since"):
        pack_cohort(srh, tmp_path / "packed")
    packed = pack_cohort(srh, tmp_path / "packed", rebuild=True)
    assert torch.equal(packed.read(3), read_patch(path, kind="srh"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".packed.packing.lock", "opensrh", "packed"]


def test_a_change_behind_the_clocks_back_is_found_by_verify(srh, tmp_path):
    pack_cohort(srh, tmp_path / "packed")
    rewrite(srh.path(3), later=False)
    PackedPatches.open(tmp_path / "packed", srh)
    with pytest.raises(ValueError, match=f"changed since.*{srh.path(3).name}"):
        PackedPatches.open(tmp_path / "packed", srh, verify=True)


def test_a_touched_file_with_the_same_content_is_no_change(srh, tmp_path):
    pack_cohort(srh, tmp_path / "packed")
    os.utime(srh.path(0), ns=(1, 1))
    assert len(PackedPatches.open(tmp_path / "packed", srh)) == len(srh)


def test_a_file_that_was_not_packed_is_named(folders_root, write_png, tmp_path):
    pack_cohort(Cohort.from_folders(folders_root), tmp_path / "packed")
    write_png(folders_root / "polyp/p1/s1/new.png")
    with pytest.raises(ValueError, match=r"lacks files.*new\.png"):
        PackedPatches.open(tmp_path / "packed", Cohort.from_folders(folders_root))


def test_a_flipped_byte_is_found_and_named(cohort, tmp_path):
    packed = pack_cohort(cohort, tmp_path / "packed")
    packed.check()
    with open(tmp_path / "packed/images.npy", "r+b") as file:
        offset = 128 + 2 * packed.stored(0).nbytes + 5
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(ValueError, match="damaged at") as caught:
        PackedPatches.open(tmp_path / "packed", cohort, verify=True)
    assert cohort.records[2].path in str(caught.value)
    assert cohort.records[1].path not in str(caught.value)


@pytest.mark.parametrize("name", ["index.npy", "sources.npy", "checksums.npy"])
def test_a_damaged_table_is_named(srh, tmp_path, name):
    pack_cohort(srh, tmp_path / "packed")
    path = tmp_path / "packed" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        PackedPatches.open(tmp_path / "packed", srh)


def test_a_short_array_is_refused(srh, tmp_path):
    packed = pack_cohort(srh, tmp_path / "packed")
    size = (tmp_path / "packed/images.npy").stat().st_size - 128
    np.save(tmp_path / "packed/images.npy", np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match=r"images\.npy' is damaged|images\.npy is damaged"):
        packed.read(0)


@pytest.mark.parametrize("change", [-1, 1])
def test_an_array_of_another_size_is_found_when_it_is_opened(srh, tmp_path, change):
    pack_cohort(srh, tmp_path / "packed")
    path = tmp_path / "packed/images.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"0")
    with pytest.raises(ValueError, match=rf"images\.npy is damaged: it has {len(data) + change} bytes"):
        PackedPatches.open(tmp_path / "packed", srh)


HOSTILE_INDEX = {
    "no rows": lambda index: index[:0],
    "one row missing": lambda index: index[:-1],
    "floats": lambda index: index.astype(float),
    "flat": lambda index: index.ravel(),
    "negative": lambda index: index * np.where(np.arange(len(index)) == 2, -1, 1)[:, None],
    "another patch": lambda index: np.concatenate([index[:2], index[:1], index[3:]]),
    "enormous": lambda index: np.concatenate([index[:2], [[index[2, 0], 2**40, 2**40, 2**40]], index[3:]]),
    "no pixels": lambda index: np.concatenate([index[:-1], [[index[-1, 0], 0, 0, 0]]]),
}


@pytest.mark.parametrize("name", HOSTILE_INDEX)
def test_a_crafted_index_is_refused_before_anything_is_read(srh, tmp_path, name):
    """With a checksum to match: whoever can write the tables can write that."""
    pack_cohort(srh, tmp_path / "packed")
    path, about = tmp_path / "packed/index.npy", tmp_path / "packed/packed.json"
    np.save(path, HOSTILE_INDEX[name](np.load(path)))
    head = json.loads(about.read_text())
    head["tables"]["index.npy"] = hashlib.sha256(path.read_bytes()).hexdigest()
    about.write_text(json.dumps(head))
    with pytest.raises(ValueError, match=r"index\.npy is damaged"):
        PackedPatches.open(tmp_path / "packed", srh)


@pytest.mark.parametrize(
    "change",
    [
        {"paths": 3},
        {"paths": []},
        {"paths": [["x"]]},
        {"bad": ["x"]},
        {"bad": {"../../x": "unreadable"}},
        {"tables": []},
        {"tables": {}},
        {"kind": ["srh"]},
    ],
    ids=str,
)
def test_a_crafted_header_is_refused(srh, tmp_path, change):
    pack_cohort(srh, tmp_path / "packed")
    path = tmp_path / "packed/packed.json"
    head = json.loads(path.read_text())
    path.write_text(json.dumps(head | change))
    with pytest.raises(ValueError, match=r"packed\.json cannot be used"):
        PackedPatches.open(tmp_path / "packed", srh)
    path.write_text(json.dumps(head | {"paths": ["../../x", *head["paths"][1:]]}))
    with pytest.raises(ValueError, match="lacks files of the cohort"):
        PackedPatches.open(tmp_path / "packed", srh)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"packed\.json cannot be used"):
        PackedPatches.open(tmp_path / "packed", srh)


def test_other_formats_kinds_and_folders_are_refused(srh, folders_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a packed cohort"):
        PackedPatches.open(tmp_path / "none", srh)
    with pytest.raises(FileExistsError, match="is no packed cohort"):
        pack_cohort(srh, srh.root)
    pack_cohort(srh, tmp_path / "packed")
    with pytest.raises(ValueError, match="holds 'srh' patches and the cohort is 'rgb'"):
        PackedPatches.open(tmp_path / "packed", Cohort.from_folders(folders_root))
    path = tmp_path / "packed/packed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="its format is 2, this version reads 1"):
        PackedPatches.open(tmp_path / "packed", srh)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be used"):
        PackedPatches.open(tmp_path / "packed", srh)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_bad": "skip"}, "on_bad must be"), ({"chunk": 0}, "at least 1"), ({"threads": 0}, "at least 1")],
)
def test_wrong_options_are_refused(srh, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pack_cohort(srh, tmp_path / "packed", **options)


def test_an_unreadable_file_stops_the_packing_by_name_and_what_is_done_stays(srh, tmp_path, monkeypatch):
    bad = srh.path(5)
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadPatch, match=bad.name):
        pack_cohort(srh, tmp_path / "packed", chunk=2)
    assert not (tmp_path / "packed").exists()
    bad.write_bytes(good)
    read: list[Path] = []
    monkeypatch.setattr(room, "read_stored", lambda path, *, kind: read.append(path) or read_stored(path, kind=kind))
    packed = pack_cohort(srh, tmp_path / "packed", chunk=2)
    assert read == [srh.path(row) for row in range(4, len(srh))]  # chunks 0 and 1 were whole
    packed.check()


def test_an_unreadable_file_may_be_recorded_and_is_replaced_as_from_files(srh, tmp_path):
    bad = srh.path(0)
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(BadPatch) as from_file:
        read_patch(bad, kind="srh")
    packed = pack_cohort(srh, tmp_path / "packed", on_bad="record")
    with pytest.raises(BadPatch) as from_packed:
        packed.read(0)
    assert str(from_packed.value) == str(from_file.value)
    packed.check()
    items = []
    for source in (None, packed):
        dataset = HierarchicalDataset(srh, image_size=12, slides=4, patches=3, packed=source, on_bad="replace")
        with pytest.warns(UserWarning, match="instead"):
            items.append(dataset[0])
    assert torch.equal(items[0].images, items[1].images)


def test_a_recorded_unreadable_file_ends_a_packing_that_wants_none(srh, tmp_path):
    bad = srh.path(4)
    bad.write_bytes(bad.read_bytes()[:200])
    pack_cohort(srh, tmp_path / "packed", on_bad="record")
    with pytest.raises(BadPatch, match=bad.name):
        pack_cohort(srh, tmp_path / "packed")
    assert len(pack_cohort(srh, tmp_path / "packed", on_bad="record")) == len(srh)


# --- interruption -----------------------------------------------------------------------------------------------------

SLOW_PACKING = """
import sys, time
import hsat.data.packing as room
from hsat.data import Cohort
from hsat.data.readers import read_stored

def slow(path, *, kind):
    time.sleep(0.05)
    return read_stored(path, kind=kind)

room.read_stored = slow
room.pack_cohort(Cohort.from_opensrh(sys.argv[1]), sys.argv[2], chunk=2)
"""


def test_a_killed_process_loses_one_chunk_at_most(srh, tmp_path, monkeypatch):
    journal = tmp_path / ".packed.packing/journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACKING, str(srh.root), str(tmp_path / "packed")])
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="another process is packing"):
        pack_cohort(srh, tmp_path / "packed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "packed").exists()
    done = 2 * journal.read_text().count("\n")
    with open(journal, "a") as file:
        file.write('[{"shape": [2, 16')  # a line that was being written
    read: list[Path] = []
    monkeypatch.setattr(room, "read_stored", lambda path, *, kind: read.append(path) or read_stored(path, kind=kind))
    packed = pack_cohort(srh, tmp_path / "packed", verify=True, chunk=3)
    assert done >= 4
    assert read == [srh.path(row) for row in range(done, len(srh))]
    whole = pack_cohort(srh, tmp_path / "whole")
    for name in ("images.npy", "index.npy", "sources.npy", "checksums.npy", "packed.json"):
        assert (packed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_who_waits_opens_what_another_process_packed(srh, tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACKING, str(srh.root), str(tmp_path / "packed")])
    deadline = time.monotonic() + 60
    while not (tmp_path / ".packed.packing/plan.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(room, "read_stored", lambda path, *, kind: pytest.fail(f"{path} was read again"))
    packed = pack_cohort(srh, tmp_path / "packed", wait=True)
    assert process.wait() == 0
    packed.check()


@pytest.mark.parametrize("name", ["plan.json", "journal.jsonl"])
@pytest.mark.parametrize("content", ["{", "[3]\n", "\0\n"])
def test_a_damaged_work_folder_is_begun_again(srh, tmp_path, name, content):
    last = srh.path(len(srh) - 1)
    good = last.read_bytes()
    last.write_bytes(good[:100])
    with pytest.raises(BadPatch):
        pack_cohort(srh, tmp_path / "packed", chunk=2)
    last.write_bytes(good)
    (tmp_path / ".packed.packing" / name).write_text(content)
    assert len(pack_cohort(srh, tmp_path / "packed", verify=True)) == len(srh)


def test_what_was_packed_of_a_file_that_changed_is_thrown_away(srh, tmp_path):
    last = srh.path(len(srh) - 1)
    good = last.read_bytes()
    last.write_bytes(good[:100])
    with pytest.raises(BadPatch):
        pack_cohort(srh, tmp_path / "packed", chunk=2)
    last.write_bytes(good)
    rewrite(srh.path(0))
    packed = pack_cohort(srh, tmp_path / "packed", verify=True)
    assert torch.equal(packed.read(0), read_patch(srh.path(0), kind="srh"))


def test_the_page_runs(tmp_path, monkeypatch):
    """The Python blocks of docs/data_speed.md, in order."""
    monkeypatch.chdir(tmp_path)
    page = Path(room.__file__).parents[2] / "docs/data_speed.md"
    names: dict = {}
    for block in page.read_text().split("```python\n")[1:]:
        exec(compile(block.split("```")[0], str(page), "exec"), names)
    assert names["batch"].images.shape[1:] == (3, 32, 32)
