"""Training batches of an SRH cohort: hsat against the published recipe; and libraries for augmentation.

The recipe is written out below: one process, tifffile, each image read transformed once for nothing and then once per
view by torchvision's operations, one image after another.  Variants take turns, and ratios are taken within a turn, so
that a machine whose speed drifts does not decide; medians over turns count.  Processor time of the main process stands
beside that of the clock; that of living workers is not in it.  The main process has the threads that torch gives it, a
worker has one.  kornia is measured where it is installed.

    OMP_NUM_THREADS=1 python benchmarks/data_speed.py --out benchmarks/results/data_speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor

from hsat.data import (
    AugmentationPolicy,
    Cohort,
    HierarchicalDataset,
    PatchStore,
    PatientBatchSampler,
    augment_batch,
    build_transform,
    hierarchical_loader,
    read_opensrh,
    write_patch_store,
)
from hsat.data.augment import fork_cpu_rng

SIDE, SLIDES, PATCHES, VIEWS = 300, 2, 2, 2
AIM = 4.0
NAMES = ("hsat", "torch", "torchvision", "kornia", "numpy")
BATCHES, ALONE, BEST = "batches of training images", "augmentation alone", "packed, items, 2 workers"


def write_cohort(root: Path, patients: int) -> Cohort:
    """An OpenSRH folder of smooth images with noise, 300 x 300, two slides of four patches per patient."""
    rng = np.random.default_rng(0)
    index, names = {}, [f"NIO_{i:03d}" for i in range(patients)]
    for i, name in enumerate(names):
        slides = {}
        for slide in ("1", "2"):
            folder = f"studies/{name}/{slide}/patches"
            (root / folder).mkdir(parents=True)
            paths = [f"{folder}/{name}-{slide}-{k}.tif" for k in range(4)]
            for path in paths:
                coarse = torch.from_numpy(rng.random((1, 2, 12, 12), dtype=np.float32))
                smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0].numpy()
                counts = 2000 + 16000 * smooth + rng.normal(0, 800, (2, SIDE, SIDE))
                tifffile.imwrite(root / path, counts.clip(0, 65535).astype(np.uint16))
            kinds = {"tumor_patches": paths, "normal_patches": [], "nondiagnostic_patches": []}
            slides[slide] = {"slide_id": f"{name}-{slide}", **kinds}
        index[name] = {"patient_id": name, "class": ("hgg", "lgg")[i % 2], "slides": slides}
    (root / "meta").mkdir()
    (root / "meta/opensrh.json").write_text(json.dumps(index))
    (root / "meta/train_val_split.json").write_text(json.dumps({"train": names[:-2], "val": names[-2:]}))
    return read_opensrh(root)


def published_read(path: Path) -> Tensor:
    """Two planes to three channels in [0, 1]."""
    raw = torch.from_numpy(tifffile.imread(path).astype(np.float32)) / 65536
    return torch.stack([raw[1] - raw[0] + 5000 / 65536, raw[0], raw[1]]).clamp(0, 1)


def published_epoch(cohort: Cohort, batch_patients: int, passes_for_nothing: int) -> Callable[[], int]:
    """One epoch of the recipe; returns the number of images.  passes_for_nothing: transforms whose result is lost."""
    rows = cohort.rows("train")
    patients = sorted({int(p) for p in cohort.patient[rows]})
    transform = build_transform("v0", image_size=SIDE)

    def run() -> int:
        seen = 0
        order = np.random.permutation(patients)
        for first in range(0, len(order), batch_patients):
            images = []
            for patient in order[first : first + batch_patients]:
                for slide in np.unique(cohort.slide[rows[cohort.patient[rows] == patient]]):
                    for row in np.random.permutation(rows[cohort.slide[rows] == slide])[:PATCHES]:
                        image = published_read(cohort.path(int(row)))
                        for _ in range(passes_for_nothing):
                            transform(image)
                        images += [transform(image) for _ in range(VIEWS)]
            seen += len(torch.stack(images))
        return seen

    return run


def hsat_epoch(
    cohort: Cohort, batch_patients: int, workers: int, *, store: PatchStore | None = None, batched: bool = False
) -> Callable[[], int]:
    """One epoch through hierarchical_loader; worker processes stay alive between calls."""
    policy = AugmentationPolicy("v0", batched=batched)
    dataset = HierarchicalDataset(
        cohort, image_size=SIDE, transform=policy, slides=SLIDES, patches=PATCHES, views=VIEWS, store=store
    )
    sampler = PatientBatchSampler(cohort, "train", batch_patients=batch_patients)
    loader = hierarchical_loader(dataset, sampler, workers=workers)
    epoch = iter(range(10**6))

    def run() -> int:
        sampler.set_epoch(next(epoch))
        return sum(len(batch.images) for batch in loader)

    return run


def spent() -> float:
    """Processor seconds of this process, and of its children that have ended."""
    return sum(
        r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def compare(variants: dict[str, Callable[[], int]], turns: int) -> dict[str, object]:
    """Milliseconds per image of each variant and, for all but the first, the ratio first / variant of each turn."""
    for run in variants.values():
        run()  # warm-up: imports, files into the page cache, workers started
    clock: dict[str, list[float]] = {name: [] for name in variants}
    own: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns):
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            begin, cpu = time.perf_counter(), spent()
            images = variants[name]()
            clock[name].append(1000 * (time.perf_counter() - begin) / images)
            own[name].append(1000 * (spent() - cpu) / images)
    first, *others = variants
    return {
        "milliseconds per image": {name: spread(values) for name, values in clock.items()},
        "processor milliseconds per image, without workers": {name: spread(values) for name, values in own.items()},
        "times faster": {
            name: spread([a / b for a, b in zip(clock[first], clock[name], strict=True)]) for name in others
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "turns": len(values)}


def libraries(images: int) -> dict[str, Callable[[], int]]:
    """v0 at strength 1 on patches in memory: torchvision per image (v1), its v2, hsat batched, kornia where it is."""
    x = torch.rand(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    pipeline = build_transform("v0", image_size=SIDE)
    second = v2_pipeline()
    found: dict[str, Callable[[], int]] = {
        "torchvision.transforms, image by image": lambda: len([pipeline(image) for image in x]),
        "hsat.data.augment_batch": lambda: len(augment_batch(list(x), pipeline, range(images))),
        "torchvision.transforms.v2, image by image": lambda: len([second(image) for image in x]),
    }
    try:
        korn = kornia_pipeline()
    except ImportError:
        return found
    return found | {"kornia, whole batch": lambda: len(korn(x))}


def v2_pipeline() -> Callable[[Tensor], Tensor]:
    """The same operations in torchvision's second interface."""
    from torchvision.transforms import v2

    from hsat.data.augment import GaussianNoise

    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomVerticalFlip(0.5),
            v2.RandomApply([v2.Lambda(GaussianNoise(0.01, 0.1))], 0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.5),
            v2.RandomAutocontrast(0.5),
            v2.RandomSolarize(0.2, 0.5),
            v2.RandomAdjustSharpness(2.0, 0.5),
            v2.RandomApply([v2.GaussianBlur(5, (1.0, 1.0))], 0.5),
            v2.RandomErasing(0.5),
            v2.RandomApply([v2.RandomAffine(10.0, translate=(0.1, 0.3))], 0.5),
            v2.RandomApply([v2.RandomResizedCrop(SIDE, (0.08, 1.0))], 0.5),
        ]
    )


