"""Evaluation: embeddings, nearest neighbours, metrics at three levels, white-box attacks, records and figures."""

from __future__ import annotations

from hsat.eval.bootstrap import Interval, bootstrap_intervals
from hsat.eval.budget import evaluate_hierarchical_budget
from hsat.eval.budget_result import BudgetResult
from hsat.eval.cache import EmbeddingCache
from hsat.eval.certificates import Certificates
from hsat.eval.certified_curves import plot_certified_accuracy
from hsat.eval.certifying import CertificateResult, certify
from hsat.eval.challenge import Challenge, challenge_certificates
from hsat.eval.diagnosis import Diagnosis, diagnose
from hsat.eval.effects import CONVENTIONS, Convention, conventions_table
from hsat.eval.embedding import embed
from hsat.eval.evidence import Condition, Evidence, read_evidence, write_evidence
from hsat.eval.export import ExportResult, save_adversarial
from hsat.eval.figures import plot_accuracy_vs_eps, plot_patches
from hsat.eval.gathering import gather_table, own_rows
from hsat.eval.knn import FittedKNN, KNNClassifier
from hsat.eval.knn_files import load_knn
from hsat.eval.paired import Difference, compare_models, differences_table, paired_difference
from hsat.eval.paper_tables import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown
from hsat.eval.pooling import PooledScores, pool
from hsat.eval.published import paper_attacks
from hsat.eval.records import Record, eps_text, markdown_table, read_records, write_records
from hsat.eval.report import write_report
from hsat.eval.rescoring import rescore
from hsat.eval.run_folders import RunFolder, open_runs
from hsat.eval.score_files import ScoreTable, load_scores, save_scores, score_tables
from hsat.eval.scoring import Metrics, match_classes, metrics, score_levels
from hsat.eval.sharded import ShardedKNN, fit_shards
from hsat.eval.smoothing import Smoothing
from hsat.eval.strongest import Casualties, MemberCount, Strongest, casualties_table, strongest_attacks
from hsat.eval.transfer import TransferResult, evaluate_transfer
from hsat.eval.transfer_report import plot_transfer, transfer_table
from hsat.eval.whitebox import WhiteboxResult, evaluate_whitebox

__all__ = [
    "CONVENTIONS",
    "BudgetResult",
    "Casualties",
    "CertificateResult",
    "Certificates",
    "Challenge",
    "Condition",
    "Convention",
    "Diagnosis",
    "Difference",
    "EmbeddingCache",
    "Evidence",
    "ExportResult",
    "FittedKNN",
    "Interval",
    "KNNClassifier",
    "MemberCount",
    "Metrics",
    "PaperRow",
    "PaperTable",
    "PooledScores",
    "Record",
    "RunFolder",
    "ScoreTable",
    "ShardedKNN",
    "Smoothing",
    "Strongest",
    "TransferResult",
    "WhiteboxResult",
    "bootstrap_intervals",
    "casualties_table",
    "certify",
    "challenge_certificates",
    "compare_models",
    "conventions_table",
    "diagnose",
    "differences_table",
    "embed",
    "eps_text",
    "evaluate_hierarchical_budget",
    "evaluate_transfer",
    "evaluate_whitebox",
    "fit_shards",
    "gather_table",
    "load_knn",
    "load_scores",
    "markdown_table",
    "match_classes",
    "metrics",
    "open_runs",
    "own_rows",
    "paired_difference",
    "paper_attacks",
    "paper_csv",
    "paper_latex",
    "paper_lines",
    "paper_markdown",
    "plot_accuracy_vs_eps",
    "plot_certified_accuracy",
    "plot_patches",
    "plot_transfer",
    "pool",
    "read_evidence",
    "read_records",
    "rescore",
    "save_adversarial",
    "save_scores",
    "score_levels",
    "score_tables",
    "strongest_attacks",
    "transfer_table",
    "write_evidence",
    "write_records",
    "write_report",
]
