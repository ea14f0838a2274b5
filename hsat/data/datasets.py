"""Patches of a cohort as tensors with their ids: every patch once, or seeded hierarchical draws with augmented views.

What an item holds depends on the files, the options and the index alone: not on worker processes, their number, the
order of access, or a global generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hsat.data.arranging import as_published, fitting, position, rows_by_patient
from hsat.data.augment import Augmentation, Transform, Uncropped, build_transform
from hsat.data.batched import augmented_images
from hsat.data.cohort import Cohort
from hsat.data.on_device import DrawnPatches
from hsat.data.packed import PackedPatches
from hsat.data.readers import BadPatch, read_patch, read_stored
from hsat.data.samples import Sample, isolated, make_sample
from hsat.data.sampling import Draw, draw_images, slot_seed

Place = Literal["images", "items", "device"]

_PROCESSES = 256  # places for the replacement counts of the main process and up to 255 workers


class PatchDataset(Dataset[Sample]):
    """Every patch of a split once, in cohort order; item i is a Sample of one image.

    split=None takes the whole cohort.  image_size resizes each patch to a square (antialiased bilinear); None keeps its
    own size.  transform, if given, gets the resized patch (3, h, w) and sees torch's CPU generator seeded by the
    patch's place in the cohort.  A patch that cannot be read raises BadPatch; an evaluation never skips one in silence.
    packed: the cohort's packed patches, read in place of the files; the images are the same.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: str | None = None,
        *,
        image_size: int | None = None,
        transform: Transform | None = None,
        packed: PackedPatches | None = None,
    ) -> None:
        self.cohort, self.split, self.packed = cohort, split, fitting(packed, cohort)
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

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[position(index, len(self), "patches")])
        image = self._resize(_image(self.cohort, self.packed, row))
        if self.transform is not None:
            with isolated():
                torch.default_generator.manual_seed(slot_seed(0, 0, "", 0, row))
                image = self.transform(image)
        return make_sample(self.cohort, [row], [image])


