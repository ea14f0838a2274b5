"""save_adversarial: lossless files in a cohort's layout, and numbers that are those of the files."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from hsat.attacks import L2, PGD, Linf, Masked, RawChannels, Reparametrized, Stains, UniversalPerturbation
from hsat.classifiers import KNNClassifier
from hsat.data import (
    Cohort,
    PatchDataset,
    patch_loader,
    read_csv,
    read_folders,
    read_opensrh,
    srh_to_rgb,
    write_synthetic_cohort,
)
from hsat.data.readers import read_raw
from hsat.embedding import embed
from hsat.eval import (
    ExportOptions,
    Provenance,
    RunOptions,
    metrics_by_level,
    read_records,
    save_adversarial,
    write_records,
)
from hsat.eval.export import ShapeBatches
from hsat.models import wrap_encoder

RAW = Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(8 / 255), step_size=2 / 255, steps=4))
RGB = PGD(Linf(8 / 255), step_size=2 / 255, steps=4)
FAST = dict(options=ExportOptions(name="PGD-8"), classifier=KNNClassifier(k=3), provenance=Provenance(model="toy"))
PAIRS = dict(options=ExportOptions(name="PGD-8", batch_size=2))


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        return wrap_encoder(net, mean=0.5, std=0.25, head=4)


@pytest.fixture(scope="module")
def srh(tmp_path_factory):
    root = tmp_path_factory.mktemp("srh") / "cohort"
    return read_opensrh(
        write_synthetic_cohort(root, classes=("hgg", "normal"), patients_per_class=2, slides=2, patches=2, size=24)
    )


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """class/patient/slide folders with PNG, JPEG and patches of two sizes."""
    root, rng = tmp_path_factory.mktemp("colour"), np.random.default_rng(0)
    for number in range(4):
        for patch in range(3):
            path = (
                root
                / ("adenoma", "normal")[number % 2]
                / f"p{number}"
                / "s1"
                / f"{patch % 2}.{('png', 'jpg')[patch // 2]}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20 + 4 * (patch % 2), 18, 3)) + 100 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return read_folders(root).with_split(val_fraction=0.5, seed=0)


def bank_of(cohort, encoder):
    return embed(encoder, patch_loader(PatchDataset(cohort, "train"), batch_size=1))


@pytest.fixture(scope="module")
def from_srh(encoder, srh, tmp_path_factory):
    return save_adversarial(tmp_path_factory.mktemp("out") / "adv", encoder, bank_of(srh, encoder), srh, RAW, **FAST)


@pytest.fixture(scope="module")
def from_colour(encoder, colour, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "adv"
    return save_adversarial(out, encoder, bank_of(colour, encoder), colour, RGB, **FAST | PAIRS)


def test_srh_files_are_two_planes_of_16_bits_inside_the_ball(srh, from_srh):
    rows = srh.rows("val")
    assert len(from_srh.cohort) == len(rows) == 8
    for i, row in enumerate(rows):
        clean, found = tifffile.imread(srh.path(row)), tifffile.imread(from_srh.cohort.path(i))
        assert (found.dtype, found.shape) == (np.uint16, clean.shape)
        gap = np.abs(found.astype(int) - clean.astype(int))
        assert 0 < gap.max() <= 8 / 255 * 65536
        assert from_srh.cohort.records[i] == srh.records[row]
        read_raw(from_srh.cohort.path(i))
    assert 0.9 < from_srh.changed <= 1


def test_colour_files_are_pngs_inside_the_ball_under_their_old_names(colour, from_colour):
    rows = colour.rows("val")
    assert [record[1:] for record in from_colour.cohort.records] == [colour.records[row][1:] for row in rows]
    names = {record.path.rpartition("/")[2] for record in from_colour.cohort.records}
    assert names == {"0.png", "1.png", "0.jpg.png"}, "0.jpg must not overwrite 0.png"
    for i, row in enumerate(rows):
        with Image.open(colour.path(row)) as clean, Image.open(from_colour.cohort.path(i)) as found:
            assert found.format == "PNG"
            gap = np.abs(np.asarray(found, dtype=int) - np.asarray(clean, dtype=int))
        assert gap.max() == 8


@pytest.mark.parametrize("which", ["from_srh", "from_colour"])
def test_the_numbers_are_those_of_the_files(which, request, encoder, srh, colour, tmp_path):
    """Scored anew by hand, from nothing but the folder."""
    result, source = request.getfixturevalue(which), {"from_srh": srh, "from_colour": colour}[which]
    again = read_csv(result.root, kind=source.kind, class_names=source.class_names)
    table = embed(encoder, patch_loader(PatchDataset(again, "val"), batch_size=1))
    knn = KNNClassifier(k=3).fit(bank_of(source, encoder))
    levels = metrics_by_level(knn.predict_proba(table), table, class_names=knn.class_names)
    conditions = list(dict.fromkeys(record.attack_name for record in result.records))
    assert conditions == ["clean", "PGD-8", "PGD-8 (files)"]
    for record in result.records:
        if record.attack_name == "PGD-8 (files)":
            assert record.value == pytest.approx(getattr(levels[record.level], record.metric))
            assert record.settings["from_files"] is True
            assert record.settings["source_cohort"] == source.fingerprint()
            assert record.cohort == again.fingerprint()
        else:
            assert "from_files" not in record.settings
            assert record.cohort == source.fingerprint()
    np.testing.assert_allclose(result.tables["PGD-8 (files)"].z, table.z, atol=1e-6)
    drift = 1 - (result.tables["clean"].z * table.z).sum(1)
    floats = 1 - (result.tables["clean"].z * result.tables["PGD-8"].z).sum(1)
    assert np.abs(drift - floats).max() < 0.1 * floats.max() + 1e-6
    assert read_records(write_records(tmp_path / "r.jsonl", result.records)) == result.records


def test_the_folder_is_a_cohort_in_its_own_layout(from_srh, from_colour, srh, colour):
    opensrh = read_opensrh(from_srh.root, class_names=srh.class_names)
    assert sorted(opensrh.records) == sorted(from_srh.cohort.records)
    assert opensrh.splits == ("val",)
    folders = read_folders(from_colour.root, class_names=colour.class_names)
    assert {record.path for record in folders.records} == {record.path for record in from_colour.cohort.records}
    about = json.loads((from_srh.root / "adversarial.json").read_text())
    assert about["attack"] == repr(RAW)
    assert (about["grid"], about["split"], about["source_cohort"]) == ("16-bit TIFF", "val", srh.fingerprint())


def test_nothing_is_overwritten_and_nothing_is_left_behind(encoder, srh, tmp_path, monkeypatch):
    bank = bank_of(srh, encoder)
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError, match=name):
            save_adversarial(tmp_path / name, encoder, bank, srh, RAW, **FAST)
    with pytest.raises(ValueError, match="inside the cohort's own folder"):
        save_adversarial(srh.root / "adv", encoder, bank, srh, RAW, **FAST)
    written = []

    def failing(path, *args, **options):
        written.append(path)
        raise OSError("disk full")

    monkeypatch.setattr(tifffile, "imwrite", failing)
    with pytest.raises(OSError, match="disk full"):
        save_adversarial(tmp_path / "new", encoder, bank, srh, RAW, **FAST)
    assert written and sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_a_file_that_reads_otherwise_is_noticed(encoder, srh, tmp_path, monkeypatch):
    write = tifffile.imwrite
    monkeypatch.setattr(tifffile, "imwrite", lambda path, planes, **options: write(path, planes // 2, **options))
    with pytest.raises(RuntimeError, match="does not read as it was written"):
        save_adversarial(tmp_path / "new", encoder, bank_of(srh, encoder), srh, RAW, **FAST)
    assert not os.listdir(tmp_path)


def test_attacks_that_files_cannot_hold_are_refused_with_what_to_do(encoder, srh, colour, tmp_path):
    with pytest.raises(TypeError, match=r"Reparametrized\(RawChannels\(srh_to_rgb\)"):
        save_adversarial(tmp_path / "a", encoder, bank_of(srh, encoder), srh, RGB, **FAST)
    stain = Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), step_size=0.05, steps=1))
    with pytest.raises(TypeError, match=r"no \.threat"):
        save_adversarial(tmp_path / "a", encoder, bank_of(colour, encoder), colour, stain, **FAST)
    for options, words in (
        ({"target": "logits"}, "'logits'"),
        ({"options": ExportOptions(split="test")}, "split 'test'"),
    ):
        with pytest.raises(ValueError, match=words):
            save_adversarial(tmp_path / "a", encoder, bank_of(srh, encoder), srh, RAW, **FAST | options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("options", "words"), [({"batch_size": 0}, "batch_size"), ({"name": "clean"}, "'clean'")])
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        ExportOptions(**options)


@pytest.mark.parametrize("target", ["decision", "embedding"])
def test_other_targets_threat_models_and_the_encoders_mode(encoder, srh, tmp_path, target):
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:12] = True
    attack = Reparametrized(RawChannels(srh_to_rgb), PGD(Masked(L2(1.0), mask), step_size=0.4, steps=3))
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    result = save_adversarial(tmp_path / "adv", encoder, bank_of(srh, encoder), srh, attack, target=target, **FAST)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    row = srh.rows("val")[0]
    gap = read_raw(result.cohort.path(0)).double() - read_raw(srh.path(row)).double()
    assert 0.5 < gap.norm() <= 1.0 + 1e-8
    assert not gap[:, 12:].any()
    encoder.eval()


def test_a_universal_perturbation_can_be_stored(encoder, colour, tmp_path):
    same = [i for i, row in enumerate(colour.rows("train")) if PatchDataset(colour, "train")[i].images.shape[2] == 20]
    data = PatchDataset(colour, "train")
    data.rows = data.rows[same]
    universal = UniversalPerturbation(threat=Linf(8 / 255), step_size=2 / 255, epochs=2).fit(
        patch_loader(data, batch_size=4), encoder.features, generator=torch.Generator().manual_seed(0)
    )
    val = Cohort(
        root=colour.root,
        records=[r for i, r in enumerate(colour.records) if r.split == "val" and "1.png" not in r.path],
        class_names=colour.class_names,
        kind="rgb",
    )
    result = save_adversarial(tmp_path / "adv", encoder, bank_of(colour, encoder), val, universal, **FAST)
    assert len(result.cohort) == 4 and result.changed > 0.5


def test_batches_hold_patches_of_one_shape_in_order(colour):
    batches = list(ShapeBatches(PatchDataset(colour, "val"), 2))
    assert [len(batch) for batch in batches] != [2] * len(batches), "two sizes of files"
    assert torch.cat([batch.patch for batch in batches]).tolist() == colour.rows("val").tolist()


class Interrupted(Exception):
    pass


def test_an_interrupted_export_goes_on_and_writes_what_is_missing(encoder, colour, tmp_path, monkeypatch):
    """Files that were lost meanwhile are written again, though their batch is in the store."""
    bank, save, written = bank_of(colour, encoder), Image.Image.save, []

    def failing(self, path, **options):
        if len(written) == 3:
            raise Interrupted
        written.append(path)
        save(self, path, **options)

    whole = save_adversarial(tmp_path / "whole", encoder, bank, colour, RGB, **FAST | PAIRS)
    options = FAST | PAIRS | dict(run=RunOptions(resume_dir=tmp_path / "state"))
    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(Interrupted):
        save_adversarial(tmp_path / "adv", encoder, bank, colour, RGB, **options)
    assert not (tmp_path / "adv").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    lost = sorted((tmp_path / ".adv.partial").rglob("*.png"))[0]
    lost.unlink()
    again = save_adversarial(tmp_path / "adv", encoder, bank, colour, RGB, **options)
    assert again.records == whole.records and again.changed == whole.changed
    for one, other in zip(sorted(whole.root.rglob("*.png")), sorted(again.root.rglob("*.png")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / ".adv.partial").exists()
    with pytest.raises(FileExistsError):
        save_adversarial(tmp_path / "adv", encoder, bank, colour, RGB, **options)
