"""The figure of patches and their views shows the images of the dataset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.data import HierarchicalDataset, read_opensrh
from hsat.report import plot_views


@pytest.fixture(scope="module")
def dataset(root):
    return HierarchicalDataset(read_opensrh(root).with_split(seed=0), "train", image_size=16, seed=3)


def test_each_row_is_a_patch_and_views_of_it(dataset):
    figure = plot_views(dataset, patients=2, views=4)
    pictures = [panel.get_images()[0].get_array() for panel in figure.axes]
    assert len(pictures) == 2 * 5 and all(picture.shape == (16, 16, 3) for picture in pictures)
    one = HierarchicalDataset(dataset.cohort, "train", image_size=16, slides=1, patches=1, views=4, seed=dataset.seed)[
        1
    ].images
    for picture, image in zip(pictures[6:], one, strict=True):
        np.testing.assert_array_equal(picture, image.permute(1, 2, 0).numpy())


def test_a_transform_of_ones_own_and_a_file(dataset, tmp_path):
    own = HierarchicalDataset(dataset.cohort, "train", image_size=16, transform=torch.zeros_like)
    pictures = [panel.get_images()[0].get_array() for panel in plot_views(own, patients=1, views=2).axes]
    assert pictures[0].any() and not pictures[1].any() and not pictures[2].any()
    assert plot_views(own, tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")


def test_counts_below_one_are_refused(dataset):
    with pytest.raises(ValueError, match="at least 1, got 0 and 6"):
        plot_views(dataset, patients=0)
