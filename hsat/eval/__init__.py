"""Evaluation: embeddings, nearest neighbours, metrics at three levels, white-box attacks, records and figures."""

from __future__ import annotations

from hsat.classifiers import FittedKNN, KNNClassifier, ShardedKNN, fit_shards, load_knn
from hsat.distributed import row_share
from hsat.embedding import embed, gather_table
from hsat.eval.budgets.budget import evaluate_hierarchical_budget
from hsat.eval.budgets.budget_result import BudgetResult
from hsat.eval.certification.certificates import Certificates
from hsat.eval.certification.certified_curves import plot_certified_accuracy
from hsat.eval.certification.certifying import CertificateResult, certify
from hsat.eval.certification.challenge import Challenge, challenge_certificates
from hsat.eval.certification.smoothing import Smoothing
from hsat.eval.doubt.diagnosis import Diagnosis, diagnose
from hsat.eval.effects import CONVENTIONS, Convention, conventions_table
from hsat.eval.engine.cache import EmbeddingCache
from hsat.eval.engine.strongest import Casualties, MemberCount, Strongest, casualties_table, strongest_attacks
from hsat.eval.export.saving import ExportResult, save_adversarial
from hsat.eval.pooling import PooledScores, pool
from hsat.eval.published import paper_attacks
from hsat.eval.records import Record, eps_text, markdown_table, read_records, write_records
from hsat.eval.reporting.evidence import Condition, Evidence, read_evidence, write_evidence
from hsat.eval.reporting.figures import plot_accuracy_vs_eps, plot_patches
from hsat.eval.reporting.paper_tables import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown
from hsat.eval.reporting.report import write_report
from hsat.eval.reporting.run_folders import RunFolder, open_runs
from hsat.eval.rescoring import rescore
from hsat.eval.scoring import Metrics, match_classes, metrics, score_levels
from hsat.eval.statistics.bootstrap import Interval, bootstrap_intervals
from hsat.eval.statistics.paired import Difference, compare_models, differences_table, paired_difference
from hsat.eval.statistics.score_files import ScoreTable, load_scores, save_scores, score_tables
from hsat.eval.transfer.evaluation import TransferResult, evaluate_transfer
from hsat.eval.transfer.matrix import plot_transfer, transfer_table
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
    "row_share",
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