class HierarchicalDataset(Dataset["Sample | DrawnPatches"]):
    """Patients as items: slides x patches x views images each, drawn and augmented by seed.

    dataset[Draw(patient, epoch, occurrence, strength)] gives the images of that patient, in the order slides, patches,
    views; `PatientBatchSampler` makes the Draws.  dataset[i] is the i-th patient of the split at epoch 0, occurrence 0,
    strength 1.  Slides and patches are drawn without replacement while there are any left, then again; ids stay true,
    so a patch drawn twice has one id.  Each file is read once per item and each view augmented by itself; the draws
    depend on (seed, epoch, patient's name, occurrence) and each view's augmentation on these and its slot.

    image_size: side of the images; None keeps the patches' own size.  augmentation, prob, uncropped: see
    `build_transform`.  static_epochs: in epochs below it the static pipeline takes the place of `augmentation`.
    compat="paper" repeats the published pipelines where these two are not given: uncropped="keep", and static_epochs=50
    for "v0" and "v1", whose first strength of the published training never comes to be used.
    on_bad="raise" lets BadPatch through.  on_bad="replace" draws another patch of the same slide, preferably one that
    the item does not hold yet, trying at most `max_replacements` per image; each file is reported once per process by a
    warning and `replaced` counts the replacements, those of worker processes included.  Where no patch of the slide can
    be read, BadPatch names the last file and the slide.

    packed: the cohort's packed patches, read in place of the files; the images are the same.
    augment: "images" runs torchvision's operations on one view after another.  "items" runs hsat's own on the views of
    an item: the same draws and images up to float rounding, in a third of the time.  "device" leaves the views to
    `hierarchical_loader`, which augments whole batches on its device; items are then `DrawnPatches`.

    `patients` lists the split's patients as indices in cohort.patient_names.

    Raises ValueError for counts below 1, an unknown split, augmentation or on_bad; IndexError for a patient outside the
    cohort or the split.
    """

    def __init__(  # noqa: PLR0913
        self,
        cohort: Cohort,
        split: str | None = "train",
        *,
        image_size: int | None,
        slides: int = 2,
        patches: int = 2,
        views: int = 2,
        augmentation: str = "v0",
        prob: float = 0.5,
        uncropped: Uncropped | None = None,
        static_epochs: int | None = None,
        compat: Literal["paper"] | None = None,
        seed: int = 0,
        on_bad: Literal["raise", "replace"] = "raise",
        max_replacements: int = 10,
        packed: PackedPatches | None = None,
        augment: Place = "images",
    ) -> None:
        if min(slides, patches, views) < 1:
            raise ValueError(f"slides, patches and views must be at least 1, got {slides}, {patches} and {views}")
        if on_bad not in ("raise", "replace"):
            raise ValueError(f"on_bad must be 'raise' or 'replace', got {on_bad!r}")
        if max_replacements < 1:
            raise ValueError(f"max_replacements must be at least 1, got {max_replacements}; or use on_bad='raise'")
        if augment not in ("images", "items", "device"):
            raise ValueError(f"augment must be 'images', 'items' or 'device', got {augment!r}")
        self.uncropped, self.static_epochs = as_published(compat, augmentation, uncropped, static_epochs)
        build_transform(augmentation, image_size=image_size, prob=prob, uncropped=self.uncropped)
        self.cohort, self.split, self.image_size = cohort, split, image_size
        self.slides, self.patches, self.views = slides, patches, views
        self.augmentation, self.prob, self.seed = augmentation, prob, seed
        self.on_bad, self.max_replacements = on_bad, max_replacements
        self.packed, self.augment = fitting(packed, cohort), augment
        self._rows_of = rows_by_patient(cohort, cohort.rows(split))
        self.patients = tuple(self._rows_of)
        self._counts = torch.zeros(_PROCESSES, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._reported: set[int] = set()

    def __repr__(self) -> str:
        drawn = ("slides", "patches", "views", "augmentation", "prob", "uncropped", "static_epochs")
        names = ("split", "image_size", *drawn, "seed", "on_bad", "max_replacements", "augment")
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"HierarchicalDataset({len(self)} patients, {options})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class i of the labels is class_names[i]; the same for every split of the cohort."""
        return self.cohort.class_names

    @property
    def replaced(self) -> int:
        """How many images came from another patch because theirs could not be read, in this process and workers."""
        return int(self._counts.sum())

    def __len__(self) -> int:
        return len(self._rows_of)

    def __getitem__(self, index: int | Draw) -> Sample | DrawnPatches:
        draw = self._draw(index)
        name = self.cohort.patient_names[draw.patient]
        key = (self.seed, draw.epoch, name, draw.occurrence)
        rng = np.random.default_rng(slot_seed(*key, -1))
        slides = self._rows_of[draw.patient]
        rows = draw_images(slides, slides_wanted=self.slides, patches_wanted=self.patches, rng=rng)
        rows, patches = self._read(rows, rng)
        name_now = "static" if draw.epoch < self.static_epochs else self.augmentation
        transform = _pipeline(name_now, self.image_size, draw.strength, self.prob, self.uncropped)
        seeds = [slot_seed(*key, slot) for slot in range(len(rows) * self.views)]
        shown = [row for row in rows for _ in range(self.views)]
        if self.augment == "device":
            return DrawnPatches.of(self.cohort, shown, patches, transform, seeds)
        if self.augment == "items":
            place = {row: i for i, row in enumerate(patches)}
            of = [place[row] for row in shown]
            return make_sample(self.cohort, shown, augmented_images([*patches.values()], transform, seeds, source=of))
        images = []
        with isolated():
            for row, seed in zip(shown, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                images.append(transform(patches[row]))
        return make_sample(self.cohort, shown, images)

    def _draw(self, index: int | Draw) -> Draw:
        if not isinstance(index, Draw):
            return Draw(self.patients[position(index, len(self), "patients")])
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
            for tried, candidate in enumerate(self._candidates(row, {*rows, *taken}, rng)):
                if candidate in bad:
                    continue
                try:
                    if candidate not in patches:
                        patches[candidate] = self._one(candidate)
                except BadPatch as error:
                    if self.on_bad == "raise":
                        raise
                    bad[candidate] = error
                    continue
                taken.append(candidate)
                if tried:
                    self._report(row, bad[row], candidate)
                break
            else:
                raise self._nothing_left(row, bad)
        return taken, patches

    def _one(self, row: int) -> Tensor:
        """The patch as an image, or as it is stored where it is augmented later."""
        if self.augment != "device":
            return _image(self.cohort, self.packed, row)
        if self.packed is not None:
            return torch.from_numpy(self.packed.stored(row))
        return torch.from_numpy(read_stored(self.cohort.path(row), kind=self.cohort.kind))

    def _candidates(self, row: int, taken: set[int], rng: np.random.Generator) -> Iterator[int]:
        """The row itself, then up to max_replacements others of its slide, those that the item does not hold first."""
        yield row
        cohort = self.cohort
        slides = self._rows_of[int(cohort.patient[row])]
        (mates,) = (rows for rows in slides if cohort.slide[rows[0]] == cohort.slide[row])
        others = [int(mate) for mate in rng.permutation(mates) if mate != row]
        yield from sorted(others, key=taken.__contains__)[: self.max_replacements]

    def _report(self, row: int, error: BadPatch, replacement: int) -> None:
        worker = get_worker_info()
        self._counts[0 if worker is None else (worker.id + 1) % _PROCESSES] += 1
        if row not in self._reported:
            self._reported.add(row)
            instead = self.cohort.records[replacement].path
            warnings.warn(f"{error}; using {instead} of the same slide instead", UserWarning, stacklevel=4)

    def _nothing_left(self, row: int, bad: dict[int, BadPatch]) -> BadPatch:
        patient, slide = self.cohort.slide_names[int(self.cohort.slide[row])]
        mates = [other for other in bad if self.cohort.slide[other] == self.cohort.slide[row]]
        last = bad[mates[-1]]
        tried = f"none of the {len(mates)} patches tried in slide {slide!r} of patient {patient!r} can be read"
        return BadPatch(last.path, f"{last.reason}; {tried} (max_replacements={self.max_replacements})")


def _image(cohort: Cohort, packed: PackedPatches | None, row: int) -> Tensor:
    return packed.read(row) if packed is not None else read_patch(cohort.path(row), kind=cohort.kind)


@lru_cache(maxsize=16)
def _pipeline(name: str, image_size: int | None, strength: float, prob: float, uncropped: Uncropped) -> Augmentation:
    return build_transform(name, image_size=image_size, strength=strength, prob=prob, uncropped=uncropped)