def kornia_pipeline() -> Callable[[Tensor], Tensor]:
    """The nearest that kornia has, parameters per image; it has no autocontrast of that form, which is left out."""
    import kornia.augmentation as ka

    return ka.AugmentationSequential(
        ka.RandomHorizontalFlip(p=0.5),
        ka.RandomVerticalFlip(p=0.5),
        ka.RandomGaussianNoise(std=0.05, p=0.5),
        ka.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.5),
        ka.RandomSolarize(thresholds=(0.2, 0.2), additions=(0.0, 0.0), p=0.5),
        ka.RandomSharpness(2.0, p=0.5),
        ka.RandomGaussianBlur((5, 5), (1.0, 1.0), p=0.5),
        ka.RandomErasing(p=0.5),
        ka.RandomAffine(10.0, translate=(0.1, 0.3), p=0.5),
        ka.RandomResizedCrop((SIDE, SIDE), (0.08, 1.0), p=0.5),
    )


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]], title: str) -> list[str]:
    """A measurement as lines of markdown."""
    found = results[title]
    lines = [f"## {title.capitalize()}", "", "| variant | ms per image (min, max) | times faster (min, max) |"]
    lines.append("| --- | --- | --- |")
    for name, time_ in found["milliseconds per image"].items():
        cell = f"{time_['median']:.1f} ({time_['min']:.1f}, {time_['max']:.1f})"
        ratio = found["times faster"].get(name)
        faster = f"{ratio['median']:.2f} ({ratio['min']:.2f}, {ratio['max']:.2f})" if ratio else "1, by definition"
        lines.append(f"| {name} | {cell} | {faster} |")
    return [*lines, ""]


def cases(cohort: Cohort, batch: int, folder: Path) -> dict[str, Callable[[], int]]:
    """The recipe, then what hsat has, in steps."""
    store = write_patch_store(cohort, folder)
    return {
        "published recipe": published_epoch(cohort, batch, 1),
        "published recipe without the transform for nothing": published_epoch(cohort, batch, 0),
        "packed, per image, 2 workers": hsat_epoch(cohort, batch, 2, store=store),
        "files, items, no workers": hsat_epoch(cohort, batch, 0, batched=True),
        "packed, items, no workers": hsat_epoch(cohort, batch, 0, batched=True, store=store),
        BEST: hsat_epoch(cohort, batch, 2, batched=True, store=store),
    }


def main() -> None:
    """Write a cohort, run everything, print the tables, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2, help="patients per batch")
    parser.add_argument("--out", type=Path, help="the record as .json; the tables go beside it as .md")
    options = parser.parse_args()
    about = {
        "versions": {name: version(name) for name in NAMES if find_spec(name)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at the start": os.getloadavg(),
        "images": f"{SIDE} x {SIDE}, v0 at strength 1, {SLIDES} x {PATCHES} x {VIEWS} per patient",
        "options": {name: getattr(options, name) for name in ("turns", "patients", "batch")},
    }
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder, fork_cpu_rng():
        torch.manual_seed(0)
        cohort = write_cohort(Path(folder, "cohort"), options.patients)
        results[BATCHES] = compare(cases(cohort, options.batch, Path(folder, "packed")), options.turns)
        results[ALONE] = compare(libraries(12), options.turns)
    ratio = results[BATCHES]["times faster"][BEST]["median"]
    verdict = f"Aim {AIM}x for '{BEST}': {'reached' if ratio >= AIM else 'NOT reached'} ({ratio:.2f}x)."
    about["load at the end"] = os.getloadavg()
    text = "\n".join(["# Data at speed", "", str(about), "", *table(results, BATCHES), *table(results, ALONE), verdict])
    text += "\n"
    sys.stdout.write(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text)
        record = {"about": about, "results": results | {"aim": AIM, "reached": ratio >= AIM}}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
