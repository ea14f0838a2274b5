"""Images with their ids on the way from a dataset to a batch, and the isolation in which transforms run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hsat.data.cohort import Cohort


class Sample(NamedTuple):
    """m images with their ids, as a dataset gives them and `collate` takes them.

    images: (m, 3, h, w) float32 in [0, 1].  patch, slide, patient: (m,) int64, unique over the cohort.  label: (m,)
    int64.  paths: one relative path per image, for error messages.
    """

    images: Tensor
    patch: Tensor
    slide: Tensor
    patient: Tensor
    label: Tensor
    paths: tuple[str, ...]


def make_sample(cohort: Cohort, rows: Sequence[int], images: Sequence[Tensor]) -> Sample:
    """The images of these rows of the cohort as one Sample; ValueError naming two files whose shapes differ."""
    rows = list(rows)
    paths = tuple(cohort.records[row].path for row in rows)
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{paths[0]} gives an image of shape {tuple(images[0].shape)} and {path} one of {tuple(image.shape)};"
                " pass image_size so that all images have one size"
            )
    patch, slide, patient, label = (
        torch.from_numpy(ids[rows]) for ids in (cohort.patch, cohort.slide, cohort.patient, cohort.label)
    )
    return Sample(torch.stack(list(images)), patch, slide, patient, label, paths)


@contextmanager
def isolated() -> Iterator[None]:
    """Leaves torch's CPU generator as it was, and computes on one thread inside.

    One thread, because sums over a large patch differ in the last bits with the number of threads, and worker processes
    have one.  Devices' generators are neither read nor seeded: transforms run on the CPU.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
