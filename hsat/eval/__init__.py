"""Evaluation: embeddings, nearest neighbours, metrics at three levels, white-box attacks, records and figures."""

from __future__ import annotations

from hsat.eval.bootstrap import Interval, bootstrap_intervals
from hsat.eval.embedding import embed
from hsat.eval.figures import plot_accuracy_vs_eps, plot_patches
from hsat.eval.knn import FittedKNN, KNNClassifier
from hsat.eval.paired import Difference, compare_models, differences_table, paired_difference
from hsat.eval.pooling import PooledScores, pool
from hsat.eval.published import paper_attacks
from hsat.eval.records import Record, eps_text, markdown_table, read_records, write_records
from hsat.eval.score_files import ScoreTable, load_scores, save_scores, score_tables
from hsat.eval.scoring import Metrics, match_classes, metrics, score_levels
from hsat.eval.whitebox import WhiteboxResult, evaluate_whitebox

__all__ = [
    "Difference",
    "FittedKNN",
    "Interval",
    "KNNClassifier",
    "Metrics",
    "PooledScores",
    "Record",
    "ScoreTable",
    "WhiteboxResult",
    "bootstrap_intervals",
    "compare_models",
    "differences_table",
    "embed",
    "eps_text",
    "evaluate_whitebox",
    "load_scores",
    "markdown_table",
    "match_classes",
    "metrics",
    "paired_difference",
    "paper_attacks",
    "plot_accuracy_vs_eps",
    "plot_patches",
    "pool",
    "read_records",
    "save_scores",
    "score_levels",
    "score_tables",
    "write_records",
]
