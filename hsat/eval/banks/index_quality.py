"""How well an approximate index answers, for the records."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsat.eval.banks.knn import FittedKNN
from hsat.types import EmbeddingTable

_QUERIES = 256


def index_quality(knn: FittedKNN, queries: EmbeddingTable, *, seed: int) -> dict[str, Any]:
    """Recall of the k nearest rows and agreement of predictions with an exact search; {} for an exact index.

    Measured on at most 256 of the queries, drawn with the seed; an exact search answers them.  {} too where the queries
    came without embeddings, as those of a transfer do.
    """
    if knn.settings.exact or not len(queries) or queries.z.shape[1] != knn.table.z.shape[1]:
        return {}
    few = min(_QUERIES, len(queries))
    chosen = np.sort(np.random.default_rng(seed).choice(len(queries), few, replace=False))
    z = np.asarray(queries.z[chosen])
    return {"index_recall": knn.recall(z), "index_agreement": knn.agreement(z), "index_queries": few}
