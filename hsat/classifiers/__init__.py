"""Classifiers of embeddings: nearest neighbours of a bank, nearest class means, trained heads, and decision models."""

from hsat.classifiers.decision_model import DecisionModel
from hsat.classifiers.head import Head
from hsat.classifiers.knn import FittedKNN, KNNClassifier, load_knn
from hsat.classifiers.knn_sets import ShardedKNN, concat_tables, fit_classifiers, fit_shards, predict_scores
from hsat.classifiers.nearest_centroid import FittedNearestCentroid, NearestCentroid
from hsat.classifiers.search import Neighbours

__all__ = [
    "DecisionModel",
    "FittedKNN",
    "FittedNearestCentroid",
    "Head",
    "KNNClassifier",
    "NearestCentroid",
    "Neighbours",
    "ShardedKNN",
    "concat_tables",
    "fit_classifiers",
    "fit_shards",
    "load_knn",
    "predict_scores",
]
