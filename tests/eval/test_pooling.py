from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.eval import pool, pool_by_level
from hsat.eval.pooling import own_labels, unreported_levels
from hsat.types import EmbeddingTable


def loop_pool(scores, groups, pooling):
    """One group after the other."""
    rows = {}
    for group in sorted(set(groups)):
        members = [row for row, g in zip(scores, groups, strict=True) if g == group]
        if pooling == "paper":
            members = [np.exp(row) / np.exp(row).sum() for row in members]
            total = sum(members)
            rows[group] = total / total.sum()
        else:
            rows[group] = sum(members) / len(members)
    return list(rows), np.array(list(rows.values()))


def simplex(rng, n, classes):
    return rng.dirichlet(np.full(classes, 0.4), n)


@pytest.mark.parametrize("level", ["slide", "patient"])
@pytest.mark.parametrize("case", ["all7_shuffled", "five_classes"])
def test_equals_the_published_pooling(golden, case, level):
    parts = [path.split("/") for path in golden[f"specs/{case}/paths"]]
    groups = ["/".join(p[-4:-3] if level == "patient" else p[-4:-2]) for p in parts]
    pooled = pool(golden[f"specs/{case}/logits"], groups, golden[f"specs/{case}/labels"], pooling="paper")
    keys = [f"{group}|{label}" for group, label in zip(pooled.groups, pooled.labels, strict=True)]
    published = list(golden[f"specs/{case}/{level}_keys"])
    assert sorted(keys) == sorted(published)
    expected = golden[f"specs/{case}/{level}_scores"][[published.index(key) for key in keys]]
    np.testing.assert_allclose(pooled.scores, expected, atol=1e-6, rtol=0)


def test_the_published_case_with_two_labels_in_one_patient_is_refused(golden):
    patients = [path.split("/")[-4] for path in golden["specs/mixed_patient/paths"]]
    scores, labels = golden["specs/mixed_patient/logits"], golden["specs/mixed_patient/labels"]
    with pytest.raises(
        ValueError, match=r"group NIO_002 holds patches with labels \[1, 2\]; a group of patches that is pooled has one"
    ):
        pool(scores, patients, labels, pooling="paper")
    assert len(pool(scores, patients)) == len(set(patients))  # labels never take part in the grouping


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    classes=st.integers(1, 6),
    pooling=st.sampled_from(["mean", "paper"]),
)
def test_laws(seed, n, classes, pooling):
    rng = np.random.default_rng(seed)
    scores, groups = simplex(rng, n, classes), rng.integers(-5, 5, n)
    labels = groups % classes
    pooled = pool(scores, groups, labels, pooling=pooling)
    names, expected = loop_pool(scores, groups.tolist(), pooling)
    assert pooled.groups.tolist() == names
    np.testing.assert_allclose(pooled.scores, expected, atol=1e-12)
    np.testing.assert_allclose(pooled.scores.sum(1), 1.0, atol=1e-12)
    assert pooled.labels.tolist() == [group % classes for group in names]
    assert pooled.sizes.tolist() == [(groups == group).sum() for group in names]
    order = rng.permutation(n)
    again = pool(scores[order], groups[order], labels[order], pooling=pooling)
    np.testing.assert_allclose(again.scores, pooled.scores, atol=1e-12)
    renamed = pool(scores, groups + 100, pooling=pooling)
    np.testing.assert_array_equal(renamed.scores, pooled.scores)
    assert renamed.labels is None
    np.testing.assert_allclose(
        pool(np.repeat(scores, 3, 0), np.repeat(groups, 3), pooling=pooling).scores, pooled.scores, atol=1e-12
    )


def test_groups_of_one_keep_their_scores():
    scores = simplex(np.random.default_rng(0), 5, 3)
    np.testing.assert_array_equal(pool(scores, [4, 2, 0, 1, 3]).scores, scores[[2, 3, 1, 4, 0]])


