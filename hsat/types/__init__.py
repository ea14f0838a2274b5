"""The words every room of hsat shares: objectives, threat models, attacks, batches and embedding tables.

Only torch and numpy are imported here; every other room may import this one and nothing here imports a room.
"""

from hsat.types.batch import LEVELS, HierarchicalBatch, Levels
from hsat.types.protocols import (
    Attack,
    AttackResult,
    Classifier,
    DecisionObjective,
    EmbeddingFunction,
    FittedClassifier,
    MemberStats,
    Objective,
    SuccessTest,
    ThreatModel,
)
from hsat.types.row_checks import align_labels
from hsat.types.slides import SlideClassifier
from hsat.types.table import GROUP_LABELS, EmbeddingTable

__all__ = [
    "GROUP_LABELS",
    "LEVELS",
    "Attack",
    "AttackResult",
    "Classifier",
    "DecisionObjective",
    "EmbeddingFunction",
    "EmbeddingTable",
    "FittedClassifier",
    "HierarchicalBatch",
    "Levels",
    "MemberStats",
    "Objective",
    "SlideClassifier",
    "SuccessTest",
    "ThreatModel",
    "align_labels",
]
