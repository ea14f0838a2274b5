"""hsat: make histopathology encoders robust, and measure honestly how robust they are.

The rooms are imported by name: hsat.attacks, hsat.losses, hsat.classifiers, hsat.data, hsat.models, hsat.training,
hsat.eval, hsat.report.  The names that most programs need are offered here as well, loaded when they are first asked
for: `import hsat` alone loads neither torchvision nor timm nor faiss nor scipy.
"""

from __future__ import annotations

import importlib
from typing import Any

from hsat.types import (
    Attack,
    AttackResult,
    Classifier,
    DecisionObjective,
    EmbeddingTable,
    FittedClassifier,
    HierarchicalBatch,
    Levels,
    Objective,
    SlideClassifier,
    ThreatModel,
)

__version__ = "0.1.0"

_ROOMS = {
    "hsat.attacks": (
        "APGD BIM DIFGSM FFGSM FGSM L2 MIFGSM NIFGSM PGD TIFGSM VMIFGSM AttackEnsemble Linf NaturalShift RandomNoise"
        " Square classification dlr feature_drift from_art from_foolbox from_torchattacks hierarchical margin"
        " match_features"
    ),
    "hsat.losses": "HiDiscLoss supcon_loss",
    "hsat.classifiers": "ABMIL DecisionModel Head KNNClassifier LinearProbe MIL MeanPooling NearestCentroid",
    "hsat.data": (
        "BadPatch Cohort HierarchicalDataset PatchDataset from_frame hierarchical_loader patch_loader"
        " read_class_folders read_csv read_folders read_opensrh read_patch slide_loader srh_to_rgb"
        " write_synthetic_cohort"
    ),
    "hsat.models": "build_encoder frozen load_checkpoint load_encoder save_encoder wrap_encoder",
    "hsat.embedding": "embed",
    "hsat.training": (
        "TrainConfig Trainer adversarial_step augmentation_strength epsilon_schedule held_out_validation"
        " paper_clean_weight"
    ),
    "hsat.eval": (
        "PAPER PatchBudget Provenance RunOptions Scoring Target evaluate_budget evaluate_classifier evaluate_slides"
        " evaluate_transfer evaluate_whitebox metrics pool"
    ),
    "hsat.robustness": "evaluate_robustness",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [  # noqa: PLE0604
    "Attack",
    "AttackResult",
    "Classifier",
    "DecisionObjective",
    "EmbeddingTable",
    "FittedClassifier",
    "HierarchicalBatch",
    "Levels",
    "Objective",
    "SlideClassifier",
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