def test_the_published_softmax_can_turn_a_vote():
    """Two patches sure of class 0 against three that lean to class 1: the means say 1, the softmax says 0."""
    scores = np.array([[1.0, 0.0, 0.0]] * 2 + [[0.0, 0.68, 0.32]] * 3)
    assert pool(scores, np.zeros(5, int)).scores.argmax() == 1
    assert pool(scores, np.zeros(5, int), pooling="paper").scores.argmax() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(scores=np.ones((2, 3)), groups=[0, 1, 2]), r"2 rows of scores but groups has shape \(3,\)"),
        (dict(scores=np.ones((2, 3)), groups=[0, 1], labels=[0]), r"2 rows of scores but labels has shape \(1,\)"),
        (dict(scores=np.ones(3), groups=[0]), r"scores must be \(n, classes\), got shape \(3,\)"),
        (dict(scores=np.ones((0, 3)), groups=[]), r"scores of shape \(0, 3\) hold nothing"),
        (
            dict(scores=np.array([[1.0], [np.nan]]), groups=[0, 1]),
            "scores are not finite in 1 of 2 rows, first in row 1",
        ),
        (dict(scores=np.ones((1, 3)), groups=[0], pooling="sum"), "pooling must be one of 'mean', 'paper'; got 'sum'"),
        (
            dict(scores=np.ones((3, 3)), groups=[7, 8, 7], labels=[0, 1, 2]),
            r"group 7 holds patches with labels \[0, 2\]",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        pool(**arguments)


@pytest.mark.parametrize("level", ["slide", "patient"])
def test_the_published_grouping_splits_a_patient_with_two_labels(golden, level):
    """On the published case that `group_by="id"` refuses: the same groups, in the published order of (id, label)."""
    paths = [str(path).split("/") for path in golden["specs/mixed_patient/paths"]]
    ids = np.array([parts[-4] if level == "patient" else f"{parts[-4]}/{parts[-3]}" for parts in paths])
    labels, scores = golden["specs/mixed_patient/labels"], golden["specs/mixed_patient/logits"].astype(float)
    pooled = pool(scores, ids, labels, pooling="paper", group_by="id_and_label")
    assert len(pooled) == len({*zip(ids.tolist(), labels.tolist(), strict=True)}) == len(np.unique(ids)) + 1
    for group, label, row, size in zip(pooled.groups, pooled.labels, pooled.scores, pooled.sizes, strict=True):
        members = (ids == group) & (labels == label)
        weights = np.exp(scores[members]) / np.exp(scores[members]).sum(1, keepdims=True)
        np.testing.assert_allclose(row, weights.sum(0) / weights.sum(), atol=1e-12)
        assert size == members.sum()
    np.testing.assert_allclose(
        np.sort(pooled.scores, axis=None), np.sort(golden[f"specs/mixed_patient/{level}_scores"], axis=None), atol=1e-6
    )


def test_keys_that_are_none():
    with pytest.raises(ValueError, match="group_by must be one of 'id', 'id_and_label'; got 'label'"):
        pool(np.eye(2), [0, 1], [0, 1], group_by="label")
    with pytest.raises(ValueError, match="group_by='id_and_label' needs labels"):
        pool(np.eye(2), [0, 1], group_by="id_and_label")


def mixed_table(**columns):
    """Two patients of two slides each; the patches of slide 1, and so of patient 0, disagree."""
    ids = np.arange(8)
    return EmbeddingTable(
        np.eye(8), [0, 0, 0, 1, 1, 1, 1, 1], ids, ids // 2, ids // 4, class_names=("normal", "tumour"), **columns
    )


def test_levels_at_which_patches_disagree_are_left_out_and_said():
    scores = np.full((8, 2), 0.5)
    assert list(pool_by_level(scores, mixed_table())) == ["patch"]
    reasons = unreported_levels(mixed_table())
    assert reasons[0].startswith("no slide level: patches of 1 of 4 slides are of several classes and no slide_label")
    assert reasons[1].startswith("no patient level: patches of 1 of 2 patients")
    assert unreported_levels(mixed_table(), group_by="id_and_label") == ()
    assert len(pool_by_level(scores, mixed_table(), group_by="id_and_label")["patient"].labels) == 3


def test_a_column_says_what_slides_and_patients_are():
    scores = np.full((8, 2), 0.5)
    table = mixed_table(slide_label=[-1, -1, 1, 1, -1, -1, 0, 0])
    levels = pool_by_level(scores, table, class_names=("tumour", "normal"))
    assert list(levels) == ["patch", "slide"]
    assert levels["slide"].labels.tolist() == [1, 0, 0, 1] and levels["slide"].patients.tolist() == [0, 0, 1, 1]
    whole = mixed_table(slide_label=[1] * 8, patient_label=[1] * 8)
    assert pool_by_level(scores, whole)["patient"].labels.tolist() == [1, 1] and unreported_levels(whole) == ()
    assert own_labels(mixed_table(patient_label=[-1] * 8), "patient")[0] is None


def test_columns_are_checked_and_kept_in_files(tmp_path):
    table = mixed_table(slide_label=[-1, -1, 1, 1, -1, -1, 0, 0])
    read = EmbeddingTable.load(table.save(tmp_path / "table"))
    assert read.slide_label.tolist() == table.slide_label.tolist() and read.patient_label is None
    with pytest.raises(ValueError, match="slide_label runs from 0 to 2; wanted -1 "):
        mixed_table(slide_label=[0, 2] * 4)
    with pytest.raises(ValueError, match=r"8 embeddings but patient_label has shape \(2,\)"):
        mixed_table(patient_label=[0, 1])
