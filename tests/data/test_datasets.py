"""Datasets over real files: what an item holds, that it depends on nothing else, and what happens to bad files."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import hsat.data.datasets as room
from hsat.data.augment import AugmentationPolicy, build_transform
from hsat.data.cohort import Cohort, PatchRecord
from hsat.data.datasets import HierarchicalDataset, PatchDataset
from hsat.data.readers import BadPatch, read_patch
from hsat.data.sampler import PatientDraw, draw_images, slot_seed

TREE = {  # patient: (class, split, patches of each slide)
    "val": ("b", "val", [2]),
    "many": ("a", "train", [4, 3, 2]),
    "one": ("b", "train", [1]),
    "two": ("b", "train", [2, 1]),
}


def write(root: Path, tree: dict = TREE, *, size: int = 12, kind: str = "rgb") -> Cohort:
    """A cohort of noisy patches; the mean of patch i is near (i + 1) / 32, so that an image says which patch it is."""
    rng, records = np.random.default_rng(0), []
    for patient, (label, split, slides) in tree.items():
        for slide, patches in enumerate(slides):
            for number in range(patches):
                path = f"{patient}/{slide}/{number}.{'png' if kind == 'rgb' else 'tif'}"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                grey = 8 * (len(records) + 1) + rng.integers(-4, 5, (3, size, size))
                if kind == "rgb":
                    Image.fromarray(grey.astype(np.uint8).transpose(1, 2, 0)).save(root / path)
                else:
                    tifffile.imwrite(root / path, (256 * grey[:2]).astype(np.uint16), photometric="minisblack")
                records.append(PatchRecord(path, label, patient, str(slide), split))
    return Cohort(root=root, records=tuple(records), class_names=("a", "b"), kind=kind)


@pytest.fixture
def cohort(tmp_path) -> Cohort:
    return write(tmp_path)


def which(images: torch.Tensor) -> list[int]:
    """The patches that unaugmented images come from."""
    return [round(32 * float(mean) * 255 / 256) - 1 for mean in images.mean((1, 2, 3))]


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True)) and one.paths == two.paths


def plain(cohort: Cohort, **options) -> HierarchicalDataset:
    return HierarchicalDataset(cohort, image_size=None, transform="none", **options)


# --- every patch once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rgb", "srh"])
def test_patches_come_once_in_cohort_order_with_their_ids(tmp_path, kind):
    cohort = write(tmp_path, kind=kind)
    for split in (None, "train", "val"):
        dataset = PatchDataset(cohort, split)
        rows = cohort.rows(split).tolist()
        assert len(dataset) == len(rows)
        for row, item in zip(rows, dataset, strict=True):
            assert torch.equal(item.images[0], read_patch(cohort.path(row), kind=kind))
            ids = (item.patch, item.slide, item.patient, item.label)
            assert [int(i) for i in ids] == [
                cohort.patch[row],
                cohort.slide[row],
                cohort.patient[row],
                cohort.label[row],
            ]
            assert all(i.dtype == torch.int64 and i.shape == (1,) for i in ids)
            assert item.paths == (cohort.records[row].path,)
    assert (dataset.class_names, dataset.cohort, dataset.split) == (("a", "b"), cohort, "val")


def test_image_size_resizes_before_the_transform(cohort):
    item = PatchDataset(cohort, image_size=20, transform=lambda x: 1.0 - x[:, :10])[3]
    expected = build_transform("none", image_size=20)(read_patch(cohort.path(3), kind="rgb"))
    assert torch.equal(item.images[0], 1.0 - expected[:, :10])


def test_a_random_transform_depends_on_the_patch_alone(cohort):
    dataset = PatchDataset(cohort, transform=lambda x: torch.rand(x.shape))
    forth = [dataset[index].images for index in range(len(dataset))]
    torch.rand(7)
    back = [dataset[index].images for index in reversed(range(len(dataset)))]
    assert all(torch.equal(one, two) for one, two in zip(forth, reversed(back), strict=True))
    assert not torch.equal(forth[0], forth[1])
    part = PatchDataset(cohort, "train", transform=dataset.transform)
    assert torch.equal(part[0].images, forth[2])  # the first two are the validation patient's


def test_patches_are_indexed_like_a_list(cohort):
    dataset = PatchDataset(cohort)
    assert same(dataset[-1], dataset[len(dataset) - 1])
    assert same(dataset[np.int64(2)], dataset[2])
    for index in (15, -16):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 15 patches"):
            dataset[index]


def test_a_subset_shows_the_chosen_patches_in_the_order_given(cohort):
    whole = PatchDataset(cohort, "train", image_size=9)
    part = whole.subset(np.array([4, -1, 0]))
    assert [same(one, two) for one, two in zip(part, (whole[4], whole[12], whole[0]), strict=True)] == [True] * 3
    assert part.rows.tolist() == whole.rows[[4, 12, 0]].tolist()
    assert len(whole) == 13 and len(part.subset([1])) == 1 and len(whole.subset([])) == 0
    assert (part.split, part.class_names, part.image_size) == ("train", ("a", "b"), 9)
    assert whole.subset(slice(2, None, 5)).rows.tolist() == whole.rows[2::5].tolist()
    with pytest.raises(IndexError, match="index 3 is out of range for 3 patches"):
        part.subset([3])
    with pytest.raises(TypeError):
        part.subset([True, False, True])


def test_a_thinned_dataset_spans_the_whole(cohort):
    whole = PatchDataset(cohort, "train")
    assert whole.thin(4).rows.tolist() == whole.rows[[0, 4, 8, 12]].tolist()
    assert whole.thin(None) is whole and whole.thin(99) is whole and len(whole.thin(1)) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        whole.thin(0)


def test_an_unreadable_patch_is_named(cohort):
    cohort.path(4).write_bytes(b"<html>not an image</html>")
    dataset = PatchDataset(cohort)
    dataset[3]
    with pytest.raises(BadPatch, match=r"many/0/2\.png"):
        dataset[4]


# --- hierarchical items ----------------------------------------------------------------------------------------------


def test_an_item_is_slides_then_patches_then_views(cohort):
    item = plain(cohort, slides=3, patches=2, views=2)[0]
    assert item.images.shape == (12, 3, 12, 12)
    assert which(item.images) == item.patch.tolist()
    patches, slides = item.patch.view(3, 2, 2), item.slide.view(3, 2, 2)
    assert torch.equal(patches[..., 0], patches[..., 1])
    assert len(set(patches[..., 0].flatten().tolist())) == 6
    assert all(len(set(row.flatten().tolist())) == 1 for row in slides)
    assert len(set(slides[:, 0, 0].tolist())) == 3
    assert item.slide.tolist() == cohort.slide[item.patch].tolist()
    assert item.patient.tolist() == [1] * 12
    assert item.label.tolist() == [0] * 12
    assert item.paths == tuple(cohort.records[row].path for row in item.patch)


def test_an_item_equals_its_specification_written_out(tmp_path):
    cohort = write(tmp_path, kind="srh")
    dataset = HierarchicalDataset(cohort, image_size=9, slides=2, patches=2, views=3, transform="v1", seed=5)
    item = dataset[PatientDraw(patient=1, epoch=4, occurrence=2, strength=0.5)]
    slides = [[2, 3, 4, 5], [6, 7, 8], [9, 10]]
    rng = np.random.default_rng(slot_seed(5, 4, "many", 2, -1))
    rows = draw_images(slides, slides_drawn=2, patches_drawn=2, rng=rng)
    transform, expected = build_transform("v1", image_size=9, strength=0.5), []
    for slot in range(12):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(slot_seed(5, 4, "many", 2, slot))
            expected.append(transform(read_patch(cohort.path(rows[slot // 3]), kind="srh")))
    assert item.patch.tolist() == [row for row in rows for _ in range(3)]
    assert torch.equal(item.images, torch.stack(expected))


def test_any_function_is_a_transform_seeded_by_the_view(cohort):
    """It gets the patch at its own size; what it returns ends at image_size."""
    seen = []

    def noisy(x):
        seen.append(x.shape)
        return (x[:, :10] + 0.1 * torch.rand(())).clamp(max=1.0)

    dataset = HierarchicalDataset(cohort, image_size=8, transform=noisy, seed=3)
    item = dataset[PatientDraw(1, epoch=2)]
    assert set(seen) == {(3, 12, 12)} and item.images.shape == (8, 3, 8, 8)
    resize, expected = build_transform("none", image_size=8), []
    for slot, row in enumerate(item.patch.tolist()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(slot_seed(3, 2, "many", 0, slot))
            expected.append(resize(noisy(read_patch(cohort.path(row), kind="rgb"))))
    assert torch.equal(item.images, torch.stack(expected))


def test_a_built_pipeline_is_the_named_one_at_its_own_strength(cohort):
    named = HierarchicalDataset(cohort, image_size=9, transform="v0")
    built = HierarchicalDataset(cohort, image_size=9, transform=build_transform("v0", image_size=9, strength=0.5))
    draw = PatientDraw(1, epoch=3, strength=0.5)
    assert same(built[draw], named[draw])
    assert same(built[PatientDraw(1, epoch=3)], named[draw])


def test_short_patients_repeat_with_true_ids_and_fresh_augmentation(cohort):
    dataset = HierarchicalDataset(cohort, image_size=12, slides=2, patches=2, views=2, transform="v1")
    assert dataset.patients == (1, 2, 3)
    item = dataset[1]
    assert item.patch.unique().tolist() == [11]
    assert item.slide.unique().tolist() == [4]
    assert len({image.numpy().tobytes() for image in item.images}) == 8
    two = plain(cohort, slides=2, patches=2, views=1)[2]
    assert sorted(two.patch.tolist()) == [12, 13, 14, 14]


def test_each_file_is_read_once_per_item(cohort, monkeypatch):
    paths = []
    monkeypatch.setattr(room, "read_patch", lambda path, *, kind: paths.append(path) or read_patch(path, kind=kind))
    dataset = plain(cohort, slides=4, patches=3, views=3)
    item = dataset[2]
    assert len(item.images) == 36
    assert sorted(paths) == [cohort.path(row) for row in (12, 13, 14)]


def test_epoch_occurrence_seed_and_strength_change_an_item(cohort):
    options = {"image_size": 12, "transform": "v1"}
    dataset = HierarchicalDataset(cohort, **options)
    base = dataset[PatientDraw(1)]
    assert same(base, dataset[0])
    assert same(base, dataset[PatientDraw(1)])
    others = [PatientDraw(1, epoch=1), PatientDraw(1, occurrence=1), PatientDraw(1, strength=0.5)]
    assert not any(torch.equal(dataset[draw].images, base.images) for draw in others)
    assert not torch.equal(HierarchicalDataset(cohort, seed=1, **options)[0].images, base.images)
    assert torch.equal(dataset[PatientDraw(1, strength=0.5)].patch, base.patch)


def test_a_patients_draws_do_not_depend_on_the_other_patients(tmp_path):
    alone = write(tmp_path / "alone", {"many": TREE["many"]})
    among = write(tmp_path / "among")
    draws = [PatientDraw(0, epoch) for epoch in range(5)], [PatientDraw(1, epoch) for epoch in range(5)]
    one, two = plain(alone), plain(among)
    assert [one[d].paths for d in draws[0]] == [two[d].paths for d in draws[1]]


def test_global_generators_and_threads_stay_as_they_were(cohort, monkeypatch):
    def refuse(*_):
        raise AssertionError("a generator outside the item was seeded")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    dataset = HierarchicalDataset(cohort, image_size=12, transform="v0")
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()

    def untouched() -> bool:
        now = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), torch.get_num_threads()
        return torch.equal(now[0], before[0]) and (now[1] == before[1]).all() and now[2:] == before[2:]

    first = dataset[0]
    assert untouched()
    random.random(), np.random.rand(), torch.rand(())
    assert same(dataset[0], first)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), torch.get_num_threads()
    with pytest.raises(ValueError, match="strength"):
        dataset[PatientDraw(1, strength=2.0)]
    with pytest.raises(ZeroDivisionError):
        PatchDataset(cohort, transform=lambda x: torch.rand(3) / (1 // 0))[0]
    assert untouched()


def test_the_number_of_threads_does_not_change_a_bit(tmp_path):
    dataset = HierarchicalDataset(write(tmp_path, {"many": TREE["many"]}, size=300), image_size=300, views=4)
    threads = torch.get_num_threads()
    try:
        items = []
        for count in (1, 8):
            torch.set_num_threads(count)
            items.append([dataset[PatientDraw(0, epoch)] for epoch in range(2)])
    finally:
        torch.set_num_threads(threads)
    assert all(same(one, two) for one, two in zip(*items, strict=True))


def test_a_pickled_dataset_gives_the_same_items(cohort):
    dataset = HierarchicalDataset(cohort, image_size=12)
    assert same(pickle.loads(pickle.dumps(dataset))[2], dataset[2])


def test_datasets_show_their_configuration(cohort):
    assert repr(PatchDataset(cohort, "val", image_size=9)) == (
        "PatchDataset(2 patches, split='val', image_size=9, transform=None)"
    )
    assert repr(HierarchicalDataset(cohort, image_size=9, seed=4)) == (
        "HierarchicalDataset(3 patients, split='train', image_size=9, transform=AugmentationPolicy(name='v0', prob=0.5,"
        " uncropped='resize', static_epochs=0, batched=False), slides=2, patches=2, views=2, seed=4, on_bad='raise')"
    )


# --- bad files -------------------------------------------------------------------------------------------------------


def spoil(cohort: Cohort, *rows: int) -> None:
    for row in rows:
        cohort.path(row).write_bytes(b"")


def test_a_bad_file_raises_by_default(cohort):
    spoil(cohort, 11)
    with pytest.raises(BadPatch, match=r"one/0/0\.png"):
        plain(cohort)[1]


@pytest.mark.filterwarnings("ignore:.*of the same slide instead")
def test_a_bad_file_is_replaced_from_its_slide_by_a_patch_the_item_does_not_hold(cohort):
    good = plain(cohort, slides=3, patches=2, views=2)
    dataset = plain(cohort, slides=3, patches=2, views=2, on_bad="replace")
    spoil(cohort, 3, 7)
    replaced = 0
    for epoch in range(12):
        rows, item = draw_rows(cohort, epoch), dataset[PatientDraw(1, epoch)]
        got = item.patch[::2].tolist()
        assert which(item.images) == item.patch.tolist()
        assert not {3, 7} & set(got)
        assert cohort.slide[got].tolist() == cohort.slide[rows].tolist()
        assert all(new == old for new, old in zip(got, rows, strict=True) if old not in (3, 7))
        assert len(set(got)) == 6
        assert same(dataset[PatientDraw(1, epoch)], item)
        replaced += 2 * sum(row in (3, 7) for row in rows)
    assert replaced > 0
    assert dataset.replaced == replaced
    assert good.replaced == 0


def draw_rows(cohort: Cohort, epoch: int) -> list[int]:
    slides = [[2, 3, 4, 5], [6, 7, 8], [9, 10]]
    rng = np.random.default_rng(slot_seed(0, epoch, "many", 0, -1))
    return draw_images(slides, slides_drawn=3, patches_drawn=2, rng=rng)


def test_each_bad_file_is_reported_once_with_its_stand_in(cohort):
    spoil(cohort, 12)
    dataset = plain(cohort, on_bad="replace", views=1)
    with pytest.warns(UserWarning, match=r"two/0/0.png.*; using two/0/1.png of the same slide instead") as caught:
        for epoch in range(4):
            dataset[PatientDraw(3, epoch)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert dataset.replaced == 4


def test_a_slide_without_a_readable_patch_is_named(cohort):
    spoil(cohort, 6, 7, 8)
    dataset = plain(cohort, slides=3, on_bad="replace")
    message = r"many/1/\d.png.*none of the 3 patches tried in slide '1' of patient 'many' can be read"
    with pytest.raises(BadPatch, match=message):
        dataset[0]


def test_replacements_are_bounded(tmp_path):
    cohort = write(tmp_path, {"p": ("a", "train", [14])})
    spoil(cohort, *range(14))
    dataset = plain(cohort, slides=1, patches=1, on_bad="replace")
    with pytest.raises(BadPatch, match=r"none of the 11 patches tried .*at most 10 others are tried"):
        dataset[0]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_patches_of_different_sizes_are_named(tmp_path):
    cohort = write(tmp_path, {"p": ("a", "train", [2])})
    Image.new("RGB", (7, 9)).save(cohort.path(1))
    with pytest.raises(ValueError, match=r"p/0/\d.png gives .* and p/0/\d.png one of .*pass image_size"):
        plain(cohort, slides=1)[0]
    assert HierarchicalDataset(cohort, image_size=8, slides=1)[0].images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slides": 0}, "slides, patches and views must be at least 1, got 0, 2 and 2"),
        ({"patches": 0}, "got 2, 0 and 2"),
        ({"views": -1}, "got 2, 2 and -1"),
        ({"on_bad": "skip"}, "on_bad must be 'raise' or 'replace', got 'skip'"),
        ({"transform": "strong"}, "unknown augmentation 'strong'"),
        ({"image_size": 0}, "image_size must be a whole number of pixels"),
        ({"image_size": 0, "transform": torch.neg}, "image_size must be a whole number of pixels"),
        ({"split": "test"}, "test"),
    ],
)
def test_wrong_options_are_refused(cohort, options, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalDataset(cohort, **{"image_size": 12, **options})


def test_transforms_of_another_kind_are_refused(cohort):
    with pytest.raises(TypeError, match=r"a name, an AugmentationPolicy or a function .* got 3"):
        HierarchicalDataset(cohort, image_size=12, transform=3)
    with pytest.raises(TypeError, match=r"transform must be a function .* got AugmentationPolicy\(name='v0'"):
        PatchDataset(cohort, transform=AugmentationPolicy("v0"))


def test_patients_outside_the_split_are_refused(cohort):
    dataset = plain(cohort)
    with pytest.raises(IndexError, match=r"patient 0, 'val': not among split 'train'"):
        dataset[PatientDraw(0)]
    with pytest.raises(IndexError, match=r"patient 9, which is not in the cohort"):
        dataset[PatientDraw(9)]
    with pytest.raises(IndexError, match="index 3 is out of range for 3 patients"):
        dataset[3]
    assert len(list(dataset)) == 3
