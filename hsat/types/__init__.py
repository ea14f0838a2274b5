"""The words every room of hsat shares: objectives, threat models, attacks, batches and embedding tables.

Only torch and numpy are imported here; every other room may import this one and nothing here imports a room.
"""

from hsat.types.batch import LEVELS, HierarchicalBatch, Levels
from hsat.types.contracts import Attack, AttackResult, Encoder, Objective, ThreatModel
from hsat.types.table import EmbeddingTable

__all__ = [
    "LEVELS",
    "Attack",
    "AttackResult",
    "EmbeddingTable",
    "Encoder",
    "HierarchicalBatch",
    "Levels",
    "Objective",
    "ThreatModel",
]
