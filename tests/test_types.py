"""HierarchicalBatch, Levels and EmbeddingTable: counting, nesting, saving, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.types import EmbeddingTable, HierarchicalBatch, Levels, align_labels


def ids(*values):
    return torch.tensor(values)


def batch(n=4, **other):
    fields = {
        "images": torch.rand(n, 3, 2, 2),
        "patch": torch.arange(n) // 2,
        "slide": torch.arange(n) // 4,
        "patient": torch.zeros(n, dtype=torch.int64),
    }
    return HierarchicalBatch(**fields | other)


@settings(max_examples=50, deadline=None)
@given(*(st.integers(1, 3) for _ in range(4)))
def test_from_grid_numbers_the_slots(p, s, k, v):
    images = torch.arange(p * s * k * v).view(p, s, k, v, 1, 1, 1).float()
    grid = HierarchicalBatch.from_grid(images, torch.arange(p) * 10)
    for i in range(len(grid)):
        a, b, c, _ = np.unravel_index(i, (p, s, k, v))
        assert grid.images[i] == images[np.unravel_index(i, (p, s, k, v))]
        assert (grid.patient[i], grid.slide[i], grid.patch[i]) == (a, a * s + b, (a * s + b) * k + c)
        assert grid.label[i] == 10 * a
    assert grid.counts == {"patch": p * s * k, "slide": p * s, "patient": p}
    n = p * s * k * v
    assert grid.levels.anchors == {"patch": n * (v > 1), "slide": n * (k * v > 1), "patient": n * (s * k * v > 1)}


def test_a_batch_moves_and_replaces_its_images_without_counting_again():
    one = batch(label=torch.arange(4))
    other = one.replace(images=one.images + 1)
    assert other.levels is one.levels and torch.equal(other.label, one.label)
    moved = one.to("cpu")
    assert torch.equal(moved.patch, one.patch) and moved.levels.anchors is one.levels.anchors
    assert len(one.levels.to("cpu")) == len(one) == 4
    with pytest.raises(ValueError, match="3 images but ids for 4"):
        one.replace(images=one.images[:3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(3, 2, 2)}, ValueError, r"images must be \(n, c, h, w\), got shape \(3, 2, 2\)"),
        ({"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)}, TypeError, "floats in .* got torch.uint8"),
        ({"patch": torch.arange(3)}, ValueError, r"patch ids must have shape \(4,\).*got \(3,\)"),
        ({"slide": torch.rand(4)}, TypeError, "slide ids must be integers"),
        ({"patient": [0, 0, 0, 0]}, TypeError, "patient ids must be a tensor"),
        ({"label": torch.arange(5)}, ValueError, "label ids must have shape"),
        ({"slide": ids(0, 1, 1, 1)}, ValueError, "patch 0 belongs to slides 0 and 1"),
        ({"patient": ids(5, 6, 6, 6)}, ValueError, "slide 0 belongs to patients 5 and 6"),
    ],
)
def test_batch_errors_name_the_field(change, error, message):
    with pytest.raises(error, match=message):
        batch(**change)


def test_grid_errors():
    with pytest.raises(ValueError, match="patients, slides, patches, views"):
        HierarchicalBatch.from_grid(torch.rand(2, 2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        HierarchicalBatch.from_grid(torch.rand(2, 1, 1, 2, 3, 4, 4), torch.arange(3))


def test_levels_count_anchors_of_any_ids():
    levels = Levels(ids(7, 7, -1, 3), ids(9, 9, 9, 2), ids(1, 1, 1, 1))
    assert levels.anchors == {"patch": 2, "slide": 3, "patient": 4}


def table(n=5, **other):
    rng = np.random.default_rng(0)
    fields = {
        "z": rng.normal(size=(n, 3)),
        "label": np.arange(n) % 2,
        "patch": np.arange(n),
        "slide": np.arange(n) // 2,
        "patient": np.arange(n) // 4,
        "class_names": ("a", "b"),
        "cohort": "c0ffee",
        "split": "val",
        "encoder": "tiny",
    }
    return EmbeddingTable(**fields | other)


def test_a_table_holds_unit_float32_rows():
    one = table()
    assert one.z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(one.z, axis=1), 1, atol=1e-6)
    unit = one.z.copy()
    assert np.array_equal(table(z=unit).z, unit), "unit rows are not touched"
    assert not table(z=np.zeros((5, 3))).z.any(), "a zero row stays zero, no NaN"


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_table_survives_saving(tmp_path, memory_map):
    one = table()
    again = EmbeddingTable.load(one.save(tmp_path / "deep" / "bank"), memory_map=memory_map)
    assert isinstance(again.z, np.memmap) == memory_map
    for name in ("z", "label", "patch", "slide", "patient"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert (again.class_names, again.cohort, again.split, again.encoder) == (("a", "b"), "c0ffee", "val", "tiny")
    two = table(n=3)
    two.save(tmp_path / "deep" / "bank")
    assert len(EmbeddingTable.load(tmp_path / "deep" / "bank")) == 3
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bank"], "no temporary folder is left"


def test_saving_does_not_replace_other_folders_and_loading_never_unpickles(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="not an embedding table"):
        table().save(tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match=r"table\.json is missing"):
        EmbeddingTable.load(tmp_path / "notes")
    path = table().save(tmp_path / "bank")
    np.save(path / "label.npy", np.array([object()] * 5), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        EmbeddingTable.load(path)
    assert "pickle" not in json.loads((path / "table.json").read_text())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": np.zeros(5)}, ValueError, r"z must be \(n, d\)"),
        ({"z": np.zeros((5, 3), dtype=int)}, TypeError, "z must hold floats"),
        ({"z": np.full((5, 3), np.nan)}, ValueError, "non-finite values in 5 of 5 rows, first in row 0"),
        ({"slide": np.arange(4)}, ValueError, r"5 embeddings but slide has shape \(4,\)"),
        ({"patient": np.zeros(5)}, TypeError, "patient must hold integers"),
        ({"label": np.full(5, 2)}, ValueError, "labels run from 2 to 2 but there are 2 class names"),
        ({"label": np.full(5, -1)}, ValueError, "labels run from -1"),
    ],
)
def test_table_errors_name_the_field(change, error, message):
    with pytest.raises(error, match=message):
        table(**change)


def test_dataclasses_replace_counts_and_checks_the_new_ids():
    one = batch(label=torch.arange(4))
    alone = dataclasses.replace(one, patch=torch.arange(4))
    assert torch.equal(alone.levels.patch, torch.arange(4)) and alone.levels.anchors["patch"] == 0
    assert dataclasses.replace(one.levels, patch=torch.arange(4)).anchors["patch"] == 0
    with pytest.raises(ValueError, match="patch 0 belongs to slides 0 and 1"):
        dataclasses.replace(one, slide=ids(0, 1, 1, 1))
    with pytest.raises(TypeError, match="label ids must be integers"):
        dataclasses.replace(one, label=torch.rand(4))
    with pytest.raises(ValueError, match=r"patch ids must have shape \(1,\)"):
        Levels(torch.tensor(0), torch.tensor(0), torch.tensor(0))


def test_a_table_takes_tensors_and_lists_and_refuses_what_it_cannot_check():
    rows = [[3.0, 4.0, 0.0]] * 5
    for z in (rows, torch.tensor(rows)):
        np.testing.assert_allclose(table(z=z).z, [[0.6, 0.8, 0.0]] * 5, atol=1e-7)
    with pytest.raises(TypeError, match="class_names must be a tuple of names, got the text 'ab'"):
        table(class_names="ab")


def test_a_memory_mapped_z_must_be_float32(tmp_path):
    np.save(tmp_path / "z.npy", np.ones((5, 3)))
    with pytest.raises(TypeError, match="memory-mapped z must hold float32 or float16 unit rows, got float64"):
        table(z=np.load(tmp_path / "z.npy", mmap_mode="r"))


def test_a_saved_table_has_the_permissions_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    assert table().save(tmp_path / "bank").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"class_names": ["a", "b"], "cohort": "", "split": ""}',
        '{"class_names": "ab", "cohort": "", "split": "", "encoder": ""}',
        '{"class_names": ["a", "a"], "cohort": "", "split": "", "encoder": ""}',
        '{"class_names": ["a", "b"], "cohort": 3, "split": "", "encoder": ""}',
        '{"class_names": [1, 2], "cohort": "", "split": "", "encoder": ""}',
        '{"class_names": [["a"], "b"], "cohort": "", "split": "", "encoder": ""}',
    ],
)
def test_a_damaged_description_of_a_table_is_named(tmp_path, damage):
    path = table().save(tmp_path / "table")
    (path / "table.json").write_text(damage)
    with pytest.raises(ValueError, match=str(path)):
        EmbeddingTable.load(path)


def test_whole_numbers_for_embeddings_are_named_with_their_folder(tmp_path):
    path = table().save(tmp_path / "table")
    np.save(path / "z.npy", np.zeros(np.load(path / "z.npy").shape, np.int64))
    for memory_map in (False, True):
        with pytest.raises(ValueError, match=f"{path} is no table"):
            EmbeddingTable.load(path, memory_map=memory_map)


def test_class_names_are_different_texts():
    with pytest.raises(ValueError, match="class_names must differ"):
        table(class_names=("a", "a"))
    with pytest.raises(TypeError, match="class_names must be names"):
        table(class_names=(1, 2))


def test_wider_floats_become_unit_rows():
    z = np.arange(10, dtype=np.longdouble).reshape(5, 2) + 1
    np.testing.assert_allclose(table(z=z).z, table(z=z.astype(np.float64)).z)


def test_a_table_knows_the_lengths_of_its_rows():
    rows = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    one = table(n=3, z=rows)
    np.testing.assert_allclose(one.norm, [5, 0, 0.5])
    np.testing.assert_allclose(one.raw(), rows, atol=1e-6)
    assert table(n=3, z=one.z[[0, 2, 2]]).norm is None, "unit rows do not say how long they were"
    given = table(n=3, z=one.z[[0, 2, 2]], norm=np.array([2.0, 3.0, 4.0]))
    np.testing.assert_allclose(given.raw(), one.z[[0, 2, 2]] * [[2], [3], [4]])
    with pytest.raises(ValueError, match=r"does not know their lengths.*norm="):
        dataclasses.replace(given, norm=None).raw()


@pytest.mark.parametrize("memory_map", [False, True])
def test_lengths_survive_saving(tmp_path, memory_map):
    one = table(z=np.random.default_rng(0).normal(size=(5, 3)))
    again = EmbeddingTable.load(one.save(tmp_path / "bank"), memory_map=memory_map)
    np.testing.assert_array_equal(again.norm, one.norm)
    np.testing.assert_array_equal(again.raw(), one.raw())


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (np.ones(4), ValueError, r"5 embeddings but norm has shape \(4,\)"),
        (np.ones(5, dtype=int), TypeError, "norm must hold floats"),
        (np.array([1.0, 1.0, -1.0, 1.0, 1.0]), ValueError, "row 2"),
        (np.array([1.0, np.nan, 1.0, 1.0, 1.0]), ValueError, "row 1"),
    ],
)
def test_wrong_lengths_are_named(norm, error, message):
    with pytest.raises(error, match=message):
        table(norm=norm)


def test_labels_are_aligned_by_name():
    labels = np.array([0, 2, 0])
    assert align_labels(labels, ("a", "b", "c"), ("c", "a")).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"\['c'\].*\['a', 'b'\]"):
        align_labels(labels, ("a", "b", "c"), ("a", "b"))
