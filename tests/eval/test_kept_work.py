"""What evaluations keep on the disk: clean embeddings for the next one, finished batches for the same one."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hsat.eval.aiming import CleanLayers
from hsat.eval.doubt import doubts
from hsat.eval.engine.identity import encoder_identity, loader_identity
from hsat.eval.engine.precision import unusual_computing

from hsat.attacks import MIFGSM, PGD, Linf, RandomNoise
from hsat.data import Cohort, PatchDataset, patch_loader, write_synthetic_cohort
from hsat.eval import EmbeddingCache, Strongest, embed, evaluate_whitebox
from hsat.files import CorruptFileError, read_arrays, write_arrays
from hsat.models import build_encoder

PAGE = Path(__file__).parents[2] / "docs" / "strongest.md"
PGD1 = PGD(Linf(1 / 255), step_size=0.5 / 255, steps=3)
ATTACKS = {"PGD": PGD1, "strongest": Strongest(Linf(1 / 255), steps=3, vote_steps=3, restarts=1, queries=3)}
FAST = dict(k=9, bootstrap=20, noise=True, keep_examples=22)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(8, 8, 8))


class Interrupted(Exception):
    pass


class Breaking:
    """Batches that end with an exception before the last one, as a killed process ends."""

    def __init__(self, batches):
        self.batches, self.dataset = batches, batches.dataset

    def __iter__(self):
        yield from self.batches[:2]
        raise Interrupted


def same(one, other):
    assert one.records == other.records
    for name in one.tables:
        np.testing.assert_array_equal(one.tables[name].z, other.tables[name].z)
        assert torch.equal(one.examples[name], other.examples[name])
    for name, found in one.casualties.items():
        np.testing.assert_array_equal(found.felled_by, other.casualties[name].felled_by)
        assert found.members == other.casualties[name].members


@pytest.fixture
def interrupted(toy_encoder, bank, queries, tmp_path):
    with pytest.raises(Interrupted):
        evaluate_whitebox(toy_encoder, bank, Breaking(queries), ATTACKS, state=tmp_path / "state", **FAST)
    return tmp_path / "state"


def test_an_interrupted_run_ends_as_an_uninterrupted_one(toy_encoder, bank, queries, interrupted):
    whole = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, **FAST)
    before = toy_encoder.forwards
    again = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, state=interrupted, **FAST)
    third = toy_encoder.forwards - before
    same(whole, again)
    finished = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, state=interrupted, **FAST | {"bootstrap": 5})
    assert toy_encoder.forwards - before - third == len(bank) < third
    assert {r.value for r in finished.records} == {r.value for r in whole.records}
    assert not list(interrupted.glob(".*"))


def test_other_settings_and_other_queries_are_refused(toy_encoder, bank, queries, toy_batches, interrupted):
    def go(queries=queries, attacks=ATTACKS, **options):
        evaluate_whitebox(toy_encoder, bank, queries, attacks, state=interrupted, **FAST | options)

    with pytest.raises(ValueError, match=r"begun under other settings: k was \[9\], now \[5\]; seed was 0, now 1"):
        go(k=5, seed=1)
    with pytest.raises(ValueError, match=r"attack\.PGD was PGD.*steps=3.*, now PGD.*steps=4"):
        go(attacks=ATTACKS | {"PGD": PGD(Linf(1 / 255), step_size=0.5 / 255, steps=4)})
    with pytest.raises(ValueError, match="batch 0 of the queries is not the one"):
        go(queries=toy_batches(seed=3, sizes=(8, 8, 8)))
    with torch.no_grad():
        toy_encoder.norm.weight[0] += 1e-6
    with pytest.raises(ValueError, match=r"encoder.weights was [0-9a-f]{12}, now [0-9a-f]{12}"):
        go()


def test_a_damaged_batch_is_attacked_anew(toy_encoder, bank, queries, interrupted):
    path = interrupted / "batch-000001.arrays"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.warns(UserWarning, match="checksum is not that of its arrays; batch 1 is attacked anew"):
        again = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, state=interrupted, **FAST)
    same(evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, **FAST), again)


def test_diagnoses_are_kept_one_by_one(toy_encoder, bank, queries, tmp_path, monkeypatch):
    attacks = {"PGD": PGD1, "other": PGD(Linf(2 / 255), step_size=0.5 / 255, steps=2)}
    plain, calls = doubts.examine, []
    state, options = tmp_path / "state", dict(k=9, bootstrap=0, diagnose=3)

    def examine(suspect, batches, *, device):
        if len(calls) == 1:
            raise Interrupted
        calls.append(suspect.attack)
        return plain(suspect, batches, device=device)

    whole = evaluate_whitebox(toy_encoder, bank, queries, attacks, **options)
    monkeypatch.setattr(doubts, "examine", examine)
    with pytest.raises(Interrupted):
        evaluate_whitebox(toy_encoder, bank, queries, attacks, state=state, **options)
    calls[:] = []
    again = evaluate_whitebox(toy_encoder, bank, queries, attacks, state=state, **options)
    assert again.records == whole.records and calls == [attacks["other"]]
    assert any("diagnosis" in record.settings for record in again.records)
    evaluate_whitebox(toy_encoder, bank, queries, attacks, state=state, **options)  # nothing is left to find out
    with pytest.raises(Interrupted):  # of other images: found out anew
        evaluate_whitebox(toy_encoder, bank, queries, attacks, state=state, **options | {"diagnose": 2})
    for note in state.glob("note-*"):
        note.write_bytes(note.read_bytes()[:-1] + b"x")
    calls[:] = []
    monkeypatch.setattr(doubts, "examine", plain)
    with pytest.warns(UserWarning, match="found out anew"):
        assert evaluate_whitebox(toy_encoder, bank, queries, attacks, state=state, **options).records == whole.records


def test_a_folder_of_something_else_is_left_alone(toy_encoder, bank, queries, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than a state of an evaluation"):
        evaluate_whitebox(toy_encoder, bank, queries, {}, state=tmp_path, **FAST)


@pytest.fixture
def patches(tmp_path):
    root = write_synthetic_cohort(tmp_path / "srh", classes=("hgg", "lgg"), patients_per_class=3, patches=2, size=32)

    def loaders(image_size=32, batch_size=8):
        cohort = Cohort.from_opensrh(root)
        sets = [PatchDataset(cohort, split, image_size=image_size) for split in ("train", "val")]
        return [patch_loader(each, batch_size=batch_size) for each in sets]

    return loaders


def test_the_cache_gives_the_same_numbers_and_knows_what_changed(patches, tmp_path):
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    cache = tmp_path / "cache"

    def go(encoder=encoder, where=cache, **options):
        bank, queries = patches(**options)
        return evaluate_whitebox(encoder, bank, queries, {"PGD": PGD1}, k=3, bootstrap=0, cache=where)

    plain, first, second = go(where=None), go(), go()
    assert plain.records == first.records == second.records
    np.testing.assert_array_equal(plain.tables["PGD"].z, second.tables["PGD"].z)
    assert len(list(cache.iterdir())) == 2  # the bank, the clean queries
    go(build_encoder("test_byobnet", embedding_dim=8, seed=1).eval())
    assert len(list(cache.iterdir())) == 4
    go(image_size=24), go(batch_size=4)
    assert len(list(cache.iterdir())) == 8
    dataset = patches()[0].dataset
    os.utime(dataset.cohort.path(int(dataset.rows[0])), ns=(1, 1))  # written anew, of the same size
    go()
    assert len(list(cache.iterdir())) == 9


def test_corrupt_and_foreign_files_are_made_anew(patches, tmp_path):
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    bank, queries = patches()
    options = dict(k=3, bootstrap=0, cache=tmp_path / "cache")
    first = evaluate_whitebox(encoder, bank, queries, {}, **options)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="embedding anew"):
        assert evaluate_whitebox(encoder, bank, queries, {}, **options).records == first.records
    one, other = sorted((tmp_path / "cache").iterdir())
    one.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="something else than its name says"):
        assert evaluate_whitebox(encoder, bank, queries, {}, **options).records == first.records


def test_the_cache_counts_and_takes_writers_at_the_same_time(table, tmp_path):
    made = table(np.eye(4), label=[0, 1, 2, 0], cohort="c", split="train", encoder="e")
    cache, errors = EmbeddingCache(tmp_path / "cache"), []

    def write():
        try:
            for number in range(8):
                found = EmbeddingCache(tmp_path / "cache").table({"number": number}, lambda: made)
                np.testing.assert_array_equal(found.z, made.z)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    again = cache.table({"number": 3}, lambda: pytest.fail("it is there"))
    assert (again.class_names, again.cohort, again.split, again.encoder) == (made.class_names, "c", "train", "e")
    assert (cache.hits, cache.misses) == (1, 0)


def test_who_cannot_say_what_it_gives_is_not_kept(patches):
    bank, _ = patches()
    assert loader_identity(bank) and loader_identity([1]) is None
    bank.dataset.transform = torch.nn.Identity()
    assert loader_identity(bank) is None
    assert encoder_identity(lambda x: x) is None
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0)
    before = encoder_identity(encoder)
    assert encoder_identity(encoder.to(memory_format=torch.channels_last)) != before


def test_files_notice_a_single_bit(tmp_path):
    path = tmp_path / "x.arrays"
    write_arrays(path, {"a": [1, "b"]}, {"z": np.arange(5.0)})
    about, arrays = read_arrays(path)
    assert about == {"a": [1, "b"]} and arrays["z"].tolist() == [0, 1, 2, 3, 4]
    content = bytearray(path.read_bytes())
    for at in range(content.index(b"\n") + 1, len(content), 37):
        changed = bytes(content[:at]) + bytes([content[at] ^ 1]) + bytes(content[at + 1 :])
        path.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            read_arrays(path)


STEPS = 3
CLIMBERS = {
    "noise-4": (RandomNoise(Linf(4 / 255)), 0),
    "PGD-4": (PGD(Linf(4 / 255), step_size=1 / 255, steps=STEPS), STEPS),
    "MIFGSM-4": (MIFGSM(Linf(4 / 255), step_size=1 / 255, steps=STEPS, random_start=True), STEPS),
}


@pytest.mark.parametrize(("target", "extra"), [("features", 0), ("embedding", 1), ("knn", 0)])
def test_no_pass_through_the_encoder_is_made_twice(toy_batches, target, extra):
    """Per batch: the clean images, each step of each attack, what each attack gave; and once the whole encoder."""
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    bank, queries = toy_batches(seed=0, sizes=(18,)), toy_batches(seed=1, sizes=(6, 6), first_id=500)
    passes = []
    table = embed(encoder, bank)
    handle = encoder.backbone.register_forward_hook(lambda *_: passes.append(1))
    attacks = {name: attack for name, (attack, _) in CLIMBERS.items()}
    options = dict(k=5, bootstrap=0, target=target, noise=False)
    result = evaluate_whitebox(encoder, table, queries, attacks, **options)
    handle.remove()
    assert len(passes) == len(queries) * (1 + sum(steps + 1 for _, steps in CLIMBERS.values())) + extra
    spent = {r.attack_name: (r.forwards, r.backwards) for r in result.records if r.attack}
    assert spent == {name: (steps, steps) for name, (_, steps) in CLIMBERS.items()}


def test_references_of_an_embedding_that_is_no_projection_are_encoded(toy_batches):
    """A hook changes what the call gives, so that the projection of the features is not the embedding."""
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, embedding = encoder.features(x), encoder(x)
        plain = CleanLayers(encoder, "features")
        assert plain.value("features", x, features) is features
        for _ in range(2):
            assert torch.equal(plain.value("embedding", x, features), embedding)
        encoder.register_forward_hook(lambda module, inputs, output: output.flip(1))
        hooked = CleanLayers(encoder, "features")
        for _ in range(2):
            assert torch.equal(hooked.value("embedding", x, features), encoder(x))


def test_the_page_runs(tmp_path):
    blocks, found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), {}
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(block, found)
    assert found["first"].records == found["again"].records
    assert len(found["found"].casualties["strongest-2"].patch) > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    how = {"memory_format": "channels_last", "autocast": "bfloat16", "batchnorm": "folded"}
    assert all(record.settings["computed"] == how for record in found["quick"].records)


def test_how_it_was_computed_belongs_to_keys_and_records(toy_encoder, bank, queries):
    plain = evaluate_whitebox(toy_encoder, bank, queries, {}, k=9, bootstrap=0)
    assert all("computed" not in record.settings for record in plain.records)
    identity = encoder_identity(toy_encoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder_identity(toy_encoder) == {**identity, "autocast": "bfloat16"}
        quick = evaluate_whitebox(toy_encoder, bank, queries, {}, k=9, bootstrap=0)
    assert all(record.settings["computed"] == {"autocast": "bfloat16"} for record in quick.records)
    assert unusual_computing(toy_encoder.double()) == {"computed": {"dtype": "float64"}}
    assert unusual_computing(toy_encoder.features) == {}
