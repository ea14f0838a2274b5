"""Evaluation: embeddings, nearest neighbours, metrics at three levels, white-box attacks, records and figures."""

from __future__ import annotations

from hsat.classifiers import KNNClassifier, ShardedKNN, fit_shards, load_knn
from hsat.embedding import embed, gather_table
from hsat.eval.budget import BudgetResult, PatchBudget, evaluate_budget
from hsat.eval.certificate_check import CertificateCheck, CheckOptions, check_certificates
from hsat.eval.certificates import Certificates
from hsat.eval.certified_curves import plot_certified_accuracy
from hsat.eval.certify import CertificateResult, CertifyOptions, certify
from hsat.eval.diagnostics import Diagnosis, diagnose
from hsat.eval.effects import CONVENTIONS, Convention, conventions_table
from hsat.eval.export import ExportOptions, ExportResult, save_adversarial
from hsat.eval.options import PAPER, Provenance, RunOptions, Scoring, Target
from hsat.eval.outcomes import EnsembleOutcome
from hsat.eval.paper_attacks import add_noise_baselines, ensemble_attacks, paper_attacks
from hsat.eval.pooling import PooledScores, pool
from hsat.eval.records import Record, read_records, write_records
from hsat.eval.reporting.evidence import Condition, Evidence, read_evidence, write_evidence
from hsat.eval.reporting.figures import plot_accuracy_vs_eps, plot_patches
from hsat.eval.reporting.paper_tables import PaperRow, PaperTable, paper_csv, paper_latex, paper_lines, paper_markdown
from hsat.eval.reporting.report import write_report
from hsat.eval.reporting.run_folders import RunFolder, open_runs
from hsat.eval.rescoring import rescore
from hsat.eval.scoring import Metrics, match_classes, metrics, score_levels
from hsat.eval.smoothing import Smoothing
from hsat.eval.statistics.bootstrap import Interval, bootstrap_intervals
from hsat.eval.statistics.paired import Difference, compare_models, differences_table, paired_difference
from hsat.eval.statistics.score_files import ScoreTable, load_scores, save_scores, score_tables
from hsat.eval.store import EmbeddingCache
from hsat.eval.tables import markdown_table
from hsat.eval.transfer import TransferResult, evaluate_transfer
from hsat.eval.transfer_table import plot_transfer, transfer_table
from hsat.eval.whitebox import WhiteboxResult, evaluate_whitebox

__all__ = [
    "CONVENTIONS",
    "PAPER",
    "BudgetResult",
    "CertificateCheck",
    "CertificateResult",
    "Certificates",
    "CertifyOptions",
    "CheckOptions",
    "Condition",
    "Convention",
    "Diagnosis",
    "Difference",
    "EmbeddingCache",
    "EnsembleOutcome",
    "Evidence",
    "ExportOptions",
    "ExportResult",
    "Interval",
    "KNNClassifier",
    "Metrics",
    "PaperRow",
    "PaperTable",
    "PatchBudget",
    "PooledScores",
    "Provenance",
    "Record",
    "RunFolder",
    "RunOptions",
    "ScoreTable",
    "Scoring",
    "ShardedKNN",
    "Smoothing",
    "Target",
    "TransferResult",
    "WhiteboxResult",
    "add_noise_baselines",
    "bootstrap_intervals",
    "certify",
    "check_certificates",
    "compare_models",
    "conventions_table",
    "diagnose",
    "differences_table",
    "embed",
    "ensemble_attacks",
    "evaluate_budget",
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
    "save_adversarial",
    "save_scores",
    "score_levels",
    "score_tables",
    "transfer_table",
    "write_evidence",
    "write_records",
    "write_report",
]
