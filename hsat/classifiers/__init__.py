"""Classifiers of embeddings: neighbours in a bank, class means, linear probes, trained heads, slides as bags, and
decision models.

Example:
    `KNNClassifier.fit` with two neighbours at cosine 1 and 0; their weights are exp(1 / temperature) and exp(0), scaled
    to sum to one:

    >>> import numpy as np
    >>> from hsat.types import EmbeddingTable
    >>> ids = np.arange(3)
    >>> z = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> bank = EmbeddingTable(z, label=[0, 1, 1], patch=ids, slide=ids, patient=ids, class_names=("hgg", "normal"))
    >>> knn = KNNClassifier(k=2, temperature=0.5).fit(bank)
    >>> knn.predict_proba(z[:1]).round(4)
    array([[0.8808, 0.1192]])
    >>> knn.class_names[knn.predict(z[:1])[0]]
    'hgg'
"""

from hsat.classifiers.bags import MeanPooling, SlideBag, bag_scores, bags_of, predict_slides
from hsat.classifiers.decision_model import DecisionModel
from hsat.classifiers.head import Head
from hsat.classifiers.knn import FittedKNN, KNNClassifier, load_knn
from hsat.classifiers.knn_sets import ShardedKNN, concat_tables, fit_classifiers, fit_shards, predict_scores
from hsat.classifiers.linear_probe import FittedLinearProbe, LinearProbe, load_linear_probe
from hsat.classifiers.mil import ABMIL, MIL, GatedAttention, load_mil
from hsat.classifiers.nearest_centroid import FittedNearestCentroid, NearestCentroid
from hsat.classifiers.search import Neighbours

__all__ = [
    "ABMIL",
    "MIL",
    "DecisionModel",
    "FittedKNN",
    "FittedLinearProbe",
    "FittedNearestCentroid",
    "GatedAttention",
    "Head",
    "KNNClassifier",
    "LinearProbe",
    "MeanPooling",
    "NearestCentroid",
    "Neighbours",
    "ShardedKNN",
    "SlideBag",
    "bag_scores",
    "bags_of",
    "concat_tables",
    "fit_classifiers",
    "fit_shards",
    "load_knn",
    "load_linear_probe",
    "load_mil",
    "predict_scores",
    "predict_slides",
]
