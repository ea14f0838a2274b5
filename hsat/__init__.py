"""hsat: make histopathology encoders robust, and measure honestly how robust they are.

The rooms are imported by name: hsat.attacks, hsat.losses, hsat.classifiers, hsat.data, hsat.models, hsat.training,
hsat.eval, hsat.report.  The public names of all but the last are offered here as well, loaded when they are first asked
for: `import hsat` alone loads neither torchvision nor timm nor faiss nor scipy.
"""

from __future__ import annotations

import importlib
from typing import Any

from hsat.types import (
    Attack,
    AttackResult,
    EmbeddingFunction,
    EmbeddingTable,
    HierarchicalBatch,
    Levels,
    Objective,
    ThreatModel,
)

__version__ = "0.1.0"

_ROOMS = {
    "hsat.attacks": (
        "BIM FFGSM FGSM L2 MIFGSM PGD Linf RandomNoise classification feature_drift hierarchical objective_from"
        " choose_guide_images match_features aggregate_margin worst_case"
        " APGD DIFGSM NIFGSM Square TIFGSM VMIFGSM dlr margin"
    ),
    "hsat.losses": "HiDiscLoss HiDiscTerms supcon_loss",
    "hsat.classifiers": "DecisionModel Head KNNClassifier NearestCentroid",
    "hsat.data": (
        "AugmentationPolicy BadPatch Cohort HierarchicalDataset PatchDataset PatchStore PatientBatchSampler"
        " build_transform collate hierarchical_loader patch_loader read_csv read_folders read_opensrh read_patch"
        " srh_to_rgb write_patch_store write_synthetic_cohort"
    ),
    "hsat.models": "build_encoder frozen load_checkpoint wrap_encoder",
    "hsat.training": ("adversarial_step augmentation_strength cosine_with_warmup epsilon_schedule paper_clean_weight"),
    "hsat.eval": "embed evaluate_transfer evaluate_whitebox metrics pool",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [  # noqa: PLE0604
    "Attack",
    "AttackResult",
    "EmbeddingTable",
    "EmbeddingFunction",
    "HierarchicalBatch",
    "Levels",
    "Objective",
    "ThreatModel",
    "__version__",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hsat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
