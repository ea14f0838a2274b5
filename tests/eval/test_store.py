"""What evaluations keep on the disk: clean embeddings for the next one, finished batches for the same one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from hsat.attacks import PGD, AttackEnsemble, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.distributed import World
from hsat.embedding import embed
from hsat.eval import EmbeddingCache, RunOptions, Scoring, diagnostics, evaluate_whitebox
from hsat.eval.store import CleanEmbeddings, ResultStore, SeenBatches, StoredResult, open_store, result_of
from hsat.models import build_encoder
from hsat.types import EmbeddingTable

PAGE = Path(__file__).parents[2] / "docs" / "ensemble.md"
PGD1 = PGD(Linf(1 / 255), step_size=0.5 / 255, steps=3)
ENSEMBLE = AttackEnsemble(Linf(1 / 255), steps=3, decision_steps=3, restarts=1, queries=3)
ATTACKS = {"PGD": PGD1, "ensemble": ENSEMBLE}
FAST = dict(classifier=KNNClassifier(k=9), target="features", scoring=Scoring(bootstrap=20))


def run(folder=None, **options):
    return RunOptions(resume_dir=folder, **dict(keep_examples=22) | options)


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
    for name, outcome in one.outcomes.items():
        np.testing.assert_array_equal(outcome.broken_by, other.outcomes[name].broken_by)
        assert outcome.members == other.outcomes[name].members


@pytest.fixture
def interrupted(toy_encoder, bank, queries, tmp_path):
    with pytest.raises(Interrupted):
        evaluate_whitebox(toy_encoder, bank, Breaking(queries), ATTACKS, run=run(tmp_path / "state"), **FAST)
    return tmp_path / "state"


def test_an_interrupted_run_ends_as_an_uninterrupted_one(toy_encoder, bank, queries, interrupted):
    whole = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, run=run(), **FAST)
    before = toy_encoder.forwards
    again = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, run=run(interrupted), **FAST)
    third = toy_encoder.forwards - before
    same(whole, again)
    finished = evaluate_whitebox(
        toy_encoder, bank, queries, ATTACKS, run=run(interrupted), **FAST | {"scoring": Scoring(bootstrap=5)}
    )
    assert toy_encoder.forwards - before - third == len(bank) < third
    assert {r.value for r in finished.records} == {r.value for r in whole.records}
    assert not list(interrupted.glob(".*"))


def test_other_settings_and_other_queries_are_refused(toy_encoder, bank, queries, toy_batches, interrupted):
    def go(queries=queries, attacks=ATTACKS, seed=0, **options):
        evaluate_whitebox(toy_encoder, bank, queries, attacks, run=run(interrupted, seed=seed), **FAST | options)

    with pytest.raises(ValueError, match=r"classifier was .*k=9.*, now .*k=5.*; seed was 0, now 1"):
        go(classifier=KNNClassifier(k=5), seed=1)
    with pytest.raises(ValueError, match=r"attack\.PGD was PGD.*steps=3.*, now PGD.*steps=4"):
        go(attacks=ATTACKS | {"PGD": PGD(Linf(1 / 255), step_size=0.5 / 255, steps=4)})
    with pytest.raises(ValueError, match="batch 0 of the queries is not the one"):
        go(queries=toy_batches(seed=3, sizes=(8, 8, 8)))
    with torch.no_grad():
        toy_encoder.norm.weight[0] += 1e-6
    with pytest.raises(ValueError, match=r"bank was [0-9a-f]{12}.*encoder.weights was [0-9a-f]{12}, now [0-9a-f]{12}"):
        go()


def test_a_damaged_batch_is_attacked_anew(toy_encoder, bank, queries, interrupted):
    (path,) = interrupted.glob("batch-000001-*.arrays")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.warns(UserWarning, match=r"batch-000001.*checksum.*; computing it anew"):
        again = evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, run=run(interrupted), **FAST)
    same(evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, run=run(), **FAST), again)


def test_diagnoses_are_kept_one_by_one(toy_encoder, bank, queries, tmp_path, monkeypatch):
    attacks = {"PGD": PGD1, "other": PGD(Linf(2 / 255), step_size=0.5 / 255, steps=2)}
    plain, calls = diagnostics.examine, []
    bare = dict(classifier=KNNClassifier(k=9), target="features", scoring=Scoring(bootstrap=0))

    def evaluate(folder=tmp_path / "state", images=3):
        options = RunOptions(noise=False, diagnose=images, resume_dir=folder)
        return evaluate_whitebox(toy_encoder, bank, queries, attacks, run=options, **bare)

    def examine(subject, batches, *, device, shared=None):
        if len(calls) == 1:
            raise Interrupted
        calls.append(subject.attack)
        return plain(subject, batches, device=device, shared=shared)

    whole = evaluate(folder=None)
    monkeypatch.setattr(diagnostics, "examine", examine)
    with pytest.raises(Interrupted):
        evaluate()
    calls[:] = []
    again = evaluate()
    assert again.records == whole.records and calls == [attacks["other"]]
    assert any("diagnosis" in record.settings for record in again.records)
    evaluate()  # nothing is left to find out
    with pytest.raises(Interrupted):  # of other images: found out anew
        evaluate(images=2)
    for note in (tmp_path / "state").glob("diagnosis-*"):
        note.write_bytes(note.read_bytes()[:-1] + b"x")
    calls[:] = []
    monkeypatch.setattr(diagnostics, "examine", plain)
    with pytest.warns(UserWarning, match="diagnosis.*computing it anew"):
        assert evaluate().records == whole.records


def test_a_folder_of_something_else_is_left_alone(toy_encoder, bank, queries, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        evaluate_whitebox(toy_encoder, bank, queries, {}, run=run(tmp_path), **FAST)


SMALL = dict(classifier=KNNClassifier(k=3), scoring=Scoring(bootstrap=0))


@pytest.fixture
def patches(tmp_path):
    root = write_synthetic_cohort(tmp_path / "srh", classes=("hgg", "lgg"), patients_per_class=3, patches=2, size=32)

    def loaders(image_size=32, batch_size=8):
        cohort = read_opensrh(root)
        sets = [PatchDataset(cohort, split, image_size=image_size) for split in ("train", "val")]
        return [patch_loader(each, batch_size=batch_size) for each in sets]

    return loaders


def test_the_cache_gives_the_same_numbers_and_knows_what_changed(patches, tmp_path):
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    cache = tmp_path / "cache"

    def go(encoder=encoder, where=cache, **options):
        bank, queries = patches(**options)
        cached = RunOptions(noise=False, cache_dir=where)
        return evaluate_whitebox(encoder, bank, queries, {"PGD": PGD1}, run=cached, **SMALL)

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
    options = dict(run=RunOptions(noise=False, cache_dir=tmp_path / "cache"), **SMALL)
    first = evaluate_whitebox(encoder, bank, queries, {}, **options)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="embedding anew"):
        assert evaluate_whitebox(encoder, bank, queries, {}, **options).records == first.records
    one, other = sorted((tmp_path / "cache").iterdir())
    one.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="something else than its name says"):
        assert evaluate_whitebox(encoder, bank, queries, {}, **options).records == first.records


@pytest.mark.parametrize(
    ("header", "arrays", "named"),
    [
        ({"class_names": None}, {}, "class_names"),
        ({"class_names": 5}, {}, "TypeError"),
        ({}, {"evil": np.zeros(2)}, "evil"),
        ({}, {"z": np.full((3, 3), np.nan, np.float32)}, "ValueError"),
        ({}, {"label": np.array([0, 1, 9])}, "labels run from 0 to 9"),
    ],
)
def test_a_cached_table_of_other_content_is_made_anew_with_a_warning(tmp_path, header, arrays, named):
    cache, key = EmbeddingCache(tmp_path), {"encoder": "e"}
    table = EmbeddingTable.from_arrays(np.eye(3, dtype=np.float32), ["a", "b", "a"], patients=["p", "q", "r"])
    good = result_of(table)
    kept = {name: value for name, value in (good.header | header).items() if value is not None}
    cache.put(key, StoredResult(kept, good.arrays | arrays))
    with pytest.warns(UserWarning, match=rf"\.arrays cannot be used \(.*{named}.*; embedding anew"):
        assert cache.get_table(key) is None
    assert (cache.hits, cache.misses) == (0, 1)
    cache.put_table(key, table)
    assert cache.get_table(key) is not None


@pytest.mark.parametrize(
    ("header", "arrays"),
    [({}, {}), ({"batches": 3}, {}), ({"batches": ["x"]}, {}), ({"batches": ["x"]}, {"z0": np.full((2, 2), np.nan)})],
)
def test_cached_batches_of_other_content_are_made_anew_with_a_warning(tmp_path, header, arrays):
    cache = EmbeddingCache(tmp_path)
    cache.put({"a": 1}, StoredResult(header, arrays))
    with pytest.warns(UserWarning, match="cannot be used .*; embedding anew"):
        CleanEmbeddings(cache, {"a": 1})


def test_the_cache_counts_and_takes_writers_at_the_same_time(toy_encoder, toy_batches, tmp_path):
    made = embed(toy_encoder, toy_batches(seed=0, sizes=(4,)), encoder_name="e")
    cache, errors = EmbeddingCache(tmp_path / "cache"), []

    def write():
        try:
            own = EmbeddingCache(tmp_path / "cache")
            for number in range(8):
                if own.get_table({"number": number}) is None:
                    own.put_table({"number": number}, made)
                np.testing.assert_array_equal(own.get_table({"number": number}).z, made.z)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    again = cache.get_table({"number": 3})
    for name in ("class_names", "cohort", "split", "encoder"):
        assert getattr(again, name) == getattr(made, name)
    np.testing.assert_array_equal(again.norm, made.norm)
    assert cache.get_table({"number": 9}) is None and (cache.hits, cache.misses) == (1, 1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        EmbeddingCache(tmp_path / "file")


@pytest.mark.parametrize("folder", [False, True])
def test_results_by_key(tmp_path, folder):
    store = ResultStore(tmp_path / "store" if folder else None, {"seed": 0})
    result = StoredResult({"name": "a"}, {"z": np.arange(3)})
    names = [("batch", "1"), ("batch-1",), ("batch", "1", ""), ("../x",)]
    for number, key in enumerate(names):
        assert store.get(*key) is None
        store.put(StoredResult({"name": number}, result.arrays), *key)
    assert [store.get(*key).header["name"] for key in names] == [0, 1, 2, 3], "no key is taken for another"
    assert store.names() == {store.file_name(*key) for key in names}
    if folder:
        assert store.scratch.is_dir() and not list(tmp_path.glob("*.arrays"))
    else:
        with pytest.raises(ValueError, match="resume_dir"):
            _ = store.scratch


def test_a_folder_goes_on_with_its_settings_only_but_some_may_grow(tmp_path):
    def reopen(**settings):
        return ResultStore(tmp_path / "store", settings, growing=("attack.",))

    reopen(seed=0, **{"attack.a": "PGD"}).put(StoredResult({}, {}), "x")
    assert reopen(seed=0, **{"attack.b": "BIM"}).get("x") is not None
    reopen(seed=0)
    with pytest.raises(ValueError, match=r"attack\.a was PGD, now FGSM"):
        reopen(seed=0, **{"attack.a": "FGSM"})
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        reopen(seed=1)
    with pytest.raises(ValueError, match="k was null, now 1"):
        reopen(seed=0, k=1)


def test_a_store_of_an_earlier_version_is_refused(tmp_path):
    ResultStore(tmp_path, {"k": 1})
    (tmp_path / "settings.json").write_text(json.dumps({"k": 1}))
    with pytest.raises(ValueError, match="format was null, now"):
        ResultStore(tmp_path, {"k": 1})


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    store, finished = open_store(tmp_path / "store", {"k": 1}, World())
    assert finished == frozenset()
    store.put(StoredResult({}, {}), "x")
    (store.scratch / "half").touch()
    (tmp_path / "store" / ".x.arrays-1.partial").touch()
    again, finished = open_store(tmp_path / "store", {"k": 1}, World())
    assert finished == {again.file_name("x")}
    assert {path.name for path in (tmp_path / "store").iterdir()} == {again.file_name("x"), "settings.json"}


def test_later_readings_are_compared_with_the_first():
    seen = SeenBatches()
    for _ in range(2):
        seen.check(0, "a")
        seen.check(1, "b")
        seen.check_count(2)
    with pytest.raises(ValueError, match=r"batch 1 .*no shuffling"):
        seen.check(1, "a")
    with pytest.raises(ValueError, match=r"2 batches .* 1 now"):
        seen.check_count(1)


def test_the_page_runs(tmp_path):
    blocks, names = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), {}
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(block, names)
    assert names["first"].records == names["again"].records
    assert len(names["result"].outcomes["ensemble-2"].patch) > 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    how = {"memory_format": "channels_last", "autocast": "bfloat16", "batchnorm": "folded"}
    assert all(record.settings["computed"] == how for record in names["quick"].records)


def test_how_it_was_computed_belongs_to_records(toy_encoder, bank, queries):
    plain = evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST)
    assert all("computed" not in record.settings for record in plain.records)
    with torch.autocast("cpu", torch.bfloat16):
        quick = evaluate_whitebox(toy_encoder, bank, queries, {}, **FAST)
    assert all(record.settings["computed"] == {"autocast": "bfloat16"} for record in quick.records)
