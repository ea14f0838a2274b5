"""Augmentation for H&E: stains vary along their own axes, white stays white, tissue keeps its colours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.data import AugmentationPolicy, build_transform
from hsat.data.augment import default_augmentation
from hsat.data.augment_batch import augment_batch
from hsat.data.augment_he import MirrorAndTurn, ReflectedTurn, StainJitter, WithProbability
from hsat.stains import from_stains, to_stains


def tissue(seed=0, size=24):
    """A patch of haematoxylin and eosin, some of it unstained."""
    generator = torch.Generator().manual_seed(seed)
    stains = torch.rand(1, 3, size, size, generator=generator) * torch.tensor([1.2, 0.8, 0.0]).view(1, 3, 1, 1)
    stains[..., : size // 4] = 0
    return from_stains(stains)[0]


def seeded(operation, x, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return operation(x)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.0, 0.3, 1.0]), size=st.sampled_from([8, 24]))
def test_views_are_seeded_in_range_and_of_the_size_asked_for(seed, strength, size):
    pipeline, x = build_transform("he", image_size=size, strength=strength), tissue()
    views = [seeded(pipeline, x, seed) for _ in range(2)]
    assert torch.equal(*views)
    assert views[0].shape == (3, size, size) and 0 <= float(views[0].min()) <= float(views[0].max()) <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_stain_jitter_moves_haematoxylin_and_eosin_only(seed):
    x = tissue()
    before, after = to_stains(x[None]), to_stains(seeded(StainJitter(0.25, 0.0), x, seed)[None])
    bright = x.amin(0) > 0.02  # darker light is cut off
    torch.testing.assert_close(after[0, 2][bright], before[0, 2][bright], atol=2e-3, rtol=0)
    stained = (before[0, :2] > 0.2) & bright
    for stain in (0, 1):
        factors = (after[0, stain] / before[0, stain])[stained[stain] & (after[0].amax(0) < 3)]
        assert float(factors.max() - factors.min()) < 0.02, "one factor for the whole patch"
        assert 0.74 < float(factors.mean()) < 1.26


def test_white_stays_white():
    x = tissue()
    for seed in range(20):
        view = seeded(StainJitter(0.25, 0.05), x, seed)
        assert float(view[..., :6].min()) > 0.999
        assert float(seeded(ReflectedTurn(15.0), torch.ones(3, 24, 24), seed).min()) == pytest.approx(1.0, abs=1e-6)


def test_tissue_does_not_turn_green_or_black():
    """In no view of H&E is green the strongest colour of much of the tissue, which v0 makes of it."""
    x = tissue(size=48)

    def green(view):
        return float((view[1] > torch.maximum(view[0], view[2]) + 0.05).float().mean())

    shares = {
        name: sum(green(seeded(build_transform(name, image_size=48), x, seed)) for seed in range(30)) / 30
        for name in ("he", "v0")
    }
    assert shares["he"] < 0.005 < 0.05 < shares["v0"], shares
    darkest = min(float(seeded(build_transform("he", image_size=48), x, seed).mean()) for seed in range(30))
    assert darkest > 0.5 * float(x.mean())


def test_mirrors_and_turns_give_the_eight_forms_of_a_square():
    x = torch.arange(12.0).view(3, 2, 2) / 12
    forms = {tuple(seeded(MirrorAndTurn(), x, seed).flatten().tolist()) for seed in range(200)}
    assert len(forms) == 8
    oblong = torch.arange(18.0).view(3, 2, 3) / 18
    shapes = {tuple(seeded(MirrorAndTurn(), oblong, seed).shape) for seed in range(50)}
    assert shapes == {(3, 2, 3)}


def test_a_share_is_a_share():
    operation = WithProbability(0.25, torch.zeros_like)
    changed = sum(not seeded(operation, torch.ones(1), seed).any() for seed in range(1000))
    assert 200 < changed < 300


def test_items_and_images_are_the_same_views():
    patches, pipeline = [tissue(seed) for seed in range(3)], build_transform("he", image_size=16)
    batch = augment_batch(patches, pipeline, [5, 6, 7, 8], source=[0, 1, 2, 0])
    for place, (which, seed) in enumerate(zip([0, 1, 2, 0], [5, 6, 7, 8], strict=True)):
        assert torch.equal(batch[place], seeded(pipeline, patches[which], seed))


def test_the_default_fits_the_kind_of_patches():
    assert (default_augmentation("srh"), default_augmentation("rgb")) == ("v0", "he")
    assert AugmentationPolicy("he").pipeline(16).name == "he"
