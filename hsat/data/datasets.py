"""Patches of a cohort as tensors with their ids: every patch once, or seeded hierarchical draws with augmented views.

What an item holds depends on the files, the options and the index alone: not on worker processes, their number, the
order of access, or a global generator.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hsat.data.augment import AugmentationPolicy, Transform, build_transform, fork_cpu_rng, resize_patch
from hsat.data.augment_batch import augment_images
from hsat.data.cohort import Cohort
from hsat.data.patch_store import PatchStore
from hsat.data.readers import BadPatch, read_patch
from hsat.data.sampler import PatientDraw, draw_images, slot_seed

MAX_REPLACEMENTS = 10
"""How many other patches of a slide `on_bad="replace"` tries for one image."""

_PROCESSES = 256  # places for the replacement counts of the main process and up to 255 workers


class Sample(NamedTuple):
    """m images with their ids, as a dataset gives them and `collate` takes them.

    Attributes:
        images: (m, 3, h, w) float32 in [0, 1].
        patch: (m,) int64, unique over the cohort.
        slide: (m,) int64, unique over the cohort.
        patient: (m,) int64, unique over the cohort.
        label: (m,) int64.
        paths: One relative path per image, for error messages.
    """

    images: Tensor
    patch: Tensor
    slide: Tensor
    patient: Tensor
    label: Tensor
    paths: tuple[str, ...]


class PatchDataset(Dataset[Sample]):
    """Every patch of a split once, in cohort order; item i is a Sample of one image.

    A patch that cannot be read raises BadPatch; an evaluation never skips one in silence.

    Args:
        cohort: The table of patches.
        split: None takes the whole cohort.
        image_size: Each patch is resized to a square of this side (antialiased bilinear); None keeps its own size.
        transform: Gets the resized patch (3, h, w) and sees torch's CPU generator seeded by the patch's place in the
            cohort.
        store: The cohort's patch store, read in place of the files; the images are the same.

    Attributes:
        rows: (n,) the row of the cohort that each item shows; `subset` makes a dataset of fewer.

    Raises:
        ValueError: An unknown split, an image_size below 1, or a store that was opened for another cohort.
        TypeError: A transform that cannot be called.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: str | None = None,
        *,
        image_size: int | None = None,
        transform: Transform | None = None,
        store: PatchStore | None = None,
    ) -> None:
        _check_store(store, cohort)
        if transform is not None:
            _check_transform(transform, "a function")
        self.cohort, self.split, self.store = cohort, split, store
        self.image_size, self.transform = image_size, transform
        self.rows = cohort.rows(split)
        self._resize = build_transform("none", image_size=image_size)

    def __repr__(self) -> str:
        options = f"split={self.split!r}, image_size={self.image_size!r}, transform={self.transform!r}"
        return f"PatchDataset({len(self)} patches, {options})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class i of the labels is class_names[i]; the same for every split of the cohort."""
        return self.cohort.class_names

    def subset(self, items: Sequence[int] | np.ndarray | slice) -> PatchDataset:
        """The same dataset with some of its items only, in the order given.

        Args:
            items: (m,) numbers below len(self), as in dataset[number], or a slice of them; there may be none.

        Returns:
            A dataset of these items.

        Raises:
            IndexError: A number is out of range.
            TypeError: They are no whole numbers; a mask has to go through np.flatnonzero.
        """
        numbers: Sequence[int]
        if isinstance(items, slice):
            numbers = range(len(self))[items]
        else:
            array = np.asarray(items)
            if array.dtype == np.bool_:
                raise TypeError("items are numbers of patches, not a mask; give np.flatnonzero(mask)")
            numbers = [_check_index(item, len(self), "patches") for item in array]
        part = copy.copy(self)
        part.rows = self.rows[np.array(numbers, dtype=np.int64)]
        return part

    def thin(self, count: int | None) -> PatchDataset:
        """The same dataset with at most so many of its items, evenly spread over it.

        Args:
            count: How many, at least 1; None keeps all.

        Returns:
            A dataset of these items.

        Raises:
            ValueError: For a count below 1.
        """
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self.subset(np.linspace(0, len(self) - 1, count).round().astype(int))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[_check_index(index, len(self), "patches")])
        image = self._resize(_read_image(self.cohort, self.store, row))
        if self.transform is not None:
            with fork_cpu_rng():
                torch.default_generator.manual_seed(slot_seed(0, 0, "", 0, row))
                image = self.transform(image)
        return _make_sample(self.cohort, [row], [image])


