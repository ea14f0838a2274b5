"""A figure of what training sees: patches and their augmented views."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hsat.report.panels import TEXT_WIDTH, figure_style, finish_figure, open_panels
from hsat.report.plots import patch_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hsat.data import HierarchicalDataset


def plot_views(
    dataset: HierarchicalDataset,
    path: str | os.PathLike[str] | None = None,
    *,
    patients: int = 3,
    views: int = 6,
    axes: Sequence[Axes] | None = None,
) -> Path | Figure:
    """One row per patient: a patch as it is in its file, and views of it as the dataset augments them.

    Look at it before a training: an augmentation that was made for other images shows at once.

    Args:
        dataset: Its transform, image size and seed are used.
        path: The file, a .png, .pdf or .svg.
        patients: Number of rows, at most the patients of the dataset.
        views: Number of views in a row.
        axes: Where to draw instead of a file: patients * (views + 1), row by row.

    Returns:
        The path, or the figure where none was given.

    Raises:
        ValueError: For counts below 1, for both a path and axes, and for another number of axes.

    Example:
        >>> from hsat.data import HierarchicalDataset, read_opensrh, write_synthetic_cohort
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     cohort = read_opensrh(write_synthetic_cohort(f"{folder}/cohort", seed=0))
        ...     dataset = HierarchicalDataset(cohort, "train", image_size=48)
        ...     plot_views(dataset, f"{folder}/views.png").name
        'views.png'
    """
    if min(patients, views) < 1:
        raise ValueError(f"patients and views must be at least 1, got {patients} and {views}")
    rows = [_row(dataset, number, views) for number in range(min(patients, len(dataset)))]
    with figure_style():
        side = min(1.1, TEXT_WIDTH / (views + 1))
        size = (side * (views + 1), 1.05 * side * len(rows) + 0.2)
        figure, panels = open_panels(views + 1, path, axes, size=size, rows=len(rows))
        for panel, image in zip(panels, [image for row in rows for image in row], strict=True):
            panel.imshow(patch_picture(image), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        panels[0].set_title("patch")
        panels[1].set_title("views", loc="left")
        return finish_figure(figure, path)


def _row(dataset: HierarchicalDataset, number: int, views: int) -> list[Tensor]:
    """A patch of a patient, and its views."""
    from hsat.data import HierarchicalDataset, PatchDataset

    one = HierarchicalDataset(
        dataset.cohort,
        dataset.split,
        image_size=dataset.image_size,
        transform=dataset.transform,
        slides=1,
        patches=1,
        views=views,
        seed=dataset.seed,
        store=dataset.store,
    )
    sample = one[number]
    plain = PatchDataset(dataset.cohort, dataset.split, image_size=dataset.image_size, store=dataset.store)
    (place,) = torch.nonzero(torch.from_numpy(plain.rows) == int(sample.patch[0]))[0].tolist()
    return [plain[place].images[0], *sample.images]
