"""The smallest number of altered patches, against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.eval import pool
from hsat.eval.patch_flips import min_patches_to_flip, patches_to_flip, patches_to_flip_in_order, pooled_is_wrong

seeds = st.integers(0, 100_000)
poolings = st.sampled_from(["mean", "paper"])


def scores(rng, n, classes, *, coarse=False):
    """Rows that sum to one; coarse ones tie often."""
    if coarse:
        rows = rng.integers(0, 4, (n, classes)) + 1e-300
        rows[:, 0] += rows.sum(1) == 0
        return rows / np.maximum(rows.sum(1, keepdims=True), 1)
    return rng.dirichlet(np.ones(classes), n)


def by_brute_force(clean, attacked, label, pooling):
    """The smallest subset of patches whose alteration makes the pooled decision wrong, by trying all of them."""
    for k in range(len(clean) + 1):
        for chosen in itertools.combinations(range(len(clean)), k):
            rows = clean.copy()
            rows[list(chosen)] = attacked[list(chosen)]
            if pool(rows, np.zeros(len(rows)), pooling=pooling).scores[0].argmax() != label:
                return k
    return None


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(2, 4), poolings, st.booleans())
def test_the_sorted_prefix_is_the_smallest_of_all_subsets(seed, n, classes, pooling, coarse):
    rng = np.random.default_rng(seed)
    clean, attacked = scores(rng, n, classes, coarse=coarse), scores(rng, n, classes, coarse=coarse)
    clean[:, 0] += 0.3  # most groups begin right
    for label in range(min(2, classes)):
        assert min_patches_to_flip(clean, attacked, label, pooling=pooling) == by_brute_force(
            clean, attacked, label, pooling
        )


@settings(max_examples=40, deadline=None)
@given(seeds, poolings)
def test_more_patches_never_help_the_defender(seed, pooling):
    """Monotone in k: whoever flips a decision with k patches flips it with a budget of k + 1."""
    rng = np.random.default_rng(seed)
    clean, attacked = scores(rng, 6, 3), scores(rng, 6, 3)
    needed = patches_to_flip(clean, attacked, np.zeros(6, dtype=int), np.zeros(6, dtype=int), pooling=pooling)
    within = [needed[0] <= k for k in range(7)]
    assert within == sorted(within)
    drawn = patches_to_flip_in_order(clean, attacked, 0, rng.permutation(6), pooling=pooling)
    assert drawn is None or drawn >= needed[0], "a random order beat the best one"


def test_counts_by_hand():
    """Three patches at 0.9 for class 0; an altered one is sure of class 1: two of three flip, one of three does not."""
    clean, attacked = np.tile([0.9, 0.1], (3, 1)), np.tile([0.0, 1.0], (3, 1))
    assert min_patches_to_flip(clean, attacked, 0) == 2
    assert min_patches_to_flip(clean, attacked, 1) == 0
    assert min_patches_to_flip(clean, clean, 0) is None
    assert min_patches_to_flip(clean, np.tile([0.5, 0.5], (3, 1)), 0) is None, "a tie goes to the lower class"
    assert min_patches_to_flip(clean[:, ::-1], np.tile([0.5, 0.5], (3, 1)), 1) == 3, "and here against the true one"


def test_patches_that_the_attack_made_better_are_left_alone():
    clean = np.array([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    attacked = np.array([[1.0, 0.0], [0.1, 0.9], [1.0, 0.0]])
    assert min_patches_to_flip(clean, attacked, 0) == 1


def test_a_rival_other_than_the_most_likely_one_may_be_cheaper():
    clean = np.array([[0.50, 0.45, 0.05], [0.50, 0.45, 0.05], [0.50, 0.45, 0.05]])
    attacked = np.array([[0.5, 0.45, 0.05], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert min_patches_to_flip(clean, attacked, 0) == by_brute_force(clean, attacked, 0, "mean") == 1
    attacked = np.array([[0.5, 0.45, 0.05], [0.46, 0.0, 0.54], [0.46, 0.0, 0.54]])
    assert min_patches_to_flip(clean, attacked, 0) == by_brute_force(clean, attacked, 0, "mean") is None


def test_groups_are_told_apart_and_random_orders_depend_on_seed_and_id_only():
    rng = np.random.default_rng(0)
    groups = np.array([7, 3, 7, 3, 7, 3, 7, 3, 7, 3])
    clean, attacked = scores(rng, 10, 3) + np.array([1.0, 0, 0]), scores(rng, 10, 3) + np.array([0, 2.0, 0])
    labels = np.zeros(10, dtype=int)
    whole = patches_to_flip(clean, attacked, groups, labels)
    for place, group in enumerate((3, 7)):
        mine = groups == group
        assert whole[place] == min_patches_to_flip(clean[mine], attacked[mine], 0)
        for order in ("worst", "random"):
            alone = patches_to_flip(clean[mine], attacked[mine], groups[mine], labels[mine], order=order, seed=5)
            assert alone[0] == patches_to_flip(clean, attacked, groups, labels, order=order, seed=5)[place]
    assert patches_to_flip(clean, clean, groups, labels).tolist() == [np.inf, np.inf]
    with pytest.raises(ValueError, match="'worst', 'random'"):
        patches_to_flip(clean, attacked, groups, labels, order="best")


@settings(max_examples=40, deadline=None)
@given(seeds, poolings)
def test_the_decision_is_that_of_pool(seed, pooling):
    rows = scores(np.random.default_rng(seed), 7, 3, coarse=True)
    decision = pool(rows, np.zeros(7), pooling=pooling).scores[0].argmax()
    assert [pooled_is_wrong(rows, label, pooling=pooling) for label in range(3)] == [
        label != decision for label in range(3)
    ]
