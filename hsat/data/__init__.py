"""Patients, slides and patches: cohorts, readers, augmentation, seeded sampling, datasets and batches.

Names are loaded when first used, so that a cohort can be read without torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsat.data.augment import build_transform
    from hsat.data.batched import augment_batch
    from hsat.data.batching import collate, hierarchical_loader, patch_loader
    from hsat.data.cohort import Cohort
    from hsat.data.datasets import HierarchicalDataset, PatchDataset
    from hsat.data.packed import PackedPatches
    from hsat.data.packing import pack_cohort
    from hsat.data.readers import BadPatch, read_patch
    from hsat.data.samples import Sample
    from hsat.data.sampling import Draw, PatientBatchSampler
    from hsat.data.srh import srh_to_rgb
    from hsat.data.synthetic import write_synthetic_cohort
    from hsat.types import HierarchicalBatch

__all__ = [
    "BadPatch",
    "Cohort",
    "Draw",
    "HierarchicalBatch",
    "HierarchicalDataset",
    "PackedPatches",
    "PatchDataset",
    "PatientBatchSampler",
    "Sample",
    "augment_batch",
    "build_transform",
    "collate",
    "hierarchical_loader",
    "pack_cohort",
    "patch_loader",
    "read_patch",
    "srh_to_rgb",
    "write_synthetic_cohort",
]

_MODULE_OF = {
    "BadPatch": "hsat.data.readers",
    "Cohort": "hsat.data.cohort",
    "Draw": "hsat.data.sampling",
    "HierarchicalBatch": "hsat.types",
    "HierarchicalDataset": "hsat.data.datasets",
    "PackedPatches": "hsat.data.packed",
    "PatchDataset": "hsat.data.datasets",
    "PatientBatchSampler": "hsat.data.sampling",
    "Sample": "hsat.data.samples",
    "augment_batch": "hsat.data.batched",
    "build_transform": "hsat.data.augment",
    "collate": "hsat.data.batching",
    "hierarchical_loader": "hsat.data.batching",
    "pack_cohort": "hsat.data.packing",
    "patch_loader": "hsat.data.batching",
    "read_patch": "hsat.data.readers",
    "srh_to_rgb": "hsat.data.srh",
    "write_synthetic_cohort": "hsat.data.synthetic",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