class HierarchicalDataset(Dataset[Sample]):
    """Patients as items: slides x patches x views images each, drawn and augmented by seed.

    dataset[PatientDraw(patient, epoch, occurrence, strength)] gives the images of that patient, in the order slides,
    patches, views; `PatientBatchSampler` makes the draws.  dataset[i] is the i-th patient of the split at epoch 0,
    occurrence 0, strength 1.  Slides and patches are drawn without replacement while there are any left, then again;
    ids stay true, so a patch drawn twice has one id.  Each file is read once per item and each view augmented by
    itself; the draws depend on (seed, epoch, patient's name, occurrence) and each view's augmentation on these and its
    slot.  `balance_classes` draws the classes of a slide equally often.

    Args:
        cohort: The table of patches.
        split: None takes the whole cohort.
        image_size: Side of the images; None keeps the patches' own size.
        transform: The name of a published pipeline (see `build_transform`), an `AugmentationPolicy`, or any function
            from a patch (3, h, w) in [0, 1] to an image.  A function gets the patch at its own size and sees torch's
            CPU generator seeded by the view; what it returns is resized to image_size where it has another size.
        slides: Slides per patient.
        patches: Patches per slide.
        views: Views per patch.
        seed: Of all draws.
        on_bad: "raise" lets BadPatch through.  "replace" draws another patch of the same slide, preferably one that the
            item does not hold yet, trying at most `MAX_REPLACEMENTS` per image; each file is reported once per process
            by a warning.  Where no patch of the slide can be read, BadPatch names the last file and the slide.
        store: The cohort's patch store, read in place of the files; the images are the same.

    Attributes:
        patients: The split's patients as indices in cohort.patient_names.

    Raises:
        ValueError: Counts below 1, an unknown split, pipeline or on_bad, or a store of another cohort.
        TypeError: A transform of another kind.
        IndexError: A draw asks for a patient outside the cohort or the split.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: str | None = "train",
        *,
        image_size: int | None,
        transform: str | AugmentationPolicy | Transform = "v0",
        slides: int = 2,
        patches: int = 2,
        views: int = 2,
        seed: int = 0,
        on_bad: Literal["raise", "replace"] = "raise",
        store: PatchStore | None = None,
    ) -> None:
        if min(slides, patches, views) < 1:
            raise ValueError(f"slides, patches and views must be at least 1, got {slides}, {patches} and {views}")
        if on_bad not in ("raise", "replace"):
            raise ValueError(f"on_bad must be 'raise' or 'replace', got {on_bad!r}")
        self.transform = AugmentationPolicy(transform) if isinstance(transform, str) else transform
        if isinstance(self.transform, AugmentationPolicy):
            self.transform.pipeline(image_size)  # refuses a wrong size, and says if torchvision does not load
        else:
            _check_transform(transform, "a name, an AugmentationPolicy or a function")
            build_transform("none", image_size=image_size)
        _check_store(store, cohort)
        self.cohort, self.split, self.image_size = cohort, split, image_size
        self.slides, self.patches, self.views = slides, patches, views
        self.seed, self.on_bad, self.store = seed, on_bad, store
        self._rows_of = _rows_by_patient(cohort, cohort.rows(split))
        self.patients = tuple(self._rows_of)
        self._drawn_by: np.ndarray | None = None
        self._counts = torch.zeros(_PROCESSES, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._reported: set[int] = set()

    def __repr__(self) -> str:
        names = ("split", "image_size", "transform", "slides", "patches", "views", "seed", "on_bad")
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        balanced = "" if self._drawn_by is None else ".balance_classes()"
        return f"HierarchicalDataset({len(self)} patients, {options}){balanced}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class i of the labels is class_names[i]; the same for every split of the cohort."""
        return self.cohort.class_names

    def balance_classes(self) -> HierarchicalDataset:
        """The same dataset, whose draws take the classes of a slide in turn; for labels that belong to patches.

        Of a slide with 5 tumour and 500 normal patches, tumour and normal then come equally often.  Slides and patients
        are drawn as before; for patients see `PatientBatchSampler`.

        Returns:
            A copy; this dataset stays as it is.
        """
        balanced = copy.copy(self)
        balanced._drawn_by = self.cohort.label
        return balanced

    @property
    def replaced(self) -> int:
        """How many images came from another patch because theirs could not be read, in this process and workers."""
        return int(self._counts.sum())

    def __len__(self) -> int:
        return len(self._rows_of)

    def __getitem__(self, index: int | PatientDraw) -> Sample:
        draw = self._check_draw(index)
        key = (self.seed, draw.epoch, self.cohort.patient_names[draw.patient], draw.occurrence)
        rng = np.random.default_rng(slot_seed(*key, -1))
        slides = self._rows_of[draw.patient]
        rows = draw_images(slides, slides_drawn=self.slides, patches_drawn=self.patches, rng=rng, labels=self._drawn_by)
        rows, patches = self._read(rows, rng)
        seeds = [slot_seed(*key, slot) for slot in range(len(rows) * self.views)]
        shown = [row for row in rows for _ in range(self.views)]
        return _make_sample(self.cohort, shown, self._views(draw, shown, patches, seeds))

    def _views(
        self, draw: PatientDraw, shown: Sequence[int], patches: dict[int, Tensor], seeds: Sequence[int]
    ) -> list[Tensor]:
        """One augmented image for each row in `shown` and its seed."""
        transform: Transform
        if isinstance(self.transform, AugmentationPolicy):
            pipeline = self.transform.pipeline(self.image_size, epoch=draw.epoch, strength=draw.strength)
            if self.transform.batched:
                place = {row: i for i, row in enumerate(patches)}
                return augment_images([*patches.values()], pipeline, seeds, source=[place[row] for row in shown])
            transform = pipeline
        else:
            transform = self.transform
        images = []
        with fork_cpu_rng():
            for row, seed in zip(shown, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                image = transform(patches[row])
                side = self.image_size
                images.append(image if side is None else resize_patch(image, (side, side)))
        return images

    def _check_draw(self, index: int | PatientDraw) -> PatientDraw:
        if not isinstance(index, PatientDraw):
            return PatientDraw(self.patients[_check_index(index, len(self), "patients")])
        if index.patient not in self._rows_of:
            known = self.cohort.patient_names
            who = repr(known[index.patient]) if 0 <= index.patient < len(known) else "which is not in the cohort"
            raise IndexError(f"{index} asks for patient {index.patient}, {who}: not among split {self.split!r}")
        return index

    def _read(self, rows: Sequence[int], rng: np.random.Generator) -> tuple[list[int], dict[int, Tensor]]:
        """The rows as they were read (bad ones replaced) and the patch of each."""
        patches: dict[int, Tensor] = {}
        bad: dict[int, BadPatch] = {}
        taken: list[int] = []
        for row in rows:
            for attempt, candidate in enumerate(self._candidates(row, {*rows, *taken}, rng)):
                if candidate in bad:
                    continue
                try:
                    if candidate not in patches:
                        patches[candidate] = _read_image(self.cohort, self.store, candidate)
                except BadPatch as error:
                    if self.on_bad == "raise":
                        raise
                    bad[candidate] = error
                    continue
                taken.append(candidate)
                if attempt:
                    self._report(row, bad[row], candidate)
                break
            else:
                raise self._all_bad(row, bad)
        return taken, patches

    def _candidates(self, row: int, taken: set[int], rng: np.random.Generator) -> Iterator[int]:
        """The row itself, then up to MAX_REPLACEMENTS others of its slide, those that the item does not hold first."""
        yield row
        cohort = self.cohort
        slides = self._rows_of[int(cohort.patient[row])]
        (mates,) = (rows for rows in slides if cohort.slide[rows[0]] == cohort.slide[row])
        others = [int(mate) for mate in rng.permutation(mates) if mate != row]
        yield from sorted(others, key=taken.__contains__)[:MAX_REPLACEMENTS]

    def _report(self, row: int, error: BadPatch, replacement: int) -> None:
        worker = get_worker_info()
        self._counts[0 if worker is None else (worker.id + 1) % _PROCESSES] += 1
        if row not in self._reported:
            self._reported.add(row)
            instead = self.cohort.records[replacement].path
            warnings.warn(f"{error}; using {instead} of the same slide instead", UserWarning, stacklevel=4)

    def _all_bad(self, row: int, bad: dict[int, BadPatch]) -> BadPatch:
        patient, slide = self.cohort.slide_names[int(self.cohort.slide[row])]
        mates = [other for other in bad if self.cohort.slide[other] == self.cohort.slide[row]]
        last = bad[mates[-1]]
        tried = f"none of the {len(mates)} patches tried in slide {slide!r} of patient {patient!r} can be read"
        return BadPatch(last.path, f"{last.reason}; {tried} (at most {MAX_REPLACEMENTS} others are tried)")


def _read_image(cohort: Cohort, store: PatchStore | None, row: int) -> Tensor:
    return store.read(row) if store is not None else read_patch(cohort.path(row), kind=cohort.kind)


def _make_sample(cohort: Cohort, rows: Sequence[int], images: Sequence[Tensor]) -> Sample:
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


def _rows_by_patient(cohort: Cohort, rows: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Rows of each slide of each patient, patients and slides in order of their ids."""
    rows = rows[np.argsort(cohort.slide[rows], kind="stable")]
    slides = np.split(rows, np.flatnonzero(np.diff(cohort.slide[rows])) + 1)
    groups: dict[int, list[np.ndarray]] = {}
    for slide in slides:
        groups.setdefault(int(cohort.patient[slide[0]]), []).append(slide)
    return dict(sorted(groups.items()))


def _check_store(store: PatchStore | None, cohort: Cohort) -> None:
    if store is not None:
        store.check_rows(cohort)


def _check_transform(transform: object, kinds: str) -> None:
    if not callable(transform):
        raise TypeError(f"transform must be {kinds} from a patch (3, h, w) to an image, got {transform!r}")


def _check_index(index: int, length: int, unit: str) -> int:
    """The index counted from 0, also where it was from the end; IndexError for one that is out of range."""
    number = operator.index(index)
    if not -length <= number < length:
        raise IndexError(f"index {number} is out of range for {length} {unit}")
    return number % length
